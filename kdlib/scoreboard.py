"""From runs to tables: means, paired differences, results files, and the published numbers beside one's own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas
import torch
from scipy import stats

from kdlib import files, scale
from kdlib.metrics import Interval, t_interval
from kdlib.runs import Runs, counted, spent

CLONE = Path(__file__).resolve().parents[1] / "results"  # of the course, where kdlib lies in its clone
NOTHING = Interval(math.nan, math.nan, math.nan, 0)
Pair = tuple[str, str]  # of arms
Table = Runs | pandas.DataFrame  # a grid's runs, or a row a run with columns arm, seed and metrics


def compare(runs: Table, metric: str, *, baseline: str | None = None, unit: float = 100.0) -> pandas.DataFrame:
    """One row an arm: mean, sd and n of ``metric``, and the paired difference to ``baseline`` with its 95 % interval.

    All numbers are ``metric`` times ``unit``: shares in points. Only seeds that both arms have are paired.

    Raises:
        ValueError: no such metric or arm.
    """
    wide, rows = unit * _wide(runs, metric, baseline), []
    for arm in wide:
        values = wide[arm].dropna()
        row = {"arm": arm, "mean": values.mean(), "sd": values.std(), "n": len(values)}
        if baseline is not None:
            found = _interval(wide[arm] - wide[baseline]) if arm != baseline else NOTHING
            row |= {"difference": found.mean, "low": found.low, "high": found.high}
        rows.append(row)
    return pandas.DataFrame(rows).set_index("arm")


def duels(runs: Table, pairs: Sequence[Pair], metric: str = "test", *, unit: float = 100.0) -> pandas.DataFrame:
    """One row a pair of arms: the paired difference first − second, times ``unit``, and what may be said of it.

    Columns: difference, low and high (95 % t-interval), n, ``verdict`` ("above", "below", "not separated"), p (paired
    t-test) and ``holm``: whether the comparison survives Holm's correction for the table's number of rows, at 5 %.
    """
    wide, rows = unit * _wide(runs, metric, *(arm for pair in pairs for arm in pair)), []
    for first, second in pairs:
        values = (wide[first] - wide[second]).dropna()
        found = _interval(values)
        verdict = "above" if found.low > 0 else "below" if found.high < 0 else "not separated"
        p = stats.ttest_1samp(values, 0).pvalue if values.std() > 0 else float(len(values) < 2 or not values.any())
        rows.append((f"{first} − {second}", found.mean, found.low, found.high, found.n, verdict, p))
    columns = ["comparison", "difference", "low", "high", "n", "verdict", "p"]
    table = pandas.DataFrame(rows, columns=columns).set_index("comparison")
    return table.assign(holm=holm(table["p"]))


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of a family's p-values survive Holm's step-down correction (1979) at ``level``."""
    values = [1.0 if value != value else float(value) for value in p]
    survive, order = [False] * len(values), sorted(range(len(values)), key=values.__getitem__)
    for rank, row in enumerate(order):
        if values[row] > level / (len(values) - rank):
            break
        survive[row] = True
    return survive


def change_of_lead(
    runs: Table, pair: Pair, other: Table, other_pair: Pair, metric: str, *, unit: float = 100.0
) -> dict[str, float]:
    """How much larger the difference of ``pair`` is in ``runs`` than that of ``other_pair`` in ``other``, by seed.

    Two verdicts that differ are no verdict on their difference; this is its 95 % t-interval.
    """
    first, second = (_wide(found, metric, *two) for found, two in ((runs, pair), (other, other_pair)))
    lead = first[pair[0]] - first[pair[1]] - (second[other_pair[0]] - second[other_pair[1]])
    change = _interval(unit * lead)
    return {"difference": change.mean, "low": change.low, "high": change.high, "n": change.n}


def answer(question: str, duel: pandas.Series, wanted: str = "above") -> str:
    """A line that answers ``question`` ("Does KD beat labels?") by a row of :func:`duels`.

    ``wanted`` is the verdict of a yes; an interval that leaves out zero by less than 0.1 makes it "barely".
    """
    says = "no, the other way round"
    if duel["verdict"] == wanted:
        says = "yes" if min(abs(duel["low"]), abs(duel["high"])) >= 0.1 else "yes, barely"
    elif duel["verdict"] == "not separated":
        says = "cannot be told from no difference"
    return f"{question:<62} {duel['difference']:+.2f} [{duel['low']:+.2f}, {duel['high']:+.2f}]  {says}"


def _wide(runs: Table, metric: str, *arms: str | None) -> pandas.DataFrame:
    """A column an arm, a row a seed."""
    frame = runs.frame() if isinstance(runs, Runs) else runs
    if metric not in frame:
        known = sorted(set(frame) - {"arm", "seed", "seconds", "diverged"})
        raise ValueError(f"the runs have no metric {metric!r}; they have {known}")
    wide = frame.pivot(index="seed", columns="arm", values=metric)[list(dict.fromkeys(frame["arm"]))]
    if strangers := {arm for arm in arms if arm is not None} - set(wide):
        raise ValueError(f"no arm is called {sorted(strangers)[0]!r}; arms are {list(wide)}")
    return wide.astype(float)


def _interval(values: pandas.Series) -> Interval:
    """The t-interval of a mean; NaN without a value, as where all runs diverged or were only rehearsed."""
    return t_interval(values.dropna().tolist()) if values.notna().any() else NOTHING


# --- results files ---


def folder(at: str | None = None) -> Path:
    """``KDLIB_RESULTS``, else ``results/`` of the course's clone, else one in kdlib's home (always so at ``smoke``)."""
    home = files.home() / "results" if (at or scale.scale()) == "smoke" or not CLONE.is_dir() else CLONE
    return Path(os.environ.get("KDLIB_RESULTS") or home).expanduser()


def write_results(notebook: str, tables: dict[str, Any], settings: scale.Settings) -> Path | None:
    """Write ``<notebook>.<scale>.<hardware>.json``: settings, environment, every row of every table, what it cost.

    A table is a grid's runs or a DataFrame. In a rehearsal nothing is written.
    """
    if scale.rehearsing():
        return print("a rehearsal: no results are written")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident()
    content = {
        "notebook": notebook, "scale": settings.scale, "hardware": scale.hardware(), "date": date.today().isoformat(),
        "seeds": list(settings.seeds), "environment": {**scale.environment(), "scale": settings.scale}, "settings": vars(settings),
        "tables": {name: {"rows": _rows(table)} for name, table in tables.items()},
        "run_seconds": round(spent(), 1), "peak_memory_gb": round(peak / 1e9, 2),
    }  # fmt: skip
    path = folder(settings.scale) / f"{notebook}.{settings.scale}.{scale.hardware()}.json"
    files.write_json(path, json.loads(json.dumps(content, default=str), parse_constant=lambda _: None))  # JSON: no NaN
    runs, loaded = counted()
    print(f"{path.name}: {runs} runs ({loaded} from the store), {spent() / 60:,.0f} minutes of one core in all")
    return path


def _rows(table: Any) -> list[dict[str, Any]]:
    frame = table.frame() if isinstance(table, Runs) else table
    frame = frame if set(frame.index.names) == {None} else frame.reset_index()
    quiet = [name for name in ("diverged",) if name in frame and not frame[name].any()]
    frame = frame.drop(columns=["seconds", *quiet], errors="ignore").rename(columns=str)
    return json.loads(frame.to_json(orient="records", double_precision=6, default_handler=str))


def _resident() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3


def committed(notebook: str) -> list[dict[str, Any]]:
    """The results files that came with the course for ``notebook``, the largest scale first, newest of each."""
    found = [files.read_json(path) for path in CLONE.glob(f"{notebook}.*.json")]
    return sorted(found, key=lambda r: (scale.SCALES.index(r["scale"]), r.get("date", "")), reverse=True)


def published(notebook: str, table: str, metric: str, *, baseline: str | None = None) -> pandas.DataFrame:
    """The committed ``lab`` and ``full`` results of ``table``, by scale and arm; empty if there are none."""
    parts = {}
    for result in committed(notebook):
        rows = pandas.DataFrame(result["tables"].get(table, {}).get("rows", []))
        if metric in rows and result["scale"] != "smoke":
            parts[f"{result['scale']}, {result['hardware']}"] = compare(rows, metric, baseline=baseline)
    return pandas.concat(parts, names=["scale", "arm"]) if parts else pandas.DataFrame()
