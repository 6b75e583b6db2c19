"""Notebooks as files: reading, writing, and lifting out the cells that define a method."""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import re
import types
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from kdlib import files

BAR = re.compile(
    r"\x1b\[A|[^\r\n]*(?:\d%\||\d(?:it|s)/\w+\])[^\r\n]*\n?"
)  # what tqdm writes between two carriage returns


def read(path: str | Path) -> NotebookNode:
    """A notebook, in the current format."""
    return nbformat.read(str(path), as_version=4)


def write(notebook: NotebookNode, path: str | Path) -> None:
    """Write a notebook, atomically."""
    with files.atomic(path) as part:
        part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def tagged(notebook: NotebookNode, *tags: str) -> list[NotebookNode]:
    """The code cells that carry one of ``tags``, in order."""
    return [c for c in notebook.cells if c.cell_type == "code" and set(tags) & set(c.metadata.get("tags", []))]


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Outputs as they are to be kept: no progress bars, no widgets without state, no timings, counts from 1."""
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.metadata.pop("execution", None)
        cell.outputs = [kept for output in cell.outputs if (kept := _lasting(output))]
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    return notebook


def _lasting(output: NotebookNode) -> NotebookNode | None:
    """The output without progress bars; None for a widget, which a page without a kernel cannot draw."""
    if output.output_type == "stream" and output.name == "stderr":
        output.text = BAR.sub("", output.text).strip("\r")  # a warning beside a bar must be seen
        return output if output.text.strip() else None
    return None if "application/vnd.jupyter.widget-view+json" in output.get("data", {}) else output


def method_namespace(path: str | Path) -> dict[str, Any]:
    """Run a notebook's cells tagged ``setup`` and ``method``, and return what they define.

    Sources stay readable for ``inspect``, so that the functions have fingerprints.
    """
    module = types.ModuleType("__main__")
    for index, cell in enumerate(tagged(read(path), "setup", "method")):
        name = f"<{Path(path).stem}, method cell {index}>"
        linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(keepends=True), name)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(cell.source, name, "exec"), module.__dict__)
    return module.__dict__


def export(path: str | Path) -> str:
    """The ``method`` cells as a module's source, with the imports of the ``setup`` cells."""
    notebook = read(path)
    imports = [
        ast.unparse(statement)
        for cell in tagged(notebook, "setup")
        for statement in ast.parse(cell.source).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    method = "\n\n\n".join(cell.source.strip() for cell in tagged(notebook, "method"))
    head = f'"""The method of {Path(path).stem}, exported from the notebook that derives it."""'
    return "\n".join([head, "", *dict.fromkeys(imports), "", "", method, ""])
