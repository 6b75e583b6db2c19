"""Exercises of chapter 06, two-stage textual distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.exercises import Exercise

# --- 06.1 hide spans: answer(ids, starts, span) -> list of ids ---


def hiding(ids: list[int], starts: list[int], span: int, *, mask: int = 2, safe: bool = True) -> list[int]:
    hidden = {place for start in starts for place in range(start, start + span)}
    return [mask if place in hidden and (i >= 4 or not safe) else i for place, i in enumerate(ids)]


HIDINGS = [
    ([1, 9, 8, 7, 6, 5, 4, 0, 0], [2, 5], 3),
    ([1, 9, 8, 7, 6, 5], [0, 1], 2),
    ([1, 4, 4, 5, 6, 7], [1], 1),
]
HIDING = {
    "CLS and padding are hidden too: only ids from 4 on are sounds": lambda i, s, n: hiding(i, s, n, safe=False),
    "CLS is hidden where a span starts at it: its place is where the utterance's vector will stand": lambda i, s, n: [2 if k in {p for a in s for p in range(a, a + n)} and x != 0 else x for k, x in enumerate(i)],
    "padding is hidden: a span ends with its utterance": lambda i, s, n: [2 if k in {p for a in s for p in range(a, a + n)} and x != 1 else x for k, x in enumerate(i)],
    "hidden tokens got the padding's id: attention skips padding, so the model does not see that something is missing there": lambda i, s, n: hiding(i, s, n, mask=0),
    "only the starts are hidden: from each, `span` tokens": lambda i, s, n: hiding(i, s, 1),
    "each span is one too long": lambda i, s, n: hiding(i, s, n + 1),
    "each span is one too short": lambda i, s, n: hiding(i, s, n - 1),
    "the start itself stays: a span begins at its start": lambda i, s, n: hiding(i, [a + 1 for a in s], n),
    "only the first start is used": lambda i, s, n: hiding(i, s[:1], n),
    "only the last start is used: is the list built anew for each?": lambda i, s, n: hiding(i, s[-1:], n),
    "hidden tokens are removed: they must stay, as MASK": lambda i, s, n: [x for x in hiding(i, s, n) if x != 2],
}  # fmt: skip

# --- 06.2 the line of a collapse: answer(vectors) -> smallest mean L1 distance to one vector ---


def floor(vectors: Tensor) -> Tensor:
    return (vectors - vectors.quantile(0.5, dim=0)).abs().mean()


def _clouds() -> list[tuple]:
    random = torch.Generator().manual_seed(0)
    skewed = torch.rand(40, 6, generator=random).pow(4) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 3
    return [(skewed,), (torch.tensor([[0.0, 1.0], [0.0, 2.0], [9.0, 6.0]]),)]


FLOOR = {
    "the mean is the best constant for squared errors; for absolute ones it is another": lambda v: (v - v.mean(0)).abs().mean(),
    "that is the squared distance (and of the mean)": lambda v: (v - v.mean(0)).pow(2).mean(),
    "one vector is asked for, with an entry a dimension: this is the best single number": lambda v: (v - v.median()).abs().mean(),
    "take the middle over the N vectors (dim 0), not over the entries of each": lambda v: (v - v.quantile(0.5, dim=1, keepdim=True)).abs().mean(),
    "averaged over all entries, not summed over a vector's": lambda v: (v - v.quantile(0.5, dim=0)).abs().sum(1).mean(),
    "this is the distance to the zero vector": lambda v: v.abs().mean(),
    "the L1 distance, without the square root of squares": lambda v: (v - v.quantile(0.5, dim=0)).norm(dim=1).mean(),
    "return the distance, not the vector": lambda v: v.quantile(0.5, dim=0),
    "this is one distance a dimension; average those too": lambda v: (v - v.quantile(0.5, dim=0)).abs().mean(0),
}  # fmt: skip

# --- 06.3 masked maximum over time: answer(states, real) -> [B, d] ---


def max_pool(states: Tensor, real: Tensor) -> Tensor:
    return states.masked_fill(~real[:, :, None], float("-inf")).amax(1)


def _states() -> list[tuple]:
    random = torch.Generator().manual_seed(1)
    states = torch.randn(3, 5, 4, generator=random)
    states[1] = -states[1].abs() - 0.1  # all below zero: a padded zero would win
    real = torch.arange(5) < torch.tensor([[5], [3], [2]])
    return [(states, real), (states[:2, :3] - 2, real[:2, :3])]


POOL = {
    "padded frames take part: put them to minus infinity first": lambda s, r: s.amax(1),
    "padded frames are zero and still take part: where all real values are negative, a zero wins": lambda s, r: (s * r[:, :, None]).amax(1),
    "only the padded frames were kept: the mask is the wrong way round": lambda s, r: s.masked_fill(r[:, :, None], float("-inf")).amax(1),
    "that is the mean over the real frames": lambda s, r: (s * r[:, :, None]).sum(1) / r.sum(1)[:, None],
    "that is the last real frame": lambda s, r: s[torch.arange(len(s)), r.sum(1) - 1],
    "the maximum over time (dim 1), not over the features": lambda s, r: s.masked_fill(~r[:, :, None], float("-inf")).amax(2),
    "the values only: max over a dimension returns a pair (values, places)": lambda s, r: tuple(s.masked_fill(~r[:, :, None], float("-inf")).max(1)),
    "that is the largest absolute value: the sign counts": lambda s, r: (s.abs() * r[:, :, None]).amax(1),
}  # fmt: skip

# --- 06.4 stage 2: answer(z, teacher, y) -> scalar ---


def stage_2(z: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + (z - teacher).abs().sum(1).mean()


def _logits() -> list[tuple]:
    random = torch.Generator().manual_seed(2)
    teacher = 4 * torch.randn(6, 5, generator=random)
    return [(torch.randn(6, 5, generator=random), teacher, teacher.argmax(1)), (torch.zeros(6, 5), teacher, torch.arange(6) % 5)]  # fmt: skip


STAGE_2 = {
    "`F.l1_loss` averages over classes as well: the paper sums over classes and averages over the batch": lambda z, t, y: F.cross_entropy(z, y) + F.l1_loss(z, t),
    "the L1 term is summed over the batch too: average over the batch": lambda z, t, y: F.cross_entropy(z, y) + (z - t).abs().sum(),
    "the labels are missing": lambda z, t, y: (z - t).abs().sum(1).mean(),
    "the teacher is missing": lambda z, t, y: F.cross_entropy(z, y),
    "the logits themselves are compared, without a softmax": lambda z, t, y: F.cross_entropy(z, y) + (z.softmax(1) - t.softmax(1)).abs().sum(1).mean(),
    "L1, not squared": lambda z, t, y: F.cross_entropy(z, y) + (z - t).pow(2).sum(1).mean(),
    "L1, not KL": lambda z, t, y: F.cross_entropy(z, y) + F.kl_div(z.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "the two are added, not averaged": lambda z, t, y: (F.cross_entropy(z, y) + (z - t).abs().sum(1).mean()) / 2,
    "the absolute value is missing: positive and negative errors cancel": lambda z, t, y: F.cross_entropy(z, y) + (z - t).sum(1).mean(),
    "the cross-entropy is summed over the batch: average it": lambda z, t, y: F.cross_entropy(z, y, reduction="sum") + (z - t).abs().sum(1).mean(),
    "cross_entropy takes logits; softmax is applied twice here": lambda z, t, y: F.cross_entropy(z.softmax(1), y) + (z - t).abs().sum(1).mean(),
}  # fmt: skip

EXERCISES = {
    "06.1": Exercise(
        "hide, but not everything", 10, 1, hiding, HIDING, cases=HIDINGS,
        praise="right: a span ends with its utterance, and CLS is never hidden",
    ),
    "06.2": Exercise(
        "the line of a collapse", 8, 2, floor, FLOOR, cases=_clouds,
        praise="right: the median, entry by entry. What lies below this line knows which utterance it heard",
    ),
    "06.3": Exercise(
        "the maximum of what was said", 8, 1, max_pool, POOL, cases=_states,
        praise="right: now an utterance's answer cannot hang on its neighbours in the batch",
    ),
    "06.4": Exercise(
        "stage 2", 10, 2, stage_2, STAGE_2, cases=_logits,
        praise="right. With 31 intents the second term starts about ten times as large as the first",
    ),
}  # fmt: skip
