"""Speed, as ratios measured in one process: ``python -m kdlib bench``.

Each pair of workloads is timed in turn, A B A B …, in one thread; a row is the median of the paired ratios
with their range. Ratios hold where absolute times do not: machines differ and are shared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import kdlib as kd
from kdlib import files, scale, scoreboard
from kdlib.data.image_sets import ImageSet

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
        s = model(x)
        soft = F.kl_div((s / TEMPERATURE).log_softmax(1), (z / TEMPERATURE).softmax(1), reduction="batchmean")
        loss = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(s, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fitted(batches, teacher: Callable | None) -> None:
    """The same through the library; without a teacher, labels only."""

    def loss_fn(model, batch):
        logits = model(batch["x"])
        if teacher is None:
            return F.cross_entropy(logits, batch["y"]), {}
        loss = kd.losses.hinton_loss(logits, teacher(batch), batch["y"], alpha=ALPHA, temperature=TEMPERATURE)
        return loss, {}

    kd.fit(student(), loss_fn, batches, epochs=1, optimizer=sgd, progress=False)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(numerator: Callable[[], None], denominator: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Median, smallest and largest of the paired ratios of seconds, each denominator the mean of its neighbours."""
    numerator(), denominator()
    found, before = [], seconds(denominator)
    for _ in range(pairs):
        middle, after = seconds(numerator), seconds(denominator)
        found.append(middle / ((before + after) / 2))
        before = after
    return statistics.median(found), min(found), max(found)


def row(what: str, goal: str, measured: tuple[float, float, float]) -> dict:
    line = {"what": what, "ratio": measured[0], "low": measured[1], "high": measured[2], "goal": goal}
    print(f"{what:<72} {measured[0]:6.3f}  [{measured[1]:.3f}, {measured[2]:.3f}]  goal {goal}", flush=True)
    return line


def own_rows(pairs: int) -> list[dict]:
    rows = []
    model = kd.models.resnet(8, CLASSES).eval().requires_grad_(False)
    live = kd.Teacher(model, name="bench")
    for size, count, goal in ((64, 24, "≥ 0.98"), (4, 160, "≥ 0.97")):
        batches = list(fake_images(size * count).batches(size).epoch(0))
        loop = lambda batches=batches: plain_loop(batches, model)  # noqa: E731
        ours = lambda batches=batches: fitted(batches, live)  # noqa: E731
        rows.append(
            row(f"speed of a live distillation step, kdlib : plain loop, batch {size}", goal, ratio(loop, ours, pairs))
        )
    data = fake_images(64 * 24)
    batches = list(data.batches(64).epoch(0))
    cached = kd.cache_teacher(live, data)
    with_cache, with_live = (lambda: fitted(batches, cached)), (lambda: fitted(batches, live))
    alone = lambda: fitted(batches, None)  # noqa: E731
    rows.append(row("time of a cached step : a step without a teacher", "≤ 1.05", ratio(with_cache, alone, pairs)))
    rows.append(row("speed, cached teacher : live ResNet-8", "", ratio(with_live, with_cache, pairs)))
    large = kd.Teacher(kd.models.resnet(20, CLASSES), name="bench 20")
    live_large = lambda: fitted(batches, large)  # noqa: E731
    rows.append(row("speed, cached teacher : live ResNet-20", "≥ 4", ratio(live_large, with_cache, max(3, pairs // 3))))
    rows.append(row("share of a cached step spent on data (decode, shuffle, mirror)", "≤ 0.03", data_share(pairs)))
    return rows


def data_share(pairs: int) -> tuple[float, float, float]:
    data = fake_images(128 * 12)
    fixed = list(data.batches(128, flip=True).epoch(0))

    def read() -> None:
        for _ in data.batches(128, flip=True).epoch(0):
            pass

    model = kd.models.resnet(8, CLASSES)

    def train() -> None:
        kd.fit(
            model, lambda m, b: (F.cross_entropy(m(b["x"]), b["y"]), {}), fixed, epochs=1, optimizer=sgd, progress=False
        )

    share, low, high = ratio(read, train, max(3, pairs // 3))
    return tuple(value / (1 + value) for value in (share, low, high))


def textbrewer_row(pairs: int) -> dict:
    """TextBrewer's BasicDistiller on the same work; its output directory is temporary."""
    import textbrewer
    from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig

    model = kd.models.resnet(8, CLASSES).eval()
    batches = list(fake_images(64 * 24).batches(64).epoch(0))
    pairs_of = [(b["x"], b["y"]) for b in batches]
    folder = tempfile.mkdtemp()

    def adaptor(batch, outputs):
        return {"logits": [outputs], "losses": [F.cross_entropy(outputs, batch[1])]}

    class Inputs(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, y):
            return self.inner(x)

    def work() -> None:
        net = Inputs(student())
        training = TrainingConfig(output_dir=folder, log_dir=None, ckpt_frequency=1, device="cpu")
        distillation = DistillationConfig(temperature=TEMPERATURE, kd_loss_weight=ALPHA, hard_label_weight=1 - ALPHA)
        distiller = BasicDistiller(training, distillation, Inputs(model), net, adaptor, adaptor)
        with distiller:
            distiller.train(sgd(net.parameters()), pairs_of, num_epochs=1, callback=None)

    measured = ratio(lambda: plain_loop(batches, model), work, pairs)
    return row(
        f"speed of TextBrewer {textbrewer.__version__ if hasattr(textbrewer, '__version__') else ''} : plain loop, batch 64",
        "",
        measured,
    )


def main() -> None:
    torch.set_num_threads(1)
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 9
    rows = own_rows(pairs)
    if find_spec("textbrewer"):
        rows.append(textbrewer_row(pairs))
    else:
        print("TextBrewer is not installed (tests/benchmarks/requirements.txt)")
    path = scoreboard.results_folder() / f"bench.{scale.hardware()}.json"
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    files.write_json(
        path, {"hardware": scale.hardware(), "date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
