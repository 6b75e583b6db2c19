"""Before the first step: does this teacher fit this student and this data? Every mismatch is named at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.teacher import CachedTeacher, Teacher


@dataclass
class Report:
    """Findings of :func:`check_contract`: each a question, whether it holds, and what to do if not."""

    findings: list[tuple[str, bool, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(good for _, good, _ in self.findings)

    def add(self, question: str, good: bool, remedy: str) -> None:
        self.findings.append((question, bool(good), remedy))

    def raise_if_broken(self) -> None:
        """Raise ValueError naming every mismatch."""
        if not self.ok:
            raise ValueError(f"teacher, student and data do not fit:\n{self}")

    def __str__(self) -> str:
        lines = []
        for question, good, remedy in self.findings:
            lines.append(f"{'✓' if good else '✗'} {question}" + ("" if good else f"\n    {remedy}"))
        return "\n".join(lines)


def check_contract(
    teacher: Teacher | CachedTeacher, student: nn.Module, batch: dict[str, Any], *, classes: Sequence[str] | None = None
) -> Report:
    """Ask teacher and student about one labelled batch and report every mismatch.

    Checks: both run on the batch (input size, vocabulary); finite logits; same number of classes; same class names
    in the same order; inputs that look normalised; a teacher better than chance; and whether another order of its
    classes would make it right far more often, the sign of a shuffled label list.

    Args:
        teacher: live or cached.
        student: is left in the mode it was in.
        batch: at least 64 labelled examples, or shuffled labels cannot be told from bad luck.
        classes: the data's class names, in the order of its labels.
    """
    report = Report()
    # Before a model runs: on a GPU an id outside the vocabulary is an error that no later call recovers from.
    known = [
        _check_vocabulary(report, who, model, batch)
        for who, model in (("the teacher", getattr(teacher, "model", None)), ("the student", student))
    ]
    teacher_logits = _answer(report, "the teacher", lambda: teacher(batch)) if known[0] else None
    student_logits = _answer(report, "the student", lambda: _student(student, batch)) if known[1] else None
    if teacher_logits is not None and student_logits is not None:
        t, s = teacher_logits.shape[-1], student_logits.shape[-1]
        report.add(
            f"same number of classes (teacher {t}, student {s})", t == s,
            "build the student with the teacher's number of classes, or map the teacher's classes to yours",
        )  # fmt: skip
    if classes is not None and teacher.classes is not None:
        _check_names(report, tuple(teacher.classes), tuple(classes))
    if "x" in batch:
        _check_normalisation(report, batch["x"])
    if teacher_logits is not None and "y" in batch and not batch["y"].is_floating_point():
        _check_accuracy(report, teacher_logits, batch["y"])
    return report


@torch.no_grad()
def _answer(report: Report, who: str, ask: Any) -> Tensor | None:
    try:
        logits = ask()
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{who} answers a {type(logits).__name__}; it must answer logits, or an object with .logits"
            )
    except Exception as error:  # whatever a stranger's model raises is a finding, not the end of the report
        report.add(f"{who} runs on a batch", False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None
    report.add(f"{who} runs on a batch and answers finite logits", logits.isfinite().all(),
               f"{who} answers NaN or infinity; look at its weights and its input's scale")  # fmt: skip
    return logits


def _student(student: nn.Module, batch: dict[str, Any]) -> Tensor:
    from kdlib.metrics import _forward

    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        return _forward(student, batch, next(student.parameters()).device)
    finally:
        for module, training in modes:
            module.training = training


def _check_names(report: Report, teacher: tuple[str, ...], data: tuple[str, ...]) -> None:
    if set(teacher) != set(data):
        odd = sorted(set(teacher) ^ set(data))[:4]
        report.add("same class names", False, f"only one of the two has {odd}; map the teacher's classes to the data's")
        return
    differ = [i for i, (a, b) in enumerate(zip(teacher, data, strict=True)) if a != b]
    remedy = (
        f"class {differ[0]} is {teacher[differ[0]]!r} for the teacher and {data[differ[0]]!r} in the data; "
        "reorder the teacher's logits: logits[:, [teacher.classes.index(c) for c in classes]]"
    ) if differ else ""  # fmt: skip
    report.add("same class names in the same order", not differ, remedy)


def _check_normalisation(report: Report, x: Tensor) -> None:
    mean, std, low = x.float().mean().item(), x.float().std().item(), x.float().min().item()
    raw = low >= 0 and x.float().max().item() > 2
    report.add(
        f"inputs look normalised (mean {mean:.2f}, sd {std:.2f})", abs(mean) < 2 and 0.2 < std < 5 and not raw,
        "divide by 255, subtract the mean and divide by the standard deviation that the teacher was trained with",
    )  # fmt: skip


def _check_vocabulary(report: Report, who: str, model: nn.Module | None, batch: dict[str, Any]) -> bool:
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)] if model is not None else []
    if not embeddings or "input_ids" not in batch:
        return True
    size, largest = max(m.num_embeddings for m in embeddings), int(batch["input_ids"].max())
    report.add(
        f"token ids are inside the vocabulary of {who} ({size})", largest < size,
        f"the batch has id {largest}; encode the text with the tokenizer of {who}",
    )  # fmt: skip
    return largest < size


def _check_accuracy(report: Report, logits: Tensor, labels: Tensor) -> None:
    from scipy.optimize import linear_sum_assignment

    n_classes, predicted = logits.shape[-1], logits.argmax(-1).cpu()
    labels = labels.cpu()
    strange = labels[(labels < 0) | (labels >= n_classes)]
    if len(strange):
        report.add("labels are among the teacher's classes", False,
                   f"label {int(strange[strange.abs().argmax()])} does not exist for a teacher of {n_classes} classes")  # fmt: skip
        return
    accuracy = (predicted == labels).float().mean().item()
    counts = torch.zeros(n_classes, n_classes).index_put_((predicted, labels), torch.ones(len(labels)), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    best = counts[rows, columns].sum().item() / len(labels)
    shuffled = best > 0.5 and best > accuracy + 0.3
    report.add(
        f"classes are in the labels' order (right {accuracy:.0%} of the time, in the best other order {best:.0%})",
        not shuffled, "the teacher's classes are permuted; take its class list and reorder its logits",
    )  # fmt: skip
    report.add(
        f"the teacher is better than chance ({accuracy:.0%} against {1 / n_classes:.0%})",
        accuracy > 1.2 / n_classes, "check weights, input normalisation and label order before training a student on it",
    )  # fmt: skip
