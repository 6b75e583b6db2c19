"""Which scale a notebook runs at, on which device, in which precision, with which seed."""

from __future__ import annotations

import os
import platform
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SCALES = ("smoke", "lab", "full")


class Settings(SimpleNamespace):
    """One scale's settings, read as attributes (``run.epochs``); prints as one line a setting."""

    def __repr__(self) -> str:
        width = max(len(name) for name in vars(self))
        return "\n".join(f"{name:<{width}}  {value!r}" for name, value in vars(self).items())


def scale() -> str:
    """The scale in force: ``KDLIB_SCALE``, else ``lab`` where there is a GPU and ``smoke`` where not."""
    name = os.environ.get("KDLIB_SCALE") or ("lab" if torch.cuda.is_available() else "smoke")
    if name not in SCALES:
        raise ValueError(f"KDLIB_SCALE is {name!r}; it must be one of {', '.join(SCALES)}")
    return name


def rehearsing() -> bool:
    """Whether this is a rehearsal (``KDLIB_REHEARSE=1``): the same cells, a few batches of a few examples."""
    return os.environ.get("KDLIB_REHEARSE", "") not in ("", "0")


def settings(*, smoke: dict[str, Any], lab: dict[str, Any], full: dict[str, Any]) -> Settings:
    """Pick one scale's settings for a notebook.

    Every scale must name the same settings, so that no later cell has to ask which scale it is.
    ``seeds`` may be a number or a list and is read as a list; ``KDLIB_SEEDS`` overrides the number of seeds.
    ``scale`` and ``jobs`` (processes to spread runs over; ``KDLIB_JOBS``) are added.

    Raises:
        ValueError: the three dictionaries differ in their names, or an override is not a positive number.
    """
    by_scale = {"smoke": smoke, "lab": lab, "full": full}
    names = set().union(*by_scale.values())
    for name, values in by_scale.items():
        if missing := sorted(names - set(values)):
            raise ValueError(f"the settings of scale {name!r} lack {', '.join(missing)}; give every scale the same names")
    chosen = dict(by_scale[scale()])
    seeds = chosen.get("seeds", 1)
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if "KDLIB_SEEDS" in os.environ:
        wanted = _positive("KDLIB_SEEDS")
        seeds = (seeds + [seed for seed in range(wanted + len(seeds)) if seed not in seeds])[:wanted]
    first = int(os.environ.get("KDLIB_FIRST_SEED", "0"))  # other seeds of the same number, to record a band
    seeds = [seed + first for seed in seeds]
    if rehearsing():
        seeds = seeds[:1]
    return Settings(scale=scale(), **{**chosen, "seeds": seeds, "jobs": jobs()})


def jobs() -> int:
    """Processes to spread independent runs over: ``KDLIB_JOBS``, else 1 with a GPU and one a core without."""
    if "KDLIB_JOBS" in os.environ:
        return _positive("KDLIB_JOBS")
    return 1 if torch.cuda.is_available() or rehearsing() else max(1, os.cpu_count() or 1)


def _positive(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{variable} is {text!r}; it must be a whole number of at least 1")
    return int(text)


def device() -> torch.device:
    """The first CUDA GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> str:
    """Accelerate's ``mixed_precision`` for this machine.

    ``no`` (fp32) on a CPU, ``fp16`` with loss scaling before Ampere (T4), ``bf16`` from Ampere on.
    """
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def hardware() -> str:
    """A short name for this machine's accelerator, fit for a file name: ``cpu2`` or ``tesla-t4``."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu{os.cpu_count()}"


def environment() -> dict[str, str]:
    """Versions, device, precision and scale: what a notebook prints first and a results file records."""
    import importlib.metadata as metadata

    packages = {}
    for name in ("torch", "torchvision", "transformers", "datasets", "accelerate"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    where = str(device())
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    return {
        "python": platform.python_version(),
        **packages,
        "device": where,
        "hardware": hardware(),
        "precision": {"no": "fp32"}.get(precision(), precision()),
        "threads": str(torch.get_num_threads()),
        "scale": scale() + (" (rehearsal)" if rehearsing() else ""),
    }
