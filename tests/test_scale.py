"""Scales, seeds and overrides: what a notebook's settings cell relies on."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kdlib import scale

SAME = {
    name: dict(epochs=epochs, seeds=seeds) for name, epochs, seeds in (("smoke", 1, 2), ("lab", 5, 3), ("full", 200, 5))
}


@pytest.mark.parametrize("name, epochs, seeds", [("smoke", 1, 2), ("lab", 5, 3), ("full", 200, 5)])
def test_the_named_scale_is_read(monkeypatch, name, epochs, seeds):
    monkeypatch.setenv("KDLIB_SCALE", name)
    run = scale.settings(**SAME)
    assert (run.scale, run.epochs, run.seeds) == (name, epochs, list(range(seeds)))


def test_unknown_scale_names_the_choices(monkeypatch):
    monkeypatch.setenv("KDLIB_SCALE", "huge")
    with pytest.raises(ValueError, match="'huge'.*smoke, lab, full"):
        scale.settings(**SAME)


def test_scales_must_name_the_same_settings():
    with pytest.raises(ValueError, match="'lab' lack clip"):
        scale.settings(smoke=dict(clip=1), lab=dict(), full=dict(clip=1))


@pytest.mark.parametrize("seeds, wanted, expected", [(2, 4, [0, 1, 2, 3]), ([7, 9], 3, [7, 9, 0]), (5, 1, [0])])
def test_the_number_of_seeds_can_be_overridden(monkeypatch, seeds, wanted, expected):
    monkeypatch.setenv("KDLIB_SEEDS", str(wanted))
    assert scale.settings(smoke=dict(seeds=seeds), lab=dict(seeds=1), full=dict(seeds=1)).seeds == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_bad_override_is_named(monkeypatch, value):
    monkeypatch.setenv("KDLIB_SEEDS", value)
    with pytest.raises(ValueError, match="KDLIB_SEEDS"):
        scale.settings(**SAME)


def test_rehearsal_keeps_one_seed_and_one_process(monkeypatch):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    monkeypatch.delenv("KDLIB_JOBS", raising=False)
    run = scale.settings(**SAME)
    assert run.seeds == [0] and run.jobs == 1


@pytest.mark.skipif(not hasattr(scale.os, "sched_setaffinity"), reason="no affinity here")
def test_jobs_are_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.delenv("KDLIB_JOBS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scale.os, "sched_getaffinity", lambda pid: {1, 4, 5})
    assert scale.jobs() == 3
    monkeypatch.setenv("KDLIB_JOBS", "7")
    assert scale.jobs() == 7
    monkeypatch.setenv("KDLIB_WORKER", "1")
    assert scale.jobs() == 1


def test_one_run_a_gpu(monkeypatch):
    monkeypatch.delenv("KDLIB_JOBS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert scale.jobs() == 4


def test_the_environment_names_the_processor():
    found = scale.environment()
    assert found["processor"] and found["torch"] == torch.__version__.split("+")[0] and found["scale"] == "smoke"


def test_seeding_repeats_every_generator():
    draws = []
    for _ in range(2):
        scale.seed_everything(3)
        draws.append((np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_importing_kdlib_stays_light():
    heavy = ("torchvision", "transformers", "datasets", "pandas", "matplotlib", "sklearn", "accelerate")
    code = f"import sys, kdlib; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_an_unknown_name_lists_what_there_is():
    import kdlib

    with pytest.raises(AttributeError, match="kdlib has no 'distill'"):
        kdlib.distill  # noqa: B018
