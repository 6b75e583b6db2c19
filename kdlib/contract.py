"""Before the first step: does this teacher fit this student and this data? Every mismatch is named at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.metrics import forward
from kdlib.models import evaluating


class Report(list[tuple[str, bool, str]]):
    """Findings: a question, whether it holds, and what to do if not."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return all(good for _, good, _ in self)

    def __str__(self) -> str:
        lines = (f"✓ {question}" if good else f"✗ {question}\n    {remedy}" for question, good, remedy in self)
        return "\n".join(lines)


def check_contract(teacher: Any, student: nn.Module, batch: dict, *, classes: Sequence[str] | None = None) -> Report:
    """Ask a teacher and a student about one labelled batch (of 64 examples or more) and report every mismatch.

    Both run on the batch and answer finite logits; ids are in the vocabularies; inputs look normalised; class names
    and numbers of classes agree; the teacher is better than chance, and not far better with its classes in another
    order; its answers are logits and no probabilities.
    """
    report = Report()
    with evaluating(student), torch.no_grad():
        theirs = _ask(report, "the student", student, batch, lambda: forward(student, batch))
    logits = _ask(report, "the teacher", getattr(teacher, "model", None), batch, lambda: teacher(batch))
    if "x" in batch:
        x = batch["x"].float()
        good = bool(abs(x.mean()) < 2 and 0.2 < x.std() < 5 and x.min() < 0)
        remedy = "divide by 255, then subtract the mean and divide by the deviation that the teacher was trained with"
        report.append((f"inputs look normalised (mean {x.mean():.2f}, sd {x.std():.2f})", good, remedy))
    if classes is not None and teacher.classes is not None:
        _compare_names(report, list(teacher.classes), list(classes))
    if logits is not None and theirs is not None:
        t, s = logits.shape[-1], theirs.shape[-1]
        remedy = "build the student with the teacher's number of classes, or map the teacher's classes to yours"
        report.append((f"same number of classes (teacher {t}, student {s})", t == s, remedy))
    if logits is not None and logits.ndim == 2:
        sure = bool((logits >= 0).all() and torch.allclose(logits.sum(-1), torch.ones(()).to(logits), atol=1e-3))
        remedy = "the teacher ends in a softmax: take its last layer off, or distil log-probabilities"
        report.append(("the teacher answers logits, not probabilities", not sure, remedy))
        if "y" in batch and not batch["y"].is_floating_point():
            _compare_with_labels(report, logits.cpu(), batch["y"].cpu())
    return report


def _ask(report: Report, who: str, model: Any, batch: dict[str, Any], ask: Callable[[], Any]) -> Tensor | None:
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    tables = (m for name, m in named if isinstance(m, nn.Embedding) and "pos" not in name)
    words = getattr(model, "get_input_embeddings", lambda: next(tables, None))()
    if "input_ids" in batch and words is not None:
        largest, size = int(batch["input_ids"].max()), words.num_embeddings
        remedy = f"the batch has id {largest}: encode the texts with the tokenizer of {who}"
        report.append((f"ids are inside the vocabulary of {who} ({size})", largest < size, remedy))
        if largest >= size:  # on a GPU such a look-up ends the process
            return None
    try:
        logits = ask()
        if not isinstance(logits, Tensor):
            raise TypeError(f"{who} answers a {type(logits).__name__}")
    except Exception as error:  # whatever a stranger's model raises is a finding, not the end of the report
        report.append((f"{who} runs on a batch", False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        return None
    finite = bool(logits.isfinite().all())
    remedy = f"NaN or infinity: look at the weights of {who} and at its input's scale"
    report.append((f"{who} runs on a batch and answers finite logits", finite, remedy))
    return logits


def _compare_names(report: Report, theirs: list[str], ours: list[str]) -> None:
    remedy = "reorder its logits: logits[:, [teacher.classes.index(name) for name in classes]]"
    if alone := sorted({*theirs} ^ {*ours}):
        remedy = f"only one of the two has {alone}"
    elif theirs != ours:
        row = next(row for row, pair in enumerate(zip(theirs, ours, strict=True)) if len({*pair}) > 1)
        remedy = f"class {row} is {theirs[row]!r} for the teacher and {ours[row]!r} in the data; {remedy}"
    report.append(("same class names in the same order", theirs == ours, remedy))


def _compare_with_labels(report: Report, logits: Tensor, labels: Tensor) -> None:
    from scipy.optimize import linear_sum_assignment

    count, predicted = logits.shape[-1], logits.argmax(-1)
    if labels.ndim != 1 or not (0 <= labels.min() and labels.max() < count):
        found = f"labels have the shape {list(labels.shape)}, from {labels.min()} to {labels.max()}"
        remedy = f"{found}: give class numbers from 0 to {count - 1}, one an example"
        return report.append(("labels are among the teacher's classes", False, remedy))
    accuracy = (predicted == labels).float().mean().item()
    counts = torch.zeros(count, count).index_put_((predicted, labels), torch.ones(len(labels)), accumulate=True)
    best = counts[linear_sum_assignment(counts.numpy(), maximize=True)].sum().item() / len(labels)
    said = f"classes are in the labels' order (right {accuracy:.0%} of the time, in the best other order {best:.0%})"
    remedy = "the teacher's classes are permuted; take its class list and reorder its logits"
    report.append((said, not (best > 0.5 and best > accuracy + 0.1), remedy))  # 0.1: luck finds a few per cent
    remedy = "check weights, input normalisation and label order before training a student on it"
    said = f"the teacher is better than chance ({accuracy:.0%} against {1 / count:.0%})"
    report.append((said, accuracy > 1.2 / count, remedy))
