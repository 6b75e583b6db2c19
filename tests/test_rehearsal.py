"""A rehearsal runs two small steps, stores nothing, and tells what the whole run would take."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlib import rehearsal
from kdlib.training import fit

ROWS, WIDTH, EPOCHS = 64, 100, 5


@pytest.fixture(autouse=True)
def rehearsing(monkeypatch):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    monkeypatch.delenv("KDLIB_REHEARSAL_LOG", raising=False)
    monkeypatch.setattr(rehearsal, "_records", [])


class Batches:
    """More batches than anyone wants to make: making the third is a failure."""

    def __len__(self):
        return 1000

    def epoch(self, epoch, start=0):
        for index in range(2):
            ids = torch.arange(ROWS) + ROWS * index
            yield {"id": ids, "x": torch.randn(ROWS, WIDTH), "y": ids % 10}
        raise AssertionError("a rehearsal needs two batches")


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"]), {"rows": float(len(batch["x"]))}


def rehearse(model=None, optimizer=torch.optim.Adam, **options):
    model = model or nn.Sequential(nn.Linear(WIDTH, 50), nn.ReLU(), nn.Linear(50, 10))
    return fit(model, loss_fn, Batches(), epochs=EPOCHS, optimizer=optimizer, progress=False, **options)


def test_two_steps_of_a_few_rows_and_one_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr("kdlib.training.CHECKPOINT_SECONDS", 0)
    evaluations = []

    def evaluate(model):
        evaluations.append(model.training)
        return {"val": 0.5}

    result = rehearse(evaluate=evaluate, monitor="val", eval_every=3, folder=tmp_path / "a" / "phase1")
    assert result.steps == 2 and evaluations == [False]
    assert result.history[0]["rows"] == rehearsal.ROWS
    assert result.history[0]["val"] == result.best["val"] == 0.5
    assert not result.model.training
    assert not (tmp_path / "a").exists()  # a rehearsal must not pass for a run
    assert rehearsal.report()["run"].tolist() == ["Sequential"]


@pytest.fixture
def costs(monkeypatch):
    """What was measured of each run's first step."""
    found, measure = [], rehearsal.measure
    monkeypatch.setattr(rehearsal, "measure", lambda *given: found.append(measure(*given)) or found[-1])
    return found


def test_the_costs_in_closed_form(costs):
    rehearse()
    row, few = rehearsal.report().iloc[0], rehearsal.ROWS
    weights = 100 * 50 + 50 + 50 * 10 + 10
    assert (row["parameters"], row["planned steps"], row["batch"]) == (weights, 1000 * EPOCHS, ROWS)
    # forward 2 x rows x both matrices; backward the same for weights, and for the second layer's input
    flops = 2 * ROWS * (2 * (100 * 50 + 50 * 10) + 50 * 10)
    assert row["TFLOP a step"] == pytest.approx(flops / 1e12)
    assert row["hours on a T4"] == pytest.approx(flops * 5000 / rehearsal.T4_FLOPS_PER_SECOND / 3600)
    # weights, gradients, Adam's two moments; and a step counter of each of the four parameters
    assert costs[0].fixed_bytes == 4 * (4 * weights + 4)
    # kept for the backward pass: x, the ReLU's output, log-probabilities, labels
    assert costs[0].activation_bytes == pytest.approx(few * (4 * (100 + 50 + 10) + 8), rel=0.03)
    whole = costs[0].fixed_bytes + costs[0].activation_bytes * ROWS / few
    assert row["GPU memory (GB)"] == pytest.approx(whole / 1e9)


def test_micro_batches_need_less_memory_and_the_same_work(costs):
    rehearse()
    rehearse(accumulate=4)
    (_, whole), (_, parts) = rehearsal.report().iterrows()
    assert parts["TFLOP a step"] == whole["TFLOP a step"] and costs[0].fixed_bytes == costs[1].fixed_bytes
    fixed = costs[0].fixed_bytes / 1e9
    assert parts["GPU memory (GB)"] - fixed == pytest.approx((whole["GPU memory (GB)"] - fixed) / 4)


def test_momentum_and_frozen_weights_are_counted_as_they_are(costs):
    frozen = nn.Sequential(nn.Linear(WIDTH, 50).requires_grad_(False), nn.ReLU(), nn.Linear(50, 10))
    rehearse(frozen, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    trained, still = 50 * 10 + 10, 100 * 50 + 50
    assert costs[0].fixed_bytes == 4 * (still + 3 * trained)


def test_a_row_a_run_also_for_another_process(monkeypatch, tmp_path):
    monkeypatch.setenv("KDLIB_REHEARSAL_LOG", str(tmp_path / "rehearsal.jsonl"))
    rehearse()
    rehearse(nn.Linear(WIDTH, 10))
    here = rehearsal.report()
    assert here["run"].tolist() == ["Sequential", "Linear"]
    monkeypatch.setattr(rehearsal, "_records", [])  # another process reads the file
    assert rehearsal.report().equals(here)
    monkeypatch.delenv("KDLIB_REHEARSAL_LOG")
    assert rehearsal.report().empty


def test_a_live_teacher_counts_as_work_but_its_activations_do_not_stay(costs):
    teacher = nn.Linear(WIDTH, 10).requires_grad_(False)

    def with_teacher(model, batch):
        with torch.no_grad():
            target = teacher(batch["x"])
        return F.mse_loss(model(batch["x"]), target), {}

    def alone(model, batch):
        return F.mse_loss(model(batch["x"]), torch.zeros(len(batch["x"]), 10)), {}

    for loss in (with_teacher, alone):
        fit(nn.Linear(WIDTH, 10), loss, Batches(), epochs=1, optimizer=torch.optim.Adam, progress=False)
    live, without = costs
    assert live.flops - without.flops == 2 * rehearsal.ROWS * WIDTH * 10
    assert live.activation_bytes == without.activation_bytes


def test_a_measured_model_is_let_go():
    """Also when a part of the step was never back-propagated: what autograd saved there must not hold its own graph."""

    def measured():
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            outputs = model(torch.randn(2, 3))
            outputs.sigmoid()  # saves its own output, and no backward pass frees it
            outputs.sum().backward()
            optimizer.step()

        rehearsal.measure(model, optimizer, step)
        return weakref.ref(model.weight)

    weight = measured()
    gc.collect()
    assert weight() is None
