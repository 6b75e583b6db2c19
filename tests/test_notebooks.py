"""Conventions that every committed notebook keeps."""

import re
import subprocess
import sys

import pytest

import kdlib
from kdlib.course import cells, chapters, results, stamp, student

NOTEBOOKS = [pytest.param(chapter, id=chapter.name) for chapter in chapters.CHAPTERS]
every_notebook = pytest.mark.parametrize("chapter", NOTEBOOKS)


def code_cells(chapter):
    return [cell for cell in cells.read(chapter.path).cells if cell.cell_type == "code"]


def outputs(chapter):
    return [output for cell in code_cells(chapter) for output in cell.outputs]


def test_every_notebook_is_a_chapter():
    there = {path.stem for path in (chapters.root() / "notebooks").glob("*.ipynb")}
    assert there == {chapter.name for chapter in chapters.CHAPTERS}


def test_address_and_version_are_the_same_everywhere():
    citation, project = ((chapters.root() / name).read_text() for name in ("CITATION.cff", "pyproject.toml"))
    assert f'repository-code: "{stamp.address()}"' in citation
    assert f"\nversion: {kdlib.__version__}\n" in citation and f'\nversion = "{kdlib.__version__}"\n' in project


@every_notebook
def test_header_badge_and_colab_cell_are_stamped(chapter):
    assert stamp.stamp(chapter, check=True), "run python -m kdlib stamp"


@every_notebook
def test_student_version_is_in_step(chapter):
    assert student.update(chapter, check=True), "run python -m kdlib student"


def test_readme_is_in_step():
    assert results.update(check=True), "run python -m kdlib results"


@every_notebook
def test_it_is_committed_executed_in_order_without_errors(chapter):
    counts = [cell.execution_count for cell in code_cells(chapter)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for o in outputs(chapter) if o.output_type == "error"]
    assert not [o.text for o in outputs(chapter) if o.output_type == "stream" and o.name == "stderr"]


@every_notebook
def test_every_picture_has_alt_text(chapter):
    pictures = [o for o in outputs(chapter) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5
    for picture in pictures:
        assert len(picture.metadata.get("image/png", {}).get("alt", "")) >= 40


@every_notebook
def test_github_can_show_it(chapter):
    assert chapter.path.stat().st_size < 1_500_000
    assert "widgets" not in cells.read(chapter.path).metadata
    assert not [o for o in outputs(chapter) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]


@every_notebook
def test_cells_are_short_and_checked(chapter):
    sources = [cell.source for cell in code_cells(chapter)]
    assert max(len(source.splitlines()) for source in sources) <= 40
    assert sum("assert" in source or "check" in source for source in sources) >= 5


@every_notebook
def test_it_has_the_parts_of_a_chapter(chapter):
    notebook = cells.read(chapter.path)
    for tag in ("colab", "setup", "method", "exercise"):
        assert cells.tagged(notebook, tag), tag
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in ("**You will be able to**", "**You need**", "*Paper*", "References", "## Exercises", "deviation"):
        assert part in text, part


@every_notebook
def test_prose_holds_no_typed_results(chapter):
    """Measured percentages belong to outputs, which a run writes; the paper's are named as such."""
    for cell in cells.read(chapter.path).cells[1:]:
        if cell.cell_type == "markdown":
            found = re.search(r"(ours|we (got|measured|reach)|our (student|run))[^.|]{0,60}\d+\.\d", cell.source)
            assert not found, found.group(0)


@every_notebook
def test_method_cells_stand_alone(chapter, tmp_path):
    space = cells.method_namespace(chapter.path)
    exported = tmp_path / "exported.py"
    exported.write_text(cells.export(chapter.path), encoding="utf-8")
    undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    found = subprocess.run([*undefined, str(exported)], capture_output=True, text=True)
    assert not found.returncode, f"a method cell uses what only the notebook defines: {found.stdout}"
    assert any(callable(value) and getattr(value, "__module__", "") == "__main__" for value in space.values())
