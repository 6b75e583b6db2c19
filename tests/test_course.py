"""The press shop, on a small chapter that is really executed."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time

import cloudpickle
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import kdlib as kd
from kdlib import __main__ as cli
from kdlib import course, files

TOP = "# 99 · Toy: it runs"
SETUP = """import kdlib as kd
from math import (
    pi,
    tau,
)
kd.about("99")
run = kd.settings(smoke=dict(gain=1, seeds=2), lab=dict(gain=2, seeds=3), full=dict(gain=3, seeds=5))"""
METHOD = '''def double(x):
    """Twice x, Φ."""
    return 2 * x * pi / pi'''
EXPERIMENT = """def train(*, seed, folder, gain):
    return kd.Outcome({"acc": double(gain) + seed / 100})
runs = kd.run_grid("toy", train, {"base": dict(gain=0.1), "kd": dict(gain=0.2)}, run.seeds, jobs=1)
kd.write_results("99_toy", {"runs": runs}, run)"""
SLIDER = """from IPython.display import display
display({"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "slider"}, raw=True)
display({"text/plain": "kept"}, raw=True)"""


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    code = [new_code_cell(source, metadata={"tags": list(tags)}) for source, *tags in cells]
    nbformat.write(new_notebook(cells=[new_markdown_cell(TOP), *code]), path)
    return path


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with one lesson and its study, and a caller who stands in another folder."""
    root = tmp_path / "clone"
    (root / "results").mkdir(parents=True)
    write(root / "notebooks" / "99_toy.ipynb", [SETUP, "setup"], [METHOD, "method"], [EXPERIMENT], [SLIDER])
    write(root / "notebooks" / "studies" / "99_toy.ipynb", ["1"])
    (root / "README.md").write_text("<!-- map -->\n<!-- /map -->\n<!-- results -->\nold\n<!-- /results -->\n")
    monkeypatch.setattr(course, "ROOT", root)
    monkeypatch.setattr(course, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(course, "HEADLINES", {"99": ("runs", "acc", "kd", "base", "a toy")})
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield root
    sys.modules.pop("lesson_99", None)


def test_run_executes_and_says_what_was_seen_and_where(clone, tmp_path, monkeypatch, capsys):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"  # a python3 of another environment, as users have it
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(
        json.dumps({"argv": ["/nowhere/python"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("KDLIB_HOME", "../store")
    assert cli.main(["run", "99", "--scale", "smoke", "--seeds", "1", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "✓ 99_toy" in said and "seen: kd 40.0, base 20.0: +20.0 points (1 seed)" in said
    assert len(said.splitlines()) <= 4 and "inf" not in said and "nan" not in said
    done = nbformat.read(tmp_path / "elsewhere" / "out" / "99_toy.ipynb", as_version=4)
    shown = [o for cell in done.cells[1:] for o in cell.outputs]
    assert [o.data["text/plain"] for o in shown if o.output_type == "display_data"] == ["kept"]
    assert (tmp_path / "store").is_dir(), "a relative home is the caller's"
    assert [path.name for path in (clone / "notebooks").iterdir()] != [] and not (clone / "store").exists()
    assert not any(
        cell.get("outputs") for cell in nbformat.read(clone / "notebooks" / "99_toy.ipynb", as_version=4).cells
    )


def test_a_failing_cell_is_named_and_nothing_is_written_in_place(clone, capsys):
    path = write(clone / "notebooks" / "99_toy.ipynb", ["raise ValueError('temperature is 0')"], ["1"])
    before = path.read_text()
    assert cli.main(["run", "99", "--in-place"]) == 1
    said = capsys.readouterr()
    assert "ValueError: temperature is 0" in said.err and "✗ 99_toy" in said.out and path.read_text() == before


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupted_run_says_how_to_go_on(clone, tmp_path):
    started, call = tmp_path / "started", tmp_path / "call.py"
    write(clone / "notebooks" / "99_toy.ipynb", [f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(60)"])
    call.write_text(
        "import sys, runpy, pathlib\nfrom kdlib import course\n"
        f"course.NOTEBOOKS = pathlib.Path({str(clone / 'notebooks')!r})\nsys.argv = ['kdlib', 'run', '99']\n"
        "runpy.run_module('kdlib', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, str(call)], stderr=subprocess.PIPE, text=True)
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on where this one stopped" in process.communicate(timeout=50)[1]
    assert process.returncode == 130


def test_chapters_are_called_by_number(clone):
    lesson, study = clone / "notebooks" / "99_toy.ipynb", clone / "notebooks" / "studies" / "99_toy.ipynb"
    assert course.notebooks(["99", "99s"]) == [lesson, study]
    assert course.notebooks(["all"]) == [lesson] and course.notebooks(["studies"]) == [study]
    with pytest.raises(ValueError, match="no chapter '98'; there are 99, 99s, all, studies"):
        course.notebooks(["98"])


def test_a_lesson_is_a_module_without_a_file(clone):
    toy = kd.lesson("99")
    assert toy.double(4) == 8 and "Twice" in inspect.getsource(toy.double) and toy is kd.lesson("99")
    assert not hasattr(toy, "run") and not hasattr(toy, "__file__") and sys.modules["lesson_99"] is toy
    sent = cloudpickle.dumps(toy.double)
    del sys.modules["lesson_99"]
    assert cloudpickle.loads(sent)(4) == 8, "another process has no such module"
    write(clone / "notebooks" / "99_toy.ipynb", [SETUP, "setup"], [METHOD.replace("2 *", "3 *"), "method"])
    assert kd.lesson("99").double(4) == 12, "an edited lesson is read again"


def test_a_lesson_has_the_keys_of_its_notebook(clone, tmp_path, monkeypatch):
    """What the notebook's cells define and what its study gets are one thing to the store, bytecode for bytecode."""
    method = """from_cells = dict
@dataclass
class Task:
    build: Callable[[], nn.Module]
    size: int = 3

def train(task):
    again = [kd.fingerprint.fingerprint(x) for x in range(task.size)]
    return kd.scale.device(), (lambda: kd.Outcome({})), again"""
    setup = "from collections.abc import Callable\nfrom dataclasses import dataclass\nimport kdlib as kd\nfrom torch import nn"
    write(clone / "notebooks" / "98_keys.ipynb", [setup, "setup"], [method, "method"])
    space = vars(sys.modules["__main__"])
    for cell in (setup, method):
        exec(compile(cell, "<cell>", "exec", dont_inherit=True), space)
    lesson = kd.lesson("98")
    for name in ("Task", "train"):
        assert kd.fingerprint.fingerprint(space.pop(name)) == kd.fingerprint.fingerprint(getattr(lesson, name)), name


def test_a_console_that_cannot_write_greek_gets_it_all_the_same():
    """``export 02 > file.py`` is right under cp1252, and what is printed for people does not stop."""
    call = "from kdlib.__main__ import main; main(['doctor']); print('-----'); main(['export', '02'])"
    done = subprocess.run(
        [sys.executable, "-c", call],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    )
    assert not done.returncode, done.stderr.decode()
    source = done.stdout.partition(b"-----")[2].replace(b"\r\n", b"\n").lstrip().decode("utf-8")
    assert "β" in source and compile(source, "exported", "exec")


def test_export_holds_the_method_and_its_imports(clone, capsys):
    assert cli.main(["export", "99"]) == 0
    space = {}
    exec(capsys.readouterr().out, space)
    assert space["tau"] == 2 * space["pi"] and space["double"](2) == 4 and "run" not in space


def result(clone, **more):
    rows = [
        {"arm": arm, "seed": s, "acc": value + s / 100} for arm, value in (("base", 0.2), ("kd", 0.4)) for s in range(3)
    ]
    content = dict(
        notebook="99_toy", scale="lab", hardware="cpu2", date="2026-01-02", run_seconds=120.0, peak_memory_gb=1.0,
        environment={"torch": "2"}, tables={"runs": {"kind": "runs", "rows": rows}, "odd": {"rows": [{"a|b": 1.0, "c": None}]}},
    )  # fmt: skip
    files.write_json(clone / "results" / "99_toy.lab.cpu2.json", content | more)


def test_results_make_the_map_the_lines_and_the_page(clone, capsys):
    result(clone)
    assert cli.main(["results", "--check"]) == 1 and not (clone / "results" / "README.md").exists()
    assert cli.main(["results"]) == 0 and cli.main(["results", "--check"]) == 0
    readme, page = (clone / "README.md").read_text(), (clone / "results" / "README.md").read_text()
    assert (
        "| 99 | [Toy](notebooks/99_toy.ipynb) | [study](notebooks/studies/99_toy.ipynb) |" in readme
        and "| 2 |" in readme
    )
    assert "- **99** kd 41.0, base 21.0: +20.0 [+20.0, +20.0] points (3 seeds); `lab`, cpu2. *Limit*: a toy." in readme
    assert "old" not in readme and "<!-- /results -->" in readme
    assert "## 99_toy: lab, cpu2, 2026-01-02" in page and "| a|b |" not in page.replace("\\|", "¦") or "| kd |" in page


def test_about_prints_versions_scale_and_what_was_measured(clone, capsys):
    result(clone)
    kd.about("99")
    said = capsys.readouterr().out
    assert "torch" in said and "scale: smoke" in said and "lab on cpu2, 2026-01-02: 2 minutes of training" in said


def test_doctor_names_what_running_needs_and_nothing_else(monkeypatch, capsys):
    needs = ["numpy>=1", "nosuchpackage>=3; extra == 'text'", "torch<1", "alsonot; extra == 'audio'"]
    monkeypatch.setattr(course.importlib.metadata, "requires", lambda name: needs)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "✗ nosuchpackage is missing; kdlib needs nosuchpackage>=3" in said and "kdlib needs torch<1" in said
    assert "numpy" not in said and "alsonot" not in said
    monkeypatch.setattr(course.importlib.metadata, "requires", lambda name: needs[:1])
    assert cli.main(["doctor"]) == 0 and "smoke can run" in capsys.readouterr().out


def test_doctor_sees_a_home_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "file" / "home"))
    assert not course.doctor() and "set KDLIB_HOME" in capsys.readouterr().out
