"""Exercises of chapter 05, distilling quality estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.exercises import Exercise

# --- 05.1 the ceiling that the raters set: answer(r_half) -> float ---


def ceiling(r_half: float) -> float:
    return (2 * r_half / (1 + r_half)) ** 0.5


CEILING = {
    "this is the reliability of ALL raters; a model without noise of its own correlates by its square root": lambda r: 2 * r / (1 + r),
    "this is the ceiling against HALF of the raters: all of them are less noisy, step up first (Spearman and Brown)": lambda r: r**0.5,
    "r_half belongs to half of the raters, and the ceiling needs a square root": lambda r: r,
    "the square root comes last: r_half already is the reliability of a half, not its root": lambda r: 2 * r**0.5 / (1 + r**0.5),
    "the formula is turned round: this is what a half has if the whole has r_half": lambda r: (r / (2 - r)) ** 0.5,
    "twice the raters do not double the reliability: it would go beyond 1": lambda r: (2 * r) ** 0.5,
    "a correlation is no share of variance here: do not square": lambda r: (2 * r / (1 + r)) ** 2,
    "this is the share of noise in the variance": lambda r: 1 - 2 * r / (1 + r),
}  # fmt: skip

# --- 05.2 masked attention: answer(relevance, real) -> Tensor [B, L] ---


def attention(relevance: Tensor, real: Tensor) -> Tensor:
    return relevance.masked_fill(~real, -torch.inf).softmax(-1)


def masked_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    return [
        (torch.randn(3, 4, generator=g), real),
        (torch.full((2, 3), -90.0), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()),
    ]


ATTENTION = {
    "the mask is not used: padding gets weight, and a score changes with its neighbours in the batch": lambda z, m: z.softmax(-1),
    "a relevance of 0 (or the mask as a factor) is one like any other: exp(0) = 1. Padding needs −∞": lambda z, m: z.masked_fill(~m, 0.0).softmax(-1),
    "weights are taken away after the softmax and not shared out again: a row must sum to 1": lambda z, m: z.softmax(-1) * m,
    "the mask is turned round: `real` is true where a word stands": lambda z, m: z.masked_fill(m, -torch.inf).softmax(-1).nan_to_num(),
    "the softmax runs over the batch; it belongs to a sentence's words, the last dimension": lambda z, m: z.masked_fill(~m, -torch.inf).softmax(0).nan_to_num(),
    "−10 is not −∞: where all relevances are low, padding wins": lambda z, m: z.masked_fill(~m, -10.0).softmax(-1),
    "all words get the same weight: this is a mean, relevance is not used": lambda z, m: m / m.sum(-1, keepdim=True),
    "only the most relevant word gets weight: nothing to learn from": lambda z, m: torch.nn.functional.one_hot(z.masked_fill(~m, -torch.inf).argmax(-1), z.shape[1]).to(z),
    "this is a sigmoid a word: the weights of a sentence must sum to 1": lambda z, m: z.sigmoid() * m,
    "these are logarithms of the weights": lambda z, m: z.masked_fill(~m, -torch.inf).log_softmax(-1),
}  # fmt: skip

# --- 05.3 where the parameters are: answer(source_words, target_words, width, hidden) -> int ---


def count(
    source_words: int, target_words: int, width: int, hidden: int, *, directions=2, gates=3, biases=2, extra=0
) -> int:
    gru = directions * gates * (width * hidden + hidden * hidden + biases * hidden)
    side = gru + (2 * hidden) * (2 * hidden) + 2 * hidden + 2 * hidden
    return width * (source_words + target_words) + 2 * side + 4 * hidden + 1 + extra


COUNT = {
    "PyTorch's GRU has TWO bias vectors for each gate": lambda s, t, w, h: count(s, t, w, h, biases=1),
    "the GRU has no biases in your count; PyTorch's has two vectors for each gate": lambda s, t, w, h: count(s, t, w, h, biases=0),
    "the GRU reads both ways: two directions, each with matrices of its own": lambda s, t, w, h: count(s, t, w, h, directions=1),
    "that is an LSTM: a GRU has three gates, not four": lambda s, t, w, h: count(s, t, w, h, gates=4),
    "the sides share nothing: the GRU, the projection and the context vector are there twice": lambda s, t, w, h: w * (s + t) + (count(s, t, w, h) - w * (s + t) - 4 * h - 1) // 2 + 4 * h + 1,
    "only one embedding table is counted: each side has its own": lambda s, t, w, h: count(s, 0, w, h),
    "the embeddings are missing, and they are nearly all of it": lambda s, t, w, h: count(0, 0, w, h),
    "4 × hidden are missing: the projection's bias or the context vector, on each side": lambda s, t, w, h: count(s, t, w, h, extra=-4 * h),
    "the last layer's bias is missing": lambda s, t, w, h: count(s, t, w, h, extra=-1),
    "the last layer is missing: 4 × hidden weights and a bias": lambda s, t, w, h: count(s, t, w, h, extra=-4 * h - 1),
    "the last layer reads both sides, each of 2 × hidden": lambda s, t, w, h: count(s, t, w, h, extra=-2 * h),
    "the projections are missing": lambda s, t, w, h: count(s, t, w, h, extra=-2 * (4 * h * h + 2 * h)),
    "the GRU's states go through a projection of 2 × hidden to 2 × hidden: its matrix is (2 hidden)², not hidden²": lambda s, t, w, h: count(s, t, w, h, extra=-6 * h * h),
}  # fmt: skip

# --- 05.4 the noise put back: answer(gold, teacher, order) -> Tensor [N] ---


def noisy_teacher(gold: Tensor, teacher: Tensor, order: Tensor) -> Tensor:
    return teacher + (gold - teacher)[order]


def noise_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(8)
    return [(torch.rand(n, generator=g), torch.rand(n, generator=g), torch.randperm(n, generator=g)) for n in (6, 9)]


NOISE = {
    "without shuffling the residual leads straight back to gold": lambda g, t, o: t + (g - t),
    "this is shuffled gold (teacher and residual were shuffled together): shuffle the residuals alone, the teacher stays in its row": lambda g, t, o: g[o],
    "gold, shuffled, is added whole: the residual is gold − teacher": lambda g, t, o: t + g[o],
    "the residual is turned round; its sign is part of the noise's shape": lambda g, t, o: t - (g - t)[o],
    "this is noise on GOLD: the teacher's scores are asked for": lambda g, t, o: g + (g - t)[o],
    "these are the residuals alone": lambda g, t, o: (g - t)[o],
    "this noise has the residuals' size and not their shape (and may be drawn by chance): shuffle them": lambda g, t, o: t + (g - t).std() * torch.randn(len(t)),
    "half of the noise is missing: the rows must be as noisy as with gold": lambda g, t, o: t + 0.5 * (g - t)[o],
}  # fmt: skip

EXERCISES = {
    "05.1": Exercise(
        "the ceiling", 10, 2, ceiling, CEILING, cases=[(0.5,), (0.8,), (0.3,)], within=2e-3,
        praise="right: a model can be perfect and still miss a correlation of 1 by the raters' noise",
    ),
    "05.2": Exercise(
        "masked attention", 8, 1, attention, ATTENTION, cases=masked_cases,
        praise="right: whatever the batch adds, a sentence's weights stay what they are",
    ),
    "05.3": Exercise(
        "where the parameters are", 12, 2, count, COUNT, cases=[(31_766, 15_670, 50, 50), (1000, 2000, 50, 100), (40, 30, 8, 6)], within=1e-9,
        praise="right. In the first case all but 81,801 of 2,453,601 are embeddings",
    ),
    "05.4": Exercise(
        "the noise put back", 8, 2, noisy_teacher, NOISE, cases=noise_cases,
        praise="right: the same teacher, as rough as gold",
    ),
}  # fmt: skip
