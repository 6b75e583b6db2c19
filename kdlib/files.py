"""Files that are either whole or absent: atomic writes, checksums, and locks between processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def home() -> Path:
    """The folder of runs, caches and packs: ``KDLIB_HOME``, else ``~/.cache/kdlib``."""
    return Path(os.environ.get("KDLIB_HOME") or Path.home() / ".cache" / "kdlib").expanduser()


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on failure it goes.

    The bytes are on disk (fsync) before the rename, so a reader, or a machine that loses power,
    sees the old file or the new one, never half of one. A full disk is told with what is free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # mkstemp's own mode lets nobody else read it
        os.replace(part, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            error.errno,
            f"could not write {path} ({error.strerror or error}); {free:,.0f} MB are free there. "
            "Free some space, or point KDLIB_HOME at a larger disk, and start again: nothing was lost",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any] | None = None) -> None:
    """Write tensors and a JSON-able ``meta`` into one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path) as part:
        try:
            save_file(whole, str(part), metadata={"kdlib": json.dumps(meta or {})})
        except SafetensorError as error:  # what a full disk looks like from there
            raise OSError(None, str(error)) from error


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: ``(tensors, meta)``. A damaged file raises ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("kdlib", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold ``path``.lock: one process at a time; the operating system frees it if the holder dies."""
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield
