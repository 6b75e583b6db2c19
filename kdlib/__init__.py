"""kdlib: the small shared package under the knowledge-distillation notebooks.

Importing it pulls in torch and numpy only; every other library is imported by the room that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    "contract", "data", "decoding", "exercises", "files", "fingerprint", "footprint", "losses", "metrics",
    "models", "plots", "rehearsal", "runs", "scale", "scoreboard", "sequence_models", "teacher", "training",
)  # fmt: skip
_NAMES = {
    "scale": ("settings", "device", "environment", "rehearsing", "seed_everything"),
    "training": ("fit", "cosine", "linear", "constant", "steps_down"),
    "contract": ("check_contract",),
    "teacher": ("Teacher", "CachedTeacher", "cache_teacher"),
    "runs": ("Outcome", "Runs", "run_grid", "tune"),
    "scoreboard": ("answer", "compare", "duels", "in_band", "published", "write_results"),
    "plots": ("show",),
}
_HOME = {name: room for room, names in _NAMES.items() for name in names}
__all__ = sorted({*_ROOMS, *_HOME})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kdlib.{_HOME[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"kdlib.{name}")
    raise AttributeError(f"kdlib has no {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
