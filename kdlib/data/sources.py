"""Where data and models come from: embedded, a local folder under ``KDLIB_DATA``, else a download."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kdlib import files

SECONDS_TO_ANSWER = 5  # a host that has not answered by then counts as out of reach


def root(folder: str | Path | None = None) -> Path:
    """The folder of real data: ``folder``, else ``KDLIB_DATA``, else ``data`` in kdlib's home."""
    return Path(folder or os.environ.get("KDLIB_DATA") or files.home() / "data").expanduser()


def local(name: str, folder: str | Path | None = None) -> Path | None:
    """``<root>/<name>`` if it is there."""
    path = root(folder) / name
    return path if path.exists() else None


def embedded(name: str) -> Path:
    """A file of the repository's ``data`` folder (an installed package carries them as ``kdlib/embedded``)."""
    package = Path(__file__).resolve().parents[1]
    places = (package.parent / "data" / name, package / "embedded" / name)
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is neither at {places[0]} nor at {places[1]}; install kdlib again")


def read_text(path: Path) -> str:
    """What a file of a set holds; a byte-order mark is dropped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; data/README.md has the layout of that folder")
    return path.read_bytes().decode("utf-8-sig")


def lines(path: Path) -> list[str]:
    """A file's lines. Only a newline ends one: other separators of Unicode stand within texts."""
    return read_text(path).removesuffix("\n").split("\n")


def json_lines(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each with ``fields`` of these types.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is something else; names it.
    """
    rows = []
    for number, line in enumerate(lines(path), 1):
        try:
            row = json.loads(line)
            if odd := [name for name, kind in fields.items() if not isinstance(row[name], kind)]:
                raise TypeError(f"{odd[0]} is {row[odd[0]]!r}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            wanted = " and ".join(fields)
            raise ValueError(f"{path}, line {number} is not a JSON object with {wanted} ({error})") from error
        rows.append(row)
    return rows


def offline() -> bool:
    """Whether downloads are switched off, by kdlib's own variable or the hub's."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("KDLIB_OFFLINE", "HF_HUB_OFFLINE"))


def reachable(url: str) -> bool:
    """Whether the host of ``url`` answers within a few seconds (asked for before any library's own retries)."""
    if offline():
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def hub() -> str:
    """The address of the Hugging Face hub, or of the mirror in ``HF_ENDPOINT``."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def from_hub(name: str, part: str | None = None, revision: str | None = None) -> Any:
    """The splits of a set of the hub, or of its local cache when the hub does not answer.

    Raises:
        OSError: it is in neither.
    """
    import datasets
    import huggingface_hub

    names, settings = [name, part] if part else [name], {"revision": revision} if revision else {}
    if reachable(hub()):
        return datasets.load_dataset(*names, **settings)
    flags = (huggingface_hub.constants, datasets.config)
    before = [flag.HF_HUB_OFFLINE for flag in flags]
    try:
        for flag in flags:  # or it would try again for half a minute before it looks into its cache
            flag.HF_HUB_OFFLINE = True
        return datasets.load_dataset(*names, **settings)
    except ValueError as error:  # "Couldn't find cache"
        raise OSError(str(error)) from error
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.HF_HUB_OFFLINE = value


def missing(name: str, layout: str, remedy: str, folder: str | Path | None = None) -> FileNotFoundError:
    """The error for what is not at hand: where it was looked for, how to get it, and which scale needs none."""
    return FileNotFoundError(
        f"{name} is not at hand: nothing at {root(folder) / layout}, and no download was possible. {remedy} "
        "KDLIB_DATA names the folder to look in; data/README.md has the layout of every set. "
        "KDLIB_SCALE=smoke needs no download"
    )
