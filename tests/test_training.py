"""fit(): what it computes, what it keeps, what it leaves alone, and what it refuses."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kdlib import scale, training
from kdlib.training import constant, cosine, fit, linear


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def toy(rows: int = 20, size: int = 6, seed: int = 0) -> list[dict]:
    """A list of batches of a linearly separable toy; the last one is uneven."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=draw)
    y = (x[:, 0] > 0).long()
    ids = torch.arange(rows)
    return [{"id": ids[i : i + size], "x": x[i : i + size], "y": y[i : i + size]} for i in range(0, rows, size)]


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Linear(8, 2))


def ce(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"right": (logits.argmax(1) == batch["y"]).float().mean()}


def run(model=None, loss_fn=ce, batches=None, **options):
    options = {"epochs": 2, "optimizer": sgd, "progress": False, **options}
    return fit(model or net(), loss_fn, batches or toy(), **options)


def weights(model) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# --- the loop against a loop written out ---


def test_it_is_the_plain_loop():
    model, losses, rights = net(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step, batch in enumerate(toy() * 3):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / 12))
        optimizer.zero_grad()
        loss, logs = ce(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        losses.append(loss.item())
        rights.append(logs["right"].item())
    ours = run(epochs=3, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), schedule=cosine(), clip=0.3, keep="last")
    assert torch.equal(weights(ours.model), weights(model))
    assert ours.steps == 12 and not ours.resumed
    for epoch, row in enumerate(ours.history):
        assert row["loss"] == pytest.approx(sum(losses[4 * epoch : 4 * epoch + 4]) / 4, abs=1e-7)
        assert row["right"] == pytest.approx(sum(rights[4 * epoch : 4 * epoch + 4]) / 4, abs=1e-7)
        assert (row["epoch"], row["step"]) == (epoch, 4 * epoch + 4)
        assert row["lr"] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * (4 * epoch + 3) / 12)))


def test_history_rows():
    result = run(
        loss_fn=lambda m, b: (ce(m, b)[0], {"epoch_seen": b["epoch"], "total": b["epochs"], "at": b["step"]}),
        evaluate=lambda m: {"val": torch.tensor(0.5), "other": 2},
        epochs=3,
        eval_every=2,
    )
    assert list(result.history[1]) == [
        "epoch", "step", "lr", "seconds", "loss", "epoch_seen", "total", "at", "val", "other",
    ]  # fmt: skip
    assert [row["epoch_seen"] for row in result.history] == [0, 1, 2]
    assert [row["at"] for row in result.history] == [1.5, 5.5, 9.5]  # the mean of steps 0..3, 4..7, 8..11
    assert [("val" in row) for row in result.history] == [False, True, True]  # every second, and the last
    seconds = [row["seconds"] for row in result.history]
    assert seconds == sorted(seconds) and seconds[-1] <= result.seconds


def test_a_bare_loss_and_a_bare_score_will_do():
    bare = run(loss_fn=lambda m, b: ce(m, b)[0], evaluate=lambda m: torch.tensor(0.5), monitor="score")
    assert torch.equal(weights(bare.model), after(1)) and bare.best == {"epoch": 0, "score": 0.5}
    assert [row["loss"] for row in bare.history] == [row["loss"] for row in run().history]


def test_a_log_of_some_steps_is_averaged_over_those():
    def loss_fn(model, batch):
        return ce(model, batch)[0], {"even": float(batch["step"])} if batch["step"] % 2 == 0 else {}

    assert [row["even"] for row in run(loss_fn=loss_fn).history] == [1.0, 5.0]  # steps 0, 2 and 4, 6


def test_the_given_batches_are_not_touched():
    batches = toy()
    before = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    run(batches=batches, accumulate=2)
    for old, new in zip(before, batches, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_gradients_left_by_the_caller_do_not_enter():
    model = net()
    ce(model, toy()[0])[0].mul(1e3).backward()
    assert torch.equal(weights(run(model).model), weights(run().model))


def test_the_seed_rules_dropout_and_nothing_else():
    first, same, other = (run(net(nn.Dropout(0.5)), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weights(first.model), weights(same.model))
    assert not torch.equal(weights(first.model), weights(other.model))
    assert torch.equal(weights(run(seed=3).model), weights(run(seed=4).model))


def test_the_optimiser_keeps_its_rate_for_a_second_phase():
    model = net()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}], 0.1)
    run(model, optimizer=optimizer, schedule=linear())
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]


# --- schedules ---


def test_schedules_in_closed_form():
    assert [constant()(p) for p in (0, 0.5, 0.99)] == [1, 1, 1]
    assert [linear()(p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [linear(0.2)(p) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [cosine()(p) for p in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    assert [cosine(0.5)(p) for p in (0.25, 0.5, 0.75, 1)] == pytest.approx([0.5, 1, 0.5, 0])


@given(st.floats(0, 0.99), st.floats(0, 1, exclude_max=True), st.sampled_from([linear, cosine]))
def test_warm_schedules_stay_between_0_and_1_and_rise_then_fall(warmup, progress, schedule):
    factor = schedule(warmup)
    assert -1e-12 <= factor(progress) <= 1
    later = min(progress + 0.01, 1.0)
    if later <= warmup:
        assert factor(later) >= factor(progress)
    if progress >= warmup:
        assert factor(later) <= factor(progress) + 1e-12


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_a_warmup_in_steps_is_refused(schedule):
    with pytest.raises(ValueError, match="warmup is 100; it is a fraction"):
        schedule(100)


# --- best, last ---


def scores(*values):
    """An evaluate that answers with these values, one after the other."""
    answers = iter(values)
    return lambda model: {"score": next(answers)}


def after(epochs: int) -> torch.Tensor:
    """The weights after so many epochs."""
    return weights(run(epochs=epochs).model)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((1, 3, 2), 1),
        ((1, 3, 3), 1),  # the first of equals
        ((2, 2, 2), 0),
        ((1, 2, 3), 2),
        ((-3, -1, -2), 1),
        ((math.nan, 1, math.nan), 1),  # NaN is never best, not even the first
    ],
)
def test_the_best_weights_are_kept(values, best):
    result = run(epochs=3, evaluate=scores(*values), monitor="score")
    assert result.best == {"epoch": best, "score": values[best]}
    assert torch.equal(weights(result.model), after(best + 1))
    last = run(epochs=3, evaluate=scores(*values), monitor="score", keep="last")
    assert last.best == result.best
    assert torch.equal(weights(last.model), after(3))


def test_without_a_monitor_the_last_weights_are_kept():
    result = run(epochs=3, evaluate=scores(3, 2, 1))
    assert result.best == {}
    assert torch.equal(weights(result.model), after(3))


def test_all_nan_keeps_the_last():
    result = run(epochs=2, evaluate=scores(math.nan, math.nan), monitor="score")
    assert result.best == {}
    assert torch.equal(weights(result.model), after(2))


# --- modes ---


class Frozen(nn.Module):
    """A part that must stay in evaluation mode says so itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.BatchNorm1d(8)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, x):
        return self.body(x)


def test_evaluation_restores_every_mode_exactly():
    model = net(Frozen(), nn.Dropout(0.5), nn.BatchNorm1d(8)).eval()
    held = model[2]
    seen = []

    def loss_fn(model, batch):
        held.eval()  # a part that is switched during training stays as it was switched
        seen.append([module.training for module in model.modules()])
        return ce(model, batch)

    def evaluate(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        return {"score": 0}

    result = run(model, loss_fn, evaluate=evaluate, epochs=3)
    #               whole, linear, frozen, its body, dropout held, norm, tanh, linear
    assert all(modes == [True, True, False, False, False, True, True, True] for modes in seen)
    assert len(seen) == 12
    assert not any(module.training for module in result.model.modules())


def test_modes_come_back_after_an_evaluation_that_fails():
    model = net(nn.Dropout(0.5))
    with pytest.raises(ZeroDivisionError):
        run(model, evaluate=lambda m: {"score": 1 / 0})
    assert all(module.training for module in model.modules())


# --- accumulation ---


class Tagger(nn.Module):
    """Scores each token; padding carries label -100."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def token_batches(lengths: list[int], *, extra: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (len(lengths), max(lengths) + extra), generator=draw)
    labels = torch.randint(5, ids.shape, generator=draw)
    labels[torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]] = -100
    return [{"id": torch.arange(len(lengths)), "input_ids": ids, "labels": labels, "note": "whole", "scale": 2.0}]


def token_mean(model, batch):
    assert batch["note"] == "whole" and batch["scale"] == 2.0
    loss = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    return loss, {"tokens": (batch["labels"] != -100).sum()}


def tokens(batch):
    return (batch["labels"] != -100).sum()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 8))
def test_micro_batches_with_padding_give_the_whole_gradient(lengths, k):
    """Also with fewer rows than micro-batches, and with rows of very different length."""
    whole = run(Tagger(), token_mean, token_batches(lengths), epochs=1)
    parts = run(Tagger(), token_mean, token_batches(lengths), epochs=1, accumulate=k, units=tokens)
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-5, atol=1e-7)
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-5)


def test_rows_instead_of_units_would_be_another_gradient():
    """The mutant that many trainers ship: the mean of the micro-batches' token means."""
    whole = run(Tagger(), token_mean, token_batches([7, 1]), epochs=1)
    rows = run(Tagger(), token_mean, token_batches([7, 1]), epochs=1, accumulate=2)
    assert (weights(rows.model) - weights(whole.model)).abs().max() > 1e-3


def test_a_part_without_any_unit_is_left_out():
    """A mean over no token is NaN; its weight is 0, and 0 times NaN would be NaN."""
    batch = token_batches([4, 4, 1, 1])
    batch[0]["labels"][2:] = -100
    whole = run(Tagger(), token_mean, batch, epochs=1)
    parts = run(Tagger(), token_mean, batch, epochs=1, accumulate=2, units=tokens)
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-5, atol=1e-7)


def test_micro_batches_are_really_smaller():
    seen = []

    def loss_fn(model, batch):
        seen.append((len(batch["id"]), len(batch["words"])))
        return ce(model, batch)

    batches = [{**batch, "words": ["w"] * len(batch["id"])} for batch in toy()]
    run(loss_fn=loss_fn, batches=batches, epochs=1, accumulate=3)
    assert seen == [(2, 2)] * 9 + [(1, 1)] * 2  # 6, 6 and 6 rows, then 2: two parts of one row, one of none


# --- no waiting for the device ---


def test_nothing_is_read_from_the_device_at_each_step(monkeypatch):
    """A read makes a GPU wait. Counted over an epoch of 4 steps and one of 40: the same, and few."""
    reads = []
    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy", "cpu"):
        real = getattr(torch.Tensor, name)

        def counting(tensor, *args, real=real, name=name, **options):
            reads.append(name)
            return real(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counting)
    counts = []
    for rows in (24, 240):
        reads.clear()
        run(batches=toy(rows), epochs=1, clip=1.0)
        counts.append(len(reads))
    assert counts[0] == counts[1] <= 3


# --- mixed precision, as far as a CPU goes ---


def test_bf16_autocast_covers_loss_and_evaluation(monkeypatch):
    seen = []

    def loss_fn(model, batch):
        logits = model(batch["x"])
        seen.append(logits.dtype)
        return F.cross_entropy(logits.float(), batch["y"]), {}

    def evaluate(model):
        seen.append(model(toy()[0]["x"]).dtype)
        return {"score": 1}

    fp32 = after(2)
    monkeypatch.setattr(scale, "precision", lambda: "bf16")
    result = run(loss_fn=loss_fn, evaluate=evaluate)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert not torch.equal(weights(result.model), fp32)
    torch.testing.assert_close(weights(result.model), fp32, rtol=0, atol=0.02)


def test_another_precision_s_run_is_refused(monkeypatch, tmp_path):
    run(folder=tmp_path)
    monkeypatch.setattr(scale, "precision", lambda: "bf16")
    with pytest.raises(ValueError, match="another run: precision differ"):
        run(folder=tmp_path)


@pytest.fixture
def scaler(monkeypatch):
    """fp16 with loss scaling: the factor starts at 2 ** 6 and doubles after 3 steps without overflow."""
    made, real = [], torch.amp.GradScaler

    def make(device, enabled):
        made.append(real(device, init_scale=2.0**6, growth_interval=3, enabled=enabled))
        return made[-1]

    monkeypatch.setattr(scale, "precision", lambda: "fp16")
    monkeypatch.setattr(torch.amp, "GradScaler", make)
    return made


def scaled(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits.float(), batch["y"]), {}


@pytest.mark.parametrize("clip", [None, 0.3])
def test_loss_scaling_changes_nothing_but_the_rounding(scaler, clip, monkeypatch):
    """The path of a T4, without its rounding: a power of two, unscaled before clipping, is exact."""
    monkeypatch.setattr(torch, "autocast", lambda *given: contextlib.nullcontext())
    result = weights(run(clip=clip).model)
    assert scaler[0].get_scale() > 2.0**6
    monkeypatch.setattr(scale, "precision", lambda: "no")
    torch.testing.assert_close(result, weights(run(clip=clip).model), rtol=1e-6, atol=1e-7)


def test_an_overflow_skips_the_step_and_lowers_the_scale(scaler):
    def loss_fn(model, batch):
        if batch["step"] == 0:
            model[0].weight.register_hook(lambda grad: grad * float("inf"))
        return scaled(model, batch)

    model = net()
    before = weights(model)
    result = run(model, loss_fn, toy()[:1], epochs=1)
    assert torch.equal(weights(result.model), before)
    assert scaler[0].get_scale() == 2.0**5
    assert result.steps == 1


def test_the_scaler_is_part_of_a_checkpoint(scaler, tmp_path):
    """8 steps without overflow, growth every 3: doubled twice. Forgotten at step 4, it would double once."""

    def attempt(stop_at: int | None) -> float:
        def loss_fn(model, batch):
            if batch["step"] == stop_at:
                raise KeyboardInterrupt
            return scaled(model, batch)

        run(loss_fn=loss_fn, folder=tmp_path, checkpoint_every=2)
        return scaler[-1].get_scale()

    with pytest.raises(KeyboardInterrupt):
        attempt(stop_at=5)
    assert attempt(stop_at=None) == 2.0**8


# --- an interrupt while something heavy is imported ---


def test_an_interrupt_waits_for_a_heavy_import(tmp_path):
    (tmp_path / "a_heavy_one.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nready = True\n")
    ask = """
import signal, sys
from kdlib import training
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
try:
    training._import_whole("a_heavy_one")
except KeyboardInterrupt:
    print("interrupted", sys.modules["a_heavy_one"].ready)
training._import_whole("a_heavy_one")
"""
    path = os.pathsep.join([str(tmp_path), str(Path(training.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.strip() == "interrupted True", done.stderr


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"keep": "all"}, "keep is 'all'"),
        ({"monitor": "score"}, "monitor is 'score', but no evaluate"),
        (
            {"evaluate": lambda m: {"val": 1}, "monitor": "score"},
            r"monitor is 'score', but evaluate.*\['val'\]",
        ),
        ({"evaluate": lambda m: {"loss": 1}}, r"\['loss'\] is logged twice"),
        ({"loss_fn": lambda m, b: (ce(m, b)[0], {"lr": 1.0})}, r"\['lr'\] is logged twice"),
        ({"loss_fn": lambda m, b: (m(b["x"]), {})}, r"loss of shape \(6, 2\)"),
        ({"loss_fn": lambda m, b: m(b["x"])}, r"loss of shape \(6, 2\)"),
        ({"loss_fn": lambda m, b: 1.0}, "returned a float; it must return a scalar tensor"),
        ({"optimizer": lambda p: sgd(nn.Linear(2, 2).parameters())}, "parameters that are not the model's"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_batches_that_cannot_be_resumed_are_refused():
    with pytest.raises(ValueError, match="DataLoader"):
        fit(net(), ce, torch.utils.data.DataLoader([1, 2]), epochs=1, optimizer=sgd)
    with pytest.raises(ValueError, match="batches is empty"):
        fit(net(), ce, [], epochs=1, optimizer=sgd)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_is_raised_with_its_epoch_and_stores_nothing_finished(bad, tmp_path):
    def loss_fn(model, batch):
        loss, logs = ce(model, batch)
        return (loss * bad if batch["step"] == 7 else loss), logs

    with pytest.raises(FloatingPointError, match=f"became {bad} in epoch 1; lower the learning rate.*clip.*-100"):
        run(loss_fn=loss_fn, folder=tmp_path, epochs=3)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_quiet_in_a_worker(monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_WORKER", "1")
    run(progress=None)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("KDLIB_WORKER")
    run(progress=None)
    assert "step" in capsys.readouterr().err
