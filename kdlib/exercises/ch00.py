"""Exercises of notebook 00, Foundations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.exercises import Exercise, expect
from kdlib.losses import kd_loss

T = 3.0


def _logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(6, 5, generator=generator), 2 * torch.randn(6, 5, generator=generator)


# --- 00.1 the loss from scratch ---


def _right_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    return kd_loss(student_logits, teacher_logits, temperature=temperature)


def check_loss(answer: Callable[..., Tensor]) -> str:
    student, teacher = _logits()
    got = _ask(answer, student, teacher, T)
    expect(got.ndim == 0, f"the loss has shape {tuple(got.shape)}; average over the examples to get one number")
    _tell_apart(float(got), student, teacher)
    other = float(_right_loss(student[:4, :3], teacher[:4, :3], 1.5))
    expect(abs(float(_ask(answer, student[:4, :3], teacher[:4, :3], 1.5)) - other) < 1e-4,
           "right for T = 3, but not for 4 examples, 3 classes and T = 1.5: is a number written in by hand?")  # fmt: skip
    masked = teacher.clone()
    masked[:, 0] = -torch.inf
    expect(torch.isfinite(_ask(answer, student, masked, T)),
           "with a class of probability exactly 0 the loss is NaN: 0 · log 0. F.kl_div with a probability target is safe")  # fmt: skip
    expect(torch.isfinite(_ask(answer, 300 * student, teacher, T)),
           "for a student that is very sure the loss is infinite: its softmax underflows to 0 before the log; use log_softmax")  # fmt: skip
    z = student.clone().requires_grad_()
    loss = answer(z, teacher.clone(), T)
    reaches = isinstance(loss, Tensor) and loss.requires_grad
    expect(reaches, "no gradient reaches the student: no detach, no .item() and no no_grad on its side")
    loss.backward()
    expect(z.grad.abs().sum() > 0, "the gradient of the student's logits is 0 everywhere")
    return "the loss is right, also where the teacher's probability is 0"


def _ask(answer: Callable[..., Tensor], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    mine = student.clone(), teacher.clone()
    got = torch.as_tensor(answer(*mine, temperature))
    untouched = torch.equal(mine[0], student) and torch.equal(mine[1], teacher)
    expect(untouched, "your function changes the caller's logits in place: write z / T, not z /= T")
    return got


def _tell_apart(got: float, student: Tensor, teacher: Tensor) -> None:
    """Recognise a mistake, or two at once: a wrong expression, a wrong power of T, a wrong mean."""
    examples, classes = student.shape
    right = _right_loss(student, teacher, T)
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    expressions = {
        "": right,
        "the roles are swapped: the teacher's distribution is the weight, KL(teacher ‖ student)": _right_loss(teacher, student, T),
        "the student went through softmax twice; log_softmax takes the logits": T**2 * F.kl_div(q.log_softmax(-1), p, reduction="batchmean"),
        "F.kl_div wants the student's LOG-probabilities as its first argument": T**2 * F.kl_div(q, p, reduction="batchmean"),
        "this is the cross-entropy: same gradient, but not 0 when the student is perfect; subtract the teacher's entropy": -(T**2) * (p * q.log()).sum(-1).mean(),
        "only the teacher is softened; divide the student's logits by T as well": _right_loss(student * T, teacher, T),
        "only the student is softened; divide the teacher's logits by T as well": _right_loss(student, teacher * T, T),
        "the logits are not softened; divide both by T before the softmax": _right_loss(student * T, teacher * T, T),
        "the softmax runs over the examples; classes are the last axis": T**2 * F.kl_div((student / T).log_softmax(0), (teacher / T).softmax(0), reduction="batchmean"),
        "the sign is turned round: KL is never negative": -right,
    }  # fmt: skip
    powers = {
        "": 1.0,
        "the factor T² is missing: raise T, and the gradient fades like 1/T²": T**-2,
        "one T is missing: the factor is T², one for the chain rule, one for the difference": 1 / T,
    }
    means = {
        "": 1.0,
        f"you average over the {classes} classes too; sum over classes, average over examples": 1 / classes,
        "you sum over the examples; average over them, or the batch size becomes a step size": examples,
    }
    for (one, value), (two, power), (three, mean) in product(expressions.items(), powers.items(), means.items()):
        hints = [hint for hint in (one, two, three) if hint]
        expect(not hints or not math.isclose(got, float(value) * power * mean, rel_tol=1e-4), "; and ".join(hints))
    expect(
        math.isclose(got, float(right), rel_tol=1e-4),
        f"the value is {got:.4f} on the test logits, it should be {right:.4f}",
    )


def _kl(student: Tensor, teacher: Tensor, t: float, how: str = "batchmean") -> Tensor:
    return F.kl_div((student / t).log_softmax(-1), (teacher / t).softmax(-1), reduction=how)


def _tutorial(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    p, log_q = (teacher / t).softmax(-1), (student / t).log_softmax(-1)
    return t**2 * (p * (p.log() - log_q)).sum(-1).mean()


def _through_softmax(student: Tensor, teacher: Tensor, t: float, take: Callable[[Tensor], Tensor]) -> Tensor:
    return t**2 * F.kl_div(take((student / t).softmax(-1)), (teacher / t).softmax(-1), reduction="batchmean")


def _in_place(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    student /= t
    return t**2 * F.kl_div(student.log_softmax(-1), (teacher / t).softmax(-1), reduction="batchmean")


WRONG_LOSS = [
    (lambda s, z, t: _kl(s, z, t), "T² is missing"),
    (lambda s, z, t: t * _kl(s, z, t), "one T is missing"),
    (lambda s, z, t: t**2 * _kl(s, z, t, "sum") / s.numel(), "average over the 5 classes too"),
    (lambda s, z, t: _kl(s, z, t, "sum") / s.numel(), "1/T²; and you average over the 5 classes"),
    (lambda s, z, t: t**2 * _kl(s, z, t, "sum"), "you sum over the examples"),
    (lambda s, z, t: t**2 * _kl(s, z, t, "none").sum(-1), "has shape (6,)"),
    (lambda s, z, t: t**2 * _kl(z, s, t), "roles are swapped"),
    (lambda s, z, t: _kl(z, s, t), "(teacher ‖ student); and the factor T² is missing"),
    (lambda s, z, t: _through_softmax(s, z, t, lambda q: q.log_softmax(-1)), "softmax twice"),
    (lambda s, z, t: _through_softmax(s, z, t, lambda q: q), "LOG-probabilities"),
    (lambda s, z, t: _through_softmax(s, z, t, torch.log), "underflows to 0 before the log"),
    (lambda s, z, t: -(t**2) * ((z / t).softmax(-1) * (s / t).log_softmax(-1)).sum(-1).mean(), "cross-entropy"),
    (lambda s, z, t: t**2 * _kl(s * t, z, t), "only the teacher is softened"),
    (lambda s, z, t: t**2 * _kl(s, z * t, t), "only the student is softened"),
    (lambda s, z, t: t**2 * _kl(s, z, 1.0), "not softened"),
    (lambda s, z, t: t**2 * F.kl_div((s / t).log_softmax(0), (z / t).softmax(0), reduction="batchmean"), "runs over the examples"),
    (lambda s, z, t: -(t**2) * _kl(s, z, t), "sign is turned"),
    (lambda s, z, t: 9 * _kl(s, z, t), "written in by hand"),
    (lambda s, z, t: 7 * _kl(s, z, t), "it should be"),
    (_tutorial, "0 · log 0"),
    (_in_place, "in place"),
    (lambda s, z, t: t**2 * _kl(s.detach(), z, t), "no gradient reaches"),
    (lambda s, z, t: (t**2 * _kl(s, z, t)).item(), "no gradient reaches"),
]  # fmt: skip


# --- 00.2 whose statistics? ---


def _right_step(student: nn.Module, teacher: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
    teacher.eval()
    with torch.no_grad():
        teacher_logits = teacher(x)
    student.train()
    loss = kd_loss(student(x), teacher_logits, temperature=2.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _bn_net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def check_step(answer: Callable[..., float]) -> str:
    student, teacher, before = _two_steps(answer)
    moved = [k for k, v in teacher.state_dict().items() if not torch.equal(v, before[k])]
    expect(not any("running" in k or "num_batches" in k for k in moved),
           "the teacher's batch-norm statistics moved: it was in training mode while it answered")  # fmt: skip
    expect(not moved, "the teacher's weights changed: only the student is trained")
    expect(all(p.grad is None for p in teacher.parameters()),
           "gradients were computed for the teacher: wasted time and memory; ask it under torch.no_grad()")  # fmt: skip
    expect(
        student[1].num_batches_tracked >= 2,
        "the student was trained in evaluation mode: its dropout was off and its statistics stood still",
    )

    def same(step: Callable[..., float]) -> bool:
        return torch.allclose(student[0].weight, _two_steps(step)[0][0].weight, atol=1e-6)

    expect(not torch.equal(student[0].weight, _bn_net(0)[0].weight), "the student did not move: backward, then step")
    expect(
        not same(_step(zero_grad=False)), "gradients pile up from step to step: optimizer.zero_grad() before backward"
    )
    expect(not same(_step(temperature=1.0)), "the student learned at T = 1; the loss at T = 2 is asked for")
    expect(same(_right_step), "the student does not end where one plain step of kd_loss at T = 2 takes it")
    return "the teacher answered and stayed as it was, and the student learned"


def _two_steps(step: Callable[..., float]) -> tuple[nn.Sequential, nn.Sequential, dict[str, Tensor]]:
    """Student and teacher after two steps for a careless caller, and the teacher's state before."""
    student, teacher = _bn_net(0), _bn_net(1)
    before = copy.deepcopy(teacher.state_dict())
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher.train(), student.eval()
    with torch.random.fork_rng():
        for seed in range(2):
            torch.manual_seed(seed)
            step(student, teacher, x, optimizer)
    return student, teacher, before


def _step(
    *, teacher_eval: bool = True, no_grad: bool = True, student_train: bool = True, zero_grad: bool = True,
    step: bool = True, temperature: float = 2.0, late: bool = False, train_both: bool = False,
) -> Callable[..., float]:  # fmt: skip
    def train_step(student: nn.Module, teacher: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
        teacher.train(not teacher_eval)
        student.train(student_train and not late)
        with torch.set_grad_enabled(not no_grad):
            teacher_logits = teacher(x)
        soft = (teacher_logits / temperature).softmax(-1)
        log = (student(x) / temperature).log_softmax(-1)
        loss = temperature**2 * F.kl_div(log, soft, reduction="batchmean")
        if zero_grad:
            optimizer.zero_grad()
        loss.backward()
        if step:
            optimizer.step()
        if train_both:
            torch.optim.SGD(teacher.parameters(), lr=0.1).step()
        student.train()
        return loss.item()

    return train_step


WRONG_STEP = [
    (_step(teacher_eval=False), "batch-norm statistics moved"),
    (_step(no_grad=False), "gradients were computed for the teacher"),
    (_step(no_grad=False, train_both=True), "teacher's weights changed"),
    (_step(student_train=False), "trained in evaluation mode"),
    (_step(late=True), "trained in evaluation mode"),
    (_step(step=False), "did not move"),
    (_step(zero_grad=False), "pile up"),
    (_step(temperature=1.0), "learned at T = 1"),
    (_step(temperature=3.0), "does not end where"),
]


# --- 00.3 calibration ---


def _right_ece(probabilities: Tensor, labels: Tensor, bins: int) -> Tensor:
    return _binned(probabilities.amax(-1), probabilities, labels, bins)


def _binned(confidence: Tensor, probabilities: Tensor, labels: Tensor, bins: int) -> Tensor:
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    correct = (probabilities.argmax(-1) == labels).float()
    return torch.zeros(bins).index_add_(0, which, correct - confidence).abs().sum() / len(labels)


def check_ece(answer: Callable[..., Tensor]) -> str:
    generator = torch.Generator().manual_seed(3)
    p = (3 * torch.randn(400, 4, generator=generator)).softmax(-1)
    y = torch.where(
        torch.rand(400, generator=generator) < 0.6, p.argmax(-1), torch.randint(4, (400,), generator=generator)
    )
    got, right = float(answer(p.clone(), y.clone(), 10)), float(_right_ece(p, y, 10))
    mistakes = {
        "give a share between 0 and 1, not per cent": 100 * right,
        "every bin counts the same here; weight each by the share of answers in it": unweighted(p, y, 10),
        "signed gaps cancel between the bins; take the absolute value in each bin": _signed(p, y, 10),
        "confidence is the LARGEST probability of each answer, not the mean over classes": _binned(p.mean(-1), p, y, 10),
        "confidence is the probability of the predicted class, not of the label": _binned(p.gather(1, y[:, None])[:, 0], p, y, 10),
    }  # fmt: skip
    for hint, value in mistakes.items():
        expect(abs(got - float(value)) > 1e-5, hint)
    expect(abs(got - right) < 1e-4, f"the value is {got:.4f} on the test set, it should be {right:.4f}")
    certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    at_one = float(answer(certain, torch.tensor([1, 1]), 10))
    expect(
        abs(at_one - 1) < 1e-5, "answers with confidence exactly 1 fall out of your last bin; the bins are (low, high]"
    )
    return "calibration error measured"


def unweighted(p: Tensor, y: Tensor, bins: int) -> float:
    """The mistake of averaging over bins instead of over answers."""
    confidence, predicted = p.max(-1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    correct = (predicted == y).float()
    gaps = [
        (correct[which == b].mean() - confidence[which == b].mean()).abs() for b in range(bins) if (which == b).any()
    ]
    return float(torch.stack(gaps).mean())


def _lost_edge(p: Tensor, y: Tensor, bins: int) -> Tensor:
    confidence, predicted = p.max(-1)
    total = torch.zeros(())
    for b in range(bins):
        inside = (confidence >= b / bins) & (confidence < (b + 1) / bins)
        if inside.any():
            total += inside.float().mean() * ((predicted == y)[inside].float().mean() - confidence[inside].mean()).abs()
    return total


def _signed(p: Tensor, y: Tensor, bins: int) -> Tensor:
    confidence, predicted = p.max(-1)
    return ((predicted == y).float().mean() - confidence.mean()).abs()


WRONG_ECE = [
    (_lost_edge, "fall out of your last bin"),
    (unweighted, "every bin counts the same"),
    (_signed, "signed gaps cancel"),
    (lambda p, y, bins: _right_ece(p, y, bins) * 100, "not per cent"),
    (lambda p, y, bins: _binned(p.mean(-1), p, y, bins), "the LARGEST probability"),
    (lambda p, y, bins: _binned(p.gather(1, y[:, None])[:, 0], p, y, bins), "not of the label"),
    (lambda p, y, bins: _right_ece(p, y, 2 * bins), "it should be"),
]


# --- 00.4 carrying a weight across ---


def check_conversion(answer: tuple[float, float]) -> str:
    expect(
        isinstance(answer, (tuple, list)) and len(answer) == 2,
        "answer with two numbers: (alpha, factor on the learning rate)",
    )
    alpha, factor = map(float, answer)
    soft, hard = 0.9 / 100, 0.1  # element mean over 100 classes; T² is there
    right = soft / (soft + hard)
    expect(
        abs(alpha - 0.9) > 1e-3, "0.9 is what they wrote, not what it does: their mean runs over 100 classes as well"
    )
    expect(
        abs(alpha - 0.9 / 16 / (0.9 / 16 + 0.1)) > 1e-3,
        "their loss has the factor T²; it is the classes that are averaged",
    )
    expect(abs(alpha - soft) > 1e-4, "the two weights must add to 1: divide by their sum")
    turned = abs(alpha - (soft + hard)) < 1e-3 and abs(factor - right) < 1e-3
    expect(not turned, "both numbers are right, the other way round: (alpha, factor)")
    expect(abs(alpha - 1 + right) > 1e-3, "this is the weight of the labels; alpha weights the teacher")
    expect(abs(alpha - 90 / 90.1) > 1e-3, "the wrong way round: a mean over more elements is smaller, divide by C")
    expect(abs(alpha - right) < 1e-3, "ratio of their loss to ours: 1/C with C = 100; then equation 6")
    expect(
        abs(factor - (soft + hard)) < 1e-3,
        "alpha is right; the learning rate is multiplied by the sum of the two weights",
    )
    return "their '0.9' is less than a tenth of the loss: almost pure label training"


EXERCISES = [
    Exercise("00.1", "the loss from scratch", 10, 2, check_loss, _right_loss, WRONG_LOSS),
    Exercise("00.2", "a step that leaves the teacher alone", 10, 1, check_step, _right_step, WRONG_STEP),
    Exercise("00.3", "expected calibration error", 15, 2, check_ece, _right_ece, WRONG_ECE),
    Exercise("00.4", "carry a weight across", 5, 2, check_conversion, (0.009 / 0.109, 0.109), [
        ((0.9, 1.0), "not what it does"), ((0.36, 0.15625), "has the factor T²"), ((0.009, 0.109), "divide by their sum"),
        ((0.0826, 1.0), "learning rate is multiplied"), ((0.5, 0.5), "1/C"), (0.9, "two numbers"),
        ((0.109, 0.0826), "other way round"), ((0.9174, 0.109), "weight of the labels"), ((0.9989, 90.1), "divide by C"),
    ]),
]  # fmt: skip
