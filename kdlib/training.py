"""One readable training loop for every notebook: :func:`fit`.

A technique is a function ``loss_fn(model, batch) -> (loss, logs)``; everything around it is here. The loop
runs the same on a laptop's CPU, on one GPU in mixed precision and on several processes started by
``accelerate``, and a run that is killed goes on from its checkpoint to the very same student.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdlib import checkpoints, rehearsal, scale
from kdlib.batches import Batch, as_batches, between, n_rows
from kdlib.batches import part as part_of

if TYPE_CHECKING:
    import pandas
    from accelerate import Accelerator

LossFn = Callable[[nn.Module, Batch], "tuple[Tensor, dict[str, Any]]"]
Schedule = Callable[[float], float]

CHECKPOINT_SECONDS = 20  # without checkpoint_every, checkpoints are at least this far apart
WHOLE = 1  # the weight of a batch that is not split; compared by identity, it saves the product
RUN_COLUMNS = ("epoch", "step", "lr", "seconds")


# --- schedules: progress in [0, 1) -> factor on the initial learning rate -----------------------------------


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

    def factor(progress: float) -> float:
        return progress / warmup if progress < warmup else after((progress - warmup) / (1.0 - warmup))

    return factor


def steps_down(factors: dict[float, float]) -> Schedule:
    """A staircase: ``steps_down({0.5: 0.1, 0.75: 0.01})`` is 1, then 0.1 from half-way, then 0.01."""

    def factor(progress: float) -> float:
        reached = [start for start in factors if progress >= start]
        return factors[max(reached)] if reached else 1.0

    return factor


# --- the call ----------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """What :func:`fit` returns.

    Attributes:
        model: the model, in evaluation mode, holding the best or the last weights (``keep``).
        history: one row an epoch: epoch (from 0), step (optimiser steps so far), lr (of the last step, first
            parameter group), seconds (since the run began), loss, the logs' means, the metrics if evaluated.
        best: ``{"epoch": …, **metrics}`` of the best evaluation by ``monitor``; empty without one.
        steps: optimiser steps made.
        seconds: wall seconds of the whole run, over all its starts.
        resumed: whether a checkpoint or a finished run was found and used.
    """

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    resumed: bool = False

    def frame(self) -> pandas.DataFrame:
        """The history as a DataFrame, one row an epoch."""
        import pandas

        return pandas.DataFrame(self.history)


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Any,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer],
    schedule: Schedule = constant(),  # noqa: B008  stateless
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    monitor: str | None = None,
    mode: str = "max",
    keep: str = "best",
    patience: int | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    units: Callable[[Batch], Any] | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    eval_every: int = 1,
    progress: bool | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> Fit:
    """Train ``model`` and return it with its history.

    Args:
        model: trained in place. It is put in train mode once, at the start; a part that must stay in
            evaluation mode (a frozen encoder) says so by overriding ``train()``.
        loss_fn: ``(model, batch) -> (loss, logs)``: a scalar MEAN over the batch's units, and scalars to
            log, means over the same units. ``batch`` also carries ``epoch`` and ``step`` (from 0) and
            ``epochs``.
        batches: what a data set's ``batches(...)`` returns: ``len(batches)`` batches an epoch, given by
            ``batches.epoch(epoch, start)``. A list of dicts serves too.
        epochs: passes over ``batches``.
        optimizer: over the parameters of ``model``, or a function of them:
            ``lambda p: torch.optim.SGD(p, 0.1)``.
        schedule: factor on each group's initial learning rate, as a function of step / all steps.
        evaluate: called with the model in evaluation mode, without gradients, every ``eval_every`` epochs
            and after the last; returns metrics. With several processes each calls it, and the main one's
            answer counts.
        monitor: the metric that decides what is best; ``mode`` says whether ``"max"`` or ``"min"`` is better.
            Only a strictly better value replaces the best.
        keep: end with the ``"best"`` weights, if there is a ``monitor``, or the ``"last"``.
        patience: stop after this many evaluations in a row without a new best.
        clip: largest norm of the whole gradient.
        accumulate: micro-batches that each batch is split into, to save memory: same gradient, less at once.
        units: what ``loss_fn`` takes the mean over, to weight micro-batches by: by default rows, for a mean
            over tokens ``lambda batch: (batch["labels"] != -100).sum()``.
        folder: where the checkpoint and the finished run are kept. The same call again resumes, or returns
            the finished run at once. A changed setting is noticed, a changed ``loss_fn`` is not: that is
            what ``kd.run_grid`` is for.
        checkpoint_every: steps between checkpoints; by default they come at ends of epochs, 20 seconds or
            more apart.
        eval_every: epochs between evaluations.
        progress: show a bar; by default yes, except in worker processes.
        seed: of dropout and whatever else ``loss_fn`` draws; the batches have their own.
        accelerator: by default one with this machine's device and precision (``kd.scale.precision``).

    Raises:
        ValueError: an impossible setting, or ``folder`` holds another run.
        FloatingPointError: the loss became NaN or infinite (found at the end of the epoch).
    """
    run = _Run(
        model, loss_fn, as_batches(batches), epochs, optimizer, schedule, evaluate, monitor, mode, keep,
        patience, clip, accumulate, units, Path(folder) if folder else None, checkpoint_every, eval_every,
        seed, accelerator or _accelerator(),
    )  # fmt: skip
    run.begin()
    if scale.rehearsing():
        return run.rehearse()
    if checkpoints.load_finished(run):
        return run.result()
    checkpoints.load(run)
    try:
        with _bar(run, progress) as bar:
            while not run.done():
                run.train_epoch(bar)
                run.end_epoch()
                bar.set_postfix(run.shown(), refresh=False)
        run.finish()
    finally:
        run.set_lr(1.0)  # the optimiser may be used again, for another phase or after an interrupt
    return run.result()


# --- the loop ----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One call of :func:`fit`: its arguments, and how far it has come."""

    model: nn.Module
    loss_fn: LossFn
    batches: Any
    epochs: int
    optimizer: Any
    schedule: Schedule
    evaluate: Callable[[nn.Module], dict[str, float]] | None
    monitor: str | None
    mode: str
    keep: str
    patience: int | None
    clip: float | None
    accumulate: int
    units: Callable[[Batch], Any] | None
    folder: Path | None
    checkpoint_every: int | None
    eval_every: int
    seed: int
    accelerator: Any

    # how far it has come: all of this, the weights, the optimiser and the random states make a checkpoint
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    since_best: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of this epoch's logs, each times its weight
    weights: dict[str, Any] = field(default_factory=dict)  # and the sums of the weights
    seconds: float = 0.0
    resumed: bool = False

    def begin(self) -> None:
        """Check the arguments, put everything on its device, seed."""
        self._check()
        self.device = self.accelerator.device
        self.model.to(self.device).train()
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer = self.optimizer(self.model.parameters())
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._check_parameters()
        self.initial_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.settings = checkpoints.settings(self)
        self.total_steps = self.epochs * len(self.batches)
        if self.accelerator.num_processes > 1:
            _broadcast(self.model.state_dict())
        scale.seed_everything(self.seed + self.accelerator.process_index)
        if self.folder and self.accelerator.is_main_process:
            for part in self.folder.glob(".*.part"):  # what a killed run was writing
                part.unlink()
        self.clock = self.saved_at = time.perf_counter()

    def done(self) -> bool:
        tired = self.patience is not None and self.since_best >= self.patience
        return self.epoch >= self.epochs or tired

    def train_epoch(self, bar: Any) -> None:
        """The rest of an epoch, from the batch after the last one seen."""
        start = self.step - self.epoch * len(self.batches)
        for batch in self.batches.epoch(self.epoch, start):
            self.train_step(batch)
            bar.update()
            if self.folder and self.checkpoint_every and self.step % self.checkpoint_every == 0:
                checkpoints.save(self)

    def train_step(self, batch: Batch) -> None:
        """One step of the optimiser: the gradient of the whole batch's mean, from its parts."""
        self.set_lr(self.schedule(self.step / self.total_steps))
        self.optimizer.zero_grad()
        for part, weight in self._parts(batch):
            with self.accelerator.autocast():
                loss, logs = self.loss_fn(self.model, self._place(part))
            if loss.ndim:
                raise ValueError(f"loss_fn returned a loss of shape {tuple(loss.shape)}; return its mean")
            self._log({**logs, "loss": loss}, weight)  # also the loss: a log of that name gives way
            self._backward(loss if weight is WHOLE else loss * weight)
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        self._update()
        self.step += 1

    def set_lr(self, factor: float) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = lr * factor

    def end_epoch(self) -> None:
        """Write the epoch's row; evaluate; keep the best; write a checkpoint if one is due."""
        row = self._row()
        if self.evaluate and ((self.epoch + 1) % self.eval_every == 0 or self.epoch + 1 == self.epochs):
            metrics = self._metrics(taken=row)
            row |= metrics
            self._compare(metrics)
        self.history.append(row)
        self.epoch, self.sums, self.weights = self.epoch + 1, {}, {}
        if self.folder and not self.checkpoint_every and not self.done() and self.checkpoint_due():
            checkpoints.save(self)

    def shown(self) -> dict[str, str]:
        """The last row for the progress bar."""
        return {k: f"{v:.4g}" for k, v in self.history[-1].items() if k not in RUN_COLUMNS}

    def finish(self) -> None:
        """Take up the weights to keep, and store them as the finished run."""
        self.tick()
        if self.keep == "best" and self.best_weights:
            self.model.load_state_dict(self.best_weights)
        if self.folder and self.accelerator.is_main_process:
            checkpoints.save_finished(self)
        self.accelerator.wait_for_everyone()

    def result(self) -> Fit:
        return Fit(self.model.eval(), self.history, self.best, self.step, self.seconds, self.resumed)

    # --- one step, in detail ---

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, Any]]:
        """This process's micro-batches, each with its share of the whole batch's units.

        Every process sees the whole batch, so that the shares need no talk between them. A part without
        units is left out: a mean over nothing is NaN, and its weight is 0.
        """
        count = self.accumulate * self.accelerator.num_processes
        if count == 1:
            yield batch, WHOLE
            return
        units = self.units or n_rows
        whole = units(batch)
        whole = whole + (whole == 0)
        first = self.accumulate * self.accelerator.process_index
        for index in range(first, first + self.accumulate):
            part = part_of(batch, index, count)
            if n_rows(part) and (mine := units(part)):
                yield part, mine / whole

    def _place(self, batch: Batch) -> Batch:
        moved = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        return {**moved, "epoch": self.epoch, "step": self.step, "epochs": self.epochs}

    def _log(self, logs: dict[str, Any], weight: Any) -> None:
        """Add to the epoch's sums on the device: nothing here waits for a GPU."""
        for name, value in logs.items():
            value = value.detach() if isinstance(value, Tensor) else value
            if name not in self.sums:
                self.sums[name], self.weights[name] = self.zero(), 0
            self.sums[name] += value if weight is WHOLE else value * weight
            self.weights[name] = self.weights[name] + weight

    def zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _backward(self, loss: Tensor) -> None:
        scaler = self.accelerator.scaler  # only fp16 has one: small gradients would round to 0
        (scaler.scale(loss) if scaler else loss).backward()

    def _update(self) -> None:
        """Clip and step. The bare optimiser: accelerate's wrapper costs 5 to 11 % of a small step."""
        scaler = self.accelerator.scaler
        if self.clip is not None:
            if scaler:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if scaler:
            scaler.step(self.optimizer)  # leaves the step out where a gradient overflowed
            scaler.update()
        else:
            self.optimizer.step()

    def _sum_gradients(self) -> None:
        """Sum the processes' gradients in one message.

        By hand and not by DistributedDataParallel, which hides the model's own methods (``generate``), wants
        exactly one forward pass a step, and waits for ever for a process that has no rows.
        """
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        has = torch.tensor([float(p.grad is not None) for p in self.parameters], device=self.device)
        message = torch.cat([grad.flatten() for grad in mine] + [has])
        *sums, has = self.accelerator.reduce(message, "sum").split([p.numel() for p in mine] + [len(has)])
        for parameter, total, users in zip(self.parameters, sums, has, strict=True):
            if parameter.grad is not None or users > 0:  # what no process used keeps no gradient
                parameter.grad = total.view_as(parameter).to(parameter.dtype)

    # --- the end of an epoch, in detail ---

    def _row(self) -> dict[str, Any]:
        means = self._means()
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss became {means['loss']} in epoch {self.epoch}; lower the learning rate, "
                "set clip=1.0, or look for log(0) or a division by 0 in loss_fn"
            )
        if clash := sorted(set(RUN_COLUMNS) & set(means)):
            raise ValueError(f"loss_fn logs {clash}, names that fit() uses itself; give them other names")
        self.tick()
        lr = self.optimizer.param_groups[0]["lr"]
        return {"epoch": self.epoch, "step": self.step, "lr": lr, "seconds": self.seconds, **means}

    def _means(self) -> dict[str, float]:
        """The epoch's mean of each log over steps, of all processes: the one place that waits for a GPU."""
        totals = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        mine = {k: (total, float(self.weights[k])) for k, total in zip(self.sums, totals, strict=True)}
        everyone, means = self.gather(mine), {}
        for name in dict.fromkeys(name for sums in everyone for name in sums):
            parts = [sums[name] for sums in everyone if name in sums]
            means[name] = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
        return {"loss": means.pop("loss", 0.0), **means}

    def _metrics(self, taken: dict[str, Any]) -> dict[str, float]:
        """Evaluate, and leave every module in the mode it was in."""
        if self.accelerator.num_processes > 1:
            _broadcast(dict(self.model.named_buffers()))  # each process's batch-norm has seen other rows
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                metrics = {name: float(value) for name, value in self.evaluate(self.model).items()}
        finally:
            for module, training in modes:
                module.training = training
        metrics = self.gather(metrics)[0]
        if clash := sorted(set(taken) & set(metrics)):
            raise ValueError(f"evaluate returned {clash}, taken by training; say val_{clash[0]} or the like")
        if self.monitor and self.monitor not in metrics:
            raise ValueError(f"monitor is {self.monitor!r}, but evaluate returned {sorted(metrics)}")
        return metrics

    def _compare(self, metrics: dict[str, float]) -> None:
        """Strictly better replaces the best; the first of equals stays; NaN is never best."""
        if not self.monitor:
            return
        sign = 1 if self.mode == "max" else -1
        value = sign * metrics[self.monitor]
        if math.isnan(value) or (self.best and value <= sign * self.best[self.monitor]):
            self.since_best += 1
            return
        self.best, self.since_best = {"epoch": self.epoch, **metrics}, 0
        if self.keep == "best":
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, the main one's first."""
        if self.accelerator.num_processes == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def checkpoint_due(self) -> bool:
        return self.gather(time.perf_counter() - self.saved_at >= CHECKPOINT_SECONDS)[0]

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    # --- before anything runs ---

    def _check(self) -> None:
        for name in ("epochs", "accumulate", "eval_every", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not len(self.batches):
            raise ValueError("batches is empty; check batch_size and drop_last against the examples")
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'max' or 'min'")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep is {self.keep!r}; it must be 'best' or 'last'")
        if self.monitor and not self.evaluate:
            raise ValueError(f"monitor is {self.monitor!r}, but no evaluate computes it; give both or none")
        if self.patience and not self.monitor:
            raise ValueError("patience needs a monitor to judge by; name one of evaluate's metrics")

    def _check_parameters(self) -> None:
        known = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) not in known for parameter in self.parameters):
            raise ValueError(
                "the optimizer holds parameters that are not the model's, so no checkpoint would have them; "
                "put all that is trained into one module (nn.ModuleDict) and pass that as the model"
            )

    # --- rehearsal ---

    def rehearse(self) -> Fit:
        """Two steps on a few rows and one evaluation; what was measured goes to :mod:`kdlib.rehearsal`."""
        batches = list(itertools.islice(self.batches.epoch(0), 2))
        rows, parts = max(map(n_rows, batches)), self.accumulate * self.accelerator.num_processes
        few = between(batches[0], 0, rehearsal.ROWS)
        self.accumulate, planned = 1, self.accumulate  # measured on one micro-batch
        cost = rehearsal.measure(self.model, self.optimizer, lambda: self.train_step(few))
        self.accumulate = planned
        self.train_step(between(batches[-1], 0, rehearsal.ROWS * parts))
        grow = rows / n_rows(few)
        rehearsal.record(
            "/".join(self.folder.parts[-2:]) if self.folder else type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            rows=rows,
            planned_steps=self.total_steps,
            step_flops=cost.flops * grow,
            step_seconds=cost.seconds,
            fixed_bytes=cost.fixed_bytes,
            activation_bytes=cost.activation_bytes * grow / parts,
        )
        self.folder, self.eval_every = None, 1  # a rehearsal stores nothing, and evaluates
        self.end_epoch()
        return self.result()


# --- small helpers -----------------------------------------------------------------------------------------


def _accelerator() -> Accelerator:
    from accelerate import Accelerator

    return Accelerator(mixed_precision=scale.precision(), cpu=scale.device().type == "cpu")


def _broadcast(tensors: dict[str, Tensor]) -> None:
    """Give every process the main one's values, in place."""
    from accelerate.utils import broadcast

    broadcast(list(tensors.values()))


def _bar(run: _Run, progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    shown = os.environ.get("KDLIB_WORKER") != "1" if progress is None else progress
    shown = shown and run.accelerator.is_main_process
    return tqdm(total=run.total_steps, initial=run.step, unit="step", leave=False, disable=not shown)
