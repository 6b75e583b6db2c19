"""Files that are either whole or absent: atomic writes, checksums, and locks between processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save_file


def home() -> Path:
    """The folder of runs, caches and packs: ``KDLIB_HOME``, else ``~/.cache/kdlib``.

    Raises:
        OSError: this machine knows no home folder, and ``KDLIB_HOME`` names none.
    """
    try:
        return Path(os.environ.get("KDLIB_HOME") or Path.home() / ".cache" / "kdlib").expanduser().absolute()
    except RuntimeError as error:
        raise OSError("this machine knows no home folder; set KDLIB_HOME to a folder that you may write to") from error


def slug(text: str) -> str:
    """``text`` as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on failure it goes.

    A reader, a killed process or a machine that loses power leaves the old file or the new one, never half of one.

    Raises:
        OSError: it cannot be written; says how much is free there and what to set.
    """
    path = Path(path)
    with _telling(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as place:
        part = Path(place) / path.name
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        _replace(part, path)


def _replace(part: Path, path: Path) -> None:
    """``os.replace``; on Windows another program (a scanner, a reader) may hold the old file for a moment."""
    for wait in (0.05, 0.2, 1.0):
        try:
            return os.replace(part, path)
        except PermissionError:
            time.sleep(wait)
    os.replace(part, path)


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Make a folder, and say what a reader can do if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        free = shutil.disk_usage(next(filter(Path.exists, (folder, *folder.parents)))).free // 10**6
        told = f"could not write in {folder} ({error.strerror or error}; {free:,} MB are free there)"
        raise OSError(error.errno, f"{told}; set KDLIB_HOME=/a/folder/you/may/write/to (now {home()})") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors into one safetensors file, atomically."""
    with atomic(path) as part:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, part)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what :func:`write_tensors` wrote, into memory: a file that stays open could not be replaced on Windows.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error


def lock(path: str | Path) -> FileLock:
    """Hold ``path``.lock: one process at a time; the operating system frees it if the holder dies."""
    with _telling(Path(path).parent):
        return FileLock(f"{path}.lock")
