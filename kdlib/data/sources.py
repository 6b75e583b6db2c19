"""Where data and models come from: embedded, a local folder under ``KDLIB_DATA``, else a download."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kdlib import files

ADVICE = (
    "KDLIB_DATA names the folder to look in; data/README.md has the layout of every set. "
    "KDLIB_SCALE=smoke needs no download"
)


@dataclass(frozen=True)
class Corpus:
    """Where a set's rows are, and how large it is.

    Attributes:
        files: of each part, below the folder of real data: ``.tsv``, ``.jsonl``, or parallel lines, whose columns
            are endings. Several for one part stand with `` + `` between them.
        columns: names (numbers, where a tsv has no header); a label comes last.
        metric: name of the set's own measure.
        rows: of the training part, for a rehearsal.
        words: of a typical text, for a rehearsal; two numbers for texts to read and to write.
        classes: names in the order of the labels, or how many (their names are then those of the training part);
            empty for scores and for sequences.
        hub: name, configuration and revision on the hub; empty where it is not there.
        hub_parts, hub_columns: the hub's names, where they are others.
    """

    files: dict[str, str]
    columns: tuple
    metric: str
    rows: int
    words: int | tuple[int, int]
    classes: tuple[str, ...] | int = ()
    hub: tuple[str | None, ...] = ()
    hub_parts: dict[str, str] = field(default_factory=dict)
    hub_columns: tuple[str, ...] = ()

    def read(self, name: str) -> dict[str, list[tuple]]:
        """The rows of every part.

        Raises:
            FileNotFoundError: they are not at hand; says what to put where.
            ValueError: a line that cannot be read.
        """
        folder = root() / os.path.commonpath([os.path.dirname(file) for file in self.files.values()])
        if not folder.is_dir():
            return self._from_hub(name)
        parts = {part: [root() / file for file in given.split(" + ")] for part, given in self.files.items()}
        return {part: [row for path in paths for row in _rows(path, self.columns)] for part, paths in parts.items()}

    def _from_hub(self, name: str) -> dict[str, list[tuple]]:
        layout = f"{{{', '.join(self.files.values())}}} with the columns {', '.join(map(str, self.columns))}"
        if not self.hub:
            raise missing(name, layout, "Put the files there.")
        if offline():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # so that the hub's cache is asked, and nobody waits
        hub, config, revision = (*self.hub, None, None)[:3]
        try:
            splits = optional("datasets").load_dataset(hub, config, revision=revision)
        except OSError as error:
            raise missing(name, layout) from error
        columns, parts = self.hub_columns or self.columns, {}
        for part in self.files:
            split = splits[self.hub_parts.get(part, part)]
            rows = split["translation"] if "translation" in split.column_names else split
            parts[part] = [tuple(row[column] for column in columns) for row in rows]
        return parts


def _rows(path: Path, columns: tuple) -> list[tuple]:
    """The columns of a table, of JSON lines, or of files of parallel lines."""
    if path.suffix == ".tsv":  # no quoting: a quotation mark is part of the text
        table = [[cell.strip() for cell in line.split("\t")] for line in lines(path)]
        header = range(len(table[0])) if isinstance(columns[0], int) else table[0]
        first = 1 if isinstance(columns[0], int) else 2
        rows = [dict(zip(header, row, strict=False)) if len(row) == len(header) else {} for row in table[first - 1 :]]
    elif path.suffix == ".jsonl":
        first, rows = 1, json_lines(path)
    else:
        sides = [lines(path.with_name(f"{path.name}.{ending}")) for ending in columns]
        if len({len(side) for side in sides}) > 1:
            counts = " and ".join(f"{len(side)}" for side in sides)
            raise ValueError(f"{path}.{{{','.join(columns)}}} are not parallel: {counts} lines; unpack them again")
        return list(zip(*sides, strict=True))
    found = [tuple(row.get(column) for column in columns) for row in rows]
    for number, values in enumerate(found, first):
        if None in values:
            raise ValueError(
                f"{path}, line {number} lacks one of {', '.join(map(str, columns))}; unpack that file again"
            )
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    found = []
    for number, line in enumerate(lines(path), 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a JSON object ({error}); unpack that file again") from error
    return found


def lines(path: Path) -> list[str]:
    """A UTF-8 file's lines. Only a newline ends one: other separators of Unicode stand within texts."""
    try:
        return path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing beside its other parts; unpack that set again") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start:,}); convert it, "
            "for example with `iconv -f cp1252 -t utf-8`"
        ) from error


def root() -> Path:
    """The folder of real data: ``KDLIB_DATA``, else ``data`` in kdlib's home."""
    return Path(os.environ.get("KDLIB_DATA") or files.home() / "data").expanduser()


def embedded(name: str) -> Path:
    """A file of the repository's ``data`` folder (an installed package carries them as ``kdlib/embedded``)."""
    package = Path(__file__).resolve().parents[1]
    places = [package.parent / "data" / name, package / "embedded" / name]
    if found := [path for path in places if path.is_file()]:
        return found[0]
    raise FileNotFoundError(f"{name} is neither at {places[0]} nor at {places[1]}; install kdlib again")


def offline() -> bool:
    """Whether downloads are switched off, by kdlib's own variable or the hub's."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("KDLIB_OFFLINE", "HF_HUB_OFFLINE"))


def missing(
    name: str, layout: str, remedy: str = "Go online and run again, or put the files there."
) -> FileNotFoundError:
    """The error for what is not at hand: where it was looked for, how to get it, and which scale needs none."""
    return FileNotFoundError(
        f"{name} is not at hand: nothing at {root() / layout}, and no download was possible. {remedy} {ADVICE}"
    )


def optional(name: str) -> ModuleType:
    """A module of the packages that only texts need.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; `pip install 'kdlib[text]'` installs what texts need", name=error.name
        ) from error
