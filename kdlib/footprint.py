"""What a model costs in use: parameters, size on disk, latency, throughput, memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    import pandas


@torch.inference_mode()
def measure(model: nn.Module, data: Any, *, calls: int = 50, batch_size: int = 128) -> dict[str, float]:
    """Footprint of ``model`` on examples of ``data`` (a set with ``view_batches``), on the model's device.

    Returns:
        parameters (millions), megabytes (of the stored weights), latency_p50_ms and latency_p95_ms (one example at a
        time), per_second (examples in batches), peak_mb (GPU memory, NaN on a CPU).
    """
    from kdlib.metrics import _forward

    device = next(model.parameters()).device
    model.eval()
    one = next(iter(data.view_batches(0, 1)))
    many = next(iter(data.view_batches(0, batch_size)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    single = _seconds(lambda: _forward(model, one, device), calls, device)
    whole = _seconds(lambda: _forward(model, many, device), max(5, calls // 5), device)
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "megabytes": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "latency_p50_ms": 1e3 * float(np.quantile(single, 0.5)),
        "latency_p95_ms": 1e3 * float(np.quantile(single, 0.95)),
        "per_second": len(many["id"]) / float(np.median(whole)),
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else float("nan"),
    }


def compare(models: dict[str, tuple[nn.Module, Any]], **options: Any) -> pandas.DataFrame:
    """Footprints side by side: ``{"teacher": (model, data), "student": (model, data)}``; the last row is the ratio."""
    import pandas

    table = pandas.DataFrame({name: measure(model, data, **options) for name, (model, data) in models.items()}).T
    first, *_, last = table.index
    table.loc[f"{last} / {first}"] = table.loc[last] / table.loc[first]
    return table


def _seconds(call: Any, calls: int, device: torch.device) -> list[float]:
    times = []
    for n in range(calls + 3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if n >= 3:  # the first calls set up memory and kernels
            times.append(time.perf_counter() - start)
    return times
