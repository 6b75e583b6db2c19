"""Running chapters: every cell through a kernel, at a chosen scale, with a bar, and what came out."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.auto import tqdm

from kdlib import files, rehearsal, scale, scoreboard
from kdlib.course import cells, rehearsals
from kdlib.course.chapters import Chapter
from kdlib.course.results import lines

KERNEL_GONE = (
    "Most often the memory was full: try --jobs 1, or a smaller scale. "
    "The same command goes on where this one stopped: finished runs come from the store"
)


def run(
    chapter: Chapter,
    options: dict[str, str],
    *,
    out: Path | None = None,
    in_place: bool = False,
    record: bool = False,
) -> bool:
    """Execute ``chapter`` with the environment variables ``options``; False if a cell failed.

    The executed notebook goes to ``out`` (``executed`` in kdlib's home by default), or back into ``notebooks/``. With
    ``record``, a rehearsal's summary is kept in ``results/rehearsals.json``; False also if it rehearsed no run.
    """
    folder = out or files.home() / "executed" / (
        options["KDLIB_SCALE"] + ("-rehearsal" if "KDLIB_REHEARSE" in options else "")
    )
    figures = folder / f"{chapter.name}_figures"
    log = folder / f"{chapter.name}_rehearsal.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    options = {"KDLIB_FIGURES": str(figures), "KDLIB_REHEARSAL_LOG": str(log), **options}
    if options["KDLIB_SCALE"] == "smoke":
        options.setdefault("KDLIB_RESULTS", str(folder / "results"))
    notebook = cells.read(chapter.path)
    began = time.perf_counter()
    with _environment(options):
        failure = _execute(notebook, chapter)
        target = chapter.path if in_place and not failure else folder / f"{chapter.name}.ipynb"
        cells.write(cells.tidy(notebook) if in_place else notebook, target)
        print(f"\n{chapter.name}: {'stopped' if failure else 'done'} after {time.perf_counter() - began:.0f} s")
        print(f"  executed notebook  {target}\n  figures            {figures}")
        if failure:
            print(f"\n{failure}", file=sys.stderr)
            return False
        if scale.rehearsing():
            return _print_rehearsal(chapter, record)
        _print_results(chapter)
    return True


def _execute(notebook, chapter: Chapter) -> str:
    """Run the cells; the failing cell and its error as text, or nothing."""
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=count, desc=chapter.name, unit="cell") as bar:
        for last_try in (False, True):
            client = NotebookClient(
                notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(chapter.path.parent)}},
                on_cell_executed=lambda cell, cell_index, execute_reply: bar.update(),
                extra_arguments=["--IPKernelApp.log_level=ERROR"],  # or it warns of local sockets at every start
            )  # fmt: skip
            try:
                client.execute()
                return ""
            except CellExecutionError as error:
                return f"The cell that failed:\n\n{error.traceback}\n{error.ename}: {error.evalue}"
            except RuntimeError as error:  # the kernel is gone; one that loses the race for its ports never starts
                if bar.n or last_try:
                    return f"The kernel stopped after {bar.n:.0f} of {count} cells ({error}). {KERNEL_GONE}"
            except AssertionError:  # on Ctrl-C nbclient shuts the kernel down, and then stumbles over its absence
                raise KeyboardInterrupt from None
    return ""


def _print_rehearsal(chapter: Chapter, record: bool) -> bool:
    print(rehearsal.report().to_string(index=False, float_format=lambda x: f"{x:,.4g}"))
    if record and not rehearsals.record(chapter, scale.scale()):
        print(f"{chapter.name} rehearsed no run: there is nothing to record", file=sys.stderr)
        return False
    return True


def _print_results(chapter: Chapter) -> None:
    path = scoreboard.results_folder() / f"{chapter.name}.{scale.scale()}.{scale.hardware()}.json"
    if path.exists():
        print("\n".join(["", *lines(chapter, files.read_json(path))]))


@contextlib.contextmanager
def _environment(options: dict[str, str]) -> Iterator[None]:
    """The variables, here and in the kernels started meanwhile; kdlib is importable there from any folder."""
    before = dict(os.environ)
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    os.environ.update(options | {"PYTHONPATH": path})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
