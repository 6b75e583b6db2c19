"""Speed, as ratios measured in one process: ``python -m kdlib bench``.

Each pair of workloads is timed in turn, A B A B …, in one thread on the CPU; a row is the median of the paired ratios
with their range. Ratios hold where absolute times do not: machines differ and are shared. What is timed is the
process's own CPU time, so that other programs on the machine do not count. A run is long enough for the start of
``fit()`` (milliseconds) not to count as part of a step.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the plain loop places nothing and knows no mixed precision

import torch
import torch.nn.functional as F

import kdlib as kd
from kdlib import files, scale
from kdlib.data.images import ImageSet

CLASSES, TEMPERATURE, ALPHA = 10, 4.0, 0.9


def fake_images(n: int, side: int = 32) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    names = tuple(str(c) for c in range(CLASSES))
    return ImageSet(images, labels, torch.arange(n), names, (0.5,) * 3, (0.25,) * 3, "noise")


def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return kd.models.small_cnn(CLASSES)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain_loop(batches: list[dict], teacher: torch.nn.Module) -> None:
    """What one writes by hand."""
    model = student().train()
    optimizer = sgd(model.parameters())
    for batch in batches:
        x, y = batch["x"], batch["y"]
        with torch.no_grad():
            z = teacher(x)
        loss = written_out(model(x), z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def written_out(s: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Hinton's loss without the checks of the library's own."""
    soft = F.kl_div((s / TEMPERATURE).log_softmax(1), (z / TEMPERATURE).softmax(1), reduction="batchmean")
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(s, y)


def fitted(batches, teacher: Callable | None, *, checked: bool = True) -> None:
    """The same through the library; without a teacher, labels only."""

    def loss_fn(model, batch):
        logits = model(batch["x"])
        if teacher is None:
            return F.cross_entropy(logits, batch["y"])
        if not checked:
            return written_out(logits, teacher(batch), batch["y"])
        return kd.losses.hinton_loss(logits, teacher(batch), batch["y"], alpha=ALPHA, temperature=TEMPERATURE)

    kd.fit(student(), loss_fn, batches, epochs=1, optimizer=sgd, progress=False)


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(numerator: Callable[[], None], denominator: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Median, smallest and largest of the paired ratios of seconds, each numerator between two denominators."""
    numerator(), denominator()
    found, before = [], seconds(denominator)
    for _ in range(pairs):
        middle, after = seconds(numerator), seconds(denominator)
        found.append(middle / ((before + after) / 2))
        before = after
    return statistics.median(found), min(found), max(found)


def keep_memory() -> None:
    """Tell glibc to keep freed memory. To hand it back and fault it in again costs up to a fifth of a step here,
    and which of two workloads it hits is chance."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD


def row(what: str, goal: str, measured: tuple[float, float, float]) -> dict:
    line = {"what": what, "ratio": measured[0], "low": measured[1], "high": measured[2], "goal": goal}
    print(
        f"{what:<66} {measured[0]:6.3f}  [{measured[1]:.3f}, {measured[2]:.3f}]  {goal and 'goal ' + goal}", flush=True
    )
    return line


def own_rows(pairs: int) -> list[dict]:
    rows = []
    model = kd.models.resnet(8, CLASSES).eval().requires_grad_(False)
    live = kd.Teacher(model, name="bench")
    for size, count, goal in ((64, 48, "≥ 0.98"), (4, 400, "≥ 0.96")):
        batches = list(fake_images(size * count).batches(size).epoch(0))
        loop, ours = partial(plain_loop, batches, model), partial(fitted, batches, live)
        rows.append(row(f"speed of a live step, kdlib : plain loop, batch {size}", goal, ratio(loop, ours, pairs)))
        bare = partial(fitted, batches, live, checked=False)
        rows.append(row("  the same with the loss written out, without its checks", "", ratio(loop, bare, pairs)))
    data = fake_images(64 * 48)
    batches = list(data.batches(64).epoch(0))
    with_cache = partial(fitted, batches, kd.cache_teacher(live, data))
    alone, with_live = partial(fitted, batches, None), partial(fitted, batches, live)
    large = kd.Teacher(kd.models.resnet(20, CLASSES), name="bench 20")
    rows.append(row("time of a cached step : a step without a teacher", "≤ 1.05", ratio(with_cache, alone, pairs)))
    rows.append(row("speed, cached teacher : live ResNet-8", "", ratio(with_live, with_cache, pairs)))
    rows.append(
        row("speed, cached teacher : live ResNet-20", "≥ 4", ratio(partial(fitted, batches, large), with_cache, pairs))
    )
    rows.append(
        row(
            "share of a cached step spent on data (shuffle, mirror, scale)",
            "≤ 0.03",
            data_share(data, with_cache, pairs),
        )
    )
    return rows


def data_share(data: ImageSet, train: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Making the batches beside ``train``, which trains on as many that are ready; nothing is loaded ahead."""

    def read() -> None:
        for _ in data.batches(64, flip=True).epoch(0):
            pass

    return tuple(found / (1 + found) for found in ratio(read, train, pairs))


# --- peers, on the same batches, models, loss and optimiser ---


def peer_rows(pairs: int) -> list[dict]:
    rows = []
    batches = list(fake_images(64 * 48).batches(64).epoch(0))
    model = kd.models.resnet(8, CLASSES).eval().requires_grad_(False)
    for name, work in (("textbrewer", textbrewer), ("torchdistill", torchdistill)):
        if not find_spec(name):
            print(f"{name}: not installed (tests/benchmarks/requirements.txt)")
            continue
        what = f"speed of a live step, {name} {version(name)} : plain loop, batch 64"
        rows.append(row(what, "", ratio(partial(plain_loop, batches, model), partial(work, batches, model), pairs)))
    return rows


def textbrewer(batches: list[dict], teacher: torch.nn.Module) -> None:
    """TextBrewer's BasicDistiller. After ``with`` it restores the mode of the outermost module, hence ``eval()``."""
    from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig

    class Inputs(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x, y):
            return self.inner(x)

    def adaptor(batch, outputs):
        return {"logits": [outputs], "losses": [F.cross_entropy(outputs, batch[1])]}

    net = Inputs(student())
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(output_dir=folder, log_dir=None, ckpt_frequency=1, device="cpu")
        settings = DistillationConfig(temperature=TEMPERATURE, kd_loss_weight=ALPHA, hard_label_weight=1 - ALPHA)
        distiller = BasicDistiller(training, settings, Inputs(teacher).eval(), net, adaptor, adaptor)
        with distiller:
            distiller.train(sgd(net.parameters()), [(b["x"], b["y"]) for b in batches], num_epochs=1, callback=None)


def torchdistill(batches: list[dict], teacher: torch.nn.Module) -> None:
    """torchdistill's DistillationBox, with the loop of its examples. It leaves the teacher's mode to its caller."""
    from torchdistill.core.distillation import DistillationBox

    ends = {
        f"{who}_module_{what}": to for who in ("student", "teacher") for what, to in (("path", "."), ("io", "output"))
    }
    loss = {
        "key": "KDLoss",
        "kwargs": {**ends, "temperature": TEMPERATURE, "alpha": 1 - ALPHA, "reduction": "batchmean"},
    }
    settings = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher, student().train(), {}, settings, torch.device("cpu"), None, False, 1)
    for batch in batches:
        box.optimizer.zero_grad()
        box.post_forward_process(loss=box.forward_process(batch["x"], batch["y"], {}))


def main() -> None:
    torch.set_num_threads(1)
    keep_memory()
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 9
    with tempfile.TemporaryDirectory() as home:  # the pack of made-up images is not to stay
        os.environ["KDLIB_HOME"] = home
        rows = own_rows(pairs) + peer_rows(pairs)
    folder = Path(os.environ.get("KDLIB_RESULTS") or Path(__file__).resolve().parents[2] / "results")
    path = folder / f"bench.{scale.hardware()}.json"
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    files.write_json(
        path,
        {
            "hardware": scale.hardware(),
            "processor": scale.processor(),
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "rows": rows,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
