"""Where data and models come from: embedded, a local folder under ``KDLIB_DATA``, else a download."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kdlib import files

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Corpus:
    """Where a set's rows are, and how large it is.

    Attributes:
        path: of a file below the folder of real data, with ``{}`` for its name: ``.tsv``, ``.jsonl``, or parallel lines,
            whose columns are endings.
        names: of the files of training, validation and test part; ``-`` where there is none, ``+`` between several.
        columns: names (numbers, where a tsv has no header); a label comes last.
        metric: name of the set's own measure.
        rows: of the training part, for a rehearsal.
        words: of a typical text of each column, for a rehearsal.
        classes: names in the order of the labels, or how many (their names are then those of the training part);
            empty for scores and for sequences.
        hub: name, configuration and revision on the hub; empty where it is not there.
        hub_names, hub_columns: the hub's own names of parts and columns.
    """

    path: str
    names: str
    columns: tuple
    metric: str
    rows: int
    words: tuple[int, ...]
    classes: tuple[str, ...] | int = ()
    hub: tuple[str | None, ...] = ()
    hub_names: str = " ".join(PARTS)
    hub_columns: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, list[str]]:
        """Those of each part."""
        given = {part: names.split("+") for part, names in zip(PARTS, self.names.split(), strict=False) if names != "-"}
        return {part: [self.path.format(name) for name in names] for part, names in given.items()}

    def read(self, name: str) -> dict[str, list[tuple]]:
        """The rows of every part.

        Raises:
            FileNotFoundError: they are not at hand; says what to put where.
            ValueError: a line that cannot be read.
        """
        if not (root() / self.path).parent.is_dir():
            return self._from_hub(name)
        files = self.files.items()
        return {part: [row for path in paths for row in _rows(root() / path, self.columns)] for part, paths in files}

    def _from_hub(self, name: str) -> dict[str, list[tuple]]:
        files = ", ".join(sum(self.files.values(), []))
        layout = f"{{{files}}} with the columns {', '.join(map(str, self.columns))}"
        if not self.hub:
            raise missing(name, layout, "Put the files there.")
        if offline():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # so that the hub's cache is asked, and nobody waits
        hub, config, revision = (*self.hub, None, None)[:3]
        try:
            found = optional("datasets").load_dataset(hub, config, revision=revision).flatten()
        except OSError as error:
            raise missing(name, layout) from error
        splits, columns = zip(PARTS, self.hub_names.split(), strict=True), self.hub_columns or self.columns
        return {p: list(zip(*(found[s][c] for c in columns), strict=True)) for p, s in splits if p in self.files}


def _rows(path: Path, columns: tuple) -> list[tuple]:
    """The columns of a table, of JSON lines, or of files of parallel lines."""
    if path.suffix not in (".tsv", ".jsonl"):
        sides = [lines(path.with_name(f"{path.name}.{ending}")) for ending in columns]
        if len(sides[0]) != len(sides[1]):
            counts = f"{len(sides[0])} and {len(sides[1])} lines"
            raise ValueError(f"{path}.{{{','.join(columns)}}} are not parallel: {counts}; unpack them again")
        return list(zip(*sides, strict=True))
    if path.suffix == ".jsonl":
        first, rows = 1, json_lines(path)
    else:  # no quoting: a quotation mark is part of the text
        table = [[cell.strip() for cell in line.split("\t")] for line in lines(path)]
        first, header = (1, range(len(table[0]))) if isinstance(columns[0], int) else (2, table[0])
        rows = [dict(zip(header, row, strict=False)) if len(row) == len(header) else {} for row in table[first - 1 :]]
    found, wanted = [tuple(row.get(column) for column in columns) for row in rows], ", ".join(map(str, columns))
    for number, values in enumerate(found, first):
        if None in values:
            raise ValueError(f"{path}, line {number} lacks one of {wanted}; unpack that file again")
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
        where = f"{error.reason} at byte {error.start:,}"
        raise ValueError(f"{path} is not UTF-8 ({where}); convert it, with iconv -f cp1252 -t utf-8") from error


def root() -> Path:
    """The folder of real data: ``KDLIB_DATA``, else ``data`` in kdlib's home."""
    return Path(os.environ.get("KDLIB_DATA") or files.home() / "data").expanduser()


def embedded(name: str) -> Path:
    """A file of the repository's ``data`` folder (an installed package carries them as ``kdlib/embedded``)."""
    package = Path(__file__).resolve().parents[1]
    places = [package.parent / "data" / name, package / "embedded" / name]
    if found := [place for place in places if place.is_file()]:
        return found[0]
    raise FileNotFoundError(f"{name} is neither at {places[0]} nor at {places[1]}; install kdlib again")


def offline() -> bool:
    """Whether downloads are switched off, by kdlib's own variable or the hub's."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("KDLIB_OFFLINE", "HF_HUB_OFFLINE"))


def missing(name: str, layout: str, remedy: str = "Go online and run again, or put the files there.") -> Exception:
    """The error for what is not at hand: where it was looked for, how to get it, and which scale needs none."""
    return FileNotFoundError(
        f"{name} is not at hand: nothing at {root() / layout}, and no download was possible. {remedy} KDLIB_DATA names "
        "the folder to look in; data/README.md has the layout of every set. KDLIB_SCALE=smoke needs no download"
    )


def optional(name: str) -> ModuleType:
    """A module of the packages that only texts need.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        told = f"{error.name} is not installed; `pip install 'kdlib[text]'` installs what texts need"
        raise ModuleNotFoundError(told, name=error.name) from error
