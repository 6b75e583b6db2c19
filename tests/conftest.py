"""Every test has a store of its own, the smallest scale, one thread and no network."""

import os

for name in (
    "KDLIB_DATA",
    "KDLIB_SEEDS",
    "KDLIB_JOBS",
    "KDLIB_REHEARSE",
    "KDLIB_RESULTS",
    "KDLIB_FIGURES",
    "KDLIB_BAND_LOG",
):
    os.environ.pop(name, None)
os.environ |= {
    "KDLIB_SCALE": "smoke",
    "KDLIB_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
