"""The run store: each run once, again when what made it changed, and nothing lost when something dies."""

import functools
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn

import kdlib as kd
from kdlib import files
from kdlib.runs import RECORD, Outcome, counted, run_grid, spent

ROOT = Path(__file__).parents[1]
ARMS = {"labels only": {"rate": 1.0}, "KD": {"rate": 2.0}}
CALLS = []


class Marked:
    """Stands for a data set: something with a fingerprint."""

    def __init__(self, mark):
        self.fingerprint = mark


def train(seed, folder, rate, data=None):
    CALLS.append((rate, seed))
    model = nn.Linear(2, 1)
    history = [{"epoch": 0, "loss": torch.tensor(0.5), "rate": np.float32(rate)}]
    draw = torch.rand(1).item() + np.random.rand() + random.random()
    return Outcome({"accuracy": rate + seed, "draw": draw}, history, model, {"logits": torch.full((2,), rate)})


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KDLIB_REHEARSE", raising=False)
    monkeypatch.setattr(kd.runs, "_counted", {})
    CALLS.clear()
    return tmp_path / "home" / "runs"


def grid(train=train, arms=ARMS, seeds=(0, 1), **more):
    return run_grid("toy", train, arms, seeds, **{"jobs": 1, **more})


def test_the_second_call_is_answered_by_the_store(capsys):
    first = grid()
    said = capsys.readouterr()
    assert len(CALLS) == 4 and said.out == "" and "toy" in said.err and counted() == (4, 0)
    second = grid()
    said = capsys.readouterr()
    assert len(CALLS) == 4 and said.out == said.err == "" and counted() == (4, 0)
    another_process()
    assert grid() == second and counted() == (4, 4)
    assert first == second and [(r.arm, r.seed) for r in second] == [(a, s) for a in ARMS for s in (0, 1)]
    frame, histories = second.frame(), second.histories()
    assert list(frame["accuracy"]) == [1, 2, 2, 3] and list(frame["arm"]) == ["labels only"] * 2 + ["KD"] * 2
    assert list(histories["loss"]) == [0.5] * 4 and list(histories["rate"]) == [1, 1, 2, 2]


def test_weights_and_arrays_come_back():
    runs = grid()
    kd.seed_everything(1)
    expected = nn.Linear(2, 1)
    loaded = runs.model("KD", 1, into=nn.Linear(2, 1))
    assert torch.equal(loaded.weight, expected.weight) and runs.arrays("KD", 1)["logits"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="no run of arm 'none' with seed 3"):
        runs.get("none", 3)


@pytest.mark.parametrize(
    "change, again",
    [
        ({"arms": {**ARMS, "KD": {"rate": 3.0}}}, [(3.0, 0), (3.0, 1)]),
        ({"arms": {**ARMS, "new": {"rate": 9.0}}}, [(9.0, 0), (9.0, 1)]),
        ({"arms": {"KD": ARMS["KD"]}}, []),
        ({"seeds": (1, 2)}, [(1.0, 2), (2.0, 2)]),
        ({"shared": {"data": Marked("b")}}, [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]),
        ({"shared": {"data": Marked("a")}}, []),
        ({"shared": lambda seed: {"data": Marked("a" if seed else "c")}}, [(1.0, 0), (2.0, 0)]),
    ],
)
def test_exactly_what_changed_is_made_again(change, again):
    grid(shared={"data": Marked("a")})
    CALLS.clear()
    grid(**{"shared": {"data": Marked("a")}, **change})
    assert again == CALLS


def test_a_run_is_seeded_and_leaves_the_callers_generators_alone():
    kd.seed_everything(5)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    kd.seed_everything(5)
    runs = grid()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    draws = runs.frame()["draw"]
    assert draws[0] == draws[2] != draws[1]  # by seed, not by arm or order


@pytest.mark.parametrize("content", ['{"seed": 0, ', "[]", "{}"])
def test_a_damaged_record_is_said_and_the_run_made_again(content, capsys):
    record = grid().get("KD", 1).folder / RECORD
    record.write_text(content)
    CALLS.clear()
    runs = grid()
    assert [(2.0, 1)] == CALLS and "damaged" in capsys.readouterr().out
    assert runs.model("KD", 1, into=nn.Linear(2, 1)) is not None and grid() == runs and len(CALLS) == 1


def test_labels_mended_in_place_and_a_class_edited_later_are_noticed():
    """The kinds of change that a later cell makes."""
    data = kd.data.images("digits").train.sample(40, seed=0)
    space = {"__name__": "__main__", "kd": kd}
    exec("class Student:\n    width = 16\ndef train(seed, folder, data):\n"
         "    return kd.Outcome({'w': Student().width, 'first': int(data.labels[0])})", space)  # fmt: skip

    def answer():
        return grid(space["train"], {"a": {}}, [0], shared={"data": data})[0].metrics

    first = answer()
    data.labels[0] += 1
    assert answer() == {"w": 16, "first": first["first"] + 1}
    space["Student"].width = 64
    assert answer() == {"w": 64, "first": first["first"] + 1}


def train_sometimes(seed, folder, mood):
    if mood == "fails":
        (folder / "progress").write_text("half")
        raise KeyError("a bug in this arm")
    if mood == "diverges":
        raise FloatingPointError("loss is nan in epoch 3")
    return Outcome({"accuracy": 0.5})


def test_a_failure_is_told_after_the_others_are_stored(store):
    arms = {"bad": {"mood": "fails"}, "good": {"mood": "fine"}}
    with pytest.raises(RuntimeError, match="(?s)2 of 4 runs failed.*arm 'bad', seed 0.*a bug in this arm"):
        grid(train_sometimes, arms)
    assert len(grid(train_sometimes, {"good": arms["good"]})) == 2
    stored = sorted(path.parent.name[:4] for path in store.rglob(RECORD))
    assert stored == ["good", "good"] and len(list(store.rglob("work/progress"))) == 2


def test_divergence_is_a_result_not_a_failure():
    arms = {"wild": {"mood": "diverges"}, "tame": {"mood": "fine"}}
    for runs in (grid(train_sometimes, arms), grid(train_sometimes, arms)):
        frame = runs.frame().set_index(["arm", "seed"])
        assert runs.get("wild", 0).diverged and runs.get("wild", 0).metrics == {}
        assert frame["accuracy"].isna().tolist() == [True, True, False, False]


def test_a_train_that_returns_something_else_is_told():
    def wrong(seed, folder):
        return {"accuracy": 1.0}

    with pytest.raises(RuntimeError, match="returned a dict; it must return a kd.Outcome"):
        grid(wrong, {"x": {}})


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seeds": ()}, "needs arms and seeds"),
        ({"arms": {}}, "needs arms and seeds"),
        ({"seeds": (1, 1)}, "each one once"),
        ({"arms": {"x": {"seed": 3}}}, r"arm 'x' sets \['seed'\]"),
        ({"shared": {"rate": 3}}, r"sets \['rate'\]"),
    ],
)
def test_a_wrong_grid_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        grid(**change)
    assert not CALLS


def test_a_rehearsal_neither_reads_nor_leaves_runs(store, monkeypatch):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    for _ in range(2):
        assert len(grid(jobs=2)) == 4
    assert len(CALLS) == 4 and not store.exists()  # once in this process, and nothing for others
    monkeypatch.delenv("KDLIB_REHEARSE")
    grid()
    assert len(CALLS) == 8


# What all runs took ------------------------------------------------------------------------------------------


def another_process():
    """As a second process starts: nothing noted, everything in the store."""
    kd.runs._counted.clear()
    assert spent() == 0


def test_every_run_counts_once_made_or_loaded():
    first = grid()
    total = sum(run.seconds for run in first)
    assert counted() == (4, 0)
    assert spent() == pytest.approx(total) and total > 0
    grid(seeds=(1, 0))
    grid(arms={"KD": ARMS["KD"]})
    assert spent() == pytest.approx(total)
    more = grid(seeds=(0, 1, 2))
    assert spent() == pytest.approx(sum(run.seconds for run in more)) and spent() > total
    another_process()
    assert len(grid()) == 4 and spent() == pytest.approx(total)


def test_a_table_of_tuning_counts_though_it_is_no_grid_of_runs():
    kd.tune("tuning", trial, {"narrow": [{"rate": 0.5}, {"rate": 1.0}]}, (0, 1), jobs=1)
    made = [files.read_json(path)["seconds"] for path in (files.home() / "runs").rglob(RECORD)]
    assert len(made) == 4 and spent() == pytest.approx(sum(made))


def asks_for_teachers(seed, folder):
    teachers = run_grid("inner", train, {"KD": {"rate": 2.0}}, [0], jobs=1, progress=False)
    return Outcome({"accuracy": teachers[0].metrics["accuracy"]})


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_grid_within_a_run_counts_within_that_run(jobs):
    outer = grid(asks_for_teachers, {"x": {}, "y": {}}, [0], jobs=jobs)
    assert spent() == pytest.approx(sum(run.seconds for run in outer))


# With processes ---------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import kdlib as kd

log = Path(sys.argv[1])
HELP = 1

def note(line):
    with open(log / "calls", "a") as file:
        file.write(line + "\\n")

def train(seed, folder, arm):
    before = (folder / "half").exists()
    worker = os.environ.get("KDLIB_WORKER")
    (folder / "half").write_text("half")
    note(f"{arm} {seed} {'resumed' if before else 'fresh'} {worker} {torch.get_num_threads()}")
    time.sleep(0.6)
    if arm == "b" and (log / "deadly").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return kd.Outcome({"value": float(seed) + HELP}, model=torch.nn.Linear(1, 1))

if __name__ == "__main__":
    runs = kd.run_grid("many", train, {a: {"arm": a} for a in "abc"}, [0, 1], jobs=int(sys.argv[2]))
    print(runs.frame()["value"].tolist())
"""


def start(folder, jobs):
    script = folder / "chapter.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(folder), str(jobs)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calls(folder):
    return sorted((folder / "calls").read_text().splitlines())


def test_two_programs_share_a_grid_and_each_run_is_made_once(tmp_path):
    programs = [start(tmp_path, 1), start(tmp_path, 2)]
    for program in programs:
        out, err = program.communicate(timeout=120)
        assert program.returncode == 0, err
        assert "[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]" in out
    made = calls(tmp_path)
    assert [line.split()[:2] for line in made] == [[a, s] for a in "abc" for s in "01"]


def test_a_killed_worker_is_told_and_its_run_resumes(tmp_path, store):
    (tmp_path / "deadly").touch()
    program = start(tmp_path, 2)
    _, err = program.communicate(timeout=180)
    assert program.returncode != 0 and "process of a run was killed" in err and "Call again" in err
    before = len(list(store.rglob(RECORD)))
    assert before <= 4
    (tmp_path / "deadly").unlink()
    (tmp_path / "calls").unlink()
    program = start(tmp_path, 1)
    out, err = program.communicate(timeout=120)
    assert program.returncode == 0, err
    made = calls(tmp_path)
    assert len(made) == 6 - before and "resumed" in " ".join(line for line in made if line.startswith("b"))
    assert len(list(store.rglob(RECORD))) == 6
    assert not list(store.rglob("work")) and not list(store.rglob(".given.*/*"))


def test_a_killed_program_goes_on_where_it_was(tmp_path, store):
    program = start(tmp_path, 1)
    while not (tmp_path / "calls").exists() or len(calls(tmp_path)) < 2:
        assert program.poll() is None, program.communicate()[1]
        time.sleep(0.02)
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    assert len(list(store.rglob(RECORD))) == 1
    program = start(tmp_path, 1)
    out, err = program.communicate(timeout=120)
    assert program.returncode == 0, err
    assert len(calls(tmp_path)) == 7
    assert [line for line in calls(tmp_path) if "resumed" in line] == ["a 1 resumed None 1"]


def test_a_notebook_spreads_its_own_function_and_sees_its_edits(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [
        "import sys\nsys.path.insert(0, {root!r})\nimport torch, kdlib as kd\nfrom dataclasses import dataclass",
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = torch.nn.Linear(2, 1)\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
        "@dataclass\nclass Plan:\n    width: int = 3\n    def twice(self):\n        return 2 * self.width\n",
        "def helper(x):\n    return x + 1  # one",
        "def train(seed, folder, a):\n    value = helper(a) + Plan().twice()\n"
        "    return kd.Outcome({{'v': value}}, model=Net())",
        "arms = {{'x': dict(a=1), 'y': dict(a=2)}}\ndef go():\n"
        "    return kd.run_grid('nb', train, arms, [0], jobs=2)\nruns = go()",
        "print(runs.frame()['v'].tolist(), runs.model('x', 0, into=Net())(torch.zeros(1, 2)).shape)",
        "def helper(x):\n    '''Says.'''\n    return x + 1  # the same\nruns = go()\nprint(kd.runs.counted())",
        "def helper(x):\n    return x + 2\nruns = go()\nprint(runs.frame()['v'].tolist(), kd.runs.counted())",
    ]
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell.format(root=str(ROOT))) for cell in cells]
    NotebookClient(book, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = [[out for out in cell.outputs if out.get("name") == "stdout"] for cell in book.cells]
    said = ["".join(out["text"] for out in outs) for outs in printed]
    assert "[8.0, 9.0] torch.Size([1, 1])" in said[5]
    assert "(2, 0)" in said[6]  # a comment and a docstring: nothing is made again
    assert "[9.0, 10.0] (4, 0)" in said[7]


def trial(seed, folder, rate, width=1):
    if rate > 2:
        raise FloatingPointError("too fast")
    CALLS.append((rate, seed))
    return Outcome({"validation": -abs(rate - width) + seed / 100})


def test_each_family_gets_its_best_candidate_by_the_mean_over_seeds():
    families = {
        "narrow": [{"rate": rate, "width": 1} for rate in (0.5, 1.0, 3.0)],
        "wide": [{"rate": rate, "width": 2} for rate in (0.5, 1.0, 2.0)],
        "given": [{"rate": 0.1}],
    }
    chosen, table = kd.tune("tuning", trial, families, (0, 2), jobs=1)
    assert chosen == {"narrow": families["narrow"][1], "wide": families["wide"][2], "given": {"rate": 0.1}}
    assert sorted(CALLS) == sorted([(r, s) for r in (0.5, 1.0, 0.5, 1.0, 2.0) for s in (0, 2)])
    assert list(table.columns) == ["family", "rate", "width", "validation"]
    assert table["validation"].tolist() == pytest.approx([-0.49, 0.01, float("nan"), -1.49, -0.99, 0.01], nan_ok=True)


def test_a_best_value_at_the_edge_of_its_grid_widens_it():
    families = {"x": [{"rate": 0.1}, {"rate": 0.3}]}
    chosen, table = kd.tune("tuning", trial, families, (0,), jobs=1, widen={"rate": 2})
    assert chosen == {"x": {"rate": 0.9}} and table["rate"].tolist() == [0.1, 0.3, 0.9, 2.7]
    assert table["validation"].isna().tolist() == [False, False, False, True]  # it diverged
    chosen, table = kd.tune("tuning", trial, families, (0,), jobs=1, widen={"rate": 1})
    assert chosen == {"x": {"rate": 0.9}} and len(table) == 3


def test_a_family_without_the_number_that_widens_stays_as_it_is():
    trial = lambda *, seed, folder, rate=0.1: kd.Outcome({"validation": rate})  # noqa: E731
    families = {"a": [{"rate": 0.1}, {"rate": 0.3}], "rule": [{}, {"rate": 0.2}]}
    chosen, table = kd.tune("some", trial, families, (0,), jobs=1, widen={"rate": 1})
    assert chosen["a"] == {"rate": 0.9} and chosen["rule"] == {"rate": 0.2} and len(table) == 5


def test_of_equal_candidates_the_first_is_chosen():
    families = {"tie": [{"rate": 1.5}, {"rate": 0.5}]}
    assert kd.tune("tuning", trial, families, (0,), jobs=1)[0]["tie"] == {"rate": 1.5}


def test_a_family_that_never_runs_through_or_has_no_candidate_is_told():
    with pytest.raises(ValueError, match="no candidate of family 'wild' ran through"):
        kd.tune("tuning", trial, {"wild": [{"rate": 3.0}, {"rate": 4.0}]}, (0,), jobs=1)
    with pytest.raises(ValueError, match="family 'none' has no candidates"):
        kd.tune("tuning", trial, {"none": []}, (0,), jobs=1)


def shifted(start, by):
    return start + by


def called(seed, folder, hook):
    CALLS.append(hook())
    return Outcome({"validation": hook()})


def test_what_is_tuned_may_be_a_function_and_is_named_without_its_address():
    """A name with an address in memory would be another run in every process, and a result that nobody can read."""
    families = {"shift": [{"hook": functools.partial(shifted, 1, by=by)} for by in (1, 2)]}
    table = kd.tune("tuning", called, families, (0,), jobs=1)[1]
    assert list(table["hook"]) == ["shifted(1, by=1)", "shifted(1, by=2)"]
    runs = run_grid("grid", called, {"arm": families["shift"][0]}, (0,), jobs=1)
    assert runs[0].settings == {"hook": "shifted(1, by=1)"}


def test_two_arms_of_the_same_settings_keep_their_names():
    arms = {"one": ARMS["KD"], "other": ARMS["KD"]}
    for _ in range(2):  # made, then loaded
        assert [run.arm for run in grid(arms=arms, seeds=(0,))] == ["one", "other"]


def test_a_setting_may_be_a_function_of_a_module_that_has_no_file():
    """As a lesson's: nothing of it has to travel back, where joblib would not know how to pack it."""
    lesson = types.ModuleType("lesson_98")
    exec("import torch\ndef hook():\n    return len(str(torch.classes))\n", lesson.__dict__)
    sys.modules["lesson_98"] = lesson
    cloudpickle.register_pickle_by_value(lesson)
    space = {"__name__": "__main__", "kd": kd}
    exec("def train(seed, folder, hook):\n    return kd.Outcome({'v': hook()})", space)
    try:
        assert len(grid(space["train"], {"a": {"hook": lesson.hook}}, (0, 1), jobs=2)) == 2
    finally:
        cloudpickle.unregister_pickle_by_value(lesson)
        del sys.modules["lesson_98"]


# Other machines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [True, False])
def test_a_cluster_that_the_caller_set_makes_the_runs(processes, tmp_path):
    """A dask cluster on this machine: workers that are processes, and threads of this one."""
    distributed = pytest.importorskip("distributed")
    import joblib

    space = {"__name__": "__main__", "kd": kd, "torch": torch, "os": os}
    exec("def train(seed, folder, rate):\n"
         "    draw = sum(torch.rand(1).item() for _ in range(100))\n"
         "    return kd.Outcome({'rate': rate + seed, 'draw': draw, 'process': os.getpid()})", space)  # fmt: skip
    arms = {"a": {"rate": 1.0}, "b": {"rate": 2.0}}
    cluster = distributed.LocalCluster(
        n_workers=2 if processes else 1, threads_per_worker=1 if processes else 2, processes=processes,
        dashboard_address=None, local_directory=str(tmp_path),
    )  # fmt: skip
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        runs = grid(space["train"], arms, (0, 1), jobs=1, progress=False)
    frame = runs.frame()
    assert frame["rate"].tolist() == [1, 2, 2, 3] and ({os.getpid()} == {*frame["process"]}) == (not processes)
    alone = run_grid("alone", space["train"], arms, (0, 1), jobs=1).frame()
    assert frame["draw"].tolist() == alone["draw"].tolist() and "KDLIB_WORKER" not in os.environ
    assert len(grid(space["train"], arms, (0, 1))) == 4 and counted() == (8, 0)


def test_each_worker_of_several_gpus_takes_one_that_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(kd.runs.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    held = []
    for expected in ("0", "1", None):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        held.append(kd.runs._take_gpu.__wrapped__())
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected
    held[0].release()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    held.append(kd.runs._take_gpu.__wrapped__())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    [lock.release() for lock in held if lock]


def test_shared_may_be_a_function_of_the_seed():
    def train(seed, folder, drawn):
        return kd.Outcome({"drawn": drawn})

    asked = []

    def world(seed):
        asked.append(seed)
        return {"drawn": 10 * seed}

    first = kd.run_grid("g", train, {"a": {}}, [1, 2], shared=world, jobs=1)
    assert [run.metrics["drawn"] for run in first] == [10, 20]
    stamps = {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in first}
    more = kd.run_grid("g", train, {"a": {}}, [1, 2, 3], shared=world, jobs=1)
    assert [run.metrics["drawn"] for run in more] == [10, 20, 30]
    assert all((folder / "run.json").stat().st_mtime_ns == stamp for folder, stamp in stamps.items())
    assert asked == [1, 2, 1, 2, 3]


def hill(seed, folder, rate, top):
    """Best at ``top``, and diverging above 50."""
    if rate > 50:
        raise FloatingPointError("too fast")
    return kd.Outcome({"validation": -abs(math.log(rate / top))})


def test_a_grid_grows_where_its_best_lies_at_an_edge():
    families = {
        name: [{"rate": rate, "top": top} for rate in (0.1, 0.3)] for name, top in (("up", 2.7), ("inside", 0.2))
    }
    chosen, table = kd.tune("t", hill, families, [0, 1], widen={"rate": 2}, jobs=1)
    assert chosen["up"]["rate"] == 2.7 and chosen["inside"]["rate"] in (0.1, 0.3)
    assert sorted(table.query("family == 'up'")["rate"]) == [0.1, 0.3, 0.9, 2.7]
    assert table.query("family == 'inside'")["rate"].nunique() <= 4


def test_a_grid_grows_at_most_so_often_and_not_unasked():
    families = {"up": [{"rate": rate, "top": 1e3} for rate in (0.1, 0.3)]}
    assert kd.tune("t", hill, families, [0], jobs=1)[0]["up"]["rate"] == 0.3
    chosen, table = kd.tune("t", hill, families, [0], widen={"rate": 1}, jobs=1)
    assert chosen["up"]["rate"] == 0.9 and len(table) == 3


def test_a_family_of_one_is_not_run():
    chosen, table = kd.tune("t", hill, {"only": [{"rate": 60, "top": 1.0}]}, [0], jobs=1)
    assert chosen["only"]["rate"] == 60 and len(table) == 0
