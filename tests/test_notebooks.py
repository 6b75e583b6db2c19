"""What every committed lesson and study keeps to."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

import kdlib as kd
from kdlib import course

BOOKS = course.NOTEBOOKS
LESSONS, STUDIES = sorted(BOOKS.glob("*.ipynb")), sorted((BOOKS / "studies").glob("*.ipynb"))
WHOLE = {"00", "02", "03"}  # chapters not yet split into a lesson and a study: long lines, long cells, wide tables
AIMS = {"lesson": (4000, 400), "study": (6000, 900)}  # words, lines of code


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: f"{path.parent.name}-{path.stem}")


every_notebook, every_lesson = each([*LESSONS, *STUDIES]), each(LESSONS)
every_split = each([path for path in [*LESSONS, *STUDIES] if path.name[:2] not in WHOLE])


def book(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in book(path).cells if cell.cell_type == "code"]


def prose(path):
    return "\n".join(cell.source for cell in book(path).cells if cell.cell_type == "markdown")


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def printed(path):
    """All text that a reader sees below the cells."""
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs(path))


@every_notebook
def test_it_is_executed_in_order_without_errors_or_noise(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for o in outputs(path) if o.output_type == "error"]
    assert not [o.text for o in outputs(path) if o.output_type == "stream" and o.name == "stderr"]
    assert "it/s]" not in printed(path)


@every_notebook
def test_every_picture_has_alt_text(path):
    for picture in [o for o in outputs(path) if "image/png" in o.get("data", {})]:
        assert len(picture.metadata.get("image/png", {}).get("alt", "")) >= 40


@every_notebook
def test_github_can_show_it(path):
    assert path.stat().st_size < 1_500_000 and "widgets" not in book(path).metadata
    assert not [o for o in outputs(path) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]


@every_notebook
def test_it_opens_on_colab_and_installs_itself_there(path):
    cells = [cell for cell in code_cells(path) if "colab" in cell.metadata.get("tags", [])]
    assert len(cells) == 1 and "kdlib[text] @ git+https://github.com/kdlib/kdlib" in cells[0].source
    exec(compile(cells[0].source, "colab", "exec"), {})  # elsewhere it does nothing
    where = f"colab.research.google.com/github/kdlib/kdlib/blob/main/notebooks/{path.relative_to(BOOKS).as_posix()}"
    assert path in STUDIES or where in book(path).cells[0].source


@every_split
def test_its_lines_fit_a_page(path):
    sources = [cell.source for cell in code_cells(path)]
    wide = [line for source in sources for line in source.splitlines() if len(line) > 110]
    assert not wide, wide[:5]
    assert max(len(source.splitlines()) for source in sources) <= 40


@every_split
def test_its_tables_are_whole_and_the_store_is_quiet(path):
    assert not re.search(r"^\.\.\. |  \.\.\.  |\[\d+ rows x \d+ columns\]", printed(path), re.M), "pandas cut a table"
    assert printed(path).count("from the store") <= 1


@each(LESSONS)
def test_it_has_the_parts_of_a_lesson(path):
    tags = {tag for cell in code_cells(path) for tag in cell.metadata.get("tags", [])}
    assert {"colab", "setup", "method", "exercise"} <= tags
    for part in (
        "**The question.**",
        "**You will be able to**",
        "**You need**",
        "*Paper*",
        "References",
        "<summary>Answer",
    ):
        assert part in prose(path), part
    assert path.name[:2] in WHOLE or (BOOKS / "studies" / path.name).exists(), "its study is missing"


@every_lesson
def test_its_exercises_are_those_of_the_bank_and_stand_open(path):
    cells = [cell.source for cell in code_cells(path) if "exercise" in cell.metadata.get("tags", [])]
    asked = re.findall(r'kd\.exercises\.check\("([\d.]+)"', "\n".join(cells))
    assert asked and set(asked) <= set(kd.exercises.exercises(path.name[:2])) and all("..." in cell for cell in cells)


@every_lesson
def test_the_folded_answers_are_right(path):
    """The code under each "Answer" passes its check, with what the notebook imports at hand."""
    keys = re.findall(r'exercises\.check\("([\d.]+)"', "\n".join(cell.source for cell in code_cells(path)))
    answers = re.findall(r"<summary>Answer</summary>\s*```python\n(.*?)```", prose(path), re.S)
    assert len(answers) == len(keys)
    space = vars(kd.lesson(path.name[:2])).copy()
    for key, answer in zip(keys, answers, strict=True):
        exec(answer, space)
        name = [getattr(s, "name", None) or s.targets[0].id for s in ast.parse(answer).body][-1]
        said = kd.exercises.exercises(key[:2])[key].verdict(space[name])
        assert said.startswith("✓"), (key, said)


@every_lesson
def test_its_method_stands_alone(path, tmp_path):
    module, exported = kd.lesson(path.name[:2]), tmp_path / "exported.py"
    assert any(
        callable(value) and getattr(value, "__module__", "") == module.__name__ for value in vars(module).values()
    )
    exported.write_text(course.export(path.name[:2]), encoding="utf-8")
    undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    found = subprocess.run([*undefined, str(exported)], capture_output=True, text=True)
    assert not found.returncode, f"a method cell uses what only the notebook defines: {found.stdout}"


@each(STUDIES)
def test_a_study_builds_on_its_lesson(path):
    assert f'kd.lesson("{path.name[:2]}")' in "\n".join(cell.source for cell in code_cells(path))
    assert f"../{path.name}" in book(path).cells[0].source and "aithful" in prose(path)


@every_split
def test_how_long_it_is(path):
    """An aim, not a rule: who goes beyond it is told."""
    words, lines = AIMS["study" if path in STUDIES else "lesson"]
    written = len(re.findall(r"[A-Za-z]{2,}", prose(path)))
    code = sum(bool(line.strip()) for cell in code_cells(path) for line in cell.source.splitlines())
    if written > words or code > lines:
        warnings.warn(f"{path.stem}: {written} words of {words}, {code} lines of code of {lines}", stacklevel=1)


@every_notebook
def test_prose_holds_no_typed_results(path):
    """Measured percentages belong to outputs, which a run writes; the paper's are named as such."""
    found = re.search(r"(ours|we (got|measured|reach)|our (student|run))[^.|]{0,60}\d+\.\d", prose(path))
    assert not found, found.group(0)


def test_readme_and_tables_are_in_step():
    assert course.results(check=True), "run python -m kdlib results"


def test_links_of_the_readme_lead_somewhere():
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (root / target).exists(), target
