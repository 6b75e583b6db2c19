"""A run of ``fit`` on disk: one atomic file in the middle, one at the end, resumed to the bit.

A checkpoint holds all that the rest of the run depends on: weights, the best weights so far, the optimiser, the
random generators, the epoch's half-summed logs. What the data loader will give next is a function of the step.
"""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdlib import files

if TYPE_CHECKING:
    from kdlib.training import _Run

CHECKPOINT, FINISHED = "checkpoint.safetensors", "finished.safetensors"
PROGRESS = ("epoch", "step", "history", "best", "since_best", "seconds")


def save(run: _Run) -> None:
    """Write one file with all that the rest of the run depends on."""
    run.tick()
    mine = {
        "random": _random_state(),
        "sums": {name: total.tolist() for name, total in run.sums.items()},
        "weights": {name: float(weight) for name, weight in run.weights.items()},
    }
    everyone = run.gather(mine)
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state, plain = _flatten(run.optimizer.state_dict())
        tensors = _named("model", run.model.state_dict()) | _named("best", run.best_weights)
        meta = {"optimizer": plain, "processes": everyone, "scaler": scaler and scaler.state_dict()}
        files.write_tensors(run.folder / CHECKPOINT, tensors | _named("optimizer", state), {**_progress(run), **meta})
    run.saved_at = time.perf_counter()


def load(run: _Run) -> None:
    """Go on from the checkpoint, if there is one.

    Raises:
        ValueError: it is of another run.
    """
    if (found := _read(run, CHECKPOINT)) is None:
        return
    tensors, meta = found
    _take_up(run, tensors, meta)
    run.best_weights = {k: v.to(run.device) for k, v in _under("best", tensors).items()}
    run.optimizer.load_state_dict(_unflatten(_under("optimizer", tensors), meta["optimizer"]))
    if meta["scaler"]:
        run.accelerator.scaler.load_state_dict(meta["scaler"])
    mine = meta["processes"][run.accelerator.process_index]
    run.sums = {k: run.zero() + v for k, v in mine["sums"].items()}
    run.weights = mine["weights"]
    _set_random_state(mine["random"])


def save_finished(run: _Run) -> None:
    """Store the weights that were kept and the history, in the checkpoint's place."""
    files.write_tensors(run.folder / FINISHED, _named("model", run.model.state_dict()), _progress(run))
    (run.folder / CHECKPOINT).unlink(missing_ok=True)


def load_finished(run: _Run) -> bool:
    """Take up the finished run, if there is one.

    Raises:
        ValueError: it is of another run.
    """
    if (found := _read(run, FINISHED)) is None:
        return False
    _take_up(run, *found)
    return True


def settings(run: _Run) -> dict[str, Any]:
    """What must be equal for a stored run to be this run."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    same = ("epochs", "monitor", "mode", "keep", "patience", "clip", "accumulate", "eval_every", "seed")
    found = {
        **{name: getattr(run, name) for name in same},
        "batches an epoch": len(run.batches),
        "batches": getattr(run.batches, "fingerprint", None),
        "optimizer": [type(run.optimizer).__name__, groups],
        "processes": run.accelerator.num_processes,
        "precision": run.accelerator.mixed_precision,
    }
    return json.loads(json.dumps(found, default=str))  # as it will look when read back


def _progress(run: _Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in (*PROGRESS, "settings")}


def _take_up(run: _Run, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    run.model.load_state_dict(_under("model", tensors))
    for name in PROGRESS:
        setattr(run, name, meta[name])
    run.resumed = True


def _read(run: _Run, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The stored file, or None; refused if another run wrote it."""
    if run.folder is None or not (run.folder / name).exists():
        return None
    tensors, meta = files.read_tensors(run.folder / name)
    differ = [key for key, value in run.settings.items() if meta["settings"].get(key) != value]
    stored = {k: tuple(v.shape) for k, v in _under("model", tensors).items()}
    if stored != {k: tuple(v.shape) for k, v in run.model.state_dict().items()}:
        differ.append("model (names or shapes of its weights)")
    if differ:
        raise ValueError(
            f"{run.folder / name} is of another run: {', '.join(differ)} differ. "
            "Give this run another folder, or delete that file to start anew"
        )
    return tensors, meta


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors, and the plain rest."""
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}/{name}"] = value
    return tensors, {"groups": state["param_groups"], "state": plain}


def _unflatten(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["state"]}.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": plain["groups"]}


def _random_state() -> dict[str, Any]:
    """The state of every generator that a loss may draw from, as JSON."""
    numpy = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
