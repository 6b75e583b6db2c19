"""The run store: each run once, again when what made it changed, and nothing lost when something dies."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdlib as kd
from kdlib import files
from kdlib.runs import MODEL, RECORD, Outcome, run_grid, spent

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
    monkeypatch.setattr(kd.runs, "_spent", {})
    CALLS.clear()
    return tmp_path / "home" / "runs"


def grid(train=train, arms=ARMS, seeds=(0, 1), **more):
    return run_grid("toy", train, arms, seeds, **{"jobs": 1, **more})


def test_the_second_call_is_answered_by_the_store(capsys):
    first = grid()
    assert len(CALLS) == 4 and "4 runs, 0 from the store, 4 to train on 1 process" in capsys.readouterr().out
    second = grid()
    assert len(CALLS) == 4 and "4 runs, 4 from the store, none to train" in capsys.readouterr().out
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


def train_two(seed, folder):
    return Outcome({"a": 1.0}, model={"student": nn.Linear(2, 1), "assistant": nn.Linear(3, 1)})


def test_one_of_several_models_is_asked_for_by_name():
    runs = grid(train_two, {"x": {}}, [0])
    assert runs.model("x", 0, into=nn.Linear(3, 1), part="assistant").in_features == 3
    with pytest.raises(ValueError, match="student.*assistant.*None"):
        runs.model("x", 0, into=nn.Linear(3, 1))
    assert runs.arrays("x", 0) == {}


@pytest.mark.parametrize(
    "change, again",
    [
        ({"arms": {**ARMS, "KD": {"rate": 3.0}}}, [(3.0, 0), (3.0, 1)]),
        ({"arms": {**ARMS, "new": {"rate": 9.0}}}, [(9.0, 0), (9.0, 1)]),
        ({"arms": {"KD": ARMS["KD"]}}, []),
        ({"seeds": (1, 2)}, [(1.0, 2), (2.0, 2)]),
        ({"shared": {"data": Marked("b")}}, [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]),
        ({"shared": {"data": Marked("a")}}, []),
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


@pytest.mark.parametrize("damage", ["cut record", "other record", "cut model", "flipped byte", "no model"])
def test_a_damaged_run_is_said_and_made_again(damage, capsys):
    folder = grid().get("KD", 1).folder
    record, model = folder / RECORD, folder / MODEL
    if damage == "cut record":
        record.write_bytes(record.read_bytes()[:40])
    elif damage == "other record":
        files.write_json(record, {**files.read_json(record), "fingerprint": "0" * 64})
    elif damage == "cut model":
        model.write_bytes(model.read_bytes()[:20])
    elif damage == "flipped byte":
        model.write_bytes(model.read_bytes()[:-1] + bytes([model.read_bytes()[-1] ^ 1]))
    else:
        model.unlink()
    CALLS.clear()
    capsys.readouterr()
    runs = grid()
    assert [(2.0, 1)] == CALLS and "damaged" in capsys.readouterr().out
    assert runs.model("KD", 1, into=nn.Linear(2, 1)) is not None and grid() == runs and len(CALLS) == 1


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
    kd.runs._spent.clear()
    assert spent() == 0


def test_every_run_counts_once_made_or_loaded():
    first = grid()
    total = sum(run.seconds for run in first)
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


def test_a_killed_worker_costs_its_own_run_only_and_that_resumes(tmp_path, store):
    (tmp_path / "deadly").touch()
    program = start(tmp_path, 2)
    _, err = program.communicate(timeout=180)
    assert program.returncode != 0 and "2 of 6 runs failed" in err and "was killed twice" in err
    assert sorted(path.parent.name[:4] for path in store.rglob(RECORD)) == ["a-s0", "a-s1", "c-s0", "c-s1"]
    (tmp_path / "deadly").unlink()
    (tmp_path / "calls").unlink()
    program = start(tmp_path, 2)
    out, err = program.communicate(timeout=120)
    assert program.returncode == 0, err
    assert "4 from the store, 2 to train" in out and calls(tmp_path) == ["b 0 resumed 1 1", "b 1 resumed 1 1"]
    assert not list(store.rglob("work"))


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
    assert program.returncode == 0 and "1 from the store, 5 to train" in out, err
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
        "def helper(x):\n    '''Says.'''\n    return x + 1  # the same\nruns = go()",
        "def helper(x):\n    return x + 2\nruns = go()\nprint(runs.frame()['v'].tolist())",
    ]
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell.format(root=str(ROOT))) for cell in cells]
    NotebookClient(book, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = [[out for out in cell.outputs if out.get("name") == "stdout"] for cell in book.cells]
    said = ["".join(out["text"] for out in outs) for outs in printed]
    assert "0 from the store, 2 to train on 2 processes" in said[4] and "[8.0, 9.0]" in said[5]
    assert "2 from the store, none to train" in said[6]
    assert "0 from the store, 2 to train" in said[7] and "[9.0, 10.0]" in said[7]


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
    assert list(table.columns) == ["family", "rate", "validation"]
    assert table["validation"].tolist() == pytest.approx([-0.49, 0.01, float("nan"), -1.49, -0.99, 0.01], nan_ok=True)


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
