"""Rehearsal: a run's cost, measured on a few rows of a machine without a GPU before anyone pays for one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas

ROWS = 4  # rows of each batch that a rehearsal computes; what grows with rows is scaled up to the whole batch
# Assumed for a Tesla T4: an eighth of its 65 TFLOP/s of fp16 matrix products, which is what training a
# mid-sized transformer sustains. A small net at 32x32 is bound by kernel launches and takes longer.
T4_FLOPS_PER_SECOND = 8e12

_records: list[dict[str, Any]] = []


@dataclass
class Cost:
    """What one training step took: operations, seconds, and bytes that do not and that do grow with rows."""

    flops: float
    seconds: float
    fixed_bytes: int
    activation_bytes: int


def measure(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> Cost:
    """Run ``step`` once, counting its work and what it holds for the backward pass.

    Counts matrix products, convolutions and attention (``torch.utils.flop_counter``), a live teacher's too.
    ``fixed_bytes``: weights, gradients and the optimiser's state after the step. ``activation_bytes``: the
    storages that autograd saves, each once, without the weights among them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        key, size = tensor.untyped_storage().data_ptr(), min(tensor.nbytes, tensor.untyped_storage().nbytes())
        if key not in own:
            saved[key] = max(size, saved.get(key, 0))
        return tensor.detach()  # the tensor itself would hold its graph, the graph the tensor, and nothing frees either

    counter = FlopCounterMode(display=False)
    began = time.perf_counter()
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    seconds = time.perf_counter() - began
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    fixed = _bytes(list(model.parameters()) + list(model.buffers()) + trained + states)
    return Cost(counter.get_total_flops(), seconds, fixed, sum(saved.values()))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def record(name: str, **facts: Any) -> None:
    """Note what a rehearsed run would cost, here and in the file that ``KDLIB_REHEARSAL_LOG`` names."""
    line = {"name": name, **facts}
    _records.append(line)
    if path := os.environ.get("KDLIB_REHEARSAL_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def report() -> pandas.DataFrame:
    """One row a rehearsed run: parameters, planned steps, estimated GPU memory and hours on a T4.

    Estimates, to tell minutes from days and 2 GB from 20: memory is weights, gradients, optimiser state and
    saved activations in the precision rehearsed in (fp32 on a CPU; mixed precision needs less), without a
    live teacher's weights and the allocator's own needs. Hours are of training steps only.
    """
    import pandas

    rows = [
        {
            "run": line["name"],
            "parameters": line["parameters"],
            "batch": line["rows"],
            "planned steps": line["planned_steps"],
            "TFLOP a step": line["step_flops"] / 1e12,
            "GPU memory (GB)": (line["fixed_bytes"] + line["activation_bytes"]) / 1e9,
            "hours on a T4": line["step_flops"] * line["planned_steps"] / T4_FLOPS_PER_SECOND / 3600,
        }
        for line in _read()
    ]
    return pandas.DataFrame(rows)


def _read() -> list[dict[str, Any]]:
    path = os.environ.get("KDLIB_REHEARSAL_LOG")
    if not path or not os.path.exists(path):
        return _records
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
