"""The run store: a grid of arms and seeds, each run made once and again only when what made it changed."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import os
import random
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
from unittest import mock

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
Settings = dict[str, Any]
Shared = Settings | Callable[[int], Settings] | None

_Task = namedtuple("_Task", "folder arm seed settings")  # a run to make or to load
_counted: dict[Path, tuple[float, bool]] = {}  # runs of this process by folder: seconds, and whether it made them

_rehearsed = functools.cache(lambda: tempfile.TemporaryDirectory(prefix="kdlib-rehearsal-"))
# What the process that started this one wrote; nothing that is stored is ever unpickled.
_unpacked = functools.lru_cache(maxsize=1)(lambda path: cloudpickle.loads(path.read_bytes()))
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
    folder: Path
    diverged: str | None
    made: dict[str, str] = field(default_factory=dict, repr=False)


class Runs(list[Run]):
    """The runs of a grid, arm by arm and in each seed by seed."""

    def get(self, arm: str, seed: int) -> Run:
        """The run of one arm and seed."""
        there = {(run.arm, run.seed): run for run in reversed(self)}
        if (arm, seed) not in there:
            raise ValueError(f"there is no run of arm {arm!r} with seed {seed}; there are {sorted(there)}")
        return there[arm, seed]

    def frame(self) -> pandas.DataFrame:
        """One row a run: arm, seed, seconds, diverged, metrics (NaN where it diverged)."""
        rows = ({"arm": r.arm, "seed": r.seed, "seconds": r.seconds, "diverged": bool(r.diverged)} for r in self)
        return pandas.DataFrame([{**row, **run.metrics} for row, run in zip(rows, self, strict=True)])

    def histories(self) -> pandas.DataFrame:
        """One row a row of a run's history, with its arm and seed in front."""
        return pandas.DataFrame([{"arm": run.arm, "seed": run.seed, **row} for run in self for row in run.history])

    def arrays(self, arm: str, seed: int) -> dict[str, Tensor]:
        """The tensors that a run stored; none if it stored none."""
        return files.read_tensors(self.get(arm, seed).folder / ARRAYS)

    def model(self, arm: str, seed: int, into: nn.Module) -> nn.Module:
        """Load a run's weights into a module of the same make."""
        path = self.get(arm, seed).folder / MODEL
        if not path.exists():
            raise ValueError(f"arm {arm!r}, seed {seed} stored no model; return Outcome(model=...) from train")
        into.load_state_dict(files.read_tensors(path))
        return into


def run_grid(
    name: str, train: Callable[..., Outcome], arms: dict[str, Settings], seeds: Sequence[int],
    *, shared: Shared = None, jobs: int | None = None, progress: bool = True,
) -> Runs:  # fmt: skip
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
    store = (Path(_rehearsed().name) if scale.rehearsing() else files.home() / "runs") / files.slug(name)
    key = functools.partial(fingerprint, train, scale.device().type, scale.precision(), memo={})  # anew at each call
    tasks = [
        _Task(store / f"{files.slug(arm)}-s{seed}-{key(given[seed], seed, settings)[:12]}", arm, seed, settings)
        for arm, settings in arms.items()
        for seed in given
    ]
    found = {task.folder: _load(task) for task in tasks}
    todo = [task for task in tasks if not found[task.folder]]
    ends = _made(todo, train, given, 1 if scale.rehearsing() else jobs or scale.jobs())
    ends = tqdm(ends, total=len(todo), desc=name, unit="run", disable=not (todo and progress))
    if failures := [f"arm {task.arm!r}, seed {task.seed}: {error}" for task, error in ends if error]:
        told = f"{len(failures)} of {len(tasks)} runs failed; mend the cause and call again: the others are stored"
        raise RuntimeError("\n".join([told, *failures]))
    runs = Runs(found[task.folder] or _load(task) for task in tasks)
    for run in runs:
        _counted[run.folder] = (run.seconds, not found[run.folder] or _counted.get(run.folder, (0, False))[1])
    return runs


def spent() -> float:
    """Seconds of all runs that this process's grids made or loaded, each once: what the chapter's training takes."""
    return sum(seconds for seconds, _ in _counted.values())


def counted() -> tuple[int, int]:
    """How many runs this process's grids made or loaded, and how many of them were loaded."""
    return len(_counted), sum(not made for _, made in _counted.values())


def tune(
    name: str, train: Callable[..., Outcome], families: dict[str, list[Settings]], seeds: Sequence[int],
    *, metric: str = "validation", widen: dict[str, int] | None = None, **options: Any,
) -> tuple[dict[str, Settings], pandas.DataFrame]:  # fmt: skip
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
    tried: dict[str, list[tuple[Settings, float]]] = {f: [] for f, candidates in families.items() if candidates[1:]}
    todo, turn = [(family, settings) for family in tried for settings in families[family]], 0
    while todo:
        arms = {f"{family} @ {fingerprint(settings)[:8]}": (family, settings) for family, settings in todo}
        runs = run_grid(name, train, {arm: settings for arm, (_, settings) in arms.items()}, seeds, **options)
        for arm, (family, settings) in arms.items():
            scores = [run.metrics.get(metric, np.nan) for run in runs if run.arm == arm]
            tried[family].append((settings, float(np.mean(scores))))
        keys, turn = [key for key, times in (widen or {}).items() if times > turn], turn + 1
        todo = []
        for family, scored in tried.items():
            if np.isnan([score for _, score in scored]).all() and not scale.rehearsing():
                raise ValueError(f"no candidate of family {family!r} ran through; try smaller learning rates")
            chosen[family] = max(scored, key=lambda found: np.nan_to_num(found[1], nan=-np.inf))[0]
            todo += [(family, more) for more in _outside(chosen[family], [settings for settings, _ in scored], keys)]
    rows = [{"family": name, **_words(given), metric: score} for name in tried for given, score in tried[name]]
    return chosen, pandas.DataFrame(rows, columns=None if rows else ["family", metric])


def _outside(best: Settings, tried: list[Settings], keys: list[str]) -> Iterator[Settings]:
    """``best`` with the next value outside, for each number whose best value is at an edge of those tried."""
    for key in filter(best.__contains__, keys):
        values = {settings[key] for settings in tried if key in settings}
        for edge, factor in ((min(values), 1 / 3), (max(values), 3)):
            if best[key] == edge and len(values) > 1:
                yield {**best, key: float(f"{edge * factor:.2g}")}


def _load(task: _Task) -> Run | None:
    """The stored run, if it is whole."""
    try:
        return Run(**{**files.read_json(task.folder / RECORD), "arm": task.arm, "folder": task.folder})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        print(f"arm {task.arm!r}, seed {task.seed} is damaged in the store and made again: {error}")
        (task.folder / RECORD).unlink()


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
    store = todo[0].folder.parent
    store.mkdir(parents=True, exist_ok=True)
    config = joblib.parallel_config("loky", inner_max_num_threads=1) if local else contextlib.nullcontext()
    with config, tempfile.TemporaryDirectory(dir=store, prefix=".given.") as place:
        path = Path(place) / "given"  # once, and not with every run; in the store, which other machines see as well
        path.write_bytes(cloudpickle.dumps((train, todo, given)))
        order = "generator_unordered" if backend.supports_return_generator or local else "list"
        calls = (joblib.delayed(_make_elsewhere)(index, path, env) for index in range(len(todo)))
        try:
            for index, error in joblib.Parallel(jobs, return_as=order, batch_size=1)(calls):
                yield todo[index], error
        except TerminatedWorkerError as error:
            told = "the process of a run was killed (out of memory? try jobs=1). Call again: runs go on where they were"
            raise RuntimeError(told) from error


def _make_elsewhere(index: int, path: Path, env: dict[str, str]) -> tuple[int, str]:
    """Make a run in a worker, which may be a thread of a cluster's: generators and environment are for one at a time.

    What comes back is plain: a worker may be unable to pickle the settings that it was given.
    """
    with _one_at_a_time:
        _take_gpu()
        with mock.patch.dict(os.environ, env):
            torch.set_num_threads(1)
            train, tasks, given = _unpacked(path)
            return index, _make(tasks[index], train, given[tasks[index].seed])


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
        files.write_tensors(task.folder / ARRAYS, outcome.arrays)
        files.write_json(task.folder / RECORD, {
            "seed": task.seed, "metrics": metrics, "history": _words(outcome.history), "settings": _words(task.settings),
            "diverged": diverged, "seconds": time.perf_counter() - began,
            "made": {"arm": task.arm, "date": time.strftime("%Y-%m-%d"), **scale.environment()},
        })  # fmt: skip
        shutil.rmtree(work, ignore_errors=True)
    return ""


@contextlib.contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Seed all generators for a run and give the caller's back; grids within a run count within it."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), mock.patch.dict(_counted):
            scale.seed_everything(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


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
    return value if plain else getattr(value, "__qualname__", type(value).__name__)
