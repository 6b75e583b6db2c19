"""The press shop: running chapters, tables of results, a chapter's method as a module. No chapter depends on its maths."""

from __future__ import annotations

import ast
import importlib.metadata
import linecache
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pandas
from tqdm.auto import tqdm

from kdlib import files, rehearsal, scale, scoreboard
from kdlib.data import sources

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks" if (ROOT / "notebooks" / "exercises").is_dir() else Path(__file__).parent / "lessons"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kdlib/kdlib/blob/main/{})"
METRICS = ("average", "test", "test_accuracy", "accuracy", "score", "validation")  # the one a table of runs is read by


# What stands for a chapter: a results file's table and metric, the two arms, and what their difference does not show.
HEADLINES = {
    "00": ("students", "test_accuracy", "KD, T=4", "labels only", "a teacher that scores lower taught better"),
    "01": ("students", "test", "annealing", "KD", "under Adam no lead over KD was shown, with a warm-up none over the constants 1 and 0.1; KD from a modest teacher is better"),
    "02": ("students", "score", "ImitKD", "vanilla", "the teacher's words on the data's own prefixes, and SeqKD, gain as much"),
    "03": ("domains", "test", "RL, gain", "uniform mean", "not with teachers that differ in kind rather than in what they know"),
    "04": ("streams", "average", "Word-KD", "LAMOL, equal weights", "a teacher that is its student's equal, without pretraining"),
    "05": ("students", "test", "KD", "gold", "the log-probability of the translating model, which is free, agrees with people as well"),
    "06": ("rows", "test", "+ stage 2, 10%", "tokens, trained longer, 10%", "three seeds do not separate it, and with few labels the chain of recogniser and reader is ahead; few words, known voices"),
}  # fmt: skip


def notebooks(wanted: Sequence[str]) -> list[Path]:
    """The files of ``01`` (a lesson), ``01s`` (its study), ``all`` (lessons) and ``studies``.

    Raises:
        ValueError: there is no such chapter.
    """
    lessons, studies = (sorted(folder.glob("[0-9][0-9]_*.ipynb")) for folder in (NOTEBOOKS, NOTEBOOKS / "studies"))
    known = {path.name[:2]: [path] for path in lessons} | {f"{path.name[:2]}s": [path] for path in studies}
    known |= {"all": lessons, "studies": studies}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"there is no chapter {unknown[0]!r}; there are {', '.join(known)}")
    return [path for name in wanted for path in known[name]]


def _cells(path: Path, tag: str) -> list[str]:
    cells = files.read_json(path)["cells"]
    return ["".join(cell["source"]) for cell in cells if tag in cell["metadata"].get("tags", [])]


def export(number: str) -> str:
    """A chapter's ``method`` cells as a module's source, with the imports of its ``setup`` cells."""
    path = notebooks([number])[0]
    statements = [statement for source in _cells(path, "setup") for statement in ast.parse(source).body]
    imports = [ast.unparse(s) for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    head = f'"""The method of {path.stem}, as its notebook defines it."""'
    return "\n".join([head, "", *dict.fromkeys(imports), "", "", "\n\n\n".join(_cells(path, "method")), ""])


def lesson(number: str) -> ModuleType:
    """What a lesson's ``method`` cells define, as the module ``lesson_01``: its study builds on it.

    It has no file, so that the store takes its functions for the notebook's own: runs of the lesson are found again.
    """
    name, source = f"lesson_{number}", export(number)
    if (known := sys.modules.get(name)) and known.__source__ == source:
        return known
    module = sys.modules[name] = ModuleType(name)
    module.__source__, file = source, f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    head, _, method = source.partition("\n\n\n")
    # As a notebook compiles its cells: imports apart (CPython calls by other bytecode what it sees imported), and
    # without this file's "from __future__".
    for part in (head, "\n" * (head.count("\n") + 3) + method):
        exec(compile(part, file, "exec", dont_inherit=True), module.__dict__)
    cloudpickle.register_pickle_by_value(module)
    return module


def about(number: str) -> None:
    """What a notebook prints first: versions, device, scale, and what this chapter cost where it was measured."""
    facts = {"transformers": "missing", **scale.environment()}
    packages = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers"))
    print(f"{packages}; {facts['device']}, {facts['precision']}, threads: {facts['threads']}")
    print(f"scale: {facts['scale']} (KDLIB_SCALE = {', '.join(scale.SCALES)})")
    for path in sorted((ROOT / "results").glob(f"{number}_*.json")):
        found = files.read_json(path)
        cost = f"{found['run_seconds'] / 60:,.0f} minutes of training, all runs together"
        print(f"measured: {found['notebook']} at {found['scale']} on {found['hardware']}, {found['date']}: {cost}")


# --- run ---


def run(paths: Sequence[Path], *, out: Path | None = None, in_place: bool = False) -> bool:
    """Execute notebooks, back into their files or into ``out`` (kdlib's home by default); False if one failed.

    One bar runs over all cells; then a line or two a notebook say what was seen and where it lies.
    """
    import nbformat

    folder = (out or files.home() / "executed" / (scale.scale() + "-rehearsal" * scale.rehearsing())).resolve()
    books, said, failures = [nbformat.read(path, as_version=4) for path in paths], [], []
    with tqdm(total=sum(len(book.cells) for book in books), unit="cell") as bar:
        for path, book in zip(paths, books, strict=True):
            bar.set_description(path.stem)
            target, began = folder / path.relative_to(NOTEBOOKS), time.time()
            figures, log = target.with_suffix(""), target.with_suffix(".rehearsal.jsonl")
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
            os.environ |= {"KDLIB_FIGURES": str(figures), "KDLIB_REHEARSAL_LOG": str(log)}
            if failure := _execute(book, path, bar):
                failures.append(f"\n{path.stem}: {failure}")
            target = path if in_place and not failure else target
            with files.atomic(target) as part:
                part.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
            said.append(f"{'✗' if failure else '✓'} {path.stem}: {time.time() - began:.0f} s, in {target}")
            said += [f"    {line}" for line in (f"pictures in {figures}", *_seen(path, began))]
    print(*said, sep="\n")
    print(*failures, sep="\n", end="", file=sys.stderr)
    return not failures


def _execute(book: Any, path: Path, bar: Any) -> str:
    """Run the cells in this interpreter's own kernel; the error as text, or nothing."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    native = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        book, km=native, timeout=None, record_timing=False, resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"], on_cell_start=lambda cell, cell_index: bar.update(),
    )  # fmt: skip
    around = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    try:
        client.execute(env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": around})  # bars are no results
    except CellExecutionError as error:
        return "the cell that failed:\n\n" + re.sub(r"\x1b\[[\d;]*m", "", str(error))
    except (AssertionError, RuntimeError) as error:
        if hasattr(client, "_async_cleanup_kernel_future"):  # Ctrl-C: nbclient stops the kernel, and stumbles over that
            raise KeyboardInterrupt from None
        return f"the kernel is gone ({error}). Most often the memory was full: try --jobs 1; finished runs are kept"
    book.metadata.pop("widgets", None)  # a slider is of no use without its kernel
    for cell in book.cells:
        if outputs := cell.get("outputs"):
            cell.outputs = [o for o in outputs if not any("widget" in kind for kind in o.get("data", {}))]
    return ""


def _seen(notebook: Path, began: float) -> Iterator[str]:
    """What ``notebook``, started at ``began``, left behind, in words."""
    if scale.rehearsing():
        cost = rehearsal.report()
        if len(cost):
            memory, hours = cost["GPU memory (GB)"].max(), cost["hours on a T4"].sum()
            yield f"{len(cost)} runs rehearsed: up to {memory:.1f} GB, about {hours:,.1f} hours on a T4"
        return
    for path in scoreboard.folder().glob(f"{notebook.stem[:2]}_*.json"):
        if path.stat().st_mtime >= began - 1:
            yield f"seen: {headline(files.read_json(path)) or 'results, in ' + str(path)}"


# --- results ---


def headline(result: dict[str, Any]) -> str:
    """The comparison that stands for a results file, in words and points; empty if it has none."""
    table, metric, first, second, _ = HEADLINES.get(result["notebook"][:2], [""] * 5)
    rows = pandas.DataFrame(result["tables"].get(table, {"rows": []})["rows"])
    if metric not in rows or not {first, second} <= set(rows["arm"]):
        return ""
    means = scoreboard.compare(rows, metric)["mean"]
    duel = scoreboard.duels(rows, [(first, second)], metric).iloc[0]
    interval = f" [{duel['low']:+.1f}, {duel['high']:+.1f}]" if duel["n"] > 1 else ""
    values = f"{first} {means[first]:.1f}, {second} {means[second]:.1f}: {duel['difference']:+.1f}{interval} points"
    return f"{values} ({duel['n']:.0f} {'seeds' if duel['n'] > 1 else 'seed'})"


def results(*, check: bool = False) -> bool:
    """Write ``results/README.md`` and the README's map and lines of results; with ``check``, say whether they are in step."""
    readme = ROOT / "README.md"
    found = [files.read_json(path) for path in sorted((ROOT / "results").glob("[0-9]*.json"))]
    found = [result for result in found if result["scale"] != "smoke"]
    text = readme.read_text(encoding="utf-8")
    for name, lines in (("map", _map(found)), ("results", _lines(found))):
        (head, _, rest), end = text.partition(f"<!-- {name} -->\n"), f"<!-- /{name} -->"
        text = "\n".join([f"{head}<!-- {name} -->", *lines, end + rest.partition(end)[2]])
    wanted = {readme: text, ROOT / "results" / "README.md": "\n".join(_page(found))}
    stale = [path for path, new in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
    for path in () if check else stale:
        path.write_text(wanted[path], encoding="utf-8")
    return not stale


def _map(found: list[dict[str, Any]]) -> Iterator[str]:
    yield from ("| | lesson | study | run | `lab`, minutes of one core |", "|---|---|---|---|---|")
    for path in notebooks(["all"]):
        number, place = path.name[:2], f"notebooks/{path.name}"
        title = re.search(rf"# {number} · ([^:\\\"]+)", path.read_text(encoding="utf-8"))[1].strip()
        study = f"[study](notebooks/studies/{path.name})" if (NOTEBOOKS / "studies" / path.name).exists() else "within"
        costs = [r["run_seconds"] / 60 for r in found if r["notebook"] == path.stem and "cpu" in r["hardware"]]
        cost = f"{max(costs):.0f}" if costs else ""
        yield f"| {number} | [{title}]({place}) | {study} | {BADGE.format(place)} | {cost} |"


def _lines(found: list[dict[str, Any]]) -> Iterator[str]:
    for result in found:
        if said := headline(result):
            number = result["notebook"][:2]
            yield f"- **{number}** {said}; `{result['scale']}`, {result['hardware']}. *Limit*: {HEADLINES[number][-1]}."


def _page(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "# Results\n\nMade by `python -m kdlib results` from the files beside it. Tables of runs hold means over seeds and"
    yield "paired differences to the first arm with 95 % t-intervals, in points (hundredths); the others are as stored.\n"
    for result in found:
        cost = f"{result['run_seconds'] / 60:,.0f} minutes of training, {result['peak_memory_gb']} GB"
        yield f"## {result['notebook']}: {result['scale']}, {result['hardware']}, {result['date']}\n"
        yield f"torch {result['environment']['torch']}, {cost}\n"
        for name, table in result["tables"].items():
            frame = pandas.DataFrame(table["rows"])
            metric = next((m for m in METRICS if m in frame and {"arm", "seed"} <= set(frame)), None)
            if metric and not frame.duplicated(["arm", "seed"]).any():
                frame = scoreboard.compare(frame, metric, baseline=frame["arm"].iloc[0]).round(2).reset_index()
            yield from (f"**{name}**{f', {metric}' if metric else ''}\n", *_markdown(frame), "")


def _markdown(frame: Any, rows: int = 30) -> list[str]:
    cells = frame.head(rows).map(lambda v: f"{v + 0:.4g}" if isinstance(v, float) else str(v).replace("|", "\\|"))
    cells = cells.replace(["nan", "inf", "-inf"], "")  # what one seed leaves open
    table = [list(map(str, frame)), ["---"] * frame.shape[1], *cells.to_numpy().tolist()]
    return [f"| {' | '.join(row)} |" for row in table] + [f"\n(The file has {len(frame)} rows.)"] * (len(frame) > rows)


# --- doctor ---


def doctor() -> bool:
    """Print what this machine has and sees; False if the chapters cannot run: only what running needs decides."""
    from packaging.requirements import Requirement

    faults = []
    for need in map(Requirement, importlib.metadata.requires("kdlib") or []):
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in ("", "text", "run")):
            continue
        found = [d.version for d in importlib.metadata.distributions(name=need.name)] or ["is missing"]
        if found == ["is missing"] or not need.specifier.contains(found[0], prereleases=True):
            faults.append(f"✗ {need.name} {found[0]}; kdlib needs {need.name}{need.specifier}")
    home, data = files.home(), sources.root()
    try:
        files.write_json(home / "doctor.json", faults)
    except OSError as error:
        faults.append(f"✗ {error}")
    seen = {"home": home, "data": f"{data} ({'there' if data.is_dir() else 'not there: what can be is downloaded'})"}
    for name, value in {**scale.environment(), **seen}.items():
        print(f"{name:<13} {value}")
    print(*faults, "✗ mend these first: pip install -r requirements.txt" if faults else "✓ smoke can run", sep="\n")
    return not faults
