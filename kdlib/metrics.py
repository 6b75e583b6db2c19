"""Measures and intervals: thin wrappers of scikit-learn, SciPy, sacrebleu and rouge-score, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor, nn

from kdlib.data.sources import optional
from kdlib.models import evaluating


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of ``logits`` [N, C] whose largest entry is the label [N]."""
    _check(logits, labels)
    return (logits.argmax(-1) == labels).double().mean().item()


def f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of class 1 (MRPC, QQP)."""
    _check(logits, labels)
    return float(f1_score(labels, logits.argmax(-1), zero_division=0))


def mcc(logits: Tensor, labels: Tensor) -> float:
    """Matthews correlation (CoLA)."""
    _check(logits, labels)
    return float(matthews_corrcoef(labels, logits.argmax(-1)))


def pearson(predicted: Sequence[float] | Tensor, true: Sequence[float] | Tensor) -> float:
    """Pearson correlation of two sequences [N]."""
    return float(stats.pearsonr(*_two_rows(predicted, true)).statistic)


def spearman(predicted: Sequence[float] | Tensor, true: Sequence[float] | Tensor) -> float:
    """Spearman rank correlation of two sequences [N]."""
    return float(stats.spearmanr(*_two_rows(predicted, true)).statistic)


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval over ``n`` values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] (n = {self.n})"


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t-interval of the mean; infinitely wide for a single value.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        raise ValueError("no values to take a mean of; did every run of this arm fail?")
    mean = float(x.mean())
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * stats.sem(x)) if len(x) > 1 else float("inf")
    return Interval(mean, mean - half, mean + half, len(x))


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """t-interval of the mean of ``a`` - ``b``, taken pair by pair (seed by seed).

    Raises:
        ValueError: the two differ in length.
    """
    _same_length(a, b)
    return t_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), level)


@torch.no_grad()
def predict(model: nn.Module, data: Any, batch_size: int = 512) -> Tensor:
    """Logits [N, C] on the CPU of all of ``data`` (something with ``view_batches``), in order, in evaluation mode.

    A model is called with ``batch["x"]`` if there is one, else with the batch's ``input_ids`` and
    ``attention_mask``; every submodule's mode is restored.
    """
    with evaluating(model):
        return torch.cat([forward(model, batch).float().cpu() for batch in data.view_batches(0, batch_size)])


def given(batch: dict[str, Any]) -> Any:
    """What a model is called with, unless told: pixels, or tokens by name."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return (batch["x"],) if "x" in batch else {name: batch[name] for name in names if name in batch}


def forward(model: nn.Module, batch: dict[str, Any], inputs: Callable[[dict], Any] = given) -> Any:
    """What ``model`` answers to a batch: its ``logits`` if it has some. ``inputs`` gives a tuple or a dict (keywords)."""
    arguments, first = inputs(batch), next(model.parameters(), None)
    named = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
    placed = {name: _placed(value, first) for name, value in named.items()}
    out = model(**placed) if named is arguments else model(*placed.values())
    return getattr(out, "logits", out)


def _placed(value: Any, like: Tensor | None) -> Any:
    """On the model's device; numbers that are not whole in its precision."""
    if not isinstance(value, Tensor) or like is None:
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() and like.is_floating_point() else value.dtype)


def _check(logits: Tensor, labels: Tensor) -> None:
    """Shapes that would broadcast, and one column, whose largest entry is always the first, give a wrong number."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}; must be [N, C], C > 1, and [N]")


def _two_rows(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"the shapes are {a.shape} and {b.shape}; both must be [N] (of [N, 1]: squeeze(-1))")
    return a, b


def _same_length(a: Any, b: Any) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}; the two must belong to the same examples or seeds")


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False) -> float:
    """Corpus BLEU in 0-100 (sacrebleu: 13a tokens, exponential smoothing), one reference each.

    ``lowercase`` ignores case on both sides.

    Raises:
        ValueError: not as many hypotheses as references.
    """
    _same_length(hypotheses, references)
    scorer = optional("sacrebleu").BLEU(lowercase=lowercase)
    return float(scorer.corpus_score(list(hypotheses), [list(references)]).score)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 in 0-100 (sacrebleu's defaults), one reference each."""
    _same_length(hypotheses, references)
    return float(optional("sacrebleu").corpus_chrf(list(hypotheses), [list(references)]).score)


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L, the F-measure with stemming in 0-100, mean over examples.

    As published, its words are made of a-z and digits; any other letter parts them.

    Raises:
        ValueError: not as many hypotheses as references, or references in another script.
    """
    _same_length(hypotheses, references)
    letters = [letter for text in references for letter in text if letter.isalpha()]
    if sum(not letter.isascii() for letter in letters) * 2 > len(letters):
        raise ValueError("most letters of the references are not Latin, which ROUGE does not see; kd.metrics.chrf does")
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = optional("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=True)
    rows = [scorer.score(truth, made) for truth, made in zip(references, hypotheses, strict=True)]
    return {name: 100 * float(np.mean([row[name].fmeasure for row in rows])) for name in names}
