"""Two processes (gloo, started as ``accelerate launch`` starts them) give the one-process result."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import sys
import traceback

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlib import files
from kdlib.training import cosine, fit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and the fork server are POSIX here")


def batches(rows: int, size: int) -> list[dict]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 5, generator=draw)
    y = torch.randint(3, (rows, 4), generator=draw)
    y[torch.rand(rows, 4, generator=draw) < 0.4] = -100
    y[:, 0] = 1  # at least one token a row
    ids = torch.arange(rows)
    return [{"id": ids[i : i + size], "x": x[i : i + size], "y": y[i : i + size]} for i in range(0, rows, size)]


class Net(nn.Module):
    """A parameter for odd rows only, a method beside forward, and one parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0 if os.environ.get("RANK", "0") == "0" else 99)  # only the main one's start counts
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 12)
        self.odd, self.unused = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(2))

    def logits(self, x: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        z = self.head(torch.tanh(self.body(x)))
        return (z + self.odd * odd[:, None] if odd.any() else z).view(-1, 4, 3)


def token_mean(model, batch):
    logits = model.logits(batch["x"], batch["id"] % 2)
    loss = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())
    logs = {"odd": 1.0} if (batch["id"] % 2).any() else {}
    valid = batch["y"] != -100
    return loss, {**logs, "certainty": logits[valid].softmax(-1).max(-1).values.mean()}


def tokens(batch):
    return (batch["y"] != -100).sum()


def evaluate(model):
    """Every process may call it, but only the main one's answer counts."""
    weight = model.body.weight.square().sum()
    return {"score": weight if os.environ.get("RANK", "0") == "0" else math.nan}


CASES = {
    "an uneven last batch": {"data": (14, 4)},
    "a last batch of one row, fewer than the processes": {"data": (13, 4)},
    "batches of one row": {"data": (3, 1)},
    "micro-batches, more than rows": {"data": (13, 4), "accumulate": 3},
    "clipping, schedule, Adam": {"data": (14, 4), "clip": 0.1, "adam": True, "schedule": cosine(0.1)},
    "best weights, patience": {
        "data": (14, 4), "evaluate": evaluate, "monitor": "score", "mode": "min", "patience": 1
    },
}  # fmt: skip


def train(data, adam=False, loss_fn=token_mean, model=None, **options):
    def optimizer(parameters):
        return torch.optim.AdamW(parameters, 0.05, weight_decay=0.1) if adam else torch.optim.SGD(parameters, 0.2)

    options = {"epochs": 3, "units": tokens, "progress": False, **options}
    return fit(model or Net(), loss_fn, batches(*data), optimizer=optimizer, **options)


def every_case(folder) -> None:
    for name, options in CASES.items():
        result = train(**options)
        answer = {"history": result.history, "best": result.best}
        files.write_tensors(folder / f"{name}-{os.environ['RANK']}", result.model.state_dict(), answer)


class Stop(Exception):
    pass


def with_dropout(folder) -> None:
    """An interrupted and resumed two-process run against an uninterrupted one, random draws and all."""

    def attempt(where, stop_at=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 12))

        def loss_fn(model, batch):
            if batch["step"] == stop_at:
                raise Stop
            masks.append(float(torch.rand(())))
            return F.cross_entropy(model(batch["x"]).view(-1, 3), batch["y"].flatten()), {}

        masks = []
        return train((16, 4), loss_fn=loss_fn, model=model, folder=where, checkpoint_every=3, **monitored), masks

    monitored = {"evaluate": lambda m: {"score": m[1].running_mean.sum()}, "monitor": "score"}
    whole, masks = attempt(folder / "whole")
    try:
        attempt(folder / "killed", stop_at=7)
    except Stop:
        pass
    resumed, rest = attempt(folder / "killed")
    assert resumed.resumed and rest == masks[6:]
    again, nothing = attempt(folder / "killed")
    assert nothing == [] and again.resumed and again.steps == whole.steps
    weights = {**{f"whole.{k}": v for k, v in whole.model.state_dict().items()}}
    weights |= {f"resumed.{k}": v for k, v in resumed.model.state_dict().items()}
    scores = [[row["score"] for row in result.history] for result in (whole, resumed)]
    files.write_tensors(folder / f"rank{os.environ['RANK']}", weights, {"scores": scores, "masks": masks})


def one_of_two(rank: int, port: int, target, folder) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        target(folder)
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def on_two(target, folder) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", "accelerate", "kdlib.training"])
    pair = [server.Process(target=one_of_two, args=(rank, port, target, folder)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(90)
    for process in pair:
        process.kill()
    errors = "\n".join(path.read_text() for path in folder.glob("error*.txt"))
    assert not errors and [process.exitcode for process in pair] == [0, 0], errors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    on_two(every_case, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, two):
    one = train(**CASES[name])
    for rank in (0, 1):
        weights, answer = files.read_tensors(two / f"{name}-{rank}")
        for key, value in one.model.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)
        assert len(answer["history"]) == len(one.history)
        for ours, theirs in zip(answer["history"], one.history, strict=True):
            numbers = {k: v for k, v in theirs.items() if k not in ("seconds", "odd")}
            assert {k: v for k, v in ours.items() if k in numbers} == pytest.approx(numbers, rel=1e-4)
            assert ours["odd"] == pytest.approx(1)  # a log of some parts is averaged over those
        assert answer["best"] == pytest.approx(one.best, rel=1e-4)


def test_two_processes_end_bit_equal(two):
    for name in CASES:
        (first, _), (second, _) = (files.read_tensors(two / f"{name}-{rank}") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_resume_exactly(tmp_path):
    on_two(with_dropout, tmp_path)
    masks = []
    for rank in (0, 1):
        weights, meta = files.read_tensors(tmp_path / f"rank{rank}")
        for name, value in weights.items():
            if name.startswith("whole."):
                assert torch.equal(value, weights[name.replace("whole.", "resumed.")])
        assert meta["scores"][0] == meta["scores"][1]
        masks.append(meta["masks"])
    assert len(masks[0]) == 12 and not set(masks[0]) & set(masks[1])  # each process drops its own units
