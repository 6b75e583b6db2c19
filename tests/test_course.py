"""The press shop, on a small notebook that is really executed."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kdlib import __main__ as cli
from kdlib import files, scoreboard
from kdlib.course import cells, chapters, execute, results, stamp, student
from kdlib.course.chapters import Chapter, Headline

SETUP = """import kdlib as kd
run = kd.settings(smoke=dict(rate=1, seeds=2), lab=dict(rate=2, seeds=3), full=dict(rate=3, seeds=5))
print(run.scale, run.seeds)"""
METHOD = """def double(x):
    return 2 * x * run.rate"""
EXPERIMENT = """def train(*, seed, folder, gain):
    return kd.Outcome({"acc": double(gain) + seed / 100})
runs = kd.run_grid("toy", train, {"base": dict(gain=0.1), "kd": dict(gain=0.2)}, run.seeds, jobs=1)
kd.write_results("99_toy", {"runs": runs}, run)"""
EXERCISE = """def triple(x):
    ### BEGIN SOLUTION
    y = 3 * x
    return y
    ### END SOLUTION

triple"""


def code(source, *tags):
    return new_code_cell(source, metadata={"tags": list(tags)})


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """A clone with one chapter."""
    root = tmp_path / "clone"
    (root / "notebooks").mkdir(parents=True)
    (root / "kdlib").mkdir()
    (root / "kdlib" / "scale.py").touch()
    (root / "results").mkdir()
    (root / "pyproject.toml").write_text('Repository = "https://github.com/someone/course"\n')
    notebook = new_notebook(
        cells=[
            new_markdown_cell("<!-- header -->"), code("", "colab"), code(SETUP, "setup"), code(METHOD, "method"),
            code(EXPERIMENT), code(EXERCISE, "exercise"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )  # fmt: skip
    nbformat.write(notebook, root / "notebooks" / "99_toy.ipynb")
    toy = Chapter("99", "99_toy", "Toy", "Does it run?", {"smoke": "none", "lab": "none", "full": "none"},
                  (Headline("runs", "acc", "base", "toys"),))  # fmt: skip
    monkeypatch.chdir(root)
    monkeypatch.setattr(chapters, "CHAPTERS", (toy,))
    monkeypatch.setattr(results, "CHAPTERS", (toy,))
    stamp.address.cache_clear()
    yield toy
    stamp.address.cache_clear()


def test_run_executes_every_cell_and_prints_the_results(chapter, tmp_path, capfd):
    assert execute.run(chapter, {"KDLIB_SCALE": "smoke", "KDLIB_SEEDS": "3"}, out=tmp_path / "out")
    said = capfd.readouterr().out
    assert "minus “base”" in said and "| kd | 41.0 ± 1.0 | +20.0" in said
    done = cells.read(tmp_path / "out" / "99_toy.ipynb")
    assert done.cells[2].outputs[0].text == "smoke [0, 1, 2]\n"
    assert all(cell.execution_count is None for cell in cells.read(chapter.path).cells if cell.cell_type == "code")


def test_run_names_the_failing_cell(chapter, tmp_path, capfd):
    notebook = cells.read(chapter.path)
    notebook.cells.append(code("raise ValueError('temperature is 0; it must be positive')"))
    cells.write(notebook, chapter.path)
    assert not execute.run(chapter, {"KDLIB_SCALE": "smoke"}, out=tmp_path / "out")
    assert "ValueError: temperature is 0; it must be positive" in capfd.readouterr().err


def test_in_place_keeps_tidy_outputs(chapter):
    assert execute.run(chapter, {"KDLIB_SCALE": "lab"}, in_place=True)
    notebook = cells.read(chapter.path)
    code_cells = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code_cells] == list(range(1, len(code_cells) + 1))
    text = json.dumps(notebook)
    assert "it/s" not in text and "widget-view" not in text and "iopub" not in text
    assert (chapters.root() / "results").glob("99_toy.lab.*.json")


def test_tidy_drops_bars_and_widgets_only():
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="runs:  50%|█████     | 1/2 [00:00<00:00, 3.00it/s]"),
        nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "w"}),
        nbformat.v4.new_output("stream", name="stdout", text="kept"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning that must be seen"),
    ]
    cell = code("x")
    cell.outputs = outputs
    tidy = cells.tidy(new_notebook(cells=[cell]))
    assert [o.text for o in tidy.cells[0].outputs] == ["kept", "a warning that must be seen"]


def test_method_cells_can_be_lifted_out(chapter):
    space = cells.method_namespace(chapter.path)
    assert space["double"](4) == 8
    from kdlib.fingerprint import fingerprint

    assert fingerprint(space["double"])


def test_export_is_a_module(chapter, tmp_path):
    source = cells.export(chapter.path)
    assert "import kdlib as kd" in source and "def double(x):" in source and "print" not in source
    compile(source, "exported", "exec")


def test_student_version_has_stubs_answers_and_no_outputs(chapter):
    execute.run(chapter, {"KDLIB_SCALE": "smoke"}, in_place=True)
    assert not student.update(chapter, check=True)
    student.update(chapter, check=False)
    assert student.update(chapter, check=True)
    opened = cells.read(student.path(chapter))
    stub, answer = opened.cells[5], opened.cells[6]
    assert "raise NotImplementedError" in stub.source and "3 * x" not in stub.source
    assert "<details><summary>Answer" in answer.source and "y = 3 * x\nreturn y" in answer.source
    assert all(not cell.outputs for cell in opened.cells if cell.cell_type == "code")


def test_a_solution_outside_a_function_becomes_an_ellipsis():
    source = "### BEGIN SOLUTION\nanswer = 1 + 1\n### END SOLUTION\n\ncheck(answer)"
    opened = student.opened(new_notebook(cells=[code(source)]))
    assert opened.cells[0].source == "answer = ...  # your answer\n\ncheck(answer)"


def test_stamp_writes_badge_costs_and_colab_cell(chapter):
    execute.run(chapter, {"KDLIB_SCALE": "lab"}, in_place=True)
    assert not stamp.stamp(chapter, check=True)
    stamp.stamp(chapter, check=False)
    assert stamp.stamp(chapter, check=True)
    top, colab = cells.read(chapter.path).cells[:2]
    assert "github/someone/course/blob/main/notebooks/99_toy.ipynb" in top.source
    assert (
        "| `lab` | none | 0.0 min" in top.source
        and "not yet measured" in top.source
        and "Outputs below: `lab`" in top.source
    )
    assert "git" in colab.source and "https://github.com/someone/course" in colab.source
    subprocess.run([sys.executable, "-c", colab.source], check=True)  # does nothing outside Colab


def test_readme_tables_come_from_the_results(chapter):
    readme = chapters.root() / "README.md"
    readme.write_text(
        "a\n<!-- notebooks -->\n<!-- /notebooks -->\n<!-- results -->\nold\n<!-- /results -->\n<!-- bench -->\n<!-- /bench -->\nz\n"
    )
    execute.run(chapter, {"KDLIB_SCALE": "lab"}, in_place=True)
    assert not results.update(check=True)
    results.update(check=False)
    assert results.update(check=True)
    text = readme.read_text()
    assert text.startswith("a\n") and text.endswith("z\n") and "old" not in text
    assert "| kd | 81.0 ± 1.0 | +40.0 [+40.0, +40.0] |" in text and "[read](notebooks/99_toy.ipynb)" in text
    stored = files.read_json(next((chapters.root() / "results").glob("99_toy.lab.*.json")))
    stored["tables"]["runs"]["rows"][0]["acc"] = 0.9
    files.write_json(chapters.root() / "results" / f"99_toy.lab.{stored['hardware']}.json", stored)
    assert not results.update(check=True)


def test_published_shows_the_committed_run(chapter):
    execute.run(chapter, {"KDLIB_SCALE": "lab"}, in_place=True)
    table = scoreboard.published("99_toy", "runs", "acc", baseline="base")
    assert table.index.get_level_values("scale")[0].startswith("lab,") and len(table) == 2


def test_the_command_line_says_what_is_wrong(chapter, capsys):
    assert cli.main(["run", "42"]) == 2
    assert "there is no chapter '42'; there are 99" in capsys.readouterr().err
    assert cli.main(["run", "99", "--rehearse", "--in-place"]) == 2


def test_doctor_finds_this_machine_fit(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "✓ packages for every chapter" in said and "smoke" in said and "✗ cifar100" in said
