"""The press shop, on a small notebook that is really executed."""

import json
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kdlib import __main__ as cli
from kdlib import files, scoreboard
from kdlib.course import band, cells, chapters, execute, rehearsals, results, stamp, student
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
REHEARSED = """import torch
batches = [{"id": torch.arange(4), "x": torch.ones(4, 2)}]
kd.fit(torch.nn.Linear(2, 1), lambda model, batch: (model(batch["x"]).mean(), {}), batches, epochs=7,
       optimizer=lambda p: torch.optim.SGD(p, 0.1), progress=False)"""
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


@pytest.fixture
def executed(chapter, made={}):  # noqa: B006, one execution serves all tests
    """The chapter executed in place at ``lab``, with its results file."""
    if not made:
        assert execute.run(chapter, {"KDLIB_SCALE": "lab"}, in_place=True)
        made |= {p: p.read_text() for p in (chapter.path, *(chapters.root() / "results").iterdir())}
    for path, text in made.items():
        (chapters.root() / path.parent.name / path.name).write_text(text)
    return chapter


def test_run_executes_every_cell_and_prints_the_results(chapter, tmp_path, capfd):
    assert execute.run(chapter, {"KDLIB_SCALE": "smoke", "KDLIB_SEEDS": "3"}, out=tmp_path / "out")
    said = capfd.readouterr().out
    assert "minus “base”" in said and "| kd | 41.0 ± 1.0 | +20.0" in said
    done = cells.read(tmp_path / "out" / "99_toy.ipynb")
    assert done.cells[2].outputs[0].text == "smoke [0, 1, 2]\n"
    assert all(cell.execution_count is None for cell in cells.read(chapter.path).cells if cell.cell_type == "code")


def test_run_names_the_failing_cell(chapter, tmp_path, capfd):
    notebook = cells.read(chapter.path)
    notebook.cells = [code("raise ValueError('temperature is 0; it must be positive')"), code("1")]
    cells.write(notebook, chapter.path)
    assert not execute.run(chapter, {"KDLIB_SCALE": "smoke"}, out=tmp_path / "out")
    assert "ValueError: temperature is 0; it must be positive" in capfd.readouterr().err


def test_run_survives_a_kernel_that_dies_or_does_not_start(chapter, tmp_path, capfd, monkeypatch):
    notebook = cells.read(chapter.path)
    notebook.cells = [code("1"), code("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")]
    cells.write(notebook, chapter.path)
    assert not execute.run(chapter, {"KDLIB_SCALE": "smoke"}, out=tmp_path / "out", in_place=True)
    assert "stopped after 1 of 2 cells" in capfd.readouterr().err
    assert cells.read(chapter.path) == notebook, "a failed run is not written in place"

    starts = []

    class Unlucky:
        def __init__(self, *args, **kwargs):
            starts.append(args)

        def execute(self):
            if len(starts) == 1:
                raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(execute, "NotebookClient", Unlucky)
    assert execute.run(chapter, {"KDLIB_SCALE": "smoke"}, out=tmp_path / "out") and len(starts) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupted_run_stops_all_chapters_and_says_so(chapter, tmp_path):
    started, call = tmp_path / "started", tmp_path / "call.py"
    notebook = cells.read(chapter.path)
    notebook.cells = [code(f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(60)")]
    cells.write(notebook, chapter.path)
    call.write_text(
        "import sys\nfrom kdlib import __main__ as cli\nfrom kdlib.course import chapters\n"
        "toy = chapters.Chapter('99', '99_toy', '', '', {}, ())\nchapters.CHAPTERS = (toy,)\n"
        f"sys.exit(cli.main(['run', '99', '99', '--scale', 'smoke', '--out', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen([sys.executable, str(call)], stderr=subprocess.PIPE, text=True)
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on where this one stopped" in process.communicate(timeout=50)[1]
    assert process.returncode == 130


def test_rehearsal_runs_the_cells_and_prints_the_cost(chapter, tmp_path, capfd):
    notebook = cells.read(chapter.path)
    notebook.cells.append(code(REHEARSED))
    cells.write(notebook, chapter.path)
    options = {"KDLIB_SCALE": "full", "KDLIB_REHEARSE": "1"}
    assert execute.run(chapter, options, out=tmp_path / "out")
    said = capfd.readouterr().out
    assert "hours on a T4" in said and "planned steps" in said and "Linear" in said
    assert not list((chapters.root() / "results").iterdir()), "a rehearsal has no results"


def test_a_recorded_rehearsal_is_kept_beside_others_and_stands_in_the_header(executed, tmp_path, capfd):
    path = chapters.root() / "results" / "rehearsals.json"
    old = {"runs": 8, "t4_hours": 5.0, "memory_gb": 1.0}
    others = {"98_other": {"full": old}, "99_toy": {"smoke": old, "full": old}}
    files.write_json(path, others)
    notebook = cells.read(executed.path)
    notebook.cells.append(code(REHEARSED))
    cells.write(notebook, executed.path)
    call = ["run", "99", "--scale", "full", "--rehearse", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 0 and files.read_json(path) == others, "only on request"
    assert cli.main([*call, "--record"]) == 0
    kept = files.read_json(path)
    entry = kept["99_toy"].pop("full")
    assert kept == {"98_other": {"full": old}, "99_toy": {"smoke": old}}
    assert entry["runs"] == 1 and entry["memory_gb"] > 0 and entry["t4_hours"] > 0
    assert set(entry) == {"runs", "t4_hours", "memory_gb", "date", "torch"}
    header = stamp.header(executed)
    assert "h on a T4 (estimated, 1 run) | 0.0 GB (estimated) | rehearsed only |" in header
    assert "| `lab` | none | 0.0 min" in header and "Outputs below: `lab`" in header


def test_a_header_says_of_each_scale_what_is_known_best(executed):
    entry = {"runs": 24, "t4_hours": 12.34, "memory_gb": 3.21}
    path = chapters.root() / "results" / "rehearsals.json"
    files.write_json(path, {"99_toy": {"full": entry, "lab": entry}})
    header = stamp.header(executed)
    wanted = "| `full` | none | ≈ 12 h on a T4 (estimated, 24 runs) | 3.2 GB (estimated) | rehearsed only |"
    assert wanted in header and header.count("rehearsed only") == 1, "lab was measured"
    assert "| `smoke` | none | not yet measured | |  |" in header
    files.write_json(path, {"99_toy": {"full": entry | {"t4_hours": 0.0123}}})
    assert "≈ 0.012 h on a T4" in stamp.header(executed)


def test_the_summary_adds_hours_and_takes_the_largest_memory(monkeypatch):
    monkeypatch.delenv("KDLIB_REHEARSAL_LOG", raising=False)
    facts = dict(parameters=1, rows=2, planned_steps=1000, step_flops=4.8e14, fixed_bytes=5e9, activation_bytes=1e9)
    small = facts | dict(name="b", step_flops=2.4e14, fixed_bytes=1e9)
    monkeypatch.setattr(rehearsals.rehearsal, "_records", [facts | dict(name="a"), small])
    found = rehearsals.summary()
    assert (found["runs"], found["memory_gb"]) == (2, 6.0)
    assert found["t4_hours"] == 25.0  # 4.8e17 / 8e12 / 3600 = 16.67, and half of it
    assert found["date"].count("-") == 2 and found["torch"]


def test_a_rehearsal_of_no_run_is_not_recorded(chapter, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(rehearsals.rehearsal, "_records", [])
    assert cli.main(["run", "99", "--rehearse", "--record", "--out", str(tmp_path / "out")]) == 1
    assert "99_toy rehearsed no run" in capfd.readouterr().err
    assert not list((chapters.root() / "results").iterdir())


def test_in_place_keeps_tidy_outputs(executed):
    notebook = cells.read(executed.path)
    code_cells = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code_cells] == list(range(1, len(code_cells) + 1))
    text = json.dumps(notebook)
    assert "it/s" not in text and "widget-view" not in text and "iopub" not in text
    assert list((chapters.root() / "results").glob("99_toy.lab.*.json"))


def test_tidy_drops_bars_and_widgets_only():
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="runs:  50%|█████     | 1/2 [00:00<00:00, 3.00it/s]"),
        nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "w"}),
        nbformat.v4.new_output("stream", name="stdout", text="kept"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning that must be seen"),
    ]
    mixed = "\rruns: 0%|   | 0/2 [00:00<?, ?it/s]careful: few rows\n\rruns: 100%|██| 2/2 [00:09<00:00, 4.5s/it]\n\x1b[A"
    outputs.append(nbformat.v4.new_output("stream", name="stderr", text=mixed.replace("]careful", "]\ncareful")))
    cell = code("x")
    cell.outputs = outputs
    tidy = cells.tidy(new_notebook(cells=[cell], metadata={"widgets": {}}))
    assert [o.text.strip() for o in tidy.cells[0].outputs] == [
        "kept", "a warning that must be seen", "careful: few rows",
    ]  # fmt: skip
    assert "widgets" not in tidy.metadata


def test_method_cells_can_be_lifted_out(chapter):
    space = cells.method_namespace(chapter.path)
    assert space["double"](4) == 8
    from kdlib.fingerprint import fingerprint

    assert fingerprint(space["double"])


def test_export_is_a_module(chapter, tmp_path):
    notebook = cells.read(chapter.path)
    notebook.cells[2].source += "\nfrom math import (\n    pi,\n    tau,\n)"
    cells.write(notebook, chapter.path)
    target = tmp_path / "doubling.py"
    assert cli.main(["export", "99", "-o", str(target)]) == 0
    source = target.read_text()
    assert "import kdlib as kd" in source and "def double(x):" in source and "print" not in source
    space = {}
    exec(compile(source, "exported", "exec"), space)
    assert space["tau"] == 2 * space["pi"] and callable(space["double"])


def test_student_version_has_stubs_answers_and_no_outputs(executed):
    assert not student.update(executed, check=True)
    student.update(executed, check=False)
    assert student.update(executed, check=True)
    opened = cells.read(student.path(executed))
    stub, answer = opened.cells[5], opened.cells[6]
    assert "raise NotImplementedError" in stub.source and "3 * x" not in stub.source
    assert "<details><summary>Answer" in answer.source and "y = 3 * x\nreturn y" in answer.source
    assert all(not cell.outputs for cell in opened.cells if cell.cell_type == "code")


def test_a_solution_outside_a_function_becomes_an_ellipsis():
    source = "### BEGIN SOLUTION\nanswer = 1 + 1\n### END SOLUTION\n\ncheck(answer)"
    opened = student.opened(new_notebook(cells=[code(source)]))
    assert opened.cells[0].source == "answer = ...  # your answer\n\ncheck(answer)"


def test_stamp_writes_badge_costs_and_colab_cell(executed):
    assert not stamp.stamp(executed, check=True)
    stamp.stamp(executed, check=False)
    assert stamp.stamp(executed, check=True)
    top, colab = cells.read(executed.path).cells[:2]
    assert "github/someone/course/blob/main/notebooks/99_toy.ipynb" in top.source
    assert (
        "| `lab` | none | 0.0 min" in top.source
        and "not yet measured" in top.source
        and "Outputs below: `lab`" in top.source
    )
    assert "git" in colab.source and "https://github.com/someone/course" in colab.source
    subprocess.run([sys.executable, "-c", colab.source], check=True)  # does nothing outside Colab


def test_on_colab_the_cell_fetches_the_release_and_leaves_torch_alone(tmp_path):
    """Run the cell with a stand-in for Colab, a repository with a tag, and a pip that only notes what it is asked."""
    origin, content = tmp_path / "origin", tmp_path / "content"
    (origin / "kdlib").mkdir(parents=True)
    (origin / "kdlib" / "__init__.py").write_text("release = 1\n")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", stamp.REF]):
        subprocess.run([*git, *command], check=True)
    (origin / "kdlib" / "__init__.py").write_text("release = 2\n")
    subprocess.run([*git, "commit", "-qam", "after the release"], check=True)
    cell = stamp.COLAB.format(address=f"file://{origin}", ref=stamp.REF).replace(
        "/content/kdlib", str(content / "kdlib")
    )
    cell = cell.replace("KEEP_RUNS_ON_DRIVE = False", "KEEP_RUNS_ON_DRIVE = True")
    around = f"""
import importlib.util, os, subprocess, sys, types
os.makedirs({str(content)!r})
colab = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(mount=print)
sys.modules |= {{"google": types.ModuleType("google"), "google.colab": colab}}
real_run, real_find = subprocess.run, importlib.util.find_spec
subprocess.run = lambda args, **kw: print("pip", args[3:]) if "pip" in args else real_run(args, **kw)
importlib.util.find_spec = lambda name: None if name == "joblib" else real_find(name)
{{}}
import kdlib
print("release", kdlib.release, os.environ["KDLIB_HOME"])
"""
    done = subprocess.run(
        [sys.executable, "-c", around.replace("{}", cell)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "pip ['install', '-q', 'joblib']", "/content/drive", "release 1 /content/drive/MyDrive/kdlib",
    ]  # fmt: skip
    assert not done.stderr


def test_the_band_lets_in_what_it_was_made_of(chapter, tmp_path, monkeypatch):
    monkeypatch.setattr(band, "run", fake_runs := FakeRuns())
    with pytest.raises(ValueError, match="at least 2"):
        band.record(chapter, 1)
    assert band.record(chapter, 3) and fake_runs.firsts == ["0", "100", "200"]
    low, high = files.read_json(chapters.root() / "results" / "smoke_bands.json")["99_toy"]["acc"]
    assert low < 0.5 - 0.3 and high > 0.7 + 0.3
    assert scoreboard.in_band("99_toy", {"acc": 0.6, "always": 1 / 3})
    assert not scoreboard.in_band("99_toy", {"acc": 2.0}) and not scoreboard.in_band("99_toy", {"always": 0.4})


class FakeRuns:
    """Stands for executing the chapter: logs values whose spread is known."""

    def __init__(self):
        self.firsts = []

    def __call__(self, chapter, options, *, out):
        values = {"acc": 0.5 + 0.1 * len(self.firsts), "always": 1 / 3}
        self.firsts.append(options["KDLIB_FIRST_SEED"])
        with open(options["KDLIB_BAND_LOG"], "a") as log:
            log.write(json.dumps(values) + "\n")
        return True


def test_readme_tables_come_from_the_results(executed):
    readme = chapters.root() / "README.md"
    readme.write_text(
        "a\n<!-- notebooks -->\n<!-- /notebooks -->\n<!-- results -->\nold\n<!-- /results -->\n<!-- bench -->\n<!-- /bench -->\nz\n"
    )
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


def test_published_shows_the_committed_run(executed):
    table = scoreboard.published("99_toy", "runs", "acc", baseline="base")
    assert table.index.get_level_values("scale")[0].startswith("lab,") and len(table) == 2


def test_the_command_line_says_what_is_wrong(chapter, capsys):
    assert cli.main(["run", "42"]) == 2
    assert "there is no chapter '42'; there are 99" in capsys.readouterr().err
    assert cli.main(["run", "99", "--rehearse", "--in-place"]) == 2
    capsys.readouterr()
    assert cli.main(["run", "99", "--record"]) == 2
    assert "--record keeps what a rehearsal estimated; give it together with --rehearse" in capsys.readouterr().err


def test_run_from_the_command_line(chapter, tmp_path, capfd):
    assert cli.main(["run", "99", "--scale", "lab", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    assert cells.read(tmp_path / "out" / "99_toy.ipynb").cells[2].outputs[0].text == "lab [0, 1]\n"
    said = capfd.readouterr().out
    assert str(tmp_path / "out" / "99_toy_figures") in said and "done after" in said


@pytest.mark.parametrize("missing", ["torch", "nbclient"])
def test_a_missing_package_is_named(missing, tmp_path):
    hide = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['kdlib', 'run', '00', '--scale', 'smoke']\n"
    call = hide + "import runpy; runpy.run_module('kdlib', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode and f"the package {missing} is missing: pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_this_machine_fit(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "✓ packages for every chapter" in said and "smoke" in said and "✗ CIFAR-100" in said


def test_doctor_sees_what_is_in_either_layout(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    for folder in ("cifar-10-batches-py", "textcls/trec", "models/roberta-large"):
        (tmp_path / folder).mkdir(parents=True)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in ("CIFAR-10", "TREC", "roberta-large"):
        assert f"✓ {name}: " in said


def test_doctor_fails_where_smoke_cannot_run(monkeypatch, capsys):
    from kdlib.course import doctor

    monkeypatch.setattr(doctor, "NEEDED", ("torch", "not_installed_anywhere"))
    assert cli.main(["doctor"]) == 1
    assert "missing not_installed_anywhere: pip install -r requirements.txt" in capsys.readouterr().out
