"""Rehearsal: a run's cost, measured on a few rows of a machine without a GPU before anyone pays for one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from kdlib.data.rows import between, n_rows

ROWS = 4  # rows of each batch that a rehearsal computes; what grows with rows is scaled up to the whole batch
# Assumed for a Tesla T4: an eighth of its 65 TFLOP/s of fp16 matrix products, which is what training a
# mid-sized transformer sustains. A small net at 32x32 is bound by kernel launches and takes longer.
T4_FLOPS_PER_SECOND = 8e12

_records: list[dict[str, Any]] = []  # of the runs rehearsed in this process


@dataclass
class Cost:
    """What one training step took: operations, and bytes that do not and that do grow with rows."""

    flops: float
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
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    fixed = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *trained, *states])
    return Cost(counter.get_total_flops(), fixed, sum(saved.values()))


def report() -> pandas.DataFrame:
    """One row a rehearsed run: parameters, planned steps, estimated GPU memory and hours on a T4.

    Estimates, to tell minutes from days and 2 GB from 20: memory is weights, gradients, optimiser state and
    saved activations in the precision rehearsed in (fp32 on a CPU; mixed precision needs less), without a
    live teacher's weights and the allocator's own needs. Hours are of training steps only.
    """
    path = os.environ.get("KDLIB_REHEARSAL_LOG", "")
    if not os.path.exists(path):
        return pandas.DataFrame(_records)
    with open(path, encoding="utf-8") as file:  # of a notebook, whose kernel is another process
        return pandas.DataFrame([json.loads(line) for line in file])


def rehearse(loop: Any, batches: Any) -> None:
    """Two steps of ``fit``'s loop on a few rows; what the first one cost, as a whole batch, goes into the report."""
    first, *others = (batch for _, batch in zip(range(2), batches.epoch(0), strict=False))
    few = between(first, 0, ROWS)
    grow = n_rows(first) / n_rows(few)
    model, parts, loop.accumulate = loop.run.model, loop.accumulate, 1
    cost = measure(model, loop.optimizer, lambda: loop.step(few))
    loop.accumulate = parts
    for batch in others:
        loop.step(between(batch, 0, ROWS))
    flops = cost.flops * grow
    row = {
        "run": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": n_rows(first),
        "planned steps": loop.total,
        "TFLOP a step": flops / 1e12,
        "GPU memory (GB)": (cost.fixed_bytes + cost.activation_bytes * grow / parts) / 1e9,
        "hours on a T4": flops * loop.total / T4_FLOPS_PER_SECOND / 3600,
    }
    _records.append(row)
    if path := os.environ.get("KDLIB_REHEARSAL_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
