"""Exercises of chapter 03, reinforced teacher selection."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.exercises import Exercise


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 03.1 from a selection to a target: answer(action, pi, probabilities) -> [B, C] ---

ACTION = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 1]])
PI = torch.tensor([[0.9, 0.6, 0.2], [0.3, 0.1, 0.4], [0.2, 0.4, 0.7], [0.6, 0.8, 0.9], [0.9, 0.3, 0.4]])


def likeliest(pi: Tensor) -> Tensor:
    return F.one_hot(pi.argmax(1), pi.shape[1]).to(pi)


def target(action: Tensor, pi: Tensor, probabilities: Tensor, empty: Callable = likeliest, weigh: Callable = lambda a, pi: a, total: float | None = None, log: bool = False) -> Tensor:  # fmt: skip
    """The mean of the selected; each default is right, each other value a mistake."""
    nobody = action.sum(1, keepdim=True) == 0
    weights = weigh(torch.where(nobody, empty(pi), action), pi)
    weights = weights / (weights.sum(1, keepdim=True) if total is None else total)
    mixed = torch.einsum("bk,bkc->bc", weights, probabilities.log() if log else probabilities)
    return mixed.softmax(1) if log else mixed


def mistaken(**how) -> Callable:
    return lambda *case: target(*case, **how)


TARGET = {
    "NaN where nobody is selected: 0 divided by 0. Decide that row before you divide": mistaken(empty=torch.zeros_like),
    "the row in which nobody is selected is all zeros; assigning through a mask writes into a copy": lambda *case: mistaken(empty=torch.zeros_like)(*case).nan_to_num(0),
    "divided by all K teachers: take the mean over the selected, or fewer teachers teach more softly": mistaken(total=3.0),
    "this is the sum over the selected; take their mean": mistaken(total=1.0),
    "weighted by π: the selected are averaged with equal weights": mistaken(weigh=lambda a, pi: a * pi),
    "mixed in log space; mix the probabilities themselves": mistaken(log=True),
    "where nobody is selected you take everybody; the likeliest teacher is asked for": mistaken(empty=torch.ones_like),
    "where nobody is selected you take the teacher that is least likely": mistaken(empty=lambda pi: likeliest(-pi)),
    "the likeliest teacher is added to every selection; it stands in only where nobody is selected": lambda a, pi, p: target(torch.maximum(a, likeliest(pi)), pi, p),
    "you follow π and forget the action: what was drawn decides": lambda a, pi, p: target(likeliest(pi), pi, p),
    "π is rounded; what was drawn decides, also where it is unlikely": lambda a, pi, p: target((pi > 0.5).to(pi), pi, p),
}  # fmt: skip


# --- 03.2 REINFORCE: answer(pi, action, reward) -> loss; judged by its gradient ---

DRAWN, REWARD = (noise(6, 3, seed=1) > 0).float(), noise(6, seed=2) - 3.0


def loss(log: bool = True, zeros: bool = True, centre: Callable = lambda r: r - r.mean(), sign: int = -1, teachers: str = "sum", examples: str = "mean") -> Callable:  # fmt: skip
    """The policy loss; each default is right, each other value a mistake."""

    def answer(pi: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        one, zero = (pi.log(), (1 - pi).log()) if log else (pi, 1 - pi)
        said = getattr(action * one + ((1 - action) * zero if zeros else 0), teachers)(1)
        return getattr(sign * centre(reward) * said, examples)()

    return answer


def chance_of_all(pi: Tensor, action: Tensor, reward: Tensor) -> Tensor:
    chance = (action * pi + (1 - action) * (1 - pi)).prod(1)
    return -((reward - reward.mean()) * chance).mean()


def batch_of_one_sum(pi: Tensor, action: Tensor, reward: Tensor) -> Tensor:
    said = (action * pi.log() + (1 - action) * (1 - pi).log()).sum(1)
    return -(reward - reward.mean()).mean() * said.mean()


def gradient(value, pi: Tensor, *_):
    """What is compared: ∂loss/∂π, or that there is none."""
    if not (isinstance(value, Tensor) and value.ndim == 0):
        return "not one number"
    return torch.autograd.grad(value, pi)[0] if value.requires_grad else "no gradient"


REINFORCE = {
    "the sign: what is minimised must be minus the expected reward": loss(sign=1),
    "π itself instead of its logarithm: the gradient is then r π ∇log π": loss(log=False),
    "the probability of all coins together instead of its logarithm: the gradient is then r π ∇log π": chance_of_all,
    "a teacher that was not selected says something as well: (1 − a) log(1 − π)": loss(zeros=False),
    "no baseline: subtract the batch's mean reward": loss(centre=lambda r: r),
    "the log-probabilities of the teachers are added, not averaged: the action is all K coins together": loss(teachers="mean"),
    "averaged over the examples, not summed: or the step grows with the batch": loss(examples="sum"),
    "averaged over the teachers, and no baseline: add over the teachers, subtract the mean reward": loss(teachers="mean", centre=lambda r: r),
    "the rewards are divided by their deviation as well; only their mean is subtracted": loss(centre=lambda r: (r - r.mean()) / r.std()),
    "each example has its own reward: multiply before you average": batch_of_one_sum,
    "return one number, the mean over the examples": lambda pi, action, reward: (reward - reward.mean()) * pi.log().sum(1),
    "no gradient reaches π; leave pi attached": lambda pi, action, reward: loss()(pi.detach(), action, reward),
}  # fmt: skip


# --- 03.3 CA-MKD's weights: answer(probabilities, labels) -> [B, K] ---


def losses(probabilities: Tensor, labels: Tensor) -> Tensor:
    return -probabilities.gather(2, labels[:, None, None].expand(-1, probabilities.shape[1], 1)).squeeze(2).log()


def ca(probabilities: Tensor, labels: Tensor) -> Tensor:
    return from_losses(losses(probabilities, labels))


def from_losses(values: Tensor, over: int = 1, divide: float = 1.0) -> Tensor:
    return (1 - values.softmax(over)) / (values.shape[1] - divide)


def cross_entropy_of(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p.transpose(1, 2), y[:, None].expand(-1, p.shape[1]), reduction="none")


CA = {
    "divide by K − 1: the weights of an example must sum to 1": lambda p, y: 1 - losses(p, y).softmax(1),
    "divided by K: one minus a softmax over K sums to K − 1": lambda p, y: from_losses(losses(p, y), divide=0),
    "the teacher of the largest loss gets the most: take 1 minus the softmax": lambda p, y: losses(p, y).softmax(1),
    "this is a softmax of minus the loss, a sharper rule than CA-MKD's": lambda p, y: (-losses(p, y)).softmax(1),
    "the softmax runs over the batch; it must run over the teachers": lambda p, y: from_losses(losses(p, y), over=0),
    "F.cross_entropy wants logits; on probabilities it takes a second softmax. The loss is −log p(label)": lambda p, y: from_losses(cross_entropy_of(p, y)),
    "these are probabilities, not losses: take −log of p(label)": lambda p, y: from_losses((-losses(p, y)).exp()),
    "the sign of the loss is turned round: it is −log p(label)": lambda p, y: from_losses(-losses(p, y)),
    "return a weight for every example and teacher, [B, K], not one a teacher": lambda p, y: ca(p, y).mean(0),
    "the surest teacher is asked instead of the label: the loss needs p(label)": lambda p, y: from_losses(-p.amax(2).log()),
}  # fmt: skip


# --- 03.4 what could a selector rescue?: answer(probabilities, labels) -> (rescued, carried) ---

# Four teachers, so that exactly half of them can be right.
VOTED, TRUTH = (2.5 * noise(400, 4, 4, seed=5)).softmax(2), torch.arange(400) % 4


def headroom(p: Tensor, y: Tensor, vote: bool = False, any_right: bool = True, few: Callable = lambda share: share < 0.5) -> tuple:  # fmt: skip
    """(rescued, carried); each default is right, each other value a mistake."""
    right, mean_right = p.argmax(2) == y[:, None], p.mean(1).argmax(1) == y
    overall = F.one_hot(p.argmax(2), p.shape[2]).sum(1).argmax(1) == y if vote else mean_right
    rescued = ~overall & (right.any(1) if any_right else torch.ones_like(overall))
    return float(rescued.float().mean()), float((mean_right & few(right.float().mean(1))).float().mean())


def share_of_mistakes(p: Tensor, y: Tensor) -> tuple:
    rescued, carried = headroom(p, y)
    return rescued / float((p.mean(1).argmax(1) != y).float().mean()), carried


HEADROOM = {
    "this is the majority vote's mistake; the mean averages probabilities, so a sure teacher can overrule two unsure ones": lambda p, y: headroom(p, y, vote=True),
    "where no teacher is right, no selector can help: leave those out": lambda p, y: headroom(p, y, any_right=False),
    "a share of the mean's mistakes; take the share of ALL examples": share_of_mistakes,
    "these are counts; return shares of all examples": lambda p, y: tuple(len(y) * share for share in headroom(p, y)),
    "the mean is right and fewer than HALF of the teachers are; you count every example where one is wrong": lambda p, y: headroom(p, y, few=lambda s: s < 1),
    "exactly half of the teachers is not fewer than half: <, not ≤": lambda p, y: headroom(p, y, few=lambda s: s <= 0.5),
    "carried by the mean means that it is right; you count all examples where few teachers are": lambda p, y: (headroom(p, y)[0], float(((p.argmax(2) == y[:, None]).float().mean(1) < 0.5).float().mean())),
    "the two shares are swapped": lambda p, y: headroom(p, y)[::-1],
    "return two shares: (rescued, carried)": lambda p, y: headroom(p, y)[0],
}  # fmt: skip


EXERCISES = {
    "03.1": Exercise(
        "from a selection to a target", 6, 1, target, TARGET, [(ACTION, PI, (2 * noise(5, 3, 5)).softmax(2))],
        praise="the teachers' part of the loss weighs the same however many are heard",
    ),
    "03.2": Exercise(
        "REINFORCE", 10, 2, loss(), REINFORCE, [((0.4 * noise(6, 3, seed=3)).sigmoid().requires_grad_(), DRAWN, REWARD)],
        look=gradient, alternatives=[loss(centre=lambda r: (r - r.mean()) * len(r) / (len(r) - 1))],
        praise="the gradient is the estimator, with the baseline in it",
    ),
    "03.3": Exercise(
        "CA-MKD's weights", 4, 1, ca, CA, [((2 * noise(5, 3, 4, seed=4)).softmax(2), torch.tensor([0, 1, 2, 3, 1]))],
        praise="and one right teacher among two wrong ones gets no more than one half",
    ),
    "03.4": Exercise(
        "what could a selector rescue?", 8, 2, headroom, HEADROOM, [(VOTED, TRUTH)], within=1e-3,
        praise="the first number is what a selector may win, the second what the mean already knows better than a vote",
    ),
}  # fmt: skip
