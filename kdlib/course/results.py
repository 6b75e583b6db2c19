"""The README's tables, made from ``results/*.json`` and the list of chapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas

from kdlib import files, scoreboard
from kdlib.course.chapters import CHAPTERS, Chapter, Headline, root
from kdlib.course.stamp import badge, between


def lines(chapter: Chapter, result: dict[str, Any]) -> list[str]:
    """A results file as Markdown: one table a headline."""
    out = []
    for headline in chapter.headlines:
        rows = result["tables"].get(headline.table, {}).get("rows")
        if rows:
            out += _table(headline, pandas.DataFrame(rows), result)
    return out


def _table(headline: Headline, frame: pandas.DataFrame, result: dict[str, Any]) -> list[str]:
    table = scoreboard.compare(frame, headline.metric, baseline=headline.baseline)
    if headline.arms:
        table = table.loc[[arm for arm in headline.arms if arm in table.index]]
    seeds = int(table["n"].max())
    out = [
        f"**{headline.title}** (`{result['scale']}`, {result['hardware']}, {seeds} seeds, {result['date']})", "",
        f"| | {headline.metric.replace('_', ' ')}, % | minus “{headline.baseline}”, points |", "|---|---|---|",
    ]  # fmt: skip
    for arm, row in table.iterrows():
        out.append(f"| {arm} | {_mean(row)} | {_difference(row)} |")
    return [*out, ""]


def _mean(row: pandas.Series) -> str:
    if math.isnan(row["mean"]):
        return "diverged"
    spread = "" if math.isnan(row["sd"]) else f" ± {100 * row['sd']:.1f}"
    return f"{100 * row['mean']:.1f}{spread}"


def _difference(row: pandas.Series) -> str:
    if math.isnan(row["difference"]):
        return ""
    return f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def readme(text: str) -> str:
    """``README.md`` with its tables as the results files and the chapters say."""
    parts = {"notebooks": _notebooks(), "results": _results(), "bench": _bench()}
    for name, content in parts.items():
        text = between(text, name, content)
    return text


def _results() -> str:
    out = []
    for chapter in CHAPTERS:
        found = [result for result in scoreboard.committed(chapter.name) if result["scale"] != "smoke"]
        if found:
            out += [f"### {chapter.number} · {chapter.title}", ""]
        for result in found:
            out += lines(chapter, result)
    return "\n".join(out).rstrip()


def _notebooks() -> str:
    out = []
    for chapter in CHAPTERS:
        file = f"notebooks/{chapter.name}.ipynb"
        student = f"[open](notebooks/student/{chapter.name}.ipynb)"
        out.append(
            f"| {chapter.number} | {chapter.title} | {chapter.question} | [read]({file}) | {badge(chapter)} | {student} |"
        )
    return "\n".join(out)


def _bench() -> str:
    found = sorted((root() / "results").glob("bench.*.json"))
    out = []
    for path in found:
        result = files.read_json(path)
        out += [f"Measured on {result['hardware']} ({result['date']}, torch {result['torch']}, one thread):", "",
                "| work | ratio | range | goal |", "|---|---|---|---|"]  # fmt: skip
        out += [
            f"| {r['what']} | {r['ratio']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['goal']} |"
            for r in result["rows"]
        ]
    return "\n".join(out)


def update(check: bool) -> bool:
    """Write the README's tables; with ``check``, only say whether they are up to date."""
    path = Path(root() / "README.md")
    old = path.read_text(encoding="utf-8")
    new = readme(old)
    if check:
        return new == old
    if new != old:
        with files.atomic(path) as part:
            part.write_text(new, encoding="utf-8")
    return True
