"""One readable training loop for every notebook: :func:`fit`.

A technique is a function ``loss_fn(model, batch) -> loss`` or ``-> (loss, logs)``; everything around it is here. A run
that is killed goes on from its checkpoint to the very same student.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kdlib import files, rehearsal, scale
from kdlib.data.rows import as_batches, n_rows, part
from kdlib.models import evaluating

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 20  # without checkpoint_every, checkpoints are at least this far apart
PROGRESS = ("history", "best", "steps", "seconds", "best_weights", "sums")  # of a Fit, what a checkpoint holds

Batch = dict[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor | tuple[Tensor, dict[str, Any]]]
Schedule = Callable[[float], float]  # progress in [0, 1) -> factor on the initial learning rate


def constant() -> Schedule:
    """The initial learning rate throughout."""
    return lambda progress: 1.0


def linear(warmup: float = 0.0) -> Schedule:
    """Up from 0 over the first ``warmup`` (a fraction of all steps), then down to 0 in a straight line."""
    return _warmed(warmup, lambda rest: 1.0 - rest)


def cosine(warmup: float = 0.0) -> Schedule:
    """Up from 0 over the first ``warmup`` (a fraction of all steps), then half a cosine down to 0.

    Source: Loshchilov & Hutter (2017), SGDR, equation 5, with one period and a minimum of 0.
    """
    return _warmed(warmup, lambda rest: 0.5 * (1.0 + math.cos(math.pi * rest)))


def _warmed(warmup: float, after: Schedule) -> Schedule:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is {warmup}; it is a fraction of all steps, at least 0 and below 1")
    return lambda progress: progress / warmup if progress < warmup else after((progress - warmup) / (1.0 - warmup))


@dataclass
class Fit:
    """What :func:`fit` returns.

    Attributes:
        model: in evaluation mode, with the best or the last weights.
        history: one row an epoch: epoch (from 0), step (so far), lr (of the last step, first parameter group), seconds
            (since the run began), loss, the means of the logs, and the metrics where it was evaluated.
        best: ``{"epoch": …, **metrics}`` of the best evaluation by ``monitor``; empty without one.
        steps: optimiser steps made.
        seconds: of the whole run, over all its starts.
        resumed: whether a checkpoint was found and used.
    """

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    resumed: bool = False
    best_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    sums: dict[str, tuple] = field(default_factory=dict, repr=False)  # of this epoch's logs, on the device: sum, weight


def fit(
    model: nn.Module, loss_fn: Loss, batches: Any, *, epochs: int,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer],
    schedule: Schedule = constant(),  # noqa: B008  stateless
    evaluate: Callable[[nn.Module], dict[str, float] | float] | None = None,
    eval_every: int = 1, monitor: str | None = None, keep: str = "best",
    clip: float | None = None, accumulate: int = 1, units: Callable[[Batch], Any] = n_rows,
    folder: str | Path | None = None, checkpoint_every: int | None = None,
    progress: bool | None = None, seed: int = 0,
) -> Fit:  # fmt: skip
    """Train ``model`` in place and return it with its history.

    Args:
        model: put in training mode once, at the start; a part that must stay in evaluation mode (a frozen encoder) says
            so by overriding ``train()``.
        loss_fn: gives a scalar, the MEAN over the batch's units, and perhaps scalars to log, means over the same units.
            ``batch`` also carries ``epoch`` and ``step`` (from 0) and ``epochs``.
        batches: what a data set's ``batches(...)`` returns, or a list of dicts.
        epochs: how often to go through them.
        optimizer: or a function of the parameters that makes it. Its learning rates are the initial ones.
        schedule: factor on the learning rates, of the share of all steps made.
        evaluate: metrics of the model (a single number is called ``score``), in evaluation mode without gradients, every
            ``eval_every`` epochs and after the last.
        monitor: the metric, larger is better, by which the best weights are kept.
        keep: ``"best"`` by ``monitor``, or ``"last"``.
        clip: largest norm of the gradient.
        accumulate: micro-batches a step. Each weighs by its share of the batch's ``units`` (rows; with padding, tokens),
            so that the gradient is the whole batch's.
        folder: for checkpoints; a run found there goes on, or is returned if it is finished.
        checkpoint_every: steps; without, at the end of an epoch when 20 seconds have passed.
        progress: show a bar; by default not in the workers of a grid.
        seed: of all generators, set at the start.

    Raises:
        ValueError: arguments that do not fit together, or a checkpoint of another run.
        FloatingPointError: the loss became NaN or infinite.
    """
    batches = as_batches(batches)
    counts = {"epochs": epochs, "accumulate": accumulate, "eval_every": eval_every}
    if few := [f"{k} is {v}" for k, v in {**counts, "checkpoint_every": checkpoint_every or 1}.items() if v < 1]:
        raise ValueError(f"{few[0]}; it must be at least 1")
    if not len(batches):
        raise ValueError("batches is empty; there is nothing to train on")
    if keep not in ("best", "last"):
        raise ValueError(f"keep is {keep!r}; it must be 'best' or 'last'")
    if monitor and not evaluate:
        raise ValueError(f"monitor is {monitor!r}, but no evaluate computes it; give both or none")
    _import_whole("torch._dynamo")  # by the optimiser's first step
    model.to(scale.device()).train()
    optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
    scale.seed_everything(seed)
    run = Fit(model)
    loop = _Loop(run, loss_fn, optimizer, schedule, len(batches), epochs, clip, accumulate, units)
    if scale.rehearsing():
        rehearsal.rehearse(loop, batches)
        _end_epoch(run, loop, epochs - 1, evaluate, monitor, keep)
        model.eval()
        return run
    data = folder and getattr(batches, "fingerprint", None)  # not read where nothing is stored
    setting = {
        "epochs": epochs, "batches": (len(batches), data), "clip": clip, "seed": seed,
        "optimizer": (type(optimizer).__name__, loop.rates), "monitor": (monitor, keep, eval_every),
        "accumulate": accumulate, "precision": scale.precision(),
    }  # fmt: skip
    store = None if folder is None else _Store(Path(folder) / CHECKPOINT, loop, setting, checkpoint_every)
    began, done = time.perf_counter() - run.seconds, run.steps == loop.total
    quiet = os.environ.get("KDLIB_WORKER") == "1" if progress is None else not progress
    try:
        with tqdm(total=loop.total, initial=run.steps, unit="step", leave=False, disable=quiet or done) as bar:
            while not done:
                epoch, start = divmod(run.steps, len(batches))
                for batch in batches.epoch(epoch, start):
                    loop.step(batch)
                    bar.update()
                    run.seconds = time.perf_counter() - began
                    if store and checkpoint_every and run.steps % len(batches) and store.due():
                        store.save()
                evaluated = evaluate if (epoch + 1) % eval_every == 0 or epoch + 1 == epochs else None
                _end_epoch(run, loop, epoch, evaluated, monitor, keep)
                run.seconds, done = time.perf_counter() - began, run.steps == loop.total
                if done and run.best_weights:
                    model.load_state_dict(run.best_weights)
                    run.best_weights = {}
                if store and (done or store.due()):
                    store.save()
    finally:
        loop.set_rates(1.0)  # the optimiser may be used again, for another phase or after an interrupt
    model.eval()
    return run


def _import_whole(name: str) -> None:
    """Import a heavy module at one go: an interrupt waits, or the half of it would stay until the kernel restarts."""
    with ThreadPoolExecutor() as apart:  # interrupts go to the main thread, which waits for this one
        apart.submit(importlib.import_module, name).result()


class _Loop:
    """The steps of a run; all that they have in common is worked out once."""

    def __init__(self, run, loss_fn, optimizer, schedule, per_epoch, epochs, clip, accumulate, units) -> None:
        self.run, self.loss_fn, self.optimizer, self.schedule, self.clip = run, loss_fn, optimizer, schedule, clip
        self.per_epoch, self.epochs, self.total = per_epoch, epochs, per_epoch * epochs
        self.accumulate, self.units = accumulate, units
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not {id(p) for p in self.trained} <= {id(p) for p in run.model.parameters()}:
            raise ValueError("the optimizer holds parameters that are not the model's; pass all that is trained as one")
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.device, precision = scale.device(), scale.precision()
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        self.autocast = contextlib.nullcontext() if precision == "no" else torch.autocast(self.device.type, half)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def step(self, batch: Batch) -> None:
        self.set_rates(self.schedule(self.run.steps / self.total))
        self.optimizer.zero_grad()
        if self.accumulate == 1:
            self.backward(batch, 1)
        else:
            for piece in (part(batch, index, self.accumulate) for index in range(self.accumulate)):
                if n_rows(piece) and self.units(piece):  # without a unit the loss is a mean over nothing, NaN
                    self.backward(piece, self.units(piece) / self.units(batch))
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.run.steps += 1

    def backward(self, batch: Batch, share: Any) -> None:
        """Add a batch's gradient, times its ``share`` of the whole; logs are summed on the device: no step waits."""
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        steps, sums = self.run.steps, self.run.sums
        batch |= {"epoch": steps // self.per_epoch, "step": steps, "epochs": self.epochs}
        with self.autocast:
            out = self.loss_fn(self.run.model, batch)
        loss, logs = out if isinstance(out, tuple) else (out, {})
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn returned a {found}; it must return a scalar tensor, or (scalar tensor, logs)")
        self.scaler.scale(loss * share).backward()
        for name, value in (*logs.items(), ("loss", loss)):
            parts = zip(sums.get(name, (0.0, 0.0)), (value * share, share), strict=True)
            sums[name] = tuple(old + (new.detach().double() if isinstance(new, Tensor) else new) for old, new in parts)


def _end_epoch(run: Fit, loop: _Loop, epoch: int, evaluate: Any, monitor: str | None, keep: str) -> None:
    """Evaluate, write the epoch's row, and keep the weights if they are the best."""
    means = {name: float(total / weight) for name, (total, weight) in run.sums.items()}
    loss = means.pop("loss", 0.0)
    if not math.isfinite(loss):
        advice = "lower the learning rate, set clip=1.0, or look for log(0) and for a batch whose labels are all -100"
        raise FloatingPointError(f"the loss became {loss} in epoch {epoch}; {advice}")
    row = {"epoch": epoch, "step": run.steps, "lr": loop.optimizer.param_groups[0]["lr"], "seconds": run.seconds}
    row["loss"], metrics = loss, {}
    if evaluate:
        with evaluating(run.model), torch.no_grad(), loop.autocast:
            found = evaluate(run.model)
        found = found if isinstance(found, dict) else {"score": found}
        metrics = {name: float(value) for name, value in found.items()}
        if monitor and monitor not in metrics:
            raise ValueError(f"monitor is {monitor!r}, but evaluate returned {sorted(metrics)}")
    if clash := {*row} & {*means} | {*row, *means} & {*metrics}:
        raise ValueError(f"{sorted(clash)} is logged twice: by fit() itself, loss_fn or evaluate; give it another name")
    run.history.append({**row, **means, **metrics})
    run.sums = {}
    if monitor and metrics and metrics[monitor] > run.best.get(monitor, -math.inf):
        run.best = {"epoch": epoch, **metrics}
        if keep == "best":
            run.best_weights = {k: v.detach().clone() for k, v in run.model.state_dict().items()}


class _Store:
    """A run's checkpoint: one file, whole or absent, with all that the rest of the run depends on."""

    def __init__(self, path: Path, loop: _Loop, setting: dict[str, Any], every: int | None) -> None:
        self.path, self.run, self.setting, self.every = path, loop.run, setting, every
        self.parts = {"model": loop.run.model, "optimizer": loop.optimizer, "scaler": loop.scaler}
        self.saved = time.perf_counter()
        self.take_up()

    def due(self) -> bool:
        return self.run.steps % self.every == 0 if self.every else time.perf_counter() - self.saved > CHECKPOINT_SECONDS

    def save(self) -> None:
        array = np.random.get_state()
        state = {
            "setting": self.setting,
            **{name: held.state_dict() for name, held in self.parts.items()},
            **{name: getattr(self.run, name) for name in PROGRESS},
            "python": random.getstate(),
            "numpy": (array[0], array[1].tolist(), *array[2:]),
            "torch": (torch.get_rng_state(), torch.cuda.get_rng_state_all()),
        }
        with files.atomic(self.path) as whole:
            torch.save(state, whole)
        self.saved = time.perf_counter()

    def take_up(self) -> None:
        """Go on where a checkpoint was written, if there is one.

        Raises:
            ValueError: it is of another run, or damaged.
        """
        for stray in self.path.parent.glob(f".{self.path.name}.*"):  # of a run that was killed while writing
            shutil.rmtree(stray, ignore_errors=True)
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location=scale.device(), weights_only=True)
            differ = [name for name, value in self.setting.items() if state["setting"].get(name) != value]
        except Exception as error:  # whatever torch makes of bytes that are no checkpoint
            raise ValueError(f"{self.path} is damaged ({error}); delete it to start anew") from error
        if not differ:
            try:
                for name, held in self.parts.items():
                    held.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError):
                differ = ["model (names or shapes)"]
        if differ:
            advice = "give this run another folder, or delete that file to start anew"
            raise ValueError(f"{self.path} is of another run: {', '.join(differ)} differ; {advice}")
        vars(self.run).update({name: state[name] for name in PROGRESS}, resumed=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"][0].cpu())
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["torch"][1]])
