"""Exercises of chapter 00, Foundations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.exercises import Exercise
from kdlib.losses import kd_loss

# --- 00.1 the loss from scratch: answer(student_logits, teacher_logits, temperature) -> scalar ---


def logits(examples: int, classes: int) -> tuple[Tensor, Tensor]:
    return tuple(2 * torch.randn(2, examples, classes, generator=torch.Generator().manual_seed(examples)))


def kl(s: Tensor, z: Tensor, t: float = 1.0, said: Tensor | None = None) -> Tensor:
    return F.kl_div((s / t).log_softmax(-1) if said is None else said, (z / t).softmax(-1), reduction="batchmean")


def right(s: Tensor, z: Tensor, t: float) -> Tensor:
    return kd_loss(s, z, temperature=t)


def over_examples(s: Tensor, z: Tensor, t: float) -> Tensor:
    return t**2 * F.kl_div((s / t).log_softmax(0), (z / t).softmax(0), reduction="batchmean")


def cross_entropy(s: Tensor, z: Tensor, t: float) -> Tensor:
    return -(t**2) * ((z / t).softmax(-1) * (s / t).log_softmax(-1)).sum(-1).mean()


EXPRESSIONS = {
    "the roles are swapped: the teacher's distribution is the weight, KL(teacher ‖ student)": lambda s, z, t: right(z, s, t),
    "the student went through softmax twice; log_softmax takes the logits": lambda s, z, t: t**2 * kl(s, z, t, (s / t).softmax(-1).log_softmax(-1)),
    "F.kl_div wants the student's LOG-probabilities as its first argument": lambda s, z, t: t**2 * kl(s, z, t, (s / t).softmax(-1)),
    "this is the cross-entropy: same gradient, but not 0 when the student is perfect; subtract the teacher's entropy": cross_entropy,
    "only the teacher is softened; divide the student's logits by T as well": lambda s, z, t: right(s * t, z, t),
    "only the student is softened; divide the teacher's logits by T as well": lambda s, z, t: right(s, z * t, t),
    "the logits are not softened; divide both by T before the softmax": lambda s, z, t: right(s * t, z * t, t),
    "the softmax runs over the examples; classes are the last axis": over_examples,
    "the sign is turned round: KL is never negative": lambda s, z, t: -right(s, z, t),
}  # fmt: skip
POWERS = {
    "the factor T² is missing: raise T, and the gradient fades like 1/T²": lambda s, t: t**-2,
    "one T is missing: the factor is T², one for the chain rule, one for the difference": lambda s, t: 1 / t,
}
MEANS = {
    "you average over the classes too; sum over classes, average over examples": lambda s, t: 1 / s.shape[1],
    "you sum over the examples; average over them, or the batch size becomes a step size": lambda s, t: len(s),
}
NOTHING = {"": lambda s, t: 1}


def times(expression: Callable, *factors: Callable) -> Callable:
    return lambda s, z, t: expression(s, z, t) * factors[0](s, t) * factors[1](s, t)


LOSS = {  # a wrong expression, a wrong power of T, a wrong mean: one, two or all three at once
    "; and ".join(filter(None, (one, two, three))): times(expression, power, mean)
    for one, expression in {"": right, **EXPRESSIONS}.items()
    for two, power in {**NOTHING, **POWERS}.items()
    for three, mean in {**NOTHING, **MEANS}.items()
    if one or two or three
} | {
    "one loss an example; average over them to get one number": lambda s, z, t: t**2 * F.kl_div((s / t).log_softmax(-1), (z / t).softmax(-1), reduction="none").sum(-1),
    "right for T = 3 only: is a number written in by hand?": lambda s, z, t: 9 * kl(s, z, t),
}  # fmt: skip


def survives_a_zero(answer: Callable) -> bool:
    s, z = logits(6, 5)
    return bool(torch.as_tensor(answer(s, z.index_fill(1, torch.tensor([0]), -torch.inf), 3.0)).isfinite())


def survives_a_sure_student(answer: Callable) -> bool:
    s, z = logits(6, 5)
    return bool(torch.as_tensor(answer(300 * s, z, 3.0)).isfinite())


def reaches_the_student(answer: Callable) -> bool:
    s, z = logits(6, 5)
    return bool(torch.autograd.grad(answer(s.requires_grad_(), z, 3.0), s)[0].abs().sum() > 0)


# --- 00.2 a step that leaves the teacher alone: answer(student, teacher, x, optimizer) -> loss ---


def net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def careless_call() -> tuple:
    """Student in evaluation mode with old gradients, teacher in training mode: what a careless caller hands over."""
    student, teacher = net(0).eval(), net(1).train()
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    return student, teacher, x, torch.optim.SGD(student.parameters(), lr=0.1)


def after(loss, student: nn.Module, teacher: nn.Module, *_) -> list:
    """What a step is judged by: student and teacher afterwards, and whether the teacher got gradients."""
    asked = [parameter.grad is not None for parameter in teacher.parameters()]
    return [list(student.state_dict().values()), list(teacher.state_dict().values()), asked]


def step(*, teacher_eval=True, no_grad=True, student_train=True, zero_grad=True, move=True, temperature=2.0, train_both=False) -> Callable:  # fmt: skip
    """A distillation step; each default is right, each other value a mistake."""

    def train_step(student: nn.Module, teacher: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
        teacher.train(not teacher_eval)
        student.train(student_train)
        with torch.set_grad_enabled(not no_grad):
            answers = teacher(x)
        loss = temperature**2 * kl(student(x), answers, temperature)
        if zero_grad:
            optimizer.zero_grad()
        loss.backward()
        if move:
            optimizer.step()
        if train_both:
            torch.optim.SGD(teacher.parameters(), lr=0.1).step()
        return loss.item()

    return train_step


def teacher_after(answer: Callable) -> nn.Module:
    case = careless_call()
    answer(*case)
    return case[1]


STEP = {
    "the teacher's batch-norm statistics moved: it was in training mode while it answered": step(teacher_eval=False),
    "gradients were computed for the teacher: wasted time and memory; ask it under torch.no_grad()": step(no_grad=False),
    "the teacher's weights changed: only the student is trained": step(no_grad=False, train_both=True),
    "the student was trained in evaluation mode: its dropout was off and its statistics stood still": step(student_train=False),
    "the student did not move: backward, then step": step(move=False),
    "gradients pile up from step to step: optimizer.zero_grad() before backward": step(zero_grad=False),
    "the student learned at T = 1; the loss at T = 2 is asked for": step(temperature=1.0),
}  # fmt: skip
TEACHER_RULES = {
    "the teacher's weights changed: only the student is trained": lambda answer: torch.equal(teacher_after(answer)[0].weight, net(1)[0].weight),
    "the teacher's batch-norm statistics moved: it was in training mode while it answered": lambda answer: torch.equal(teacher_after(answer)[1].running_mean, torch.zeros(8)),
    "gradients were computed for the teacher: wasted time and memory; ask it under torch.no_grad()": lambda answer: teacher_after(answer)[0].weight.grad is None,
}  # fmt: skip


# --- 00.3 expected calibration error: answer(probabilities, labels, bins) -> scalar ---


def binned(confidence: Tensor, p: Tensor, y: Tensor, bins: int, which: Tensor | None = None) -> Tensor:
    which = ((confidence * bins).ceil().long().clamp(1, bins) - 1) if which is None else which
    return torch.zeros(bins + 1).index_add_(0, which, (p.argmax(-1) == y).float() - confidence).abs().sum() / len(y)


def ece(p: Tensor, y: Tensor, bins: int) -> Tensor:
    return binned(p.amax(-1), p, y, bins)


def gaps(p: Tensor, y: Tensor, bins: int) -> Tensor:
    """Accuracy minus confidence in each bin; NaN where it is empty."""
    confidence, correct = p.amax(-1), (p.argmax(-1) == y).float()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.stack([(correct - confidence)[which == b].mean() for b in range(bins)])


def shares(p: Tensor, bins: int) -> Tensor:
    which = (p.amax(-1) * bins).ceil().long().clamp(1, bins) - 1
    return torch.bincount(which, minlength=bins) / len(p)


def closed_below(p: Tensor, y: Tensor, bins: int, last: bool = True) -> Tensor:
    """[low, high) instead of (low, high]; a confidence of 1 has no bin unless the last one is closed."""
    confidence = p.amax(-1)
    which = (confidence * bins).floor().long()
    if last:
        return binned(confidence, p, y, bins, which.clamp(max=bins - 1))
    kept = which < bins
    return binned(confidence[kept], p[kept], y[kept], bins, which[kept]) * kept.sum() / len(y) if kept.any() else torch.zeros(())  # fmt: skip


random = torch.Generator().manual_seed(3)
P = (3 * torch.randn(400, 4, generator=random)).softmax(-1)
KNOWN = torch.rand(400, generator=random) < 0.6
Y = torch.where(KNOWN, P.argmax(-1), torch.randint(4, (400,), generator=random))
EDGES = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [0.625, 0.375]])  # confidences on the borders of 4 bins
CASES = [(P, Y, 10), (P, Y, 4), (EDGES, torch.tensor([0, 1, 0, 0]), 4), (torch.eye(2), torch.tensor([1, 1]), 10)]
CALIBRATION = {
    "answers with confidence exactly 1 fall out of your last bin; the bins are (low, high]": lambda *case: closed_below(*case, last=False),
    "your bins are [low, high): a confidence on a border belongs to the bin below it, (low, high]": closed_below,
    "give a share between 0 and 1, not per cent": lambda *case: 100 * ece(*case),
    "every bin counts the same here; weight each by the share of answers in it": lambda *case: gaps(*case).abs().nanmean(),
    "an empty bin has no mean: your value is NaN. Leave it out": lambda *case: (gaps(*case).abs() * shares(case[0], case[2])).sum(),
    "signed gaps cancel between the bins; take the absolute value in each bin": lambda p, y, bins: ((p.argmax(-1) == y).float() - p.amax(-1)).mean().abs(),
    "signed gaps cancel between the bins, and the sum may be negative; take the absolute value in each bin": lambda p, y, bins: ((p.argmax(-1) == y).float() - p.amax(-1)).mean(),
    "confidence is the LARGEST probability of each answer, not the mean over classes": lambda p, y, bins: binned(p.mean(-1), p, y, bins),
    "confidence is the probability of the predicted class, not of the label": lambda p, y, bins: binned(p.gather(1, y[:, None])[:, 0], p, y, bins),
    "the number of bins is an argument; you always take 10": lambda p, y, bins: ece(p, y, 10),
    "the gaps are squared; take their absolute value": lambda *case: (gaps(*case).nan_to_num() ** 2 * shares(case[0], case[2])).sum(),
    "this is the largest gap; take the mean over the answers": lambda *case: gaps(*case).nan_to_num().abs().amax(),
}  # fmt: skip


# --- 00.4 carry a weight across: answer = (alpha, factor on the learning rate) ---

CONVERSION = {
    "0.9 is what they wrote, not what it does: their mean runs over 100 classes as well": (0.9, 1.0),
    "their loss has the factor T²; it is the classes that are averaged": (0.36, 0.15625),
    "the two weights must add to 1: divide by their sum": (0.009, 0.109),
    "alpha is right; the learning rate is multiplied by the sum of the two weights": (0.009 / 0.109, 1.0),
    "alpha is right; the learning rate is multiplied by the sum, not divided by it": (0.009 / 0.109, 1 / 0.109),
    "both numbers are right, the other way round: (alpha, factor)": (0.109, 0.009 / 0.109),
    "this is the weight of the labels; alpha weights the teacher": (0.1 / 0.109, 0.109),
    "the wrong way round: a mean over more elements is smaller, divide by C": (90 / 90.1, 90.1),
    "answer with two numbers: (alpha, factor on the learning rate)": 0.009 / 0.109,
}


EXERCISES = {
    "00.1": Exercise(
        "the loss from scratch", 10, 2, right, LOSS, [(*logits(6, 5), 3.0), (*logits(4, 3), 1.5)],
        rules={
            "with a class of probability exactly 0 the loss is NaN: 0 · log 0. F.kl_div with a probability target is safe": survives_a_zero,
            "for a student that is very sure the loss is infinite: its softmax underflows to 0 before the log; use log_softmax": survives_a_sure_student,
            "no gradient reaches the student: no detach, no .item() and no no_grad on its side": reaches_the_student,
        },
        praise="the loss is right, also where the teacher's probability is 0",
    ),
    "00.2": Exercise(
        "a step that leaves the teacher alone", 10, 1, step(), STEP, lambda: [careless_call()], look=after, rules=TEACHER_RULES,
        praise="the teacher answered and stayed as it was, and the student learned",
    ),
    "00.3": Exercise("expected calibration error", 15, 2, ece, CALIBRATION, CASES, praise="calibration error measured"),
    "00.4": Exercise(
        "carry a weight across", 5, 2, (0.009 / 0.109, 0.109), CONVERSION, within=0.04,
        rules={"ratio of their loss to ours: 1/C with C = 100; then equation 6": lambda answer: abs(float(answer[0]) - 0.009 / 0.109) < 0.01},
        praise="their '0.9' is less than a tenth of the loss: almost pure label training",
    ),
}  # fmt: skip
