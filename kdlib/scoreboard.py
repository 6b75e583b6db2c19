"""From runs to tables: means, paired differences, results files, and the published numbers beside one's own."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlib import files, metrics, scale
from kdlib.runs import Runs, spent

if TYPE_CHECKING:
    import pandas

_NOTHING = metrics.Interval(math.nan, math.nan, math.nan, 0)
ORDER = ("smoke", "lab", "full")


def compare(
    runs: Runs | pandas.DataFrame, metric: str, *, baseline: str | None = None, paper: dict[str, float] | None = None
) -> pandas.DataFrame:
    """One row an arm: mean, sd and n of ``metric``, and the paired difference to ``baseline`` with its 95 % interval.

    Args:
        runs: of a grid, or a frame with columns ``arm``, ``seed`` and the metric.
        metric: which of the runs' metrics.
        baseline: the arm to subtract, seed by seed; only seeds that both arms have count.
        paper: the paper's number by arm, set beside ours.

    Raises:
        ValueError: no such metric or arm.
    """
    import pandas

    wide = _wide(runs, metric)
    if baseline is not None:
        _check_arm(wide, baseline)
    rows = []
    for arm in wide:
        values = wide[arm].dropna()
        row = {"arm": arm, "mean": values.mean(), "sd": values.std(), "n": len(values)}
        if baseline is not None:
            found = _difference(wide, arm, baseline)
            row |= {"difference": found.mean, "low": found.low, "high": found.high}
        if paper is not None:
            row["paper"] = paper.get(arm, math.nan)
        rows.append(row)
    return pandas.DataFrame(rows).set_index("arm")


def duels(
    runs: Runs | pandas.DataFrame, pairs: Sequence[tuple[str, str]], metric: str = "test", *, unit: float = 100.0
) -> pandas.DataFrame:
    """One row a pair of arms: the paired difference first − second, its 95 % interval, and what may be said of it.

    Args:
        runs: of a grid, or a frame with columns ``arm``, ``seed`` and the metric.
        pairs: of arms; only seeds that both have count.
        metric: which of the runs' metrics.
        unit: what differences are multiplied by; 100 turns fractions into points.

    Returns:
        ``difference``, ``low``, ``high``, ``n`` and ``verdict`` ("above", "below" or "not separated").

    Raises:
        ValueError: no such metric or arm.
    """
    import pandas

    wide, rows = _wide(runs, metric), []
    for first, second in pairs:
        _check_arm(wide, first)
        _check_arm(wide, second)
        found = _difference(wide, first, second)
        verdict = "above" if found.low > 0 else "below" if found.high < 0 else "not separated"
        rows.append((f"{first} − {second}", unit * found.mean, unit * found.low, unit * found.high, found.n, verdict))
    columns = ["comparison", "difference", "low", "high", "n", "verdict"]
    return pandas.DataFrame(rows, columns=columns).set_index("comparison")


def change_of_lead(
    runs: Runs | pandas.DataFrame,
    pair: tuple[str, str],
    other: Runs | pandas.DataFrame,
    other_pair: tuple[str, str],
    metric: str = "accuracy",
    *,
    unit: float = 100,
) -> dict[str, Any]:
    """How much larger the difference of ``pair`` is in ``runs`` than that of ``other_pair`` in ``other``, by seed.

    Two verdicts that differ are no verdict on their difference; this is its 95 % t-interval.

    Returns:
        ``difference``, ``low``, ``high`` and ``n``, as a row of :func:`duels`; seeds that all four have count, and
        without one all is NaN.

    Raises:
        ValueError: no such metric or arm.
    """
    leads = []
    for found, (first, second) in ((runs, pair), (other, other_pair)):
        wide = _wide(found, metric)
        _check_arm(wide, first)
        _check_arm(wide, second)
        leads.append(wide[first] - wide[second])
    change = _interval((unit * (leads[0] - leads[1])).dropna())
    return {"difference": change.mean, "low": change.low, "high": change.high, "n": change.n}


def answer(question: str, duel: pandas.Series, wanted: str = "above") -> str:
    """A line that answers ``question`` ("Does KD beat labels?") by a row of :func:`duels`; ``wanted`` is the verdict of a yes."""
    other = "below" if wanted == "above" else "above"
    says = {wanted: "yes", other: "no, the other way round", "not separated": "cannot be told from no difference"}
    interval = f"{duel['difference']:+.2f} [{duel['low']:+.2f}, {duel['high']:+.2f}]"
    return f"{question:<62} {interval}  {says[duel['verdict']]}"


def _wide(runs: Runs | pandas.DataFrame, metric: str) -> pandas.DataFrame:
    """A column an arm, a row a seed."""
    frame = runs.frame() if isinstance(runs, Runs) else runs
    if metric not in frame:
        raise ValueError(
            f"the runs have no metric {metric!r}; they have {sorted(set(frame) - {'arm', 'seed', 'seconds'})}"
        )
    return frame.pivot(index="seed", columns="arm", values=metric)[list(dict.fromkeys(frame["arm"]))]


def _check_arm(wide: pandas.DataFrame, arm: str) -> None:
    if arm not in wide:
        raise ValueError(f"no arm is called {arm!r}; arms are {list(wide)}")


def _difference(wide: pandas.DataFrame, first: str, second: str) -> metrics.Interval:
    """NaN of an arm with itself, or without a seed that both have."""
    both = wide[[first, second]].dropna() if first != second else wide[:0]
    return _interval(both[first] - both[second]) if len(both) else _NOTHING


def _interval(values: pandas.Series) -> metrics.Interval:
    """The t-interval of a mean; NaN without a value, as where all runs diverged or were only rehearsed."""
    return metrics.t_interval(values.tolist()) if len(values) else _NOTHING


def results_folder() -> Path:
    """``KDLIB_RESULTS``, else ``results/`` of the course's clone, else one in kdlib's home (always so at ``smoke``)."""
    if own := os.environ.get("KDLIB_RESULTS"):
        return Path(own).expanduser()
    clone = clone_folder()
    return clone / "results" if clone and scale.scale() != "smoke" else files.home() / "results"


def clone_folder() -> Path | None:
    """The clone of the course that this package or the working folder belongs to, if any."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "kdlib" / "scale.py").exists() and (folder / "notebooks").is_dir():
                return folder
    return None


def write_results(notebook: str, tables: dict[str, Any], settings: scale.Settings) -> Path | None:
    """Write ``<notebook>.<scale>.<hardware>.json``: settings, environment, and each table.

    ``tables`` holds grids of runs (stored as per-seed metrics and wall seconds) or DataFrames. ``run_seconds`` is
    what all runs of this process took, in the tables or not: :func:`kdlib.runs.spent`. A rehearsal writes nothing.
    """
    if scale.rehearsing():
        print("a rehearsal: no results are written")
        return None
    content = {
        "notebook": notebook, "scale": settings.scale, "hardware": scale.hardware(), "date": date.today().isoformat(),
        "seeds": list(settings.seeds), "environment": scale.environment(),
        "settings": _jsonable(vars(settings)), "tables": {name: _table(table) for name, table in tables.items()},
    }  # fmt: skip
    content["run_seconds"] = round(spent(), 1)
    content["peak_memory_gb"] = round(_peak_memory_gb(), 2)
    path = results_folder() / f"{notebook}.{settings.scale}.{scale.hardware()}.json"
    files.write_json(path, content)
    print(f"results written to {path.name}")
    return path


def _peak_memory_gb() -> float:
    """Of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


def _table(table: Any) -> dict[str, Any]:
    if isinstance(table, Runs):
        rows = [
            {"arm": r.arm, "seed": r.seed, **r.metrics, **({"diverged": True} if r.diverged else {})} for r in table
        ]
        return {"kind": "runs", "rows": _jsonable(rows), "seconds": round(sum(r.seconds for r in table), 1)}
    return {"kind": "table", "rows": _jsonable(table.to_dict("records"))}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if hasattr(value, "item"):  # numpy scalars
        value = value.item()
    if isinstance(value, float):
        return None if not math.isfinite(value) else round(value, 6)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def committed(notebook: str) -> list[dict[str, Any]]:
    """The results files that came with the course for ``notebook``, largest scale first."""
    folder = clone_folder()
    found = [files.read_json(p) for p in sorted((folder / "results").glob(f"{notebook}.*.json"))] if folder else []
    return sorted(found, key=lambda r: -ORDER.index(r["scale"]))


def published(notebook: str, table: str, metric: str, *, baseline: str | None = None) -> pandas.DataFrame:
    """The committed ``lab`` and ``full`` results of ``table``, by scale and arm; empty if there are none."""
    import pandas

    parts = []
    for result in committed(notebook):
        if result["scale"] == "smoke":
            continue
        rows = pandas.DataFrame(result["tables"].get(table, {}).get("rows", []))
        if metric in rows:
            part = compare(rows, metric, baseline=baseline).reset_index()
            part.insert(0, "scale", f"{result['scale']}, {result['hardware']}")
            parts.append(part)
    return pandas.concat(parts).set_index(["scale", "arm"]) if parts else pandas.DataFrame()


def in_band(notebook: str, values: dict[str, float]) -> bool:
    """Whether each value lies in the band that several seeds gave at ``smoke``; says which does not.

    At other scales, in a rehearsal, or before a band is recorded, there is nothing to hold against: True. With
    ``KDLIB_BAND_LOG`` set, the values are appended there instead (``python -m kdlib band`` records a band so).
    """
    if log := os.environ.get("KDLIB_BAND_LOG"):
        import json

        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        return True
    clone = clone_folder()
    path = clone / "results" / "smoke_bands.json" if clone else None
    if scale.scale() != "smoke" or scale.rehearsing() or path is None or not path.exists():
        return True
    bands = files.read_json(path).get(notebook, {})
    outside = {k: v for k, v in values.items() if k in bands and not bands[k][0] <= v <= bands[k][1]}
    for name, value in outside.items():
        print(f"{name} is {value:.4f}, outside the recorded band {bands[name]}")
    return not outside
