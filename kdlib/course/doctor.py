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
FOR_TEXT = ("transformers", "datasets", "tokenizers", "sacrebleu", "rouge_score")
FOR_RUNNING = ("nbclient", "nbformat", "ipykernel", "jupyterlab", "nbval", "pytest")
SETS = (  # name, folders that hold it (any will do), which chapters want it at which scale, how it comes
    ("CIFAR-10", ("cifar10", "cifar-10-batches-py"), "00, 01 at lab and full", "the chapter downloads it, 170 MB"),
    ("CIFAR-100", ("cifar100", "cifar-100-python"), "01 at full", "the chapter downloads it, 169 MB"),
    ("ready ResNets", ("weights_resnet_cifar10",), "00, 01 at lab", "by hand: data/README.md, under Models"),
    ("GLUE", ("glue",), "01 at lab and full", "the chapter asks the hub (or its cache) for it, 15 MB at lab"),
    ("TREC", ("textcls/trec",), "01 at lab", "by hand: data/README.md, under trec"),
    ("Multi30k", ("multi30k",), "02 at lab", "the chapter asks the hub (or its cache) for it, 5 MB"),
    ("AESLC", ("summarisation/aeslc",), "02 at lab", "the chapter asks the hub (or its cache) for it, 15 MB"),
)
ENCODERS = (
    ("sentence-transformers/all-MiniLM-L6-v2", "01 at lab"),
    ("bert-large-uncased", "01 at full"),
    ("google/bert_uncased_L-4_H-512_A-8", "01 at full"),
    ("roberta-large", "01 at full"),
    ("distilroberta-base", "01 at full"),
)


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
    _data()
    print("\n`smoke` needs none of these: " + ("it can run." if ok else "but it cannot run until the above is mended."))
    return ok


def _data() -> None:
    print(f"\nData and models, in {sources.root()} (KDLIB_DATA) or the hub's cache")
    for name, folders, use, how in SETS:
        there = any(sources.local(folder) for folder in folders)
        _line(there, f"{name}: {use}", f"not there: {how}, or set KDLIB_DATA to the folder that has {folders[0]}/")
    for name, use in ENCODERS:
        there = sources.local(f"models/{name}") or _cached(name)
        _line(bool(there), f"{name}: {use}", "not there: the chapter downloads it from the hub")


def _cached(model: str) -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return isinstance(try_to_load_from_cache(model, "config.json"), str)


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
