"""Exercises of notebook 00, Foundations."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
    got = torch.as_tensor(answer(student, teacher, T))
    expect(got.ndim == 0, f"the loss has shape {tuple(got.shape)}; average over the examples to get one number")
    right = float(_right_loss(student, teacher, T))
    _tell_apart(float(got), right, student, teacher)
    masked = teacher.clone()
    masked[:, 0] = -torch.inf
    expect(torch.isfinite(torch.as_tensor(answer(student, masked, T))),
           "with a class of probability exactly 0 the loss is NaN: 0 · log 0. F.kl_div with a probability target is safe")  # fmt: skip
    z = student.clone().requires_grad_()
    answer(z, teacher, T).backward()
    expect(z.grad is not None and z.grad.abs().sum() > 0, "no gradient reaches the student: did you detach its logits?")
    return "the loss is right, also where the teacher's probability is 0"


def _tell_apart(got: float, right: float, student: Tensor, teacher: Tensor) -> None:
    n_classes = student.shape[1]

    def near(value: float | Tensor) -> bool:
        return abs(got - float(value)) < 1e-4 * max(1.0, abs(float(value)))

    swapped = _right_loss(teacher, student, T)
    double = T**2 * F.kl_div(
        (student / T).softmax(-1).log_softmax(-1), (teacher / T).softmax(-1), reduction="batchmean"
    )
    no_log = T**2 * F.kl_div((student / T).softmax(-1), (teacher / T).softmax(-1), reduction="batchmean")
    entropy = -(T**2) * ((teacher / T).softmax(-1) * (student / T).log_softmax(-1)).sum(-1).mean()
    expect(not near(right / T**2), "the factor T² is missing: raise T, and the gradient fades like 1/T²")
    expect(not near(right / T), "one T is missing: the factor is T², one for the chain rule, one for the difference")
    expect(
        not near(right / n_classes),
        f"you average over the {n_classes} classes too; sum over classes, average over examples",
    )
    expect(not near(right / n_classes / T**2), "T² is missing, and you average over the classes instead of summing")
    expect(
        not near(right * len(student)),
        "you sum over the examples; average over them, or the batch size becomes a step size",
    )
    expect(not near(swapped), "the roles are swapped: the teacher's distribution is the weight, KL(teacher ‖ student)")
    expect(not near(double), "the student went through softmax twice; log_softmax takes the logits")
    expect(not near(no_log), "F.kl_div wants the student's LOG-probabilities as its first argument")
    expect(not near(entropy), "this is the cross-entropy: same gradient, but not 0 when the student is perfect; subtract the teacher's entropy")  # fmt: skip
    expect(
        not near(_right_loss(student * T, teacher, T)),
        "only the teacher is softened; divide the student's logits by T as well",
    )
    expect(near(right), f"the value is {got:.4f} on the test logits, it should be {right:.4f}")


def _kl(student: Tensor, teacher: Tensor, t: float, how: str = "batchmean") -> Tensor:
    return F.kl_div((student / t).log_softmax(-1), (teacher / t).softmax(-1), reduction=how)


def _tutorial(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    p, log_q = (teacher / t).softmax(-1), (student / t).log_softmax(-1)
    return t**2 * (p * (p.log() - log_q)).sum(-1).mean()


WRONG_LOSS = [
    (lambda s, z, t: _kl(s, z, t), "T² is missing"),
    (lambda s, z, t: t * _kl(s, z, t), "one T is missing"),
    (lambda s, z, t: t**2 * _kl(s, z, t, "sum") / s.numel(), "average over the 5 classes too"),
    (lambda s, z, t: _kl(s, z, t, "sum") / s.numel(), "T² is missing, and you average"),
    (lambda s, z, t: t**2 * _kl(s, z, t, "sum"), "you sum over the examples"),
    (lambda s, z, t: t**2 * _kl(s, z, t, "none").sum(-1), "one number"),
    (lambda s, z, t: t**2 * _kl(z, s, t), "roles are swapped"),
    (lambda s, z, t: t**2 * F.kl_div((s / t).softmax(-1).log_softmax(-1), (z / t).softmax(-1), reduction="batchmean"), "softmax twice"),
    (lambda s, z, t: t**2 * F.kl_div((s / t).softmax(-1), (z / t).softmax(-1), reduction="batchmean"), "LOG-probabilities"),
    (lambda s, z, t: -(t**2) * ((z / t).softmax(-1) * (s / t).log_softmax(-1)).sum(-1).mean(), "cross-entropy"),
    (lambda s, z, t: t**2 * F.kl_div(s.log_softmax(-1), (z / t).softmax(-1), reduction="batchmean"), "only the teacher is softened"),
    (_tutorial, "0 · log 0"),
    (lambda s, z, t: t**2 * _kl(s.detach(), z, t), "stopped with RuntimeError"),
    (lambda s, z, t: t**2 * _kl(s, z, 1.0), "it should be"),
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
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def check_step(answer: Callable[..., float]) -> str:
    with torch.random.fork_rng():
        student, teacher = _bn_net(0), _bn_net(1)
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
        before, weights = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
        teacher.train(), student.eval()  # a careless caller
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(2):
            answer(student, teacher, x, optimizer)
        moved = [k for k, v in teacher.state_dict().items() if not torch.equal(v, before[k])]
    expect(not any("running" in k or "num_batches" in k for k in moved),
           "the teacher's batch-norm statistics moved: it was in training mode while it answered")  # fmt: skip
    expect(not moved, "the teacher's weights changed: only the student is trained")
    expect(all(p.grad is None for p in teacher.parameters()),
           "gradients were computed for the teacher: wasted time and memory; ask it under torch.no_grad()")  # fmt: skip
    expect(
        student.training,
        "the student was trained in evaluation mode: its dropout was off and its statistics stood still",
    )
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, weights[k])}
    expect("0.weight" in changed, "the student did not move: zero_grad, backward, step")
    return "the teacher answered and stayed as it was, and the student learned"


def _step(*, teacher_eval: bool, no_grad: bool, student_train: bool, step: bool = True) -> Callable[..., float]:
    def train_step(student: nn.Module, teacher: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
        if teacher_eval:
            teacher.eval()
        with torch.set_grad_enabled(not no_grad):
            teacher_logits = teacher(x)
        if student_train:
            student.train()
        soft = (teacher_logits / 2.0).softmax(-1)
        loss = 4 * F.kl_div((student(x) / 2.0).log_softmax(-1), soft, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        if step:
            optimizer.step()
        return loss.item()

    return train_step


WRONG_STEP = [
    (_step(teacher_eval=False, no_grad=True, student_train=True), "batch-norm statistics moved"),
    (_step(teacher_eval=True, no_grad=False, student_train=True), "gradients were computed for the teacher"),
    (_step(teacher_eval=True, no_grad=True, student_train=False), "trained in evaluation mode"),
    (_step(teacher_eval=True, no_grad=True, student_train=True, step=False), "did not move"),
]


# --- 00.3 calibration ---


def _right_ece(probabilities: Tensor, labels: Tensor, bins: int) -> Tensor:
    confidence, predicted = probabilities.max(-1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins).index_add_(0, which, (predicted == labels).float() - confidence)
    return gaps.abs().sum() / len(labels)


def check_ece(answer: Callable[..., Tensor]) -> str:
    generator = torch.Generator().manual_seed(3)
    p = (3 * torch.randn(400, 4, generator=generator)).softmax(-1)
    y = torch.where(
        torch.rand(400, generator=generator) < 0.6, p.argmax(-1), torch.randint(4, (400,), generator=generator)
    )
    certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    at_one = float(answer(certain, torch.tensor([1, 1]), 10))
    expect(abs(at_one - 100) > 1e-3, "give a share between 0 and 1, not per cent")
    expect(
        abs(at_one - 1) < 1e-5, "answers with confidence exactly 1 fall out of your last bin; the bins are (low, high]"
    )
    got, right = float(answer(p, y, 10)), float(_right_ece(p, y, 10))
    confidence, predicted = p.max(-1)
    overall = abs((predicted == y).float().mean() - confidence.mean())
    expect(
        abs(got - unweighted(p, y, 10)) > 1e-5,
        "every bin counts the same here; weight each by the share of answers in it",
    )
    expect(abs(got - float(overall)) > 1e-5, "signed gaps cancel between the bins; take the absolute value in each bin")
    expect(abs(got - right) < 1e-4, f"the value is {got:.4f} on the test set, it should be {right:.4f}")
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
    ]),
]  # fmt: skip
