"""Rows of tokens of unequal length, and batches of like length: what text and sequence sets share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdlib.data.rows import Batches, Rows, generator

WINDOW = 50  # batches that are sorted by length together: more pads less, and shuffles less


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length in one flat tensor.

    Attributes:
        lengths: int64 [N].
        values: int32 [sum of lengths], the rows one after the other.
    """

    lengths: Tensor
    values: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> Ragged:
        """From lists of whole numbers."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return Ragged(lengths, torch.tensor([value for row in rows for value in row], dtype=torch.int32))

    def take(self, rows: Tensor) -> Ragged:
        """The rows of these numbers."""
        where, mask = self._places(rows)
        return Ragged(self.lengths[rows], self.values[where[mask]])

    def padded(self, rows: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """The rows of these numbers, int64 [B, L] with ``fill`` behind the shorter ones, and which entries are real."""
        where, mask = self._places(rows)
        return torch.where(mask, self.values[where].long(), fill), mask

    @cached_property
    def _starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[rows]
        column = torch.arange(int(lengths.max()) if len(rows) else 0)
        mask = column < lengths[:, None]
        return torch.where(mask, self._starts[rows][:, None] + column, 0), mask


class TokenRows(Rows):
    """Texts in tokens, a row as long as its text: what sets of one and of two sides have in common.

    A frozen dataclass that adds ``source`` (the texts), ``lengths``, ``take`` and ``batch`` gets the rest.
    """

    source: Any
    lengths: Tensor

    @property
    def name(self) -> str:
        """That of the texts."""
        return self.source.name

    @property
    def labels(self) -> Tensor:
        """Those of the texts, [N]."""
        return self.source.labels

    @property
    def ids(self) -> Tensor:
        """int64 [N]."""
        return self.source.ids

    @property
    def stands_for(self) -> int | None:
        """In a rehearsal, the number of real texts that these few stand for."""
        return self.source.stands_for

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """One batch of the rows of these numbers, padded to its longest."""
        raise NotImplementedError

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        by_length: bool = True,
        drop_last: bool = False,
    ) -> TokenBatches:
        """Batches for ``kd.fit``, each as :meth:`batch` makes it.

        Args:
            batch_size: rows in a batch.
            seed: of the order, which is a function of seed and epoch alone.
            shuffle: a new order every epoch.
            by_length: sort every 50 batches' rows by length before cutting them into batches; the batches are
                shuffled again (without ``shuffle``, the longest batches come first).
            drop_last: leave out an incomplete last batch.
        """
        return TokenBatches(self, batch_size, seed, shuffle, drop_last, by_length)

    def view_batches(self, view: int = 0, batch_size: int = 256) -> Iterator[dict[str, Any]]:
        """All rows in order; texts have only view 0."""
        if view != 0:
            raise ValueError(f"view is {view}; texts have only view 0 (as they are)")
        for rows in torch.arange(len(self)).split(batch_size):
            yield self.batch(rows)

    def _stand_for(self, planned: int) -> Any:
        return replace(self, source=replace(self.source, stands_for=planned))


@dataclass(frozen=True)
class TokenBatches(Batches):
    """An epoch of batches at a time; see :meth:`TokenRows.batches`."""

    by_length: bool

    def plan(self, epoch: int) -> Sequence[Tensor]:
        rows = self.order(epoch)
        if not self.by_length:
            return rows.split(self.batch_size)
        plan: list[Tensor] = []
        for window in rows.split(WINDOW * self.batch_size):
            # Longest first: a batch too large for the memory fails at once, and the short batch is the cheapest.
            plan += window[self.data.lengths[window].argsort(descending=True, stable=True)].split(self.batch_size)
        plan = plan[: len(self)]
        if not self.shuffle:
            return plan
        return [plan[number] for number in torch.randperm(len(plan), generator=generator("batches", self.seed, epoch))]

    def batch(self, rows: Tensor, random: torch.Generator) -> dict[str, Any]:
        return self.data.batch(rows)
