"""Chapter 01: the lesson's method and the study's rivals, held to the papers' formulas."""

from __future__ import annotations

import ast
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdlib as kd

BOOKS = Path(__file__).parents[1] / "notebooks"
STEPS = 3  # batches an epoch, of the task below


def tree(book: str) -> list[ast.stmt]:
    cells = nbformat.read(BOOKS / book, as_version=4).cells
    return [s for cell in cells if cell.cell_type == "code" for s in ast.parse(cell.source).body]


def named(statement: ast.stmt) -> set[str]:
    """What a statement of a notebook makes."""
    targets = getattr(statement, "targets", ())
    return {getattr(statement, "name", "")} | {n.id for t in targets for n in ast.walk(t) if hasattr(n, "id")}


@pytest.fixture(scope="module")
def nb():
    return kd.lesson("01")


STUDY = (
    "annealed_temperature_objective", "annealing_kl_objective", "annealing_softmax_objective", "stairs_objective",
    "turned_kd_objective", "continuation_objective", "Panel", "dgkd_objective", "correlation", "dist_objective",
    "standardise", "standardised_objective", "WIDTHS", "plain_cnn", "BiLSTM", "holm",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(nb):
    """What the study defines by these names, without running its cells."""
    statements = tree("studies/01_annealing_kd.ipynb")
    kept = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom) or named(s) & set(STUDY)]
    space = {**vars(nb), "LABELS": nb.label_objective}
    exec(compile(ast.Module(kept, []), "study", "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in STUDY})


class Counting:
    """A teacher with fixed answers that counts how often it is asked."""

    name, fingerprint = "counting", "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        table = 3 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(1))
        return table[batch["id"] % 2000]


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def task(nb):
    digits = kd.data.images("digits")
    rest, validation = digits.train.split(60, seed=0)
    parts = (part.resize(4) for part in (rest.sample(60, seed=0), validation, digits.test.sample(60, seed=0)))
    return nb.Task(linear, *parts, kd.metrics.accuracy, 20)


def train(nb, task, folder, first, second, **more):
    settings = {"rate": 0.1, "finish_rates": (0.03,), "epochs": (4, 2), "teachers": {"t": Counting()}, "teacher": "t"}
    return nb.train_student(seed=0, folder=folder, task=task, phases=(first, second), **(settings | more))


def of_phase(outcome, phase, name):
    return [row[name] for row in outcome.history if row["phase"] == phase]


# --- phi ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 300))
def test_the_staircase_climbs_from_one_over_tau_to_exactly_one(nb, tau_max, extra):
    epochs = tau_max + extra
    stairs = [nb.volume_at(epoch, epochs, tau_max=tau_max) for epoch in range(epochs)]
    length = epochs // tau_max
    by_hand = [min(1.0, (epoch // length + 1) / tau_max) for epoch in range(epochs)]
    assert stairs == pytest.approx(by_hand) and max(stairs) == stairs[-1] == 1
    assert [nb.volume_at(e, epochs, tau_max=tau_max, reverse=True) for e in range(epochs)] == stairs[::-1]
    assert {nb.volume_at(e, epochs, constant=0.3) for e in range(epochs)} == {0.3}


@pytest.mark.parametrize(("epochs", "tau_max", "overshot"), [(25, 10, 1.3), (19, 10, 1.9), (30, 20, 1.5)])
def test_the_authors_counter_overshoots_and_this_one_does_not(nb, epochs, tau_max, overshot):
    assert ((epochs - 1) // (epochs // tau_max) + 1) / tau_max == pytest.approx(overshot)
    assert nb.volume_at(epochs - 1, epochs, tau_max=tau_max) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda nb: nb.phi(0, 10), "stage is 0"),
        (lambda nb: nb.phi(11, 10), "stage is 11"),
        (lambda nb: nb.phi(1.5, 10), "stage is 1.5"),
        (lambda nb: nb.phi(1, 0), "tau_max is 0"),
        (lambda nb: nb.phi(1, 2.5), "tau_max is 2.5"),
        (lambda nb: nb.volume_at(0, 7, tau_max=10), "7 epochs cannot hold tau_max = 10"),
        (lambda nb: nb.volume_at(20, 20, tau_max=10), "epoch is 20"),
        (lambda nb: nb.volume_at(0, 20, constant=0), "constant is 0"),
    ],
)
def test_bad_stages_epochs_and_constants_are_refused(nb, call, words):
    with pytest.raises(ValueError, match=words):
        call(nb)


# --- the objectives ----------------------------------------------------------------------------------------


@given(st.floats(0.05, 3), st.floats(0.1, 5), st.integers(2, 12), st.integers(1, 9))
def test_phase_one_by_hand_with_its_gradient(nb, constant, turned, classes, rows):
    z_t, z = torch.randn(rows, classes), torch.randn(rows, classes, requires_grad=True)
    objective = partial(nb.annealing_objective, constant=constant, turned=turned)
    loss = objective(z, {"epoch": 0}, lambda batch: z_t, 10)  # no label in the batch
    loss.backward()
    error = z.detach().double() - constant * turned * z_t.double()
    assert float(loss.detach()) == pytest.approx(float((error**2).sum() / rows / classes), rel=1e-4, abs=1e-6)
    assert torch.allclose(z.grad, (2 / (rows * classes) * error).float(), atol=1e-5)


def test_each_epoch_meets_its_own_target(nb):
    """The loss is 0 for a student that outputs phi * z of this epoch, and for no other stage's."""
    teacher, batch = Counting(), {"id": torch.arange(6)}
    for epoch in range(25):
        for stage in range(1, 11):
            at = stage / 10 * teacher(batch)
            loss = nb.annealing_objective(at, {**batch, "epoch": epoch}, teacher, 25, tau_max=10)
            assert (float(loss) < 1e-10) == (stage == min(10, epoch // 2 + 1))


@pytest.mark.parametrize("mutant", ["student scaled", "both scaled", "softmax", "not scaled", "summed over classes"])
def test_mutants_of_phase_one_are_noticed(nb, mutant):
    z_t, z = torch.randn(4, 5), 0.3 * torch.randn(4, 5)
    wrong = {
        "student scaled": F.mse_loss(0.3 * z, z_t),
        "both scaled": F.mse_loss(0.3 * z, 0.3 * z_t),
        "softmax": F.mse_loss(z.softmax(1), (0.3 * z_t).softmax(1)),
        "not scaled": F.mse_loss(z, z_t),
        "summed over classes": (z - 0.3 * z_t).square().sum(1).mean(),
    }
    ours = nb.annealing_objective(z, {"epoch": 0}, lambda batch: z_t, 10, constant=0.3)
    assert not torch.isclose(ours, wrong[mutant], rtol=1e-2)


def test_scores_are_distilled_by_squared_error(nb):
    z, batch = torch.tensor([[1.0], [2.0]]), {"y": torch.tensor([1.0, 3.0])}
    assert float(nb.label_objective(z, batch, None, 1)) == 0.5
    told = partial(nb.kd_objective, alpha=0.5, temperature=1.0)
    assert float(told(z, batch, lambda batch: torch.tensor([[1.0], [4.0]]), 1)) == pytest.approx(0.5 * 2 + 0.5 * 0.5)


# --- the phases --------------------------------------------------------------------------------------------


def test_the_teacher_speaks_in_phase_one_only(nb, task, tmp_path):
    teacher = Counting()
    first = partial(nb.annealing_objective, tau_max=2)
    train(nb, task, tmp_path, first, nb.label_objective, teachers={"t": teacher}, finish_rates=(0.1, 0.03))
    assert teacher.calls == 4 * STEPS


def test_every_arm_makes_the_same_updates_at_the_same_rates(nb, task, tmp_path):
    firsts = [
        nb.label_objective,
        partial(nb.annealing_objective, tau_max=2),
        partial(nb.kd_objective, alpha=0.9, temperature=4.0),
    ]
    outcomes = [train(nb, task, tmp_path / str(n), first, nb.label_objective) for n, first in enumerate(firsts)]
    assert {outcome.metrics["updates"] for outcome in outcomes} == {(4 + 2) * STEPS}
    for phase in (1, 2):
        assert len({tuple(of_phase(outcome, phase, "lr")) for outcome in outcomes}) == 1
    assert [row["epoch"] for row in outcomes[0].history] == list(range(6))


def test_one_stage_is_the_loud_constant(nb, task, tmp_path):
    made = []
    for n, how in enumerate(({"tau_max": 1}, {"constant": 1.0})):
        first = partial(nb.annealing_objective, **how)
        made.append(train(nb, task, tmp_path / str(n), first, nb.label_objective).model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_the_best_not_the_last_checkpoint_starts_phase_two(nb, task, tmp_path):
    """Validation scores are dictated: the second of four epochs is best, and phase II all but stands still."""
    dictated, seen = iter([0.1, 0.9, 0.3, 0.2, 0.0, 0.5, 0.4, 0.0]), []

    def score(logits, labels):
        seen.append(logits)
        return next(dictated)

    watched = nb.Task(linear, task.train, task.validation, task.validation, score, 20)
    train(nb, watched, tmp_path, nb.label_objective, nb.label_objective, finish_rates=(1e-9,))
    best, last, after_phase_one, in_phase_two = seen[1], seen[3], seen[4], seen[5]
    assert not torch.allclose(best, last, atol=1e-3)
    assert torch.equal(after_phase_one, best) and torch.allclose(in_phase_two, best, atol=1e-5)


def test_the_finishing_rate_is_picked_by_validation_and_reported(nb, task, tmp_path):
    by_rate = {}
    for rate in (1e-5, 0.3):
        found = train(nb, task, tmp_path / f"{rate}", nb.label_objective, nb.label_objective, finish_rates=(rate,))
        by_rate[rate] = found.metrics
    both = train(nb, task, tmp_path / "both", nb.label_objective, nb.label_objective, finish_rates=tuple(by_rate))
    best = max(by_rate, key=lambda rate: by_rate[rate]["validation"])
    assert both.metrics["rate"] == best and both.metrics["test"] == by_rate[best]["test"]
    assert both.metrics["updates"] == (4 + 2 * 2) * STEPS
    none = train(nb, task, tmp_path / "none", nb.label_objective, nb.label_objective, finish_rates=())
    assert none.metrics["validation"] == none.metrics["validation 1"] == both.metrics["validation 1"]


def test_schedules_differ_in_phase_one_and_unknown_ones_are_refused(nb, task, tmp_path):
    rates = {}
    for schedule in ("cosine", "warm-up", "constant", "linear"):
        how = {"schedule": schedule, "epochs": (4, 4)}
        outcome = train(nb, task, tmp_path / schedule, nb.label_objective, nb.label_objective, **how)
        rates |= {(schedule, phase): of_phase(outcome, phase, "lr") for phase in (1, 2)}
    assert rates["warm-up", 2] == rates["constant", 2] == rates["cosine", 2] != rates["linear", 2]
    assert len({tuple(rates[schedule, 1]) for schedule in ("cosine", "warm-up", "constant", "linear")}) == 4
    with pytest.raises(KeyError, match="stairs"):
        train(nb, task, tmp_path / "no", nb.label_objective, nb.label_objective, schedule="stairs")


# --- the study ---------------------------------------------------------------------------------------------


def test_the_study_keeps_the_lessons_frame(nb):
    """Else it would train the lesson's students again, or others under their names."""
    wanted = ("SMALL", "run", "pool", "teacher_model", "mislabelled", "hinton", "tuned", "final", "students")
    frames = []
    for book in ("01_annealing_kd.ipynb", "studies/01_annealing_kd.ipynb"):
        first = {}
        for statement in tree(book):
            for name in named(statement) & set(wanted):
                first.setdefault(name, ast.unparse(statement).replace("lesson.", ""))
        frames.append(first)
    same = lambda text: text.replace("pool.images.shape[1]", "channels")  # noqa: E731
    assert set(frames[0]) == set(frames[1]) >= {"run", "teacher_model", "tuned", "final"}
    assert {name: same(text) for name, text in frames[0].items()} == {name: same(t) for name, t in frames[1].items()}


@given(st.integers(2, 12), st.integers(1, 5), st.floats(0.02, 0.9))
def test_stairs_lead_from_start_to_one_in_equal_steps(study, stairs, length, start):
    epochs, teacher, batch = stairs * length, Counting(), {"id": torch.arange(6)}
    for epoch in range(epochs):
        height = start + (1 - start) * (epoch // length) / (stairs - 1)
        at = {**batch, "epoch": epoch}
        loss = study.stairs_objective(height * teacher(batch), at, teacher, epochs, start=start, stairs=stairs)
        assert float(loss) == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(0, 7))
def test_other_losses_scale_the_teacher_and_never_the_student(study, nb, seed, tau_max, epoch):
    z, z_t = 2 * torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(seed))
    volume, batch = nb.volume_at(epoch, 8, tau_max=tau_max), {"epoch": epoch, "y": torch.arange(5)}
    p, z = (volume * z_t).softmax(1), z.requires_grad_()
    told = (batch, lambda batch: z_t, 8)
    (gradient,) = torch.autograd.grad(study.annealing_kl_objective(z, *told, tau_max=tau_max), z)
    assert torch.allclose(gradient, (z.detach().softmax(1) - p) / 5, atol=1e-6)
    squared = study.annealing_softmax_objective(z, *told, tau_max=tau_max)
    assert torch.isclose(squared, (z.softmax(1) - p).square().mean(), rtol=1e-4)
    warm = study.annealed_temperature_objective(z, *told, alpha=0.9, tau_max=tau_max)
    assert torch.isclose(warm, nb.kd_objective(z, *told, alpha=0.9, temperature=1 / volume))
    quiet = study.turned_kd_objective(z, *told, turned=0.3, alpha=0.9, temperature=2.0)
    assert torch.isclose(quiet, nb.kd_objective(z, batch, lambda batch: 0.3 * z_t, 8, alpha=0.9, temperature=2.0))


@given(st.floats(0.2, 5), st.floats(-3, 3))
def test_standardised_kd_sees_no_scale_and_dist_no_shift(study, factor, shift):
    z, z_t = torch.randn(2, 6, 10)
    batch, how = {"y": torch.arange(6)}, {"weights": (9.0, 0.1), "temperature": 2.0}
    told = [study.standardised_objective(z, batch, lambda batch, t=t: t, 1, **how) for t in (z_t, factor * z_t + shift)]
    assert float(told[0]) == pytest.approx(float(told[1]), rel=1e-3, abs=1e-5)
    told = [study.dist_objective(z, batch, lambda batch, t=t: t, 1, temperature=4.0) for t in (z_t, z_t + shift)]
    assert float(told[0]) == pytest.approx(float(told[1]), rel=1e-3)
    at_teacher = study.dist_objective(z_t, batch, lambda batch: z_t, 1, temperature=4.0)
    assert float(at_teacher) == pytest.approx(float(F.cross_entropy(z_t, batch["y"])), abs=1e-3)


def test_continuation_without_margin_is_annealing_and_forgives_with_one(study, nb):
    teacher, z, batch = Counting(), torch.randn(6, 10), {"id": torch.arange(6), "y": torch.arange(6), "epoch": 0}
    ours = study.continuation_objective(z, batch, teacher, 10, margin=0.0, tau_max=5)
    assert torch.isclose(ours, nb.annealing_objective(z, batch, teacher, 10, tau_max=5))
    assert float(study.continuation_objective(z, batch, teacher, 10, margin=1e6, tau_max=5)) == 0


def test_dgkd_hears_all_but_one_without_labels(study):
    z, answers = torch.randn(6, 10), torch.randn(3, 6, 10)
    parts = [float(kd.losses.kd_loss(z, answer, temperature=5.0)) for answer in answers]
    allowed = [sum(parts) - part for part in parts]
    heard = {round(float(study.dgkd_objective(z, {}, lambda batch: answers, 1, temperature=5.0)), 4) for _ in range(60)}
    assert heard == {round(value, 4) for value in allowed}
    panel = study.Panel((lambda batch: answers[0], lambda batch: answers[1]))
    assert torch.equal(panel({}), answers[:2])


@pytest.mark.parametrize(
    ("depth", "classes", "parameters"), [(2, 10, 13_082), (4, 10, 37_338), (2, 100, 215_172), (10, 10, 2_487_850)]
)
def test_plain_cnns_have_the_authors_sizes(study, depth, classes, parameters):
    model = study.plain_cnn(depth, classes, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)
    assert kd.models.parameters(model) == parameters


def test_padding_never_reaches_the_lstm(study):
    torch.manual_seed(0)
    model = study.BiLSTM(50, 8, 3).eval()
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    longer = (
        torch.cat([ids, torch.randint(3, 50, (2, 4))], 1),
        torch.cat([mask, torch.zeros(2, 4, dtype=torch.long)], 1),
    )
    assert torch.allclose(model(ids, mask), model(*longer), atol=1e-6)


def test_holm_steps_down_and_stops(study):
    p = pandas.Series([0.04, 0.001, 0.015, math.nan, 0.02], index=list("abcda"))
    assert study.holm(p).tolist() == [False, True, False, False, False]
    assert study.holm(pandas.Series([0.001, 0.012, 0.024, 0.04])).all()
