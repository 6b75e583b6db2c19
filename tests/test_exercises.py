"""Every check accepts a right answer and tells each wrong one its own hint."""

import pytest

from kdlib import exercises

CHAPTERS = ["00", "01"]
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
