"""A run that is really killed (SIGKILL) and started again gives the very same student and history."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import files
from kdlib.training import CHECKPOINT, cosine, fit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and the fork server are POSIX")

EPOCHS, BATCHES = 4, 7
STEPS = EPOCHS * BATCHES
SERVER = multiprocessing.get_context("forkserver") if sys.platform != "win32" else None


class Noisy:
    """Shuffled, augmented batches: a pure function of seed, epoch and batch; the last one is uneven."""

    examples, fingerprint = 40, "noisy-0"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(5)
        self.x = torch.randn(self.examples, 6, generator=draw)
        self.y = (self.x[:, 0] + 0.8 * torch.randn(self.examples, generator=draw) > 0).long()

    def __len__(self) -> int:
        return BATCHES

    def epoch(self, epoch, start=0):
        order = torch.randperm(self.examples, generator=torch.Generator().manual_seed(100 + epoch))
        for index in range(start, BATCHES):
            ids = order[6 * index : 6 * index + 6]
            noise = torch.Generator().manual_seed(1000 * epoch + index)
            yield {"id": ids, "x": self.x[ids] + torch.randn(len(ids), 6, generator=noise), "y": self.y[ids]}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 2))


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.03),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "slower adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
}


def train(folder: Path | None, optimizer: str, kill_at: int | None = None, **changed):
    """The run of these tests. The loss draws from all three generators; ``kill_at`` is a step."""
    data, calls, start = Noisy(), [], net()[0].weight.detach()

    def loss_fn(model, batch):
        calls.append(batch["step"])
        if batch["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        scale = 1.0 + 0.1 * random.random() + 0.1 * np.random.rand()
        logits = model(batch["x"])
        right = (logits.argmax(1) == batch["y"]).float().mean()
        return scale * nn.functional.cross_entropy(logits, batch["y"]), {"scale": scale, "right": right}

    def evaluate(model):
        logits = model(data.x)
        hits = (logits.argmax(1) == data.y).float().mean()
        nll = nn.functional.cross_entropy(logits, data.y)
        early = {"early": -(model[0].weight - start).norm()} if changed.get("monitor") == "early" else {}
        return {"val": hits, "val_nll": nll, **early}

    options = {
        "epochs": EPOCHS, "optimizer": OPTIMIZERS[optimizer], "schedule": cosine(0.2), "evaluate": evaluate,
        "monitor": "val", "clip": 1.0, "checkpoint_every": 3, "progress": False, "seed": 7,
    }  # fmt: skip
    result = fit(net(), loss_fn, data, folder=folder, **{**options, **changed})
    return result, calls


def die_while_writing(folder: Path, write: int) -> None:
    """Be killed when the ``write``-th checkpoint is written but not yet renamed."""
    replace, seen = os.replace, []

    def killing(*paths):
        seen.append(paths)
        if len(seen) == write:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = killing
    train(folder, "adam")


def killed(target, *args, **options) -> None:
    """Run ``target`` in another process and see it killed."""
    SERVER.set_forkserver_preload(["torch._dynamo", "kdlib.training", "test_resume"])
    child = SERVER.Process(target=target, args=args, kwargs=options)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


def rows(result) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def assert_same(result, whole) -> None:
    assert rows(result) == rows(whole)
    assert result.best == whole.best
    assert result.steps == whole.steps
    ours, theirs = result.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted runs."""
    return {name: train(None, name)[0] for name in ("adam", "sgd")}


KILLS = [(name, step) for name in ("adam", "sgd") for step in random.Random(name).sample(range(1, STEPS), 3)]


@pytest.mark.parametrize(("optimizer", "step"), KILLS)
def test_killed_at_a_random_step(optimizer, step, tmp_path, whole):
    killed(train, tmp_path, optimizer, kill_at=step)
    assert (tmp_path / CHECKPOINT).exists() == (step >= 3)
    result, calls = train(tmp_path, optimizer)
    assert calls[0] == step - step % 3  # it went on from the last checkpoint, not from the start
    assert result.resumed == (step >= 3)
    assert_same(result, whole[optimizer])


@pytest.mark.parametrize("step", [BATCHES * 3, BATCHES * 3 + 1, STEPS - 1])
def test_killed_around_the_end_of_an_epoch(step, tmp_path, whole):
    """Step 21 ends both an epoch and three steps: the checkpoint lies between the step and the evaluation."""
    killed(train, tmp_path, "adam", kill_at=step)
    assert_same(train(tmp_path, "adam")[0], whole["adam"])


def test_killed_twice(tmp_path, whole):
    killed(train, tmp_path, "sgd", kill_at=10)
    killed(train, tmp_path, "sgd", kill_at=20)
    result, calls = train(tmp_path, "sgd")
    assert calls[0] == 18
    assert_same(result, whole["sgd"])


def test_killed_after_the_best(tmp_path):
    """The best weights come from the checkpoint: the best was epoch 0."""
    options = {"monitor": "early", "checkpoint_every": 3}
    uninterrupted, _ = train(None, "adam", **options)
    assert uninterrupted.best["epoch"] == 0
    killed(train, tmp_path, "adam", kill_at=20, **options)
    assert_same(train(tmp_path, "adam", **options)[0], uninterrupted)


def test_killed_while_writing_a_checkpoint(tmp_path, whole):
    killed(die_while_writing, tmp_path, 4)
    assert list(tmp_path.glob(f".{CHECKPOINT}.*"))
    result, calls = train(tmp_path, "adam")
    assert calls[0] == 9
    assert_same(result, whole["adam"])
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def positives(batch) -> torch.Tensor:
    return (batch["y"] == 1).sum() + 1


def test_killed_with_micro_batches_and_units(tmp_path):
    options = {"accumulate": 2, "units": positives, "keep": "last"}
    killed(train, tmp_path, "adam", kill_at=11, **options)
    result, calls = train(tmp_path, "adam", **options)
    assert calls[0] == 9
    assert_same(result, train(None, "adam", **options)[0])


def test_without_checkpoint_every_it_goes_by_the_clock(tmp_path, monkeypatch, whole):
    monkeypatch.setattr("kdlib.training.CHECKPOINT_SECONDS", 0)
    writes = []
    write = files.atomic
    monkeypatch.setattr(files, "atomic", lambda path: (writes.append(path.name), write(path))[1])
    result, _ = train(tmp_path / "often", "adam", checkpoint_every=None)
    assert writes == [CHECKPOINT] * EPOCHS
    assert_same(result, whole["adam"])
    monkeypatch.setattr("kdlib.training.CHECKPOINT_SECONDS", 1000)
    writes.clear()
    train(tmp_path / "seldom", "adam", checkpoint_every=None)
    assert writes == [CHECKPOINT]


def test_a_finished_run_returns_at_once(tmp_path, whole):
    first, _ = train(tmp_path, "adam")
    assert not first.resumed
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    again, calls = train(tmp_path, "adam")
    assert calls == [] and again.resumed
    assert again.history == first.history and again.seconds == first.seconds
    assert_same(again, whole["adam"])
    assert not again.model.training


def test_an_interrupt_in_a_notebook_resumes_with_the_same_optimizer(tmp_path, whole):
    """The optimiser object survives the interrupt with a scheduled rate; the second call must not notice."""
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    real, stop = Noisy(), [17]

    class Stopping(Noisy):
        def epoch(self, epoch, start=0):
            for index, batch in enumerate(real.epoch(epoch, start), start):
                if stop and epoch * BATCHES + index == stop[0]:
                    stop.clear()
                    raise KeyboardInterrupt
                yield batch

    def loss_fn(model, batch):
        scale = 1.0 + 0.1 * random.random() + 0.1 * np.random.rand()
        logits = model(batch["x"])
        right = (logits.argmax(1) == batch["y"]).float().mean()
        return scale * nn.functional.cross_entropy(logits, batch["y"]), {"scale": scale, "right": right}

    def evaluate(model):
        logits = model(real.x)
        return {
            "val": (logits.argmax(1) == real.y).float().mean(),
            "val_nll": nn.functional.cross_entropy(logits, real.y),
        }

    def call():
        return fit(
            model, loss_fn, Stopping(), epochs=EPOCHS, optimizer=optimizer, schedule=cosine(0.2),
            evaluate=evaluate, monitor="val", clip=1.0, folder=tmp_path, checkpoint_every=3,
            progress=False, seed=7,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        call()
    assert_same(call(), whole["adam"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 5}, "epochs"),
        ({"seed": 8}, "seed"),
        ({"clip": 2.0}, "clip"),
        ({"optimizer": "slower adam"}, "optimizer"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"accumulate": 2}, "accumulate"),
    ],
)
@pytest.mark.parametrize("stored", ["under way", "finished"])
def test_another_run_s_file_is_refused(change, named, stored, stores):
    with pytest.raises(ValueError, match=rf"is of another run: {named} differ.*another folder"):
        train(stores[stored], **{"optimizer": "adam", **change})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A folder that holds a checkpoint, and one that holds a finished run."""
    folders = {name: tmp_path_factory.mktemp("store") for name in ("under way", "finished")}
    killed(train, folders["under way"], "adam", kill_at=5)
    train(folders["finished"], "adam")
    return folders


@pytest.mark.parametrize("stored", ["under way", "finished"])
def test_another_model_or_data_set_is_refused(stored, stores, monkeypatch):
    monkeypatch.setattr(Noisy, "fingerprint", "noisy-1")
    with pytest.raises(ValueError, match="another run: batches differ"):
        train(stores[stored], "adam")
    monkeypatch.undo()
    monkeypatch.setattr(f"{__name__}.net", lambda: nn.Sequential(nn.Linear(6, 2)))
    with pytest.raises(ValueError, match="model .names or shapes"):
        train(stores[stored], "adam")


def test_a_damaged_checkpoint_is_said_to_be(tmp_path):
    killed(train, tmp_path, "adam", kill_at=5)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged.*delete it"):
        train(tmp_path, "adam")
