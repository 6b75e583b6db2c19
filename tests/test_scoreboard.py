"""Tables of results: against intervals worked out by hand, and files that are small and complete."""

import json
import math

import pandas as pd
import pytest

import kdlib as kd
from kdlib import files, scoreboard
from kdlib.runs import Outcome, Run, Runs


def run(arm, seed, value, folder, diverged=False):
    metrics = {} if diverged else {"accuracy": value}
    return Run(arm, seed, metrics, [], {}, 1.5, folder, diverged)


@pytest.fixture
def runs(tmp_path):
    """KD minus labels, seed by seed: 2, 4, 6."""
    labels = [run("labels", seed, value, tmp_path) for seed, value in enumerate([10.0, 30.0, 20.0])]
    return Runs(labels + [run("KD", seed, value, tmp_path) for seed, value in enumerate([12.0, 34.0, 26.0])])


def test_the_interval_is_the_paired_one(runs):
    table = kd.compare(runs, "accuracy", baseline="labels", unit=1)
    row = table.loc["KD"]
    half = 4.302653 * 2 / math.sqrt(3)  # t(.975, 2 degrees of freedom), sd of 2, 4, 6 is 2
    assert (row["mean"], row["n"], row["difference"]) == (24.0, 3, 4.0)
    assert row["sd"] == pytest.approx(math.sqrt(124)) and row["low"] == pytest.approx(4 - half, abs=1e-5)
    assert row["high"] == pytest.approx(4 + half, abs=1e-5)
    assert math.isnan(table.loc["labels", "difference"]) and list(table.index) == ["labels", "KD"]
    assert kd.compare(runs, "accuracy", baseline="labels").loc["KD", "difference"] == 400.0  # points, unless told


def test_duels_are_paired_judged_and_in_the_unit_asked_for(runs):
    row = kd.duels(runs, [("KD", "labels"), ("labels", "KD")], "accuracy", unit=10).loc["KD − labels"]
    half = 4.302653 * 2 / math.sqrt(3)
    assert (row["difference"], row["n"], row["verdict"]) == (40.0, 3, "not separated")
    assert row["low"] == pytest.approx(10 * (4 - half), abs=1e-4) and row["high"] == pytest.approx(
        10 * (4 + half), abs=1e-4
    )
    frame = runs.frame().assign(accuracy=lambda f: f["accuracy"] + 100 * (f["arm"] == "KD"))
    table = kd.duels(frame, [("KD", "labels"), ("labels", "KD")], "accuracy")
    assert table["verdict"].tolist() == ["above", "below"]
    assert kd.answer("Does it?", table.loc["labels − KD"]).endswith("no, the other way round")
    assert (
        kd.answer("Does it?", row).split("?")[1].split()
        == "+40.00 [-9.68, +89.68] cannot be told from no difference".split()
    )
    assert kd.answer("Fewer?", table.loc["labels − KD"], wanted="below").endswith("yes")
    assert kd.duels(runs, [("KD", "KD")], "accuracy")["verdict"].tolist() == ["not separated"]


@pytest.mark.parametrize("pair", [("labels", "nobody"), ("nobody", "labels")])
def test_a_duel_with_a_stranger_is_refused(runs, pair):
    with pytest.raises(ValueError, match="no arm is called 'nobody'"):
        kd.duels(runs, [pair], "accuracy")


def test_only_seeds_in_common_are_paired_and_divergence_is_no_number(runs, tmp_path):
    runs.append(run("KD", 3, 1000.0, tmp_path))
    runs.append(run("wild", 0, 0.0, tmp_path, diverged=True))
    runs.append(run("wild", 1, 35.0, tmp_path))
    table = kd.compare(runs, "accuracy", baseline="labels", unit=1)
    assert table.loc["KD", "difference"] == 4.0 and table.loc["KD", "n"] == 4
    assert (table.loc["wild", "n"], table.loc["wild", "difference"]) == (1, 5.0)


def test_unknown_names_list_what_there_is(runs):
    with pytest.raises(ValueError, match="'f1'.*accuracy"):
        kd.compare(runs, "f1")
    with pytest.raises(ValueError, match="'none'.*labels.*KD"):
        kd.compare(runs, "accuracy", baseline="none")


def test_a_results_file_holds_every_seed_and_little_else(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("KDLIB_SCALE", "smoke")
    monkeypatch.delenv("KDLIB_REHEARSE", raising=False)
    runs.append(run("wild", 0, 0.0, tmp_path, diverged=True))
    settings = kd.settings(**dict.fromkeys(("smoke", "lab", "full"), dict(epochs=2, seeds=3)))
    frame = pd.DataFrame({"x": [1, 2], "y": [0.5, math.nan]})
    path = kd.write_results("99_toy", {"students": runs, "profile": frame}, settings)
    assert path.parent == tmp_path / "results" and path.name.startswith("99_toy.smoke.")
    text = path.read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = content["tables"]["students"]["rows"]
    assert [(r["arm"], r["seed"], r.get("accuracy")) for r in rows[2:4]] == [
        ("labels", 2, 20.0),
        ("KD", 0, 12.0),
    ]
    assert rows[-1]["diverged"] and content["tables"]["profile"]["rows"][1] == {"x": 2, "y": None}
    assert content["seeds"] == [0, 1, 2] and content["settings"]["epochs"] == 2 and "torch" in content["environment"]
    assert len(text) < 5000 and "processor" in content["environment"]
    assert "diverged" not in scoreboard._rows(Runs(list(runs)[:3]))[0]


def train(seed, folder, arm):
    return Outcome({"accuracy": float(seed)})


def test_run_seconds_are_of_every_run_of_the_process_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(kd.runs, "_counted", {})
    settings = kd.settings(**dict.fromkeys(("smoke", "lab", "full"), dict(epochs=2, seeds=3)))

    def chapter(tables):
        grids = [kd.run_grid(name, train, {"KD": {"arm": "KD"}}, [0, 1], jobs=1) for name in ("sweep", "main")]
        return files.read_json(kd.write_results("99_toy", tables(*grids), settings))["run_seconds"]

    chapter(lambda sweep, main: {})
    for number, path in enumerate(sorted((files.home() / "runs").rglob("run.json"))):
        files.write_json(path, files.read_json(path) | {"seconds": 10.0**number})
    assert chapter(lambda sweep, main: {"sweep": sweep.frame(), "main": main}) == 1111.0  # a frame has no seconds
    assert chapter(lambda sweep, main: {"main": main, "again": main}) == 1111.0
    kd.runs._counted.clear()  # another process
    assert chapter(lambda sweep, main: {"main": main}) == 1111.0


def test_published_shows_the_larger_scale_first(runs, tmp_path, monkeypatch):
    rows = [{"arm": r.arm, "seed": r.seed, **r.metrics} for r in runs]
    for scale in ("smoke", "full", "lab"):
        content = {"scale": scale, "hardware": "t4", "tables": {"students": {"rows": rows}}}
        files.write_json(tmp_path / "results" / f"99_toy.{scale}.t4.json", content)
    monkeypatch.setattr(scoreboard, "CLONE", tmp_path / "results")
    table = kd.published("99_toy", "students", "accuracy", baseline="labels")
    order = list(dict.fromkeys(table.index.get_level_values("scale")))
    assert order == ["full, t4", "lab, t4"] and table.loc[("lab, t4", "KD"), "difference"] == 400.0
    assert kd.published("98_none", "students", "accuracy").empty


def test_p_values_are_the_paired_t_tests_and_holm_steps_down(runs):
    frame = pd.concat([runs.frame(), runs.frame().query("arm == 'KD'").assign(arm="far", accuracy=[62.0, 83.0, 76.0])])
    table = kd.duels(frame, [("KD", "labels"), ("far", "KD"), ("KD", "KD")], "accuracy")
    from scipy.stats import ttest_rel

    assert table["p"].iloc[0] == pytest.approx(ttest_rel([12, 34, 26], [10, 30, 20]).pvalue)
    assert table["p"].iloc[2] == 1 and table["holm"].tolist() == [False, True, False]
    assert scoreboard.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 4 x .005, 3 x .01, 2 x .03
    assert scoreboard.holm([0.04]) == [True] and scoreboard.holm([math.nan, 0.001]) == [False, True]
    assert scoreboard.holm([]) == []


def test_barely_is_said():
    row = pd.Series({"difference": 1.9, "low": 0.02, "high": 3.8, "verdict": "above"})
    assert kd.answer("Does it?", row).endswith("yes, barely")


def test_the_change_of_a_lead_is_that_of_paired_differences():
    frame = pd.DataFrame([(arm, seed, value) for arm, values in {"a": [5, 7, 9], "b": [4, 4, 4]}.items()
                          for seed, value in enumerate(values)], columns=["arm", "seed", "x"])  # fmt: skip
    other = frame.assign(arm=frame["arm"].map({"a": "c", "b": "b"}), x=frame["x"].where(frame["arm"] == "b", 5))
    found = kd.change_of_lead(frame, ("a", "b"), other, ("c", "b"), "x", unit=10)
    alone = kd.metrics.t_interval([0, 20, 40])  # leads of 1, 3, 5 against 1, 1, 1
    assert (found["difference"], found["low"], found["high"], found["n"]) == (20, alone.low, alone.high, 3)
    assert kd.change_of_lead(frame, ("a", "b"), frame, ("a", "b"), "x")["difference"] == 0
    one_less = other[other["seed"] > 0]
    assert kd.change_of_lead(frame, ("a", "b"), one_less, ("c", "b"), "x")["n"] == 2
    nothing = kd.change_of_lead(frame, ("a", "b"), other.assign(seed=other["seed"] + 10), ("c", "b"), "x")
    assert nothing["n"] == 0 and all(math.isnan(nothing[name]) for name in ("difference", "low", "high"))
    with pytest.raises(ValueError, match="no arm is called 'z'"):
        kd.change_of_lead(frame, ("a", "z"), other, ("c", "b"), "x")
