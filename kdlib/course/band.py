"""The band that a chapter's smoke results fall into, recorded from several seeds."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import pandas

from kdlib import files
from kdlib.course.chapters import Chapter, root
from kdlib.course.execute import run

LEAST = 0.03


def record(chapter: Chapter, seeds: int) -> bool:
    """Run ``chapter`` at ``smoke`` from ``seeds`` first seeds and store mean ± 4 sd of each value.

    A band is at least ± ``LEAST`` wide: another processor rounds differently, and a tuned rate may flip.

    Raises:
        ValueError: fewer than two seeds, which have no spread.
    """
    if seeds < 2:
        raise ValueError(f"--seeds is {seeds}; a band needs at least 2, better 8")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "values.jsonl"
        for first in range(seeds):
            options = {"KDLIB_SCALE": "smoke", "KDLIB_FIRST_SEED": str(100 * first), "KDLIB_BAND_LOG": str(log)}
            if not run(chapter, options, out=Path(folder)):
                return False
        values = pandas.read_json(log, lines=True)
    path = Path(os.environ.get("KDLIB_RESULTS") or root() / "results") / "smoke_bands.json"
    bands = files.read_json(path) if path.exists() else {}
    middle, half = values.mean(), (4 * values.std()).clip(lower=LEAST)
    low, high = (middle - half) * 1e4, (middle + half) * 1e4  # rounded outwards: a spread of 0 must let its value in
    bands[chapter.name] = {k: [math.floor(low[k]) / 1e4, math.ceil(high[k]) / 1e4] for k in values}
    files.write_json(path, bands)
    return True
