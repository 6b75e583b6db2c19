"""Every test has a store of its own, the smallest scale, one thread and no network."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

for name in (
    "KDLIB_DATA",
    "KDLIB_SEEDS",
    "KDLIB_JOBS",
    "KDLIB_REHEARSE",
    "KDLIB_RESULTS",
    "KDLIB_FIGURES",
):
    os.environ.pop(name, None)
os.environ |= {
    "KDLIB_SCALE": "smoke",
    "KDLIB_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    "KDLIB_HOME": tempfile.mkdtemp(prefix="kdlib-tests-"),  # for what a module shares; each test has its own, below
}
atexit.register(shutil.rmtree, os.environ["KDLIB_HOME"], ignore_errors=True)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of real data, and no hub."""
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    monkeypatch.setenv("KDLIB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path
