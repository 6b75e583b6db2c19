"""The run store: a grid of arms and seeds, each run made once and again only when what made it changed."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import os
import random
import re
import shutil
import tempfile
import threading
import time
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import pandas
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor, nn
from tqdm.auto import tqdm

from kdlib import files, scale
from kdlib.fingerprint import fingerprint

MODEL, ARRAYS, RECORD = "model.safetensors", "arrays.safetensors", "run.json"
Shared = dict[str, Any] | Callable[[int], dict[str, Any]] | None

_Task = namedtuple("_Task", "folder arm seed settings")  # a run to make or to load
_counted: dict[Path, tuple[float, bool]] = {}  # runs of this process by folder: seconds, and whether it made them

_one_at_a_time = threading.Lock()


@dataclass
class Outcome:
    """What a notebook's ``train`` function returns.

    Attributes:
        metrics: the run's final numbers by name.
        history: rows over time, as ``Fit.history``.
        model: the student; its weights are stored.
        arrays: tensors worth keeping (test logits), by name.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    model: nn.Module | None = None
    arrays: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One finished run of the store.

    Attributes:
        arm, seed, settings: what it is a run of; settings as text where JSON has no word for them.
        metrics, history: what ``train`` returned; no metrics if it diverged.
        seconds: wall seconds of the start that finished it.
        hardware: the machine that made it, as ``scale.hardware()`` names it.
        folder: where it lies.
        diverged: the message of the FloatingPointError in which training ended, or None.
        made: date and environment.
    """

    arm: str
    seed: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    seconds: float
    hardware: str
    folder: Path
    diverged: str | None
    made: dict[str, str] = field(default_factory=dict, repr=False)


class Runs(list[Run]):
    """The runs of a grid, arm by arm and in each seed by seed."""

    def get(self, arm: str, seed: int) -> Run:
        """The run of one arm and seed."""
        for run in self:
            if (run.arm, run.seed) == (arm, seed):
                return run
        there = sorted({(run.arm, run.seed) for run in self})
        raise ValueError(f"there is no run of arm {arm!r} with seed {seed}; there are {there}")

    def frame(self) -> pandas.DataFrame:
        """One row a run: arm, seed, seconds, diverged, metrics (NaN where it diverged)."""
        rows = ({"arm": r.arm, "seed": r.seed, "seconds": r.seconds, "diverged": bool(r.diverged)} for r in self)
        return pandas.DataFrame([{**row, **run.metrics} for row, run in zip(rows, self, strict=True)])

    def histories(self) -> pandas.DataFrame:
        """One row a row of a run's history, with its arm and seed in front."""
        return pandas.DataFrame([{"arm": run.arm, "seed": run.seed, **row} for run in self for row in run.history])

    def arrays(self, arm: str, seed: int) -> dict[str, Tensor]:
        """The tensors that a run stored; none if it stored none."""
        path = self.get(arm, seed).folder / ARRAYS
        return files.read_tensors(path) if path.exists() else {}

    def model(self, arm: str, seed: int, into: nn.Module) -> nn.Module:
        """Load a run's weights into a module of the same make."""
        path = self.get(arm, seed).folder / MODEL
        if not path.exists():
            raise ValueError(f"arm {arm!r}, seed {seed} stored no model; return Outcome(model=...) from train")
        into.load_state_dict(files.read_tensors(path))
        return into


def run_grid(
    name: str,
    train: Callable[..., Outcome],
    arms: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    *,
    shared: Shared = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Runs:
    """Make, or load, the run of every arm and seed.

    A run is ``train(seed=seed, folder=folder, **shared, **arm)`` with all generators seeded. It is stored under the
    fingerprint of the function with all code that it reaches, the arm's settings, ``shared``, the seed, the kind of
    device and the precision, all as they are at this call; where a whole run lies under it, it is loaded. Not seen are
    the contents of files and environment variables that ``train`` reads by itself, and the versions of installed
    libraries: hand contents in as settings or through ``shared``. A rehearsal stores nothing that counts.

    Runs are spread over processes of one thread each, one a GPU where there are several, and through the backend that
    the caller set with ``joblib.parallel_config`` (``"dask"``, ``"ray"``): then ``KDLIB_HOME`` must be a folder that all
    machines share, and the backend says how many run at once.

    Args:
        name: the grid's folder in the store; one an experiment.
        train: may be defined in a notebook. ``folder`` is for ``fit(folder=folder / "phase1")``: what a killed run
            leaves there is found by the next call. It goes when the run is finished.
        arms: settings by arm.
        seeds: each used for every arm, so that differences are paired.
        shared: big things that all runs use, such as data sets and teachers; or a function of the seed that gives them.
        jobs: processes; 1 runs in this one. Default: ``scale.jobs()``.
        progress: show a bar while runs are made.

    Raises:
        ValueError: no arms or seeds, a seed twice, or a setting's name that is taken.
        RuntimeError: some runs failed; the others are stored. A FloatingPointError is no failure but a divergence, and
            is stored as such.
    """
    given = {seed: shared(seed) if callable(shared) else shared or {} for seed in seeds}
    if not arms or not seeds or len(given) < len(seeds):
        raise ValueError(f"a grid needs arms and seeds, each one once; arms are {list(arms)}, seeds are {list(seeds)}")
    for arm, settings in arms.items():
        if taken := {"seed", "folder", *given[seeds[0]]} & set(settings):
            raise ValueError(f"arm {arm!r} sets {sorted(taken)}, which the grid gives to train itself; rename them")
    store = Path(_rehearsed().name) if scale.rehearsing() else files.home() / "runs"
    tasks = _tasks(store / _slug(name), train, arms, given)
    found = {task.folder: _load(task) for task in tasks}
    todo = [task for task in tasks if not found[task.folder]]
    ends = _made(todo, train, given, 1 if scale.rehearsing() else jobs or scale.jobs())
    ends = tqdm(ends, total=len(todo), desc=name, unit="run", disable=not (todo and progress))
    failures = [f"arm {task.arm!r}, seed {task.seed}: {error}" for task, error in ends if error]
    if failures:
        told = f"{len(failures)} of {len(tasks)} runs failed; mend the cause and call again: the others are stored"
        raise RuntimeError("\n".join([told, *failures]))
    runs = Runs(found[task.folder] or _load(task) for task in tasks)
    for run in runs:
        made = not found[run.folder] or _counted.get(run.folder, (0.0, False))[1]
        _counted[run.folder] = (run.seconds, made)
    return runs


def spent() -> float:
    """Seconds of all runs that this process's grids made or loaded, each once: what the chapter's training takes."""
    return sum(seconds for seconds, _ in _counted.values())


def counted() -> tuple[int, int]:
    """How many runs this process's grids made or loaded, and how many of them were loaded."""
    return len(_counted), sum(not made for _, made in _counted.values())


def tune(
    name: str,
    train: Callable[..., Outcome],
    families: dict[str, list[dict[str, Any]]],
    seeds: Sequence[int],
    *,
    metric: str = "validation",
    widen: dict[str, int] | None = None,
    **options: Any,
) -> tuple[dict[str, dict[str, Any]], pandas.DataFrame]:
    """The best settings of each family by its runs' mean ``metric``: a grid search in which all are treated alike.

    Args:
        name: of the grid in the store.
        train: as for :func:`run_grid`.
        families: candidate settings of each family; of several that are equally good the first is chosen, and a single
            one is not tried.
        seeds: to tune on; use others to report on.
        metric: of the runs, larger is better. A candidate that diverged for one seed is out.
        widen: numbers whose grid may grow, and how often: where a family's best value is the smallest or the largest
            tried, the next one outside, a factor of three further, is tried too.
        options: for :func:`run_grid`.

    Returns:
        The chosen settings by family, and a row a candidate that was tried, with its settings and its mean metric.

    Raises:
        ValueError: a family without candidates, or no candidate of it ran through.
    """
    if empty := [family for family, candidates in families.items() if not candidates]:
        raise ValueError(f"family {empty[0]!r} has no candidates; give it at least one dict of settings")
    chosen = {family: candidates[0] for family, candidates in families.items()}
    todo = [(family, settings) for family, given in families.items() if len(given) > 1 for settings in given]
    tried: dict[str, list[tuple[dict, float]]] = {family: [] for family, _ in todo}
    left = dict(widen or {})
    while todo:
        arms = {f"{family} @ {fingerprint(settings)[:8]}": (family, settings) for family, settings in todo}
        runs = run_grid(name, train, {arm: settings for arm, (_, settings) in arms.items()}, seeds, **options)
        for arm, (family, settings) in arms.items():
            scores = [run.metrics.get(metric, np.nan) for run in runs if run.arm == arm]
            tried[family].append((settings, float(np.mean(scores))))
        for family, scored in tried.items():
            if np.isnan([score for _, score in scored]).all() and not scale.rehearsing():
                raise ValueError(f"no candidate of family {family!r} ran through; try smaller learning rates")
            chosen[family] = max(scored, key=lambda found: np.nan_to_num(found[1], nan=-np.inf))[0]
        todo = [(family, more) for family in tried for more in _outside(chosen[family], tried[family], left)]
        left = {key: times - 1 for key, times in left.items()}
    found = [(family, settings, score) for family, scored in tried.items() for settings, score in scored]
    table = pandas.DataFrame(
        [{"family": family, **_words(settings), metric: score} for family, settings, score in found]
    )
    return chosen, table if found else pandas.DataFrame(columns=["family", metric])


def _outside(best: dict[str, Any], tried: list[tuple[dict, float]], left: dict[str, int]) -> list[dict[str, Any]]:
    """``best`` with the next value outside, for each number whose best value is at an edge of those tried."""
    found = []
    for key in (key for key, times in left.items() if times > 0):
        values = {settings[key] for settings, _ in tried}
        for edge, factor in ((min(values), 1 / 3), (max(values), 3)):
            if best[key] == edge and len(values) > 1:
                found.append({**best, key: float(f"{edge * factor:.2g}")})
    return found


def _tasks(folder: Path, train: Callable, arms: dict[str, dict], given: dict[int, dict]) -> list[_Task]:
    """Every run with the folder that is named after its fingerprint, taken anew at each call."""
    memo: dict[int, Any] = {}
    code = fingerprint(train, scale.device().type, scale.precision(), memo=memo)
    common = {seed: fingerprint(code, shared, seed, memo=memo) for seed, shared in given.items()}
    own = {arm: fingerprint(settings, memo=memo) for arm, settings in arms.items()}
    return [
        _Task(folder / f"{_slug(arm)}-s{seed}-{fingerprint(common[seed], own[arm])[:12]}", arm, seed, settings)
        for arm, settings in arms.items()
        for seed in given
    ]


@functools.cache
def _rehearsed() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="kdlib-rehearsal-")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def _load(task: _Task) -> Run | None:
    """The stored run, if it is whole."""
    try:
        record = files.read_json(task.folder / RECORD)
        return Run(**{**record, "arm": task.arm, "folder": task.folder})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        print(f"arm {task.arm!r}, seed {task.seed} is damaged in the store and made again: {error}")
        (task.folder / RECORD).unlink()
        return None


# --- making runs, here and elsewhere ---


def _made(todo: list[_Task], train: Callable, given: dict[int, dict], jobs: int) -> Iterator[tuple[_Task, str]]:
    """Make runs, in this process or in others, and yield each with its failure, or ""."""
    backend, _ = joblib.parallel.get_active_backend()
    local = type(backend).__name__ in ("LokyBackend", "SequentialBackend", "ThreadingBackend")
    jobs = min(jobs, len(todo)) if local else None
    if not todo or jobs == 1:
        yield from ((task, _make(task, train, given[task.seed])) for task in todo)
        return
    # a function that says `.classes` or `.ops` makes cloudpickle reach for torch's namespaces of these names
    for name in ("classes", "ops"):
        copyreg.pickle(type(getattr(torch, name)), lambda _, name=name: (getattr, (torch, name)))
    env = {key: value for key, value in os.environ.items() if key.startswith("KDLIB_")}
    env |= {"KDLIB_HOME": str(files.home()), "KDLIB_SCALE": scale.scale(), "KDLIB_WORKER": "1"}
    store, by_folder = todo[0].folder.parent, {task.folder: task for task in todo}
    store.mkdir(parents=True, exist_ok=True)
    config = joblib.parallel_config("loky", inner_max_num_threads=1) if local else contextlib.nullcontext()
    with config, tempfile.TemporaryDirectory(dir=store, prefix=".given.") as place:
        path = Path(place) / "given"  # once, and not with every run; in the store, which other machines see as well
        path.write_bytes(cloudpickle.dumps((train, by_folder, given)))
        order = "generator_unordered" if backend.supports_return_generator or local else "list"
        calls = (joblib.delayed(_make_elsewhere)(folder, path, env) for folder in by_folder)
        try:
            for folder, error in joblib.Parallel(jobs, return_as=order, batch_size=1)(calls):
                yield by_folder[folder], error
        except TerminatedWorkerError as error:
            raise RuntimeError(
                "the process of a run was killed (out of memory? jobs=1 and smaller batches need less). "
                "Call again: what is stored is kept, and runs go on from their checkpoints"
            ) from error


def _make_elsewhere(folder: Path, path: Path, env: dict[str, str]) -> tuple[Path, str]:
    """Make a run in a worker, which may be a thread of a cluster's: generators and environment are for one at a time.

    What comes back is plain: a worker may be unable to pickle the settings that it was given.
    """
    with _one_at_a_time:
        before = {name: value for name, value in os.environ.items() if name in env}
        os.environ.update(env)
        try:
            _take_gpu()
            torch.set_num_threads(1)
            train, tasks, given = _unpacked(path)
            return folder, _make(tasks[folder], train, given[tasks[folder].seed])
        finally:
            for name in env:
                del os.environ[name]
            os.environ.update(before)


@functools.lru_cache(maxsize=1)
def _unpacked(path: Path) -> tuple[Callable, dict[Path, _Task], dict[int, dict[str, Any]]]:
    """What the process that started this one wrote; nothing that is stored is ever unpickled."""
    return cloudpickle.loads(path.read_bytes())


@functools.cache
def _take_gpu() -> FileLock | None:
    """Of several GPUs let this worker see one that no other worker has, for as long as it lives."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    for gpu in seen.split(",") if "," in seen else ():
        lock = FileLock(Path(tempfile.gettempdir()) / f"kdlib-gpu-{gpu}.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(blocking=False)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return lock
    return None


def _make(task: _Task, train: Callable, shared: dict[str, Any]) -> str:
    """Make one run, alone among all processes, and say why it failed, or "". The record is written last."""
    work, began, diverged = task.folder / "work", time.perf_counter(), None
    with files.lock(task.folder / "run"):
        if (task.folder / RECORD).exists():
            return ""
        try:
            work.mkdir(parents=True, exist_ok=True)
            with _alone(task.seed):
                outcome = train(seed=task.seed, folder=work, **shared, **task.settings)
            if not isinstance(outcome, Outcome):
                raise TypeError(f"train returned a {type(outcome).__name__}; it must return a kd.Outcome")
            metrics = {name: float(value) for name, value in outcome.metrics.items()}
        except FloatingPointError as error:
            outcome, metrics, diverged = Outcome({}), {}, str(error)
        except Exception:
            return traceback.format_exc()
        if outcome.model is not None:
            files.write_tensors(task.folder / MODEL, outcome.model.state_dict())
        if outcome.arrays:
            files.write_tensors(task.folder / ARRAYS, outcome.arrays)
        record = {
            "seed": task.seed, "metrics": metrics, "history": _words(outcome.history), "settings": _words(task.settings),
            "diverged": diverged, "hardware": scale.hardware(), "seconds": time.perf_counter() - began,
            "made": {"arm": task.arm, "date": time.strftime("%Y-%m-%d"), **scale.environment()},
        }  # fmt: skip
        files.write_json(task.folder / RECORD, record)
        shutil.rmtree(work, ignore_errors=True)
    return ""


@contextlib.contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Seed all generators for a run and give the caller's back; grids within a run count within it."""
    python, array, before = random.getstate(), np.random.get_state(), dict(_counted)
    try:
        with torch.random.fork_rng():
            scale.seed_everything(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        _counted.clear()
        _counted.update(before)


def _words(value: Any) -> Any:
    """``value`` as JSON can say it, without addresses in memory."""
    if isinstance(value, functools.partial):
        given = [*map(_words, value.args), *(f"{key}={_words(item)}" for key, item in value.keywords.items())]
        return f"{_words(value.func)}({', '.join(map(str, given))})"
    if isinstance(value, dict):
        return {str(key): _words(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_words, value)]
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    plain = value is None or isinstance(value, (bool, int, float, str))
    return value if plain else getattr(value, "__qualname__", None) or type(value).__name__
