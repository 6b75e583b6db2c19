"""The version of a chapter with its exercises left open, generated from the filled one."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from kdlib.course import cells
from kdlib.course.chapters import Chapter, root

SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n(.*?)^[ \t]*### END SOLUTION\n?", re.S | re.M)
ASSIGNED = re.compile(r"^(\w+) = ", re.M)


def path(chapter: Chapter) -> Path:
    """Where the open version lies."""
    return root() / "notebooks" / "student" / f"{chapter.name}.ipynb"


def opened(notebook: NotebookNode) -> NotebookNode:
    """A copy without outputs; each solution becomes a stub, with the answer folded in the cell after it."""
    notebook = copy.deepcopy(notebook)
    made = []
    for cell in notebook.cells:
        made.append(cell)
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        if found := SOLUTION.search(cell.source):
            cell.source = SOLUTION.sub(_stub, cell.source)
            made.append(_answer(cell.id, found))
    notebook.cells = made
    notebook.metadata.pop("widgets", None)
    return notebook


def _stub(found: re.Match) -> str:
    indent, body = found.groups()
    if indent:  # in a function
        return f"{indent}raise NotImplementedError  # your answer\n"
    return "".join(f"{name} = ...  # your answer\n" for name in dict.fromkeys(ASSIGNED.findall(body)))


def _answer(cell_id: str, found: re.Match) -> NotebookNode:
    indent, body = found.groups()
    code = "\n".join(line.removeprefix(indent) for line in body.rstrip().splitlines())
    text = f"<details><summary>Answer</summary>\n\n```python\n{code}\n```\n\n</details>"
    return nbformat.v4.new_markdown_cell(text, id=f"{cell_id[:50]}-answer")


def update(chapter: Chapter, check: bool) -> bool:
    """Generate the open version; with ``check``, only say whether it is up to date."""
    new, target = opened(cells.read(chapter.path)), path(chapter)
    same = target.exists() and cells.read(target) == new
    if not check and not same:
        cells.write(new, target)
    return same or not check
