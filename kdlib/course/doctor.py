"""What this machine can run, what it sees, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import torch

from kdlib import files, scale
from kdlib.data import sources

NEEDED = (
    "numpy",
    "torch",
    "torchvision",
    "accelerate",
    "safetensors",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "joblib",
)
FOR_TEXT = ("transformers", "datasets", "tokenizers")
FOR_RUNNING = ("nbclient", "nbformat", "ipykernel", "jupyterlab", "nbval", "pytest")
SETS = {  # folder under KDLIB_DATA: what uses it
    "cifar10": "00, 01 at lab and full (torchvision can download it, 170 MB)",
    "cifar100": "01 at full (torchvision can download it, 169 MB)",
    "weights_resnet_cifar10": "00, 01 at lab: ready CIFAR-10 teachers",
    "glue": "01 at lab and full (datasets can download it)",
    "models/sentence-transformers/all-MiniLM-L6-v2": "01 at lab (transformers can download it, 90 MB)",
}


def report() -> bool:
    """Print the findings; False if not even ``smoke`` can run."""
    ok = sys.version_info >= (3, 10)
    _line(ok, f"Python {sys.version.split()[0]}", "install Python 3.10 or later")
    for names, use in (
        (NEEDED, "every chapter"),
        (FOR_TEXT, "chapters with text"),
        (FOR_RUNNING, "running and testing notebooks"),
    ):
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        _line(not absent, f"packages for {use}", f"missing {', '.join(absent)}: pip install -r requirements.txt")
        ok &= not absent or names is FOR_TEXT
    _machine()
    print(f"\nData and models under {sources.root()}")
    for name, use in SETS.items():
        _line((sources.root() / name).exists(), f"{name}: {use}", "not there; set KDLIB_DATA, or see data/README.md")
    print("\n`smoke` needs none of these: " + ("it can run." if ok else "but it cannot run until the above is mended."))
    return ok


def _machine() -> None:
    print()
    for name, value in scale.environment().items():
        if name in ("torch", "device", "precision", "threads", "scale"):
            print(f"  {name:<10} {value}")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"  {'GPU memory':<10} {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    home = files.home()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    print(f"  {'store':<10} {home}")
    _line(free > 5, f"{free:.0f} GB free there", "runs and caches want 5 GB; point KDLIB_HOME at a larger disk")


def _line(good: bool, text: str, remedy: str) -> None:
    print(f"{'✓' if good else '✗'} {text}" + ("" if good else f"\n    {remedy}"))
