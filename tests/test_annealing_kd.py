"""Notebook 01: the method cells, lifted out and held to the paper's rules."""

from __future__ import annotations

import ast
import functools
import math
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdlib as kd
from kdlib.course import cells
from kdlib.course.cells import method_namespace
from kdlib.data import images

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_annealing_kd.ipynb"


@pytest.fixture(scope="module")
def nb():
    return SimpleNamespace(**method_namespace(NOTEBOOK))


@functools.cache
def statements(notebook: Path) -> list[ast.stmt]:
    return [s for cell in cells.read(notebook).cells if cell.cell_type == "code" for s in ast.parse(cell.source).body]


def lifted(nb, *names, **others):
    """The method, and of the notebook's other cells the functions and constants of these names.

    ``others`` stand in for what the notebook calls by these names.
    """
    namespace = types.ModuleType("__main__").__dict__ | vars(nb) | others
    wanted = []
    for statement in statements(NOTEBOOK):
        targets = getattr(statement, "targets", ())
        made = {getattr(statement, "name", None)} | {n.id for t in targets for n in ast.walk(t) if hasattr(n, "id")}
        wanted += [statement] if made & set(names) else []
    exec(compile(ast.Module(wanted, []), "lifted", "exec"), namespace)
    assert all(name in namespace for name in names), f"{NOTEBOOK.name} no longer has all of {names}"
    return SimpleNamespace(**{name: namespace[name] for name in names})


class Counting:
    """A teacher with fixed answers that counts how often it is asked."""

    name, fingerprint = "counting", "counting"

    def __init__(self, classes: int = 10) -> None:
        self.calls, self.classes = 0, classes

    def __call__(self, batch):
        self.calls += 1
        generator = torch.Generator().manual_seed(1)
        table = 3 * torch.randn(2000, self.classes, generator=generator)
        return table[batch["id"] % 2000]


@pytest.fixture(scope="module")
def task(nb):
    digits = images("digits")
    rest, validation = digits.train.split(60, seed=0)
    return nb.Task(
        nb.build, ("small_cnn", (4, 8)), rest.sample(60, seed=0).resize(4), validation.resize(4),
        digits.test.sample(60, seed=0).resize(4), metric=lambda z, y: (z.argmax(1) == y).float().mean().item(), batch_size=20,
    )  # fmt: skip


def train(nb, task, tmp_path, **arm):
    settings = dict(seed=0, folder=tmp_path, task=task, teachers=[], rates=(0.1, 0.03), epochs=(4, 2)) | arm
    return nb.train_student(**settings)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


# --- Φ -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.data())
def test_phi_is_the_papers_formula(nb, tau_max, data):
    temperature = data.draw(st.integers(1, tau_max))
    assert nb.phi(temperature, tau_max) == pytest.approx((tau_max + 1 - temperature) / tau_max)
    assert nb.phi(1, tau_max) == 1
    assert nb.phi(tau_max, tau_max) == pytest.approx(1 / tau_max)


@given(st.integers(1, 40), st.integers(1, 400))
def test_staircase_climbs_from_one_over_tau_to_exactly_one(nb, tau_max, extra):
    epochs = tau_max + extra - 1
    stairs = [nb.phi_at(epoch, epochs, tau_max=tau_max) for epoch in range(epochs)]
    assert stairs == sorted(stairs)
    assert stairs[0] == pytest.approx(1 / tau_max) and stairs[-1] == 1 and max(stairs) == 1
    length = epochs // tau_max
    assert len(set(stairs)) == tau_max
    for stage in range(tau_max - 1):  # every stage but the last lasts floor(epochs / tau_max) epochs
        assert stairs[stage * length : (stage + 1) * length] == [nb.phi(tau_max - stage, tau_max)] * length


@pytest.mark.parametrize(("epochs", "tau_max", "unclamped"), [(25, 10, 1.3), (19, 10, 1.9), (30, 20, 1.5)])
def test_clamped_where_the_authors_counter_overshoots(nb, epochs, tau_max, unclamped):
    stage = (epochs - 1) // (epochs // tau_max) + 1
    assert stage / tau_max == pytest.approx(unclamped)
    assert nb.phi_at(epochs - 1, epochs, tau_max=tau_max) == 1


@given(st.integers(1, 12), st.integers(12, 60), st.floats(0.05, 3))
def test_controls_are_the_same_function_with_another_phi(nb, tau_max, epochs, constant):
    forward = [nb.phi_at(e, epochs, tau_max=tau_max) for e in range(epochs)]
    assert [nb.phi_at(e, epochs, tau_max=tau_max, reverse=True) for e in range(epochs)] == forward[::-1]
    assert {nb.phi_at(e, epochs, constant=constant) for e in range(epochs)} == {constant}
    batch = {"epoch": 0, "y": torch.zeros(3, dtype=torch.long), "id": torch.arange(3)}
    z, teacher = torch.randn(3, 10), Counting()
    as_annealed = nb.annealing_objective(z, batch, [teacher], epochs, tau_max=tau_max)
    as_constant = nb.annealing_objective(z, batch, [teacher], epochs, constant=1 / tau_max)
    assert torch.allclose(as_annealed, as_constant)


@pytest.mark.parametrize("tau_max", [0, -3, 2.5])
def test_bad_tau_max(nb, tau_max):
    with pytest.raises(ValueError, match=f"tau_max.*{tau_max}"):
        nb.phi(1, tau_max)
    with pytest.raises(ValueError, match="tau_max"):
        nb.phi_at(0, 20, tau_max=tau_max)


def test_bad_stage_epoch_and_constant(nb):
    with pytest.raises(ValueError, match="temperature is 0"):
        nb.phi(0, 10)
    with pytest.raises(ValueError, match="temperature is 11"):
        nb.phi(11, 10)
    with pytest.raises(ValueError, match="7 epochs cannot hold tau_max = 10"):
        nb.phi_at(0, 7, tau_max=10)
    with pytest.raises(ValueError, match="epoch is 20"):
        nb.phi_at(20, 20, tau_max=10)
    with pytest.raises(ValueError, match="constant is 0"):
        nb.phi_at(0, 20, constant=0)


# --- phase I -----------------------------------------------------------------------------------------------


@given(st.floats(0.05, 1), st.integers(2, 12), st.integers(1, 9))
def test_phase_one_target_is_exactly_phi_z(nb, phi, classes, rows):
    teacher_logits, z = torch.randn(rows, classes), torch.randn(rows, classes, requires_grad=True)
    assert float(nb.annealing_loss(phi * teacher_logits, teacher_logits, phi)) == 0
    loss = nb.annealing_loss(z, teacher_logits, phi)
    loss.backward()
    by_hand = sum(
        (float(z[n, c].detach()) - phi * float(teacher_logits[n, c])) ** 2 for n in range(rows) for c in range(classes)
    )
    assert float(loss.detach()) == pytest.approx(by_hand / rows / classes, rel=1e-4, abs=1e-6)
    assert torch.allclose(z.grad, 2 / (rows * classes) * (z.detach() - phi * teacher_logits), atol=1e-6)


@pytest.mark.parametrize("mutant", ["student scaled", "both scaled", "softmax", "not scaled"])
def test_mutants_of_phase_one_are_noticed(nb, mutant):
    teacher_logits, z = torch.randn(4, 5), 0.3 * torch.randn(4, 5)
    wrong = {
        "student scaled": F.mse_loss(0.3 * z, teacher_logits), "both scaled": F.mse_loss(0.3 * z, 0.3 * teacher_logits),
        "softmax": F.mse_loss(z.softmax(1), (0.3 * teacher_logits).softmax(1)), "not scaled": F.mse_loss(z, teacher_logits),
    }  # fmt: skip
    assert not torch.isclose(nb.annealing_loss(z, teacher_logits, 0.3), wrong[mutant], rtol=1e-2)


def test_each_epoch_meets_its_own_target(nb):
    """The loss is 0 for a student that outputs phi * z of this epoch, and for no other stage's."""
    teacher = Counting()
    batch = {"id": torch.arange(6), "y": torch.zeros(6, dtype=torch.long)}
    z = teacher(batch)
    for epoch in range(25):
        for stage in range(1, 11):
            loss = nb.annealing_objective(stage / 10 * z, batch | {"epoch": epoch}, [teacher], 25, tau_max=10)
            assert (float(loss) < 1e-10) == (stage == min(10, epoch // 2 + 1))


def test_no_label_reaches_phase_one(nb):
    teacher, z = Counting(), torch.randn(6, 10)
    batch = {"id": torch.arange(6), "epoch": 0}  # no "y" at all
    assert math.isfinite(float(nb.annealing_objective(z, batch, [teacher], 10, tau_max=5)))


# --- the frame ---------------------------------------------------------------------------------------------


def test_phase_two_makes_no_teacher_call(nb, task, tmp_path):
    teacher = Counting()
    annealed = partial(nb.annealing_objective, tau_max=2)
    train(nb, task, tmp_path, teachers=[teacher], phases=[annealed, nb.label_objective])
    assert teacher.calls == 4 * 3  # 4 epochs of 3 batches in phase I, none after


def test_scratch_and_method_get_equal_updates(nb, task, tmp_path):
    annealed = partial(nb.annealing_objective, tau_max=2)
    arms = {
        "scratch": dict(phases=[nb.label_objective, nb.label_objective]),
        "annealing": dict(phases=[annealed, nb.label_objective], teachers=[Counting()]),
        "control": dict(
            phases=[partial(nb.annealing_objective, constant=1.0), nb.label_objective], teachers=[Counting()]
        ),
    }
    outcomes = {name: train(nb, task, tmp_path / name, **arm) for name, arm in arms.items()}
    assert {o.metrics["updates"] for o in outcomes.values()} == {(4 + 2) * 3}
    rates = {name: [row["lr"] for row in o.history] for name, o in outcomes.items()}
    assert rates["scratch"] == rates["annealing"] == rates["control"]
    restarted = [row["lr"] for row in outcomes["scratch"].history if row["phase"] == 2]
    assert restarted[0] > 0.01  # the schedule starts again in phase II


def test_constant_phi_equals_annealing_with_one_stage(nb, task, tmp_path):
    """tau_max = 1 has the single stage phi = 1: the control must be the very same run."""
    students = []
    for number, schedule in enumerate((dict(tau_max=1), dict(constant=1.0))):
        phases = [partial(nb.annealing_objective, **schedule), nb.label_objective]
        students.append(train(nb, task, tmp_path / str(number), teachers=[Counting()], phases=phases).model)
    assert torch.equal(flat(students[0]), flat(students[1]))


def test_a_warm_up_of_phase_one_leaves_phase_two_alone(nb, task, tmp_path):
    rates = {}
    for schedule in ("cosine", "warm-up", "constant", "linear"):
        outcome = train(nb, task, tmp_path / schedule, phases=[nb.label_objective] * 2, schedule=schedule)
        for phase in (1, 2):
            rates[schedule, phase] = [row["lr"] for row in outcome.history if row["phase"] == phase]
    assert rates["warm-up", 2] == rates["constant", 2] == rates["cosine", 2] != rates["linear", 2]
    assert len({tuple(rates[schedule, 1]) for schedule in ("cosine", "warm-up", "constant", "linear")}) == 4


def test_the_best_not_the_last_checkpoint_starts_phase_two(nb, task, tmp_path):
    """Validation scores are dictated: the second of four epochs is best, and phase II all but stands still."""
    dictated, seen = iter([0.1, 0.9, 0.3, 0.2, 0.0, 0.5, 0.4, 0.0]), []

    def score(logits, labels):
        seen.append(logits)
        return next(dictated)

    def linear(arch, data):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))

    watched = nb.Task(linear, (), task.train, task.validation, task.validation, metric=score, batch_size=20)
    train(nb, watched, tmp_path, phases=[nb.label_objective] * 2, rates=(0.1, 1e-9))
    best, last, after_phase_one, in_phase_two = seen[1], seen[3], seen[4], seen[5]
    assert not torch.allclose(best, last, atol=1e-3)
    assert torch.equal(after_phase_one, best)
    assert torch.allclose(in_phase_two, best, atol=1e-5)


@pytest.mark.parametrize(
    "arm",
    [dict(phases=[], rates=(), epochs=()), dict(epochs=(0, 2)), dict(epochs=(4,)), dict(rates=(0.1,))],
    ids=["no phase", "an empty phase", "epochs missing", "rate missing"],
)
def test_empty_phases_are_refused(nb, task, tmp_path, arm):
    with pytest.raises(ValueError, match="at least one"):
        train(nb, task, tmp_path, **{"phases": [nb.label_objective] * 2, **arm})


def test_labels_out_of_range_and_empty_parts_are_refused(nb, task):
    bad = replace(task.train, labels=task.train.labels + 5)
    with pytest.raises(ValueError, match=r"labels run from 5 to 14.*0\.\.9"):
        replace(task, train=bad)
    with pytest.raises(ValueError, match="no examples"):
        replace(task, test=task.test.take(torch.zeros(len(task.test), dtype=torch.bool)))


def test_tuning_scores_every_finishing_rate_from_one_phase_one(nb, task, tmp_path):
    teacher = Counting()
    phases = [partial(nb.annealing_objective, tau_max=2), nb.label_objective]
    outcome = nb.tune_student(
        seed=0,
        folder=tmp_path,
        task=task,
        teachers=[teacher],
        phases=phases,
        rate=0.1,
        finish_rates=(0.01, 0.1),
        epochs=(4, 2),
    )
    assert set(outcome.metrics) == {"0.01", "0.1"}
    assert teacher.calls == 4 * 3
    whole = train(nb, task, tmp_path / "whole", teachers=[teacher], phases=phases, rates=(0.1, 0.01))
    assert outcome.metrics["0.01"] == whole.metrics["validation 2"]  # tuning and training are one computation


@pytest.mark.parametrize(
    ("scores", "next_pairs"),
    [
        ({(0.03, 0.1): 1, (0.1, 0.1): 3, (0.3, 0.1): 2}, [(0.1, 0.033), (0.1, 0.3)]),  # one finishing rate: both sides
        ({(0.03, 0.02): 3, (0.1, 0.02): 2, (0.03, 0.1): 1, (0.1, 0.1): 1}, [(0.01, 0.02), (0.03, 0.0067)]),
        ({(r, f): r == 0.3 and f == 0.1 for r in (0.1, 0.3) for f in (0.02, 0.1)}, [(0.9, 0.1), (0.3, 0.3)]),
        ({(r, f): r == 0.1 and f == 0.1 for r in (0.03, 0.1, 0.3) for f in (0.02, 0.1, 0.3)}, []),  # best inside
    ],
)
def test_a_best_rate_at_the_edge_widens_the_grid_there(nb, scores, next_pairs):
    assert nb.beyond(scores) == next_pairs


def test_a_diverged_rate_is_never_best(nb):
    scores = {(0.1, 0.1): 0.2, (0.3, 0.1): math.nan, (0.9, 0.1): math.nan}
    assert (0.03, 0.1) not in nb.beyond(scores) and (0.033, 0.1) in nb.beyond(scores)
    only = nb.beyond({(0.1, 0.1): math.nan, (0.3, 0.1): math.nan})
    assert (0.033, 0.1) in only  # all diverged: try a lower one


TUNED = {  # validation scores by learning rates, one a tuning seed; NaN: that seed diverged
    "steady": {(0.1, 0.02): (0.9, 0.1), (0.1, 0.05): (0.2, 0.2), (0.3, 0.02): (0.5, 0.7), (0.3, 0.05): (0.4, 0.5)},
    "one seed diverged": {(0.1, 0.02): (0.1, 0.2), (0.1, 0.05): (0.3, 0.3), (0.3, 0.02): (0.9, math.nan), (0.3, 0.05): (0.9, math.nan)},
    "as good, and earlier": {(0.1, 0.02): (0.3, 0.5), (0.1, 0.05): (0.4, 0.4), (0.3, 0.02): (0.0, 0.0), (0.3, 0.05): (0.1, 0.0)},
}  # fmt: skip


def dictated(*, seed, folder, task, epochs, rate, finish_rates, scores):
    """In place of a tuning run: what is written down for it, and a divergence where there is NaN."""
    found = {finish: scores[rate, finish][seed - 100] for finish in finish_rates}
    if any(math.isnan(score) for score in found.values()):
        raise FloatingPointError("the loss is NaN")
    return kd.Outcome({f"{finish:g}": score for finish, score in found.items()})


def tuned(nb, scores, rates, finish_rates, *, widen):
    """The notebook's ``tune`` on families ``{name: dictated scores}``, as of two tuning seeds."""
    tune = lifted(nb, "tune", run=SimpleNamespace(jobs=1, widen=0), tune_student=dictated).tune
    families = {name: {"scores": table} for name, table in scores.items()}
    return tune("tuning", families, None, rates, finish_rates, seeds=(100, 101), epochs=(1, 1), widen=widen)


def test_tune_takes_the_best_mean_over_seeds_and_drops_what_diverged_once(nb):
    chosen, table = tuned(nb, TUNED, (0.1, 0.3), (0.02, 0.05), widen=0)
    assert chosen == {"steady": (0.3, 0.02), "one seed diverged": (0.1, 0.05), "as good, and earlier": (0.1, 0.02)}
    for family, scores in TUNED.items():
        for pair, (one, other) in scores.items():
            assert table.loc[family, pair] == pytest.approx((one + other) / 2, nan_ok=True)


def test_tune_widens_its_grid_and_does_not_choose_what_diverged_there(nb):
    """The best of the grid lies at its edge; beyond it one rate diverges for one seed and the other is better."""
    scores = {
        (0.1, 0.1): (0.2, 0.2),
        (0.3, 0.1): (0.6, 0.6),
        (0.9, 0.1): (0.99, math.nan),
        (0.3, 0.3): (0.7, 0.6),
        (0.3, 0.033): (0.1, 0.1),
    }
    chosen, table = tuned(nb, {"labels": scores}, (0.1, 0.3), (0.1,), widen=1)
    assert chosen == {"labels": (0.3, 0.3)} and set(table.columns) == set(scores)
    assert math.isnan(table.loc["labels", (0.9, 0.1)])


# --- rivals ------------------------------------------------------------------------------------------------


def test_continuation_with_margin_zero_and_psi_zero_is_annealing(nb):
    teacher, z = Counting(), torch.randn(6, 10)
    batch = {"id": torch.arange(6), "y": torch.arange(6), "epoch": 0}
    ours = nb.continuation_objective(z, batch, [teacher], 10, margin=0.0, tau_max=5)
    assert torch.isclose(ours, nb.annealing_objective(z, batch, [teacher], 10, tau_max=5))
    forgiven = nb.continuation_objective(z, batch, [teacher], 10, margin=1e6, tau_max=5)
    assert float(forgiven) == 0


@given(st.floats(0.2, 5), st.floats(-3, 3))
def test_standardised_kd_does_not_see_scale_or_shift(nb, factor, shift):
    z, teacher_logits = torch.randn(2, 6, 10)
    batch = {"y": torch.arange(6)}
    losses = [
        float(nb.standardised_objective(z, batch, [lambda b, t=t: t], 1, alpha=0.9, temperature=2.0))
        for t in (teacher_logits, factor * teacher_logits + shift)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)


def test_dist_is_zero_beyond_labels_at_the_teacher_and_dgkd_leaves_one_out(nb):
    teacher = Counting()
    batch = {"id": torch.arange(6), "y": torch.arange(6), "epoch": 0}
    z = teacher(batch)
    hard = float(F.cross_entropy(z, batch["y"]))
    assert float(nb.dist_objective(z, batch, [teacher], 1, temperature=4.0)) == pytest.approx(hard, abs=1e-4)
    a, b = Counting(), Counting()
    nb.dgkd_objective(torch.randn(6, 10), batch, [a, b], 1, alpha=0.9, temperature=4.0)
    assert a.calls + b.calls == 1


def taught(nb, task, tmp_path, family, teachers, seed=0):
    """Train a student by one of the image section's families, as :func:`train` does."""
    families = lifted(nb, "image_families", "LABELS", "KD4").image_families(*teachers, 2)
    return train(nb, task, tmp_path, seed=seed, **families[family])


def test_the_assistants_student_never_calls_the_big_teacher(nb, task, tmp_path):
    calls = {}
    for family in ("TAKD", "KD", "DGKD"):
        big, assistant = Counting(), Counting()
        taught(nb, task, tmp_path / family, family, (big, assistant))
        calls[family] = big.calls, assistant.calls
    updates = (4 + 2) * 3
    assert calls["TAKD"] == (0, updates) and calls["KD"] == (updates, 0)
    assert 0 < calls["DGKD"][0] < updates == sum(calls["DGKD"])  # where both teach, both are heard


def test_dgkds_choice_of_teachers_follows_the_seed(nb, task, tmp_path):
    """And not the state that the random generators were left in."""

    class Named(Counting):
        def __init__(self, name, heard):
            super().__init__()
            self.name = self.fingerprint = name
            self.heard = heard

        def __call__(self, batch):
            self.heard.append(self.name)
            return super().__call__(batch)

    def heard(seed, before):
        torch.manual_seed(before)
        names = []
        taught(nb, task, tmp_path / f"{seed} {before}", "DGKD", (Named("big", names), Named("assistant", names)), seed)
        return names

    first = heard(0, before=1)
    assert len(first) == (4 + 2) * 3 and set(first) == {"big", "assistant"}
    assert heard(0, before=2) == first != heard(1, before=1)


def test_annealed_temperature_is_one_over_phi(nb):
    teacher, z = Counting(), torch.randn(6, 10)
    batch = {"id": torch.arange(6), "y": torch.arange(6)}
    for epoch in range(10):
        ours = nb.annealed_temperature_objective(z, batch | {"epoch": epoch}, [teacher], 10, alpha=0.9, tau_max=5)
        temperature = 1 / nb.phi_at(epoch, 10, tau_max=5)
        assert torch.isclose(ours, nb.hinton_objective(z, batch, [teacher], 10, alpha=0.9, temperature=temperature))


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(0, 7))
def test_kl_in_phase_one_scales_the_teacher_and_never_the_student(nb, seed, tau_max, epoch):
    """By the textbook's sum, with its gradient; nothing is left at the faint teacher, something at the loud one."""
    epochs, epoch = 8, min(epoch, 7)
    z, t = 2 * torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(seed))
    batch = {"id": torch.arange(5), "epoch": epoch}  # no labels
    objective = partial(nb.annealing_kl_objective, batch=batch, teachers=[lambda _: t], epochs=epochs, tau_max=tau_max)
    volume = nb.phi_at(epoch, epochs, tau_max=tau_max)
    p, z = (volume * t).softmax(1), z.requires_grad_()
    loss = objective(z)
    by_hand = (p * (p.log() - z.softmax(1).log())).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.allclose(gradient, (z.detach().softmax(1) - p) / 5, atol=1e-6)
    assert float(objective(volume * t)) == pytest.approx(0, abs=1e-6)
    assert (float(objective(t)) > 1e-3) == (volume < 1)


# --- ablations ---------------------------------------------------------------------------------------------


def volume_of(objective, batch, *args, **settings):
    """The factor on the teacher's logits: a silent student's loss is its square times the logits' mean square."""
    teacher = Counting()
    loss = objective(torch.zeros(len(batch["id"]), 10), batch, [teacher], *args, **settings)
    return math.sqrt(float(loss) / float(teacher(batch).square().mean()))


@given(st.integers(2, 12), st.integers(1, 5), st.floats(0.02, 0.9))
def test_stairs_lead_from_start_to_one_in_equal_steps(nb, stairs, length, start):
    objective, epochs = lifted(nb, "stairs_objective").stairs_objective, stairs * length
    volumes = [
        volume_of(objective, {"id": torch.arange(6), "epoch": epoch}, epochs, start=start, stairs=stairs)
        for epoch in range(epochs)
    ]
    assert volumes[0] == pytest.approx(start, rel=1e-4) and volumes[-1] == pytest.approx(1, rel=1e-4)
    heights = [start + (1 - start) * step / (stairs - 1) for step in range(stairs)]
    assert volumes == pytest.approx([height for height in heights for _ in range(length)], rel=1e-4)


@pytest.mark.parametrize(("epochs", "stairs"), [(30, 2), (30, 30), (160, 40), (20, 2), (11, 3)])
def test_stairs_that_do_not_divide_the_epochs_differ_by_one(nb, epochs, stairs):
    objective = lifted(nb, "stairs_objective").stairs_objective
    volumes = [
        round(volume_of(objective, {"id": torch.arange(3), "epoch": e}, epochs, start=0.1, stairs=stairs), 4)
        for e in range(epochs)
    ]
    lengths = [volumes.count(volume) for volume in sorted(set(volumes))]
    assert volumes == sorted(volumes) and (volumes[0], volumes[-1]) == (0.1, 1.0)
    assert len(lengths) == stairs and max(lengths) - min(lengths) == (epochs % stairs > 0)


def test_as_many_stairs_as_stages_are_annealing(nb):
    objective = lifted(nb, "stairs_objective").stairs_objective
    for epoch in range(20):
        batch = {"id": torch.arange(6), "epoch": epoch}
        ours = volume_of(objective, batch, 20, start=0.1, stairs=10)
        assert ours == pytest.approx(nb.phi_at(epoch, 20, tau_max=10), rel=1e-4)


@given(st.floats(0.05, 2), st.sampled_from([0.3, 0.5, 3.0]), st.integers(0, 10_000))
def test_a_constant_at_a_volume_is_their_product_at_volume_one(nb, constant, volume, seed):
    """In loss and gradient; so are the stairs' targets; labels have no volume."""
    turned = lifted(nb, "turned_objective").turned_objective
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    batch = {"id": torch.arange(6), "y": torch.arange(6), "epoch": 0}
    one = partial(turned, z, batch, [Counting()], 10, volume=volume)
    ours = one(objective=partial(nb.annealing_objective, constant=constant))
    theirs = nb.annealing_objective(z, batch, [Counting()], 10, constant=constant * volume)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)), atol=1e-6)
    target = volume * constant * Counting()(batch)
    at_target = turned(
        target, batch, [Counting()], 10, objective=partial(nb.annealing_objective, constant=constant), volume=volume
    )
    assert float(at_target) == pytest.approx(0, abs=1e-9)
    first = nb.annealing_objective(z, batch, [Counting()], 10, constant=0.2 * volume)
    assert torch.allclose(one(objective=partial(nb.annealing_objective, tau_max=5)), first, rtol=1e-5)
    assert torch.equal(one(objective=nb.label_objective), nb.label_objective(z, batch, [], 10))


def test_every_teacher_is_turned_by_itself(nb):
    turned, z = lifted(nb, "turned_objective").turned_objective, torch.zeros(2, 3)
    teachers = [lambda batch: torch.full((2, 3), 1.0), lambda batch: torch.full((2, 3), 2.0)]
    heard = []

    def objective(student_logits, batch, teachers, epochs):
        heard.extend(float(teacher(batch).mean()) for teacher in teachers)
        return student_logits.sum()

    turned(z, {}, teachers, 1, objective=objective, volume=0.5)
    assert heard == [0.5, 1.0]


def test_scores_are_distilled_by_squared_error(nb):
    z, batch = torch.tensor([[1.0], [2.0]]), {"y": torch.tensor([1.0, 3.0])}
    assert float(nb.label_objective(z, batch, [], 1)) == 0.5
    mixed = nb.hinton_objective(z, batch, [lambda b: torch.tensor([[1.0], [4.0]])], 1, alpha=0.5, temperature=1.0)
    assert float(mixed) == pytest.approx(0.5 * 2.0 + 0.5 * 0.5)


def test_padding_never_reaches_the_lstm(nb):
    torch.manual_seed(0)
    model = nb.BiLSTM(50, 8, 3).eval()
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padded = (
        torch.cat([ids, torch.randint(3, 50, (2, 4))], 1),
        torch.cat([mask, torch.zeros(2, 4, dtype=torch.long)], 1),
    )
    assert torch.allclose(model(ids, mask), model(*padded), atol=1e-6)


def test_pairs_hand_their_token_types_on_and_single_texts_have_none(nb):
    """The two texts of a pair reach an encoder with their types; a model of words takes them and needs none."""
    seen = {}

    def encoder(**inputs):
        seen.update(inputs)
        return torch.zeros(2, 3)

    ids = torch.randint(3, 50, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "y": torch.zeros(2), "id": torch.arange(2)}
    nb.logits_of(encoder, batch)
    assert set(seen) == {"input_ids", "attention_mask"}
    nb.logits_of(encoder, batch | {"token_type_ids": torch.ones_like(ids)})
    assert set(seen) == {"input_ids", "attention_mask", "token_type_ids"}
    torch.manual_seed(0)
    words = nb.BiLSTM(50, 8, 3).eval()
    with_types = nb.logits_of(words, batch | {"token_type_ids": torch.ones_like(ids)})
    assert torch.equal(with_types, nb.logits_of(words, batch))
