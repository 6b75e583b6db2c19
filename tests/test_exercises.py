"""Every check accepts what is right and tells each mistake of its bank its own hint."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kdlib import exercises

CHAPTERS = ["00", "01", "02", "03", "04", "05", "06"]
ALL = {key: exercise for chapter in CHAPTERS for key, exercise in exercises.exercises(chapter).items()}
BANK = [(key, hint) for key, exercise in ALL.items() for hint in exercise.mistakes]
every_exercise = pytest.mark.parametrize("key", ALL)


def told(key, answer):
    return ALL[key].verdict(answer)


@every_exercise
def test_the_right_answer_passes(key):
    for answer in (ALL[key].right, *ALL[key].alternatives):
        assert told(key, answer) == f"✓ {ALL[key].praise}"


@pytest.mark.parametrize("key, hint", BANK, ids=[f"{key}-{n}" for n, (key, _) in enumerate(BANK)])
def test_a_mistake_gets_its_own_hint(key, hint):
    assert told(key, ALL[key].mistakes[hint]) == f"✗ {hint}"


@every_exercise
def test_an_unfinished_stub_waits(key, capsys):
    def stub(*_): ...

    def documented(*_):
        """What is asked for."""
        pass

    def raising(*_):
        raise NotImplementedError

    for unfinished in (stub, documented, raising) if callable(ALL[key].right) else (..., None):
        exercises.check(key, unfinished)
        assert capsys.readouterr().out == f"… {key}: {ALL[key].title} waits for your answer\n"


@every_exercise
def test_an_exercise_has_a_bank_and_a_size(key):
    exercise = ALL[key]
    assert len(exercise.mistakes) >= 5 and 1 <= exercise.difficulty <= 3 and 1 <= exercise.minutes <= 30


@every_exercise
def test_a_check_leaves_the_global_random_state_alone(key):
    before = torch.get_rng_state()
    for answer in (ALL[key].right, next(iter(ALL[key].mistakes.values()))):
        told(key, answer)
    assert torch.equal(torch.get_rng_state(), before)


@every_exercise
def test_a_forgotten_return_is_told(key):
    if callable(ALL[key].right):
        assert "return forgotten" in told(key, lambda *case: print(end="") or (case and None))
        assert "the function itself" in told(key, 1.0)


def test_an_unknown_exercise_lists_what_there_is():
    with pytest.raises(ValueError, match="00.1"):
        exercises.check("00.99", 1)
    with pytest.raises(ValueError, match="chapter '99' has no exercises"):
        exercises.check("99.1", 1)


def test_an_answer_that_crashes_is_told_its_error():
    assert "ZeroDivisionError" in told("00.1", lambda s, z, t: 1 / 0)


def test_an_answer_of_another_shape_or_value_is_shown_beside_the_right_one():
    assert told("00.1", lambda s, z, t: torch.tensor(1.0)).startswith("✗ ")
    assert "your answer is 1, it should be 28" not in told("02.1", lambda b: 1.0)
    assert "on case 1 of 3 your answer is 1, it should be 0.2787" in told("02.1", lambda b: 1.0)


# --- answers beside the banks: what readers wrote ---


def kl(s, z, t, how="batchmean"):
    return F.kl_div((s / t).log_softmax(-1), (z / t).softmax(-1), reduction=how)


def in_place(s, z, t):
    s /= t
    return t**2 * F.kl_div(s.log_softmax(-1), (z / t).softmax(-1), reduction="batchmean")


def tutorial(s, z, t):
    p = (z / t).softmax(-1)
    return t**2 * (p * (p.log() - (s / t).log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize(
    "answer, hint",
    [
        (in_place, "has changed"),
        (tutorial, "0 · log 0"),
        (lambda s, z, t: t**2 * F.kl_div((s / t).softmax(-1).log(), (z / t).softmax(-1), reduction="batchmean"), "underflows"),
        (lambda s, z, t: t**2 * kl(s.detach(), z, t), "no gradient reaches"),
        (lambda s, z, t: (t**2 * kl(s, z, t)).item(), "no gradient reaches"),
        (lambda s, z, t: 7 * kl(s, z, t), "it should be"),
        (lambda s, z, t: kl(z, s, t, "sum"), "swapped: the teacher's distribution is the weight, KL(teacher ‖ student); and the factor T² is missing: raise T, and the gradient fades like 1/T²; and you sum over"),
    ],
)  # fmt: skip
def test_a_loss_beside_the_bank(answer, hint):
    assert hint in told("00.1", answer)


def test_a_step_with_two_mistakes_is_told_of_the_teacher():
    ch00 = __import__("kdlib.exercises.ch00", fromlist=["step"])
    assert "statistics moved" in told("00.2", ch00.step(teacher_eval=False, zero_grad=False))
    assert "no_grad" in told("00.2", ch00.step(no_grad=False, temperature=3.0))
    assert told("00.2", ch00.step(temperature=3.0)).startswith("✗")


def test_numbers_are_taken_in_any_form_and_to_two_or_three_digits():
    for answer in ((0.083, 0.109), torch.tensor([0.0826, 0.109]), (torch.tensor(0.08257), 0.109), [0.08, 0.11]):
        assert told("00.4", answer).startswith("✓"), answer
    assert "1/C with C = 100" in told("00.4", (0.5, 0.5))
    right = ALL["01.1"].right
    assert told("01.1", lambda e, n, t: torch.tensor(right(e, n, t), dtype=torch.float32)).startswith("✓")


def test_a_student_may_be_scaled_in_any_way_that_keeps_its_shape():
    import copy

    def by_state(student, phi):
        made = copy.deepcopy(student)
        made.load_state_dict({k: v * phi if k.startswith("head") else v for k, v in student.state_dict().items()})
        return made

    assert told("01.2", by_state).startswith("✓")


def test_a_control_may_keep_the_staircase_it_overrides():
    def answer(arm, constant):
        first, second = arm["phases"]
        return {**arm, "phases": (partial(first, constant=constant), second)}

    assert told("01.3", answer).startswith("✓")

    def edits_the_arm(arm, constant):
        arm["phases"] = answer(arm, constant)["phases"]
        return arm

    assert "was handed in has changed" in told("01.3", edits_the_arm)


def test_targets_must_read_who_wrote_the_row():
    assert "`rolled` says" in told("02.3", lambda z, y, r, m: torch.where((y == -100) & m, z.argmax(-1), y))


def test_the_chapters_own_baseline_passes():
    def answer(pi, action, reward):
        said = (action * pi.log() + (1 - action) * (1 - pi).log()).sum(1)
        others = (reward.sum() - reward) / (len(reward) - 1)
        return -((reward - others) * said).mean()

    assert told("03.2", answer).startswith("✓")
