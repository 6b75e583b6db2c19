"""Exercises of notebook 03, reinforced teacher selection."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.exercises import Exercise, expect


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 03.1 from a selection to a target ---

_ACTION = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
_PI = torch.tensor([[0.9, 0.6, 0.2], [0.3, 0.1, 0.4], [0.2, 0.4, 0.7], [0.6, 0.8, 0.9]])


def _right_target(action: Tensor, pi: Tensor, probabilities: Tensor) -> Tensor:
    likeliest = F.one_hot(pi.argmax(1), pi.shape[1]).to(action)
    action = torch.where(action.sum(1, keepdim=True) == 0, likeliest, action)
    return torch.einsum("bk,bkc->bc", action / action.sum(1, keepdim=True), probabilities)


def check_target(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    probabilities = (2 * _random(4, 3, 5)).softmax(2)
    action = _ACTION.clone()
    got, right = answer(action, _PI.clone(), probabilities), _right_target(_ACTION, _PI, probabilities)
    expect(
        isinstance(got, Tensor) and got.shape == (4, 5), "return one distribution over the classes an example: [B, C]"
    )
    expect(not got.isnan().any(), "NaN where nobody is selected: 0 divided by 0. Decide that row before you divide")
    expect(
        got[1].abs().sum() > 0,
        "the row in which nobody is selected is all zeros; assigning through a mask writes into a copy",
    )
    expect(torch.equal(action, _ACTION), "the action that was handed in has changed; make a new tensor (torch.where)")
    expect(
        not torch.allclose(got[0], right[0] * 2 / 3, atol=1e-5),
        "divided by all K teachers: take the mean over the selected, or fewer teachers teach more softly",
    )
    expect(not torch.allclose(got[0], right[0] * 2, atol=1e-5), "this is the sum over the selected; take their mean")
    weighted = (_ACTION * _PI)[0] @ probabilities[0] / (_ACTION * _PI)[0].sum()
    expect(
        not torch.allclose(got[0], weighted, atol=1e-5), "weighted by π: the selected are averaged with equal weights"
    )
    logits = torch.einsum("k,kc->c", _ACTION[0] / 2, probabilities[0].log()).softmax(0)
    expect(not torch.allclose(got[0], logits, atol=1e-5), "mixed in log space; mix the probabilities themselves")
    expect(
        not torch.allclose(got[1], probabilities[1].mean(0), atol=1e-5),
        "where nobody is selected you take everybody; the likeliest teacher is asked for",
    )
    expect(torch.allclose(got, right, atol=1e-5), f"the target differs in rows {(got - right).abs().amax(1).gt(1e-5).nonzero().flatten().tolist()}")  # fmt: skip
    return "the teachers' part of the loss weighs the same however many are heard"


def _target(scale: str = "selected", empty: str = "best", space: str = "probabilities") -> Callable:
    def answer(action: Tensor, pi: Tensor, probabilities: Tensor) -> Tensor:
        a = action.clone()
        if empty == "best":
            a = torch.where(a.sum(1, keepdim=True) == 0, F.one_hot(pi.argmax(1), pi.shape[1]).to(a), a)
        elif empty == "all":
            a = torch.where(a.sum(1, keepdim=True) == 0, torch.ones_like(a), a)
        elif empty == "copy":
            a[a.sum(1) == 0].fill_(1.0)
        w = a * pi if scale == "pi" else a
        total = {"selected": w.sum(1, keepdim=True), "all": 3.0, "sum": 1.0, "pi": w.sum(1, keepdim=True)}[scale]
        w = w / (total.clamp_min(1) if empty == "copy" and isinstance(total, Tensor) else total)
        if space == "log":
            return torch.einsum("bk,bkc->bc", w, probabilities.log()).softmax(1)
        return torch.einsum("bk,bkc->bc", w, probabilities)

    return answer


def _in_place(action: Tensor, pi: Tensor, probabilities: Tensor) -> Tensor:
    for row in range(len(action)):
        if action[row].sum() == 0:
            action[row, pi[row].argmax()] = 1.0
    return _right_target(action, pi, probabilities)


WRONG_TARGET = [
    (_target(empty="none"), "NaN where nobody"),
    (_target(empty="copy"), "writes into a copy"),
    (_in_place, "has changed"),
    (_target(scale="all"), "divided by all K"),
    (_target(scale="sum"), "this is the sum"),
    (_target(scale="pi"), "weighted by π"),
    (_target(space="log"), "mixed in log space"),
    (_target(empty="all"), "you take everybody"),
]


# --- 03.2 REINFORCE ---


def _right_loss(pi: Tensor, action: Tensor, reward: Tensor) -> Tensor:
    log_prob = (action * pi.log() + (1 - action) * (1 - pi).log()).sum(1)
    return -((reward - reward.mean()).detach() * log_prob).mean()


def check_reinforce(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    action, reward = (_random(6, 3, seed=1) > 0).float(), _random(6, seed=2) - 3.0

    def gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        pi = (0.4 * _random(6, 3, seed=3)).sigmoid().requires_grad_()
        value = loss(pi, action, reward)
        expect(isinstance(value, Tensor) and value.ndim == 0, "return one number, the mean over the examples")
        expect(value.requires_grad, "no gradient reaches π; leave pi attached")
        return torch.autograd.grad(value, pi)[0]

    got, right = gradient(answer), gradient(_right_loss)
    for hint, loss in _MISTAKES.items():
        expect(not torch.allclose(got, gradient(loss), atol=1e-6), hint)
    expect(torch.allclose(got, right, atol=1e-6), f"the gradient is off by up to {(got - right).abs().max():.3f}")
    return "the gradient is the estimator, with the baseline in it"


def _loss(log: bool = True, zeros: bool = True, baseline: bool = True, sign: int = -1, teachers: str = "sum", examples: str = "mean") -> Callable:  # fmt: skip
    def answer(pi: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        one, zero = (pi.log(), (1 - pi).log()) if log else (pi, 1 - pi)
        said = action * one + ((1 - action) * zero if zeros else 0)
        said = said.sum(1) if teachers == "sum" else said.mean(1)
        terms = sign * (reward - (reward.mean() if baseline else 0)) * said
        return terms.mean() if examples == "mean" else terms.sum()

    return answer


_MISTAKES = {
    "the sign: what is minimised must be minus the expected reward": _loss(sign=1),
    "π itself instead of its logarithm: the gradient is then r π ∇log π": _loss(log=False),
    "a teacher that was not selected says something as well: (1 − a) log(1 − π)": _loss(zeros=False),
    "no baseline: subtract the batch's mean reward": _loss(baseline=False),
    "the log-probabilities of the teachers are added, not averaged: the action is all K coins together": _loss(teachers="mean"),
    "averaged over the examples, not summed: or the step grows with the batch": _loss(examples="sum"),
}  # fmt: skip
WRONG_REINFORCE = [
    *((loss, hint.partition(":")[0]) for hint, loss in _MISTAKES.items()),
    (lambda pi, action, reward: (reward - reward.mean()) * pi.log().sum(1), "one number"),
    (lambda pi, action, reward: _right_loss(pi.detach(), action, reward), "no gradient reaches"),
]


# --- 03.3 CA-MKD's weights ---


def _losses(probabilities: Tensor, labels: Tensor) -> Tensor:
    index = labels[:, None, None].expand(-1, probabilities.shape[1], 1)
    return -probabilities.gather(2, index).squeeze(2).log()


def _right_ca(probabilities: Tensor, labels: Tensor) -> Tensor:
    losses = _losses(probabilities, labels)
    return (1 - losses.softmax(1)) / (losses.shape[1] - 1)


def check_ca(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    probabilities, labels = (2 * _random(5, 3, 4, seed=4)).softmax(2), torch.tensor([0, 1, 2, 3, 1])
    got, right = answer(probabilities, labels), _right_ca(probabilities, labels)
    expect(isinstance(got, Tensor) and got.shape == (5, 3), "return a weight for every example and teacher: [B, K]")
    losses = _losses(probabilities, labels)
    expect(not torch.allclose(got, 2 * right, atol=1e-5), "divide by K − 1: the weights of an example must sum to 1")
    expect(not torch.allclose(got, right * 2 / 3, atol=1e-5), "divided by K: one minus a softmax over K sums to K − 1")
    expect(
        not torch.allclose(got, losses.softmax(1), atol=1e-5),
        "the teacher of the largest loss gets the most: take 1 minus the softmax",
    )
    expect(
        not torch.allclose(got, (-losses).softmax(1), atol=1e-5),
        "this is a softmax of minus the loss, a sharper rule than CA-MKD's",
    )
    expect(
        not torch.allclose(got, (1 - losses.softmax(0)) / 2, atol=1e-5),
        "the softmax runs over the batch; it must run over the teachers",
    )
    expect(torch.allclose(got, right, atol=1e-5), f"the weights are off by up to {(got - right).abs().max():.3f}")
    return "and one right teacher among two wrong ones gets no more than one half"


WRONG_CA = [
    (lambda p, y: 1 - _losses(p, y).softmax(1), "divide by K − 1"),
    (lambda p, y: (1 - _losses(p, y).softmax(1)) / p.shape[1], "divided by K"),
    (lambda p, y: _losses(p, y).softmax(1), "largest loss gets the most"),
    (lambda p, y: (-_losses(p, y)).softmax(1), "softmax of minus the loss"),
    (lambda p, y: (1 - _losses(p, y).softmax(0)) / 2, "runs over the batch"),
    (lambda p, y: _right_ca(p, y).mean(0), "for every example and teacher"),
    (lambda p, y: (1 - p.gather(2, y[:, None, None].expand(-1, 3, 1)).squeeze(2).softmax(1)) / 2, "are off by"),
]


# --- 03.4 what could a selector rescue? ---


def _right_headroom(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    right = probabilities.argmax(2) == labels[:, None]
    mean_right = probabilities.mean(1).argmax(1) == labels
    carried = mean_right & (right.float().mean(1) < 0.5)
    return float((~mean_right & right.any(1)).float().mean()), float(carried.float().mean())


def _headroom_data() -> tuple[Tensor, Tensor]:
    return (2.5 * _random(400, 3, 4, seed=5)).softmax(2), torch.arange(400) % 4


def check_headroom(answer: Callable[[Tensor, Tensor], tuple[float, float]]) -> str:
    probabilities, labels = _headroom_data()
    got = answer(probabilities, labels)
    expect(isinstance(got, (tuple, list)) and len(got) == 2, "return two shares: (rescued, carried)")
    got = [float(g) for g in got]
    right = _right_headroom(probabilities, labels)
    close = [abs(g - r) < 1e-6 for g, r in zip(got, right, strict=True)]
    expect(max(got) <= 1, "these are counts; return shares of all examples")
    expect(not (abs(got[0] - right[1]) < 1e-6 and abs(got[1] - right[0]) < 1e-6), "the two shares are swapped")
    single = probabilities.argmax(2) == labels[:, None]
    mean_right = probabilities.mean(1).argmax(1) == labels
    votes = F.one_hot(probabilities.argmax(2), 4).sum(1).argmax(1) == labels
    expect(
        abs(got[0] - float((~votes & single.any(1)).float().mean())) > 1e-6,
        "this is the majority vote's mistake; the mean averages probabilities, so a sure teacher can overrule two unsure ones",
    )
    expect(
        abs(got[0] - float((~mean_right & single.any(1)).float().sum() / (~mean_right).sum())) > 1e-6,
        "a share of the mean's mistakes; take the share of ALL examples",
    )
    expect(
        abs(got[0] - float((~mean_right).float().mean())) > 1e-6,
        "where no teacher is right, no selector can help: leave those out",
    )
    expect(close[0], f"the first share is {got[0]:.3f}, it should be {right[0]:.3f}")
    expect(
        close[1],
        f"the second share is {got[1]:.3f}, it should be {right[1]:.3f}: the mean is right, fewer than half of the teachers are",
    )
    return "the first number is what a selector may win, the second what the mean already knows better than a vote"


def _wrong_headroom(kind: str) -> Callable:
    def answer(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
        right = probabilities.argmax(2) == labels[:, None]
        mean_right = probabilities.mean(1).argmax(1) == labels
        carried = float((mean_right & (right.float().mean(1) < 0.5)).float().mean())
        if kind == "vote":
            mean_right = F.one_hot(probabilities.argmax(2), 4).sum(1).argmax(1) == labels
        rescued = ~mean_right & right.any(1)
        if kind == "all wrong":
            rescued = ~mean_right
        if kind == "of mistakes":
            return float(rescued.sum() / (~mean_right).sum()), carried
        if kind == "counts":
            return float(rescued.sum()), carried * len(labels)
        if kind == "any":
            carried = float((mean_right & ~right.all(1)).float().mean())
        return float(rescued.float().mean()), carried

    return answer


WRONG_HEADROOM = [
    (_wrong_headroom("vote"), "majority vote"),
    (_wrong_headroom("all wrong"), "no teacher is right"),
    (_wrong_headroom("of mistakes"), "share of the mean's mistakes"),
    (_wrong_headroom("counts"), "these are counts"),
    (_wrong_headroom("any"), "the second share is"),
    (lambda p, y: _right_headroom(p, y)[::-1], "swapped"),
    (lambda p, y: 0.1, "two shares"),
]


EXERCISES = [
    Exercise("03.1", "from a selection to a target", 10, 1, check_target, _right_target, WRONG_TARGET),
    Exercise("03.2", "REINFORCE", 15, 2, check_reinforce, _right_loss, WRONG_REINFORCE),
    Exercise("03.3", "CA-MKD's weights", 10, 1, check_ca, _right_ca, WRONG_CA),
    Exercise("03.4", "what could a selector rescue?", 15, 2, check_headroom, _right_headroom, WRONG_HEADROOM),
]
