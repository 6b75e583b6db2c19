"""Exercises of notebook 02, ImitKD."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdlib.exercises import Exercise, expect

# --- 02.1 the rollout share ---


def _right_share(b: float) -> float:
    return 1 - (1 - 1 / b) / math.log(b)


def check_share(answer: Callable[[float], float]) -> str:
    bases = (2.0, 10.0, 200.0)
    got = [float(answer(b)) for b in bases]

    def like(wrong: Callable[[float], float]) -> bool:
        return all(math.isclose(g, wrong(b), rel_tol=1e-6) for g, b in zip(got, bases, strict=True))

    expect(not like(lambda b: 1 - _right_share(b)), "this is the mean of β, the share of DATA contexts; the student writes the rest")  # fmt: skip
    expect(not like(lambda b: 1 - 1 / b), "this is the share at the END of training, 1 − β(1); the mean over training is asked for")  # fmt: skip
    expect(not like(lambda b: 1 - b**-0.5), "β at half-time is not the mean of β: an exponential is not a straight line. Integrate")  # fmt: skip
    expect(not like(lambda b: 1 - (1 - 1 / b) / math.log2(b)), "the antiderivative of b^(−τ) has the natural logarithm of b, not base 2")  # fmt: skip
    expect(not like(lambda b: (1 + 1 / b) / 2), "the mean of start and end is that of a straight line; and it is β's, not the student's")  # fmt: skip
    for b, share in zip(bases, got, strict=True):
        expect(math.isclose(share, _right_share(b), rel_tol=1e-6), f"for b = {b:g} you get {share:.3f}, it should be {_right_share(b):.3f}")  # fmt: skip
    return "28, 61 and 81 %: with b = 200 half of the contexts are the student's after an eighth of training"


WRONG_SHARE = [
    (lambda b: (1 - 1 / b) / math.log(b), "share of DATA contexts"),
    (lambda b: 1 - 1 / b, "at the END of training"),
    (lambda b: 1 - b**-0.5, "not the mean of β"),
    (lambda b: 1 - (1 - 1 / b) / math.log2(b), "natural logarithm"),
    (lambda b: (1 + 1 / b) / 2, "straight line"),
    (lambda b: 1 - 1 / (b * math.log(b)), "it should be"),
]


# --- 02.2 a mask for any start token ---


def _right_mask(context: Tensor, pad: int, eos: int) -> Tensor:
    mask = (context != eos) & (context != pad)
    mask[:, 0] = True
    return mask


def check_mask(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    pad, eos = 0, 2
    usual = torch.tensor([[1, 5, 6, 7, eos, pad], [1, 5, 6, 7, 8, 9], [1, eos, pad, pad, pad, pad]])
    as_eos, as_pad = usual.clone(), usual.clone()
    as_eos[:, 0], as_pad[:, 0] = eos, pad
    copy = as_eos.clone()
    got = answer(as_eos, pad, eos)
    expect(torch.equal(copy, as_eos), "the context that was handed in has changed: build a new tensor")
    expect(isinstance(got, Tensor) and got.dtype == torch.bool, "return a boolean tensor: true where a position trains")
    expect(got.shape == usual.shape, f"the mask has shape {tuple(got.shape)}, the context {tuple(usual.shape)}")
    right = _right_mask(as_eos, pad, eos)
    expect(not torch.equal(got, ~right), "this is true where nothing trains; turn it round")
    expect(bool(got[:, 0].all()), "where the start token is EOS your mask drops position 0: the first word is never trained")  # fmt: skip
    expect(bool(answer(as_pad, pad, eos)[:, 0].all()), "where the start token is PAD your mask drops position 0: the first word is never trained")  # fmt: skip
    expect(not bool(got[0, 4]), "the position that reads EOS trains: nothing comes after an end")
    expect(not bool(got[0, 5]), "the position that reads PAD trains: padding has no continuation")
    expect(bool(got[0, 3]), "the position that reads the last word is left out: it is where EOS is learned")
    for context in (usual, as_eos, as_pad):
        expect(torch.equal(answer(context, pad, eos), _right_mask(context, pad, eos)), "n words and EOS have n + 1 positions that train: count yours")  # fmt: skip
    return "n words and EOS train n + 1 decisions, whatever the decoder starts with"


def _without_last_word(context: Tensor, pad: int, eos: int) -> Tensor:
    mask = _right_mask(context, pad, eos)
    return mask & torch.cat([mask[:, 1:], torch.ones_like(mask[:, :1])], 1) | (torch.arange(context.shape[1]) == 0)


def _in_place(context: Tensor, pad: int, eos: int) -> Tensor:
    context[:, 0] = -1
    return (context != eos) & (context != pad)


def _first_unless_pad(context: Tensor, pad: int, eos: int) -> Tensor:
    mask = (context != eos) & (context != pad)
    mask[:, 0] |= context[:, 0] == eos
    return mask


def _with_first(mask: Tensor) -> Tensor:
    mask[:, 0] = True
    return mask


WRONG_MASK = [
    (lambda c, pad, eos: (c != eos) & (c != pad), "start token is EOS your mask drops"),
    (_first_unless_pad, "start token is PAD your mask drops"),
    (lambda c, pad, eos: _with_first(c != pad), "reads EOS trains"),
    (lambda c, pad, eos: _with_first(c != eos), "reads PAD trains"),
    (_without_last_word, "reads the last word is left out"),
    (lambda c, pad, eos: ~_right_mask(c, pad, eos), "turn it round"),
    (_in_place, "has changed"),
    (lambda c, pad, eos: _right_mask(c, pad, eos).float(), "boolean"),
]


# --- 02.3 base ImitKD's targets ---


def _right_targets(teacher_logits: Tensor, labels: Tensor, rolled: Tensor, mask: Tensor) -> Tensor:
    return torch.where(rolled[:, None], teacher_logits.argmax(-1), labels).masked_fill(~mask, -100)


def check_targets(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 9, generator=generator)
    labels = torch.randint(0, 9, (4, 5), generator=generator)
    rolled = torch.tensor([False, True, False, True])
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 5])[:, None]
    labels = labels.masked_fill(~mask | rolled[:, None], -100)
    before = labels.clone()
    got, best = answer(logits, labels, rolled, mask), logits.argmax(-1)
    expect(torch.equal(before, labels), "the labels that were handed in have changed: build a new tensor")
    expect(isinstance(got, Tensor) and got.shape == labels.shape, "return one target a position, [B, L]")
    right = _right_targets(logits, labels, rolled, mask)
    data, own = mask & ~rolled[:, None], mask & rolled[:, None]
    swapped = torch.equal(got[data], best[data]) and bool((got[own] == -100).all())
    expect(not swapped, "the two are swapped: `rolled` is true where the STUDENT wrote, and there the teacher's argmax belongs")  # fmt: skip
    expect(not torch.equal(got[data], best[data]), "data rows have the teacher's argmax too: that is the control of § 5. Base ImitKD keeps their reference words")  # fmt: skip
    expect(torch.equal(got[data], labels[data]), "on data rows the target is the reference's next word")
    expect(not bool((got[own] == -100).any()), "rolled rows have no target: there the teacher's argmax belongs")
    shifted = logits[:, 1:].argmax(-1)
    alike = (got[:, :-1] == shifted)[own[:, :-1]].all() or (got[:, 1:] == best[:, :-1])[own[:, 1:]].all()
    expect(not bool(alike), "the teacher's logits are shifted: its position j already speaks of target j")
    expect(not torch.equal(got[own], logits.argmin(-1)[own]), "this is the least likely token")
    expect(torch.equal(got[own], best[own]), "on rolled rows the target is the teacher's most likely token")
    expect(torch.equal(got, right), "where the mask is false the target must be −100, on rolled rows as well")
    return "reference words where there is a reference, the teacher's where there is none"


WRONG_TARGETS = [
    (lambda z, y, r, m: z.argmax(-1).masked_fill(~m, -100), "the control of § 5"),
    (lambda z, y, r, m: torch.where(r[:, None], y, z.argmax(-1)).masked_fill(~m, -100), "swapped"),
    (lambda z, y, r, m: y.masked_fill(~m, -100), "rolled rows have no target"),
    (lambda z, y, r, m: _right_targets(z.roll(-1, 1), y, r, m), "shifted"),
    (lambda z, y, r, m: _right_targets(z.roll(1, 1), y, r, m), "shifted"),
    (lambda z, y, r, m: torch.where(r[:, None], z.argmax(-1), y), "must be −100"),
    (lambda z, y, r, m: _right_targets(-z, y, r, m), "least likely"),
    (lambda z, y, r, m: _right_targets(z, y, r, m)[m], "one target a position"),
]


# --- 02.4 the other direction ---


def _kl(weights: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    log_w, log_o = weights.log_softmax(-1), other.log_softmax(-1)
    return (log_w.exp() * (log_w - log_o)).sum(-1)[mask]


def _right_reverse(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    return _kl(student_logits, teacher_logits, mask).mean()


def check_reverse(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, 11, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    student.requires_grad_()
    got = answer(student, teacher, mask)
    expect(isinstance(got, Tensor) and got.ndim == 0, "return a scalar tensor: the mean over the positions that count")
    expect(got.requires_grad, "no gradient reaches the student: was something detached, or turned into a number?")
    value, right = float(got.detach()), float(_right_reverse(student, teacher, mask).detach())
    rows, everywhere = _kl(student, teacher, mask), torch.ones_like(mask)
    mistakes = {
        "this is the FORWARD KL: in the reverse one the student's probabilities weigh": _kl(teacher, student, mask).mean(),
        "the sign is turned round: a divergence is not negative": -rows.mean(),
        "the mean runs over all positions, padding too: select by the mask": _kl(student, teacher, everywhere).mean(),
        "padding is set to zero but still counted in the mean: divide by the positions that count": rows.sum() / mask.numel(),
        "a mean over the vocabulary makes it V times too small: sum over tokens": rows.mean() / student.shape[-1],
        "this is the sum over positions: take the mean": rows.sum(),
        "this is summed per sentence and averaged over sentences: take the mean over positions": rows.sum() / len(mask),
    }  # fmt: skip
    for hint, wrong in mistakes.items():
        expect(not math.isclose(value, float(wrong.detach()), rel_tol=1e-4), hint)
    expect(math.isclose(value, right, rel_tol=1e-4), f"you get {value:.4f}, it should be {right:.4f}")
    (gradient,) = torch.autograd.grad(got, student)
    (wanted,) = torch.autograd.grad(_right_reverse(student, teacher, mask), student)
    expect(torch.allclose(gradient, wanted, atol=1e-6), "the value is right, the gradient is not: the weights are the student's too, do not detach them")  # fmt: skip
    return "the student now pays where IT puts mass and the teacher does not: it seeks a mode"


def _detached_weights(s: Tensor, t: Tensor, m: Tensor) -> Tensor:
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    return (log_q.exp().detach() * (log_q - log_p)).sum(-1)[m].mean()


WRONG_REVERSE = [
    (lambda s, t, m: _kl(t, s, m).mean(), "FORWARD KL"),
    (lambda s, t, m: -_kl(s, t, m).mean(), "sign is turned round"),
    (lambda s, t, m: _kl(s, t, torch.ones_like(m)).mean(), "padding too"),
    (lambda s, t, m: _kl(s, t, m).sum() / m.numel(), "still counted"),
    (lambda s, t, m: _kl(s, t, m).mean() / s.shape[-1], "V times too small"),
    (lambda s, t, m: _kl(s, t, m).sum(), "sum over positions"),
    (lambda s, t, m: _kl(s, t, m).sum() / len(m), "per sentence"),
    (_detached_weights, "do not detach"),
    (lambda s, t, m: _right_reverse(s, t, m).item(), "scalar tensor"),
    (lambda s, t, m: _right_reverse(s, t, m).detach(), "no gradient"),
]


EXERCISES = [
    Exercise("02.1", "the rollout share", 10, 1, check_share, _right_share, WRONG_SHARE),
    Exercise("02.2", "a mask for any start token", 10, 2, check_mask, _right_mask, WRONG_MASK),
    Exercise("02.3", "base ImitKD's targets", 15, 2, check_targets, _right_targets, WRONG_TARGETS),
    Exercise("02.4", "the other direction", 20, 3, check_reverse, _right_reverse, WRONG_REVERSE),
]
