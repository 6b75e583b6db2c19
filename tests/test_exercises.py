"""Every check accepts a right answer and tells each wrong one its own hint."""

import pytest
import torch
import torch.nn.functional as F

from kdlib import exercises

CHAPTERS = ["00", "01", "02", "03"]
ALL = [e for chapter in CHAPTERS for e in exercises.exercises(chapter).values()]
BANK = [(e, wrong, hint) for e in ALL for wrong, hint in e.wrong]


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.key)
def test_the_right_answer_passes(exercise):
    assert exercises.verdict(exercise, exercise.right).startswith("✓")


@pytest.mark.parametrize("exercise, wrong, hint", BANK, ids=[f"{e.key}-{i}" for i, (e, _, _) in enumerate(BANK)])
def test_a_wrong_answer_gets_its_hint(exercise, wrong, hint):
    said = exercises.verdict(exercise, wrong)
    assert said.startswith("✗") and hint in said, said


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.key)
def test_an_unfinished_stub_waits(exercise, capsys):
    def stub(*_):
        raise NotImplementedError

    for unfinished in (stub, ..., None):
        if callable(unfinished) and not callable(exercise.right):
            continue
        exercises.check(exercise.key, unfinished)
        assert "waits for your answer" in capsys.readouterr().out


def test_every_exercise_has_a_bank_and_a_size():
    for exercise in ALL:
        assert len(exercise.wrong) >= 3 and 1 <= exercise.difficulty <= 3 and 1 <= exercise.minutes <= 30, exercise.key


def test_an_unknown_exercise_lists_what_there_is():
    with pytest.raises(ValueError, match="00.1"):
        exercises.check("00.99", 1)


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.key)
def test_different_mistakes_get_different_hints(exercise):
    meant: dict[str, str] = {}
    for wrong, hint in exercise.wrong:
        assert meant.setdefault(exercises.verdict(exercise, wrong), hint) == hint


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.key)
def test_a_check_leaves_the_global_random_state_alone(exercise):
    before = torch.get_rng_state()
    for answer in (exercise.right, exercise.wrong[0][0]):
        exercises.verdict(exercise, answer)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_mistakes_at_once_are_both_named():
    kd = exercises.exercises("00")["00.1"]
    said = exercises.verdict(
        kd, lambda s, z, t: F.kl_div((z / t).log_softmax(-1), (s / t).softmax(-1), reduction="sum")
    )
    assert "swapped" in said and "T² is missing" in said and "sum over the examples" in said


def test_an_answer_that_crashes_is_told_its_error():
    assert "ZeroDivisionError" in exercises.verdict(exercises.exercises("00")["00.1"], lambda s, z, t: 1 / 0)
