"""Exercises of chapter 02, ImitKD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlib.exercises import Exercise

# --- 02.1 the rollout share: answer(b) -> share of the student's prefixes over the whole training ---


def share(b: float) -> float:
    return 1 - (1 - 1 / b) / math.log(b)


SHARE = {
    "this is the mean of β, the share of DATA contexts; the student writes the rest": lambda b: 1 - share(b),
    "this is the share at the END of training, 1 − β(1); the mean over training is asked for": lambda b: 1 - 1 / b,
    "β at half-time is not the mean of β: an exponential is not a straight line. Integrate": lambda b: 1 - b**-0.5,
    "this is β at half-time, and the share of DATA contexts: integrate, and take the rest": lambda b: b**-0.5,
    "the antiderivative of b^(−τ) has the natural logarithm of b, not base 2": lambda b: 1 - (1 - 1 / b) / math.log2(b),
    "the antiderivative of b^(−τ) has the natural logarithm of b, not base 10": lambda b: 1 - (1 - 1 / b) / math.log10(b),
    "the mean of start and end is that of a straight line; and it is β's, not the student's": lambda b: (1 + 1 / b) / 2,
    "the mean of start and end is that of a straight line; β is an exponential. Integrate": lambda b: 1 - (1 + 1 / b) / 2,
    "the antiderivative is taken at both ends: β(0) = 1 leaves 1 − 1/b": lambda b: 1 - 1 / (b * math.log(b)),
}  # fmt: skip


# --- 02.2 a mask for any start token: answer(context, pad, eos) -> bool [B, L] ---

PAD, EOS = 0, 2
USUAL = torch.tensor([[1, 5, 6, 7, EOS, PAD], [1, 5, 6, 7, 8, 9], [1, EOS, PAD, PAD, PAD, PAD]])
CONTEXTS = [(torch.cat([torch.full((3, 1), start), USUAL[:, 1:]], 1), PAD, EOS) for start in (1, EOS, PAD)]


def mask_of(context: Tensor, pad: int, eos: int) -> Tensor:
    return with_first((context != eos) & (context != pad))


def with_first(mask: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)


def without_last_word(context: Tensor, pad: int, eos: int) -> Tensor:
    mask = mask_of(context, pad, eos)
    return with_first(mask & torch.cat([mask[:, 1:], torch.ones_like(mask[:, :1])], 1))


def first_unless_pad(context: Tensor, pad: int, eos: int) -> Tensor:
    mask = (context != eos) & (context != pad)
    return torch.cat([mask[:, :1] | (context[:, :1] == eos), mask[:, 1:]], 1)


def first_unless_eos(context: Tensor, pad: int, eos: int) -> Tensor:
    mask = (context != eos) & (context != pad)
    return torch.cat([mask[:, :1] | (context[:, :1] == pad), mask[:, 1:]], 1)


MASK = {
    "where the start token is EOS or PAD your mask drops position 0: the first word is never trained": lambda c, pad, eos: (c != eos) & (c != pad),
    "where the start token is PAD your mask drops position 0: the first word is never trained": first_unless_pad,
    "where the start token is EOS your mask drops position 0: the first word is never trained": first_unless_eos,
    "the position that reads EOS trains: nothing comes after an end": lambda c, pad, eos: with_first(c != pad),
    "the position that reads PAD trains: padding has no continuation": lambda c, pad, eos: with_first(c != eos),
    "the position that reads the last word is left out: it is where EOS is learned": without_last_word,
    "this is true where nothing trains; turn it round": lambda c, pad, eos: ~mask_of(c, pad, eos),
    "every position trains: leave out those that read EOS or PAD": lambda c, pad, eos: torch.ones_like(c, dtype=torch.bool),
}  # fmt: skip


def is_boolean(answer) -> bool:
    return answer(*CONTEXTS[0]).dtype == torch.bool


# --- 02.3 base ImitKD's targets: answer(teacher_logits, labels, rolled, mask) -> targets [B, L] ---

random = torch.Generator().manual_seed(0)
LOGITS, LABELS = torch.randn(4, 5, 9, generator=random), torch.randint(0, 9, (4, 5), generator=random)
INSIDE = torch.arange(5) < torch.tensor([5, 4, 3, 5])[:, None]
# Row 3 was rolled out, and still carries its reference: whoever does not read `rolled` trains on words that the
# student did not write. Row 1 carries none.
ROLLED = torch.tensor([False, True, False, True])
LABELS = LABELS.masked_fill(~INSIDE | torch.tensor([False, True, False, False])[:, None], -100)


def targets(z: Tensor, y: Tensor, rolled: Tensor, mask: Tensor) -> Tensor:
    return torch.where(rolled[:, None], z.argmax(-1), y).masked_fill(~mask, -100)


TARGETS = {
    "data rows have the teacher's argmax too: that is the control of § 5. Base ImitKD keeps their reference words": lambda z, y, r, m: z.argmax(-1).masked_fill(~m, -100),
    "the two are swapped: `rolled` is true where the STUDENT wrote, and there the teacher's argmax belongs": lambda z, y, r, m: targets(z, y, ~r, m),
    "rolled rows have no target of the teacher's: there its argmax belongs": lambda z, y, r, m: y.masked_fill(~m, -100),
    "you ask whether a label is missing; `rolled` says which rows the student wrote": lambda z, y, r, m: torch.where(y == -100, z.argmax(-1), y).masked_fill(~m, -100),
    "the teacher's logits are shifted to the left: its position j already speaks of target j": lambda z, y, r, m: targets(z.roll(-1, 1), y, r, m),
    "the teacher's logits are shifted to the right: its position j already speaks of target j": lambda z, y, r, m: targets(z.roll(1, 1), y, r, m),
    "this is the least likely token": lambda z, y, r, m: targets(-z, y, r, m),
    "where the mask is false the target must be −100, on rolled rows as well": lambda z, y, r, m: torch.where(r[:, None], z.argmax(-1), y),
    "one target a position, [B, L], is asked for": lambda z, y, r, m: targets(z, y, r, m)[m],
    "padding has the target 0; cross-entropy skips −100": lambda z, y, r, m: targets(z, y, r, m).masked_fill(~m, 0),
}  # fmt: skip


# --- 02.4 the other direction: answer(student_logits, teacher_logits, mask) -> scalar ---

STUDENT, TEACHER = torch.randn(2, 3, 6, 11, generator=random)
COUNTS = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]


def kl(weights: Tensor, other: Tensor, mask: Tensor, detach: bool = False) -> Tensor:
    log_w, log_o = weights.log_softmax(-1), other.log_softmax(-1)
    return ((log_w.exp().detach() if detach else log_w.exp()) * (log_w - log_o)).sum(-1)[mask]


def reverse(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    return kl(student_logits, teacher_logits, mask).mean()


def value_and_gradient(loss, student_logits: Tensor, *_) -> list:
    """The loss, and what the student is told by it; a zero gradient where it has none."""
    if not (isinstance(loss, Tensor) and loss.requires_grad and loss.ndim == 0):
        return [loss, "no gradient"]
    return [loss, torch.autograd.grad(loss, student_logits)[0]]


REVERSE = {
    "this is the FORWARD KL: in the reverse one the student's probabilities weigh": lambda s, t, m: kl(t, s, m).mean(),
    "the sign is turned round: a divergence is not negative": lambda s, t, m: -reverse(s, t, m),
    "the mean runs over all positions, padding too: select by the mask": lambda s, t, m: reverse(s, t, torch.ones_like(m)),
    "padding is set to zero but still counted in the mean: divide by the positions that count": lambda s, t, m: kl(s, t, m).sum() / m.numel(),
    "a mean over the vocabulary makes it V times too small: sum over tokens": lambda s, t, m: reverse(s, t, m) / s.shape[-1],
    "this is the sum over positions: take the mean": lambda s, t, m: kl(s, t, m).sum(),
    "this is summed per sentence and averaged over sentences: take the mean over positions": lambda s, t, m: kl(s, t, m).sum() / len(m),
    "one loss a position; take their mean": lambda s, t, m: kl(s, t, m),
    "the value is right, the gradient is not: the weights are the student's too, do not detach them": lambda s, t, m: kl(s, t, m, detach=True).mean(),
    "no gradient reaches the student: was something detached, or turned into a number?": lambda s, t, m: reverse(s, t, m).detach(),
}  # fmt: skip


EXERCISES = {
    "02.1": Exercise(
        "the rollout share", 3, 1, share, SHARE, [(2.0,), (10.0,), (200.0,)], within=1e-3,
        praise="28, 61 and 81 %: with b = 200 half of the contexts are the student's after an eighth of training",
    ),
    "02.2": Exercise(
        "a mask for any start token", 5, 2, mask_of, MASK, CONTEXTS,
        rules={"return a boolean tensor: true where a position trains": is_boolean},
        praise="n words and EOS train n + 1 decisions, whatever the decoder starts with",
    ),
    "02.3": Exercise(
        "base ImitKD's targets", 8, 2, targets, TARGETS, [(LOGITS, LABELS, ROLLED, INSIDE)],
        praise="reference words where there is a reference, the teacher's where there is none",
    ),
    "02.4": Exercise(
        "the other direction", 10, 3, reverse, REVERSE, [(STUDENT.clone().requires_grad_(), TEACHER, COUNTS)], look=value_and_gradient,
        praise="the student now pays where IT puts mass and the teacher does not: it seeks a mode",
    ),
}  # fmt: skip
