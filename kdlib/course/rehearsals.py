"""What rehearsals estimated, kept in ``results/rehearsals.json`` for the headers of chapters not yet measured."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch

from kdlib import files, rehearsal
from kdlib.course.chapters import Chapter, root


def record(chapter: Chapter, scale: str) -> bool:
    """Keep the summary of the rehearsal just made; other chapters' and scales' stay. False if it rehearsed no run."""
    found = summary()
    if not found["runs"]:
        return False
    with files.lock(files.home() / "rehearsals"):  # chapters may be rehearsed side by side
        kept = _all()
        kept[chapter.name] = kept.get(chapter.name, {}) | {scale: found}
        files.write_json(_path(), dict(sorted(kept.items())))
    return True


def recorded(chapter: Chapter) -> dict[str, dict[str, Any]]:
    """The kept summaries of a chapter by scale; empty if there are none."""
    return _all().get(chapter.name, {})


def summary() -> dict[str, Any]:
    """Of all rehearsed runs: how many, estimated hours on a T4 (all together) and memory in GB (the largest), when.

    Hours are of training steps only, without drawing batches (rollouts, decoding) and evaluation, and of the runs that
    a rehearsal makes: see :func:`kdlib.rehearsal.report`.
    """
    report = rehearsal.report()
    if report.empty:
        return {"runs": 0}
    return {
        "runs": len(report),
        "t4_hours": _rounded(report["hours on a T4"].sum()),
        "memory_gb": _rounded(report["GPU memory (GB)"].max()),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }


def _rounded(value: float) -> float:
    """To the three digits that an estimate may claim at most."""
    return float(f"{value:.3g}")


def _path() -> Path:
    return root() / "results" / "rehearsals.json"


def _all() -> dict[str, dict[str, Any]]:
    return files.read_json(_path()) if _path().exists() else {}
