"""Data sets with one face: ``images(name)`` and ``text(name)`` find a set and give its training and test parts.

The rooms are called ``image_sets`` and ``text_sets`` so that importing one never hides the function.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "images": "image_sets", "ImageData": "image_sets", "ImageSet": "image_sets",
    "text": "text_sets", "TextData": "text_sets", "TextSet": "text_sets", "TokenSet": "text_sets",
    "train_tokenizer": "text_sets",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kdlib.data.{_HOME[name]}"), name)
    raise AttributeError(f"kdlib.data has no {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
