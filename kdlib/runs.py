"""The run store: a grid of arms and seeds, each run made once and again only when what made it changed."""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import datetime
import functools
import math
import pickle
import random
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import files, scale
from .fingerprint import fingerprint

if TYPE_CHECKING:
    import pandas

MODEL, ARRAYS, RECORD = "model.safetensors", "arrays.safetensors", "run.json"
_BUSY = "busy"  # another process holds the run

_spent: dict[Path, float] = {}  # seconds of the runs that this process made or loaded, by folder


@dataclass
class Outcome:
    """What a notebook's ``train`` function returns.

    Attributes:
        metrics: the run's final numbers by name.
        history: rows over time, as ``Fit.history``.
        model: the student, or several models by name; its weights are stored.
        arrays: tensors worth keeping (test logits, embeddings), by name.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    model: nn.Module | dict[str, nn.Module] | None = None
    arrays: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One finished run of the store.

    Attributes:
        arm: the arm's name.
        seed: the run's seed.
        metrics: final numbers; empty if it diverged.
        history: rows over time.
        settings: the arm's settings, as text where JSON has no word for them.
        seconds: wall seconds of the start that finished it.
        hardware: the machine that made it, as ``scale.hardware()`` names it.
        folder: where it lies.
        diverged: whether training ended in a FloatingPointError.
    """

    arm: str
    seed: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    seconds: float
    hardware: str
    folder: Path
    diverged: bool


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
        import pandas

        keys = ("arm", "seed", "seconds", "diverged")
        return pandas.DataFrame([{**{key: getattr(run, key) for key in keys}, **run.metrics} for run in self])

    def histories(self) -> pandas.DataFrame:
        """One row a row of a run's history, with its arm and seed in front."""
        import pandas

        return pandas.DataFrame([{"arm": run.arm, "seed": run.seed, **row} for run in self for row in run.history])

    def model(self, arm: str, seed: int, into: nn.Module, part: str | None = None) -> nn.Module:
        """Load a run's weights into a module of the same make; ``part`` names one of several models."""
        run = self.get(arm, seed)
        if not (run.folder / MODEL).exists():
            raise ValueError(f"arm {arm!r}, seed {seed} stored no model; return Outcome(model=...) from train")
        tensors, meta = files.read_tensors(run.folder / MODEL)
        if part not in (meta["parts"] or [None]):
            raise ValueError(f"arm {arm!r} stored the models {meta['parts']}; part is {part!r}, give one of them")
        prefix = f"{part}/" if part else ""
        own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        into.load_state_dict(own)
        return into

    def arrays(self, arm: str, seed: int) -> dict[str, Tensor]:
        """The tensors that a run stored; none if it stored none."""
        path = self.get(arm, seed).folder / ARRAYS
        return files.read_tensors(path)[0] if path.exists() else {}


@dataclass(frozen=True)
class _Task:
    """A run to load or to make: its fingerprint and where it lies."""

    arm: str
    seed: int
    settings: dict[str, Any]
    key: str
    folder: Path


def run_grid(
    name: str,
    train: Callable[..., Outcome],
    arms: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    *,
    shared: dict[str, Any] | None = None,
    jobs: int | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Runs:
    """Make, or load, the run of every arm and seed.

    A run is ``train(seed=seed, folder=folder, **shared, **arm)`` with all generators seeded. It is stored
    under the fingerprint of the function with all that it reaches, the arm's settings, ``shared``, the seed,
    the kind of device and the precision; where a whole run lies under it, it is loaded. Several
    processes may work on one grid: each run is made by one of them. A rehearsal stores nothing that counts.

    Args:
        name: the grid's folder in the store; one an experiment.
        train: may be defined in a notebook. ``folder`` is for ``fit(folder=folder / "phase1")``: what a
            killed run leaves there is found by the next call. It goes when the run is finished.
        arms: settings by arm.
        seeds: each used for every arm, so that differences are paired.
        shared: big things that all runs use, such as data sets and teachers.
        jobs: processes, of one thread each; 1 runs in this process. Default: ``scale.jobs()``.
        store: a folder; default ``runs`` in ``files.home()``.
        progress: say what is loaded and show a bar.

    Raises:
        ValueError: no arms or seeds, a seed twice, or a setting's name that is taken.
        RuntimeError: some runs failed; the others are stored. A FloatingPointError is no failure but a
            divergence, and is stored as such.
    """
    shared = shared or {}
    _check(arms, seeds, shared)
    rehearsal = scale.rehearsing()
    store = Path(store or files.home() / "runs") if not rehearsal else _rehearsal_store()
    tasks = _tasks(store / _slug(name), train, arms, seeds, shared)
    found = {task.folder: _load(task) for task in tasks}
    todo = [task for task in tasks if found[task.folder] is None]
    jobs = min(1 if rehearsal else jobs or scale.jobs(), len(todo))
    if progress:
        left = f"{len(todo)} to train on {jobs} process{'es' if jobs > 1 else ''}" if todo else "none to train"
        print(f"{name}: {len(tasks)} runs, {len(tasks) - len(todo)} from the store, {left}")
    failures = _make_all(todo, train, shared, jobs, progress)
    if failures:
        told = "\n".join(f"arm {task.arm!r}, seed {task.seed}: {error}" for task, error in failures)
        raise RuntimeError(
            f"{len(failures)} of {len(tasks)} runs failed, the others are stored; mend the cause and call "
            f"again, and only these are made\n{told}"
        )
    runs = Runs(found[task.folder] or _load(task) for task in tasks)
    _spent.update({run.folder: run.seconds for run in runs})
    return runs


def tune(
    name: str,
    train: Callable[..., Outcome],
    families: dict[str, list[dict[str, Any]]],
    seeds: Sequence[int],
    *,
    metric: str = "validation",
    **options: Any,
) -> tuple[dict[str, dict[str, Any]], pandas.DataFrame]:
    """The best settings of each family by its runs' mean ``metric``: a grid search in which all are treated alike.

    Args:
        name: of the grid in the store.
        train: as for :func:`run_grid`.
        families: candidate settings of each family; what differs between a family's candidates is what is tuned. Of
            several that are equally good the first is chosen; a single one is not tried.
        seeds: to tune on; use others to report on.
        metric: of the runs, larger is better. A candidate that diverged for one seed is out.
        options: ``shared``, ``jobs`` and the like, for :func:`run_grid`.

    Returns:
        The chosen settings by family, and a table of what was tried: a row a candidate, with the family, what was
        tuned, and the mean metric.

    Raises:
        ValueError: a family without candidates, or no candidate of it ran through.
    """
    import pandas

    arms, tried = {}, []
    for family, candidates in families.items():
        if not candidates:
            raise ValueError(f"family {family!r} has no candidates; give it at least one dict of settings")
        varied = [
            key
            for key, value in candidates[0].items()
            if any(c[key] is not value and c[key] != value for c in candidates)
        ]
        for number, settings in enumerate(candidates if len(candidates) > 1 else []):
            values = {key: _words(settings[key]) for key in varied}
            label = f"{family} @ {', '.join(map(str, values.values()))}"
            arms[label] = settings
            tried.append({"family": family, "number": number, "arm": label, **values})
    chosen = {family: candidates[0] for family, candidates in families.items()}
    if not arms:
        return chosen, pandas.DataFrame(columns=["family", metric])
    frame = run_grid(name, train, arms, seeds, **options).frame()
    if metric not in frame:  # all diverged
        frame[metric] = math.nan
    means = frame.groupby("arm")[metric].agg(lambda values: values.mean(skipna=False))
    table = pandas.DataFrame(tried)
    table[metric] = means.reindex(table["arm"]).to_numpy()
    for family, rows in table.groupby("family", sort=False):
        if rows[metric].isna().all():
            raise ValueError(f"no candidate of family {family!r} ran through; try smaller learning rates")
        chosen[family] = families[family][rows.loc[rows[metric].idxmax(), "number"]]
    return chosen, table.drop(columns=["arm", "number"])


def spent() -> float:
    """Seconds of all runs that this process's grids made or loaded, each once: what the chapter's training takes.

    A loaded run counts with the seconds that it once took, so the sum does not depend on what the store holds. A grid
    within a train function counts within that function's run, whose seconds hold it.
    """
    return sum(_spent.values())


@functools.cache
def _rehearsal_store() -> Path:
    """A store for this process only: what is rehearsed is rehearsed anew each time."""
    folder = tempfile.mkdtemp(prefix="kdlib-rehearsal-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _check(arms: dict[str, dict[str, Any]], seeds: Sequence[int], shared: dict[str, Any]) -> None:
    if not arms or not seeds:
        raise ValueError(f"a grid needs arms and seeds; arms are {list(arms)}, seeds are {list(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give each one once, or it would count twice in the intervals")
    for arm, settings in arms.items():
        if taken := {"seed", "folder", *shared} & set(settings):
            raise ValueError(f"arm {arm!r} sets {sorted(taken)}, which the grid gives to train itself; rename them")


def _tasks(folder: Path, train: Callable, arms: dict, seeds: Sequence[int], shared: dict[str, Any]) -> list[_Task]:
    common = fingerprint(train, shared, scale.device().type, scale.precision())
    tasks = []
    for arm, settings in arms.items():
        own = fingerprint(common, settings)
        for seed in seeds:
            key = fingerprint(own, int(seed))
            tasks.append(_Task(arm, int(seed), settings, key, folder / f"{_slug(arm)}-s{seed}-{key[:12]}"))
    return tasks


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


# Making runs ------------------------------------------------------------------------------------------------


def _make_all(
    todo: list[_Task], train: Callable, shared: dict[str, Any], jobs: int, progress: bool
) -> list[tuple[_Task, str]]:
    """Make the runs; return what failed and why. Those that another process makes are waited for last."""
    from tqdm.auto import tqdm

    failures = []
    with tqdm(total=len(todo), desc="runs", disable=not (todo and progress)) as bar:
        for wait in (False, True):
            busy = []
            for task, state in _spread(todo, train, shared, jobs, wait):
                if state == _BUSY:
                    busy.append(task)
                    continue
                if state:
                    failures.append((task, state))
                bar.update()
            todo = busy
    return failures


def _spread(
    todo: list[_Task], train: Callable, shared: dict[str, Any], jobs: int, wait: bool
) -> Iterator[tuple[_Task, str]]:
    """Make runs, in this process or in several, and yield each with what :func:`_make` says."""
    if jobs <= 1 or not todo:
        for task in todo:
            yield task, _make(task, train, shared, wait)
        return
    import cloudpickle

    # a function that says `.classes` or `.ops` makes cloudpickle reach for torch's namespaces of these names
    for name in ("classes", "ops"):
        copyreg.pickle(type(getattr(torch, name)), functools.partial(_torch_attribute, name))
    given, lost = cloudpickle.dumps((train, shared)), []
    for task, state in _in_processes(todo, given, jobs, wait):
        if state is None:
            lost.append(task)
        else:
            yield task, state
    if lost:  # a killed worker takes its pool with it: what was under way resumes, one at a time
        print(f"A worker process was killed (out of memory?). {len(lost)} runs go on, one at a time.")
    for task in sorted(lost, key=todo.index):
        for _, state in _in_processes([task], given, 1, wait):
            killed = "its process was killed twice; was there too little memory? Try jobs=1 or smaller batches"
            yield task, killed if state is None else state


def _torch_attribute(name: str, _: Any) -> tuple:
    return getattr, (torch, name)


def _in_processes(todo: list[_Task], given: bytes, jobs: int, wait: bool) -> Iterator[tuple[_Task, str | None]]:
    """Make runs in worker processes of one thread each; None is said of those that a killed worker left."""
    from concurrent.futures import BrokenExecutor

    from joblib.externals import loky

    env = {"KDLIB_WORKER": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pool = loky.ProcessPoolExecutor(jobs, env=env, initializer=_start_worker, initargs=(given,))
    try:
        futures = {pool.submit(_make_in_worker, task, wait): task for task in todo}
        for future in loky.as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenExecutor:
                yield futures[future], None
        pool.shutdown(wait=True)
    finally:  # also when interrupted
        pool.shutdown(wait=True, kill_workers=True)


_given = b""


def _start_worker(given: bytes) -> None:
    global _given
    _given = given
    torch.set_num_threads(1)


@functools.cache
def _unpacked() -> tuple[Callable, dict[str, Any]]:
    return pickle.loads(_given)  # from the process that started this one; nothing stored is ever unpickled


def _make_in_worker(task: _Task, wait: bool) -> str:
    return _make(task, *_unpacked(), wait)


def _make(task: _Task, train: Callable, shared: dict[str, Any], wait: bool) -> str:
    """Make one run, alone among all processes: "" if it is stored, ``_BUSY``, or the failure's traceback."""
    from filelock import FileLock, Timeout

    task.folder.mkdir(parents=True, exist_ok=True)
    own = FileLock(task.folder / "run.lock")
    try:
        own.acquire(blocking=wait)
    except Timeout:
        return _BUSY
    try:
        if _load(task) is None:
            _train(task, train, shared)
        return ""
    except Exception:
        (task.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return traceback.format_exc()
    finally:
        own.release()


def _train(task: _Task, train: Callable, shared: dict[str, Any]) -> None:
    """Call ``train`` and store what it returns; the record comes last, so a run is whole or not there."""
    work, began, divergence = task.folder / "work", time.perf_counter(), None
    work.mkdir(exist_ok=True)
    try:
        with _seeded(task.seed), _counted_once():
            outcome = train(seed=task.seed, folder=work, **shared, **task.settings)
    except FloatingPointError as error:
        outcome, divergence = Outcome({}), str(error)
    if not isinstance(outcome, Outcome):
        raise TypeError(f"train returned a {type(outcome).__name__}; it must return a kd.Outcome")
    record = {
        "arm": task.arm,
        "seed": task.seed,
        "settings": _words(task.settings),
        "metrics": {name: float(value) for name, value in outcome.metrics.items()},
        "history": [_words(row) for row in outcome.history],
        "diverged": divergence,
        "seconds": time.perf_counter() - began,
        "hardware": scale.hardware(),
        "versions": scale.environment(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fingerprint": task.key,
        "files": _store(task.folder, outcome),
    }
    files.write_json(task.folder / RECORD, record)
    (task.folder / "error.txt").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _store(folder: Path, outcome: Outcome) -> dict[str, str]:
    """Write the models and arrays; return their checksums."""
    models = outcome.model if isinstance(outcome.model, dict) else {"": outcome.model} if outcome.model else {}
    weights = {
        f"{part}/{name}" if part else name: tensor
        for part, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    if weights:
        files.write_tensors(folder / MODEL, weights, {"parts": [part for part in models if part]})
    if outcome.arrays:
        files.write_tensors(folder / ARRAYS, outcome.arrays)
    kept = [name for name, there in ((MODEL, weights), (ARRAYS, outcome.arrays)) if there]
    return {name: files.sha256(folder / name) for name in kept}


def _load(task: _Task) -> Run | None:
    """The stored run, or None where there is none that is whole."""
    path = task.folder / RECORD
    if not path.exists():
        return None
    try:
        record = files.read_json(path)
        if record["fingerprint"] != task.key:
            raise ValueError("it is of another run")
        for name, checksum in record["files"].items():
            if files.sha256(task.folder / name) != checksum:
                raise ValueError(f"{name} has other bytes than were stored")
        given = {key: record[key] for key in ("arm", "seed", "metrics", "history", "settings", "seconds", "hardware")}
        run = Run(**given, folder=task.folder, diverged=record["diverged"] is not None)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        print(f"The stored run {task.folder} is damaged ({error!r}); it is made again.")
        path.unlink(missing_ok=True)
        return None
    shutil.rmtree(task.folder / "work", ignore_errors=True)  # of a process killed after its last write
    return run


@contextlib.contextmanager
def _counted_once() -> Iterator[None]:
    """Runs of grids within a train function are in its own seconds: forget them in :func:`spent`."""
    before = dict(_spent)
    try:
        yield
    finally:
        _spent.clear()
        _spent.update(before)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all generators for a run and give the caller's back: whether a run was loaded must not matter."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            scale.seed_everything(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _words(value: Any) -> Any:
    """``value`` as JSON can say it."""
    if isinstance(value, dict):
        return {str(key): _words(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_words(item) for item in value]
    if isinstance(value, (type(None), bool, int, float, str)):
        return value
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    if isinstance(value, functools.partial):  # without the address in memory that its repr has
        given = [*map(str, map(_words, value.args)), *(f"{key}={_words(item)}" for key, item in value.keywords.items())]
        return f"{_words(value.func)}({', '.join(given)})"
    if isinstance(mark := getattr(value, "fingerprint", None), str):
        return f"{type(value).__name__} {mark[:12]}"
    return getattr(value, "__qualname__", None) or repr(value)
