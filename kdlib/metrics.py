"""Measures and intervals: thin wrappers of scikit-learn, SciPy, sacrebleu and rouge-score, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of ``logits`` [N, C] whose largest entry is the label [N]."""
    _same_length(logits, labels)
    return (logits.argmax(-1) == labels).double().mean().item()


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of rows in which two models' logits [N, C] have the same largest entry."""
    _same_length(a, b)
    return (a.argmax(-1) == b.argmax(-1)).double().mean().item()


def nll(logits: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood of the labels, in nats, mean over rows."""
    _same_length(logits, labels)
    return F.cross_entropy(logits.float(), labels).item()


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): equal-width bins of confidence in (0, 1]."""
    _same_length(logits, labels)
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = (predicted == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct - confidence)
    return gaps.abs().sum().item() / len(labels)


def f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of class 1 (MRPC, QQP)."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(-1), zero_division=0))


def mcc(logits: Tensor, labels: Tensor) -> float:
    """Matthews correlation (CoLA)."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(-1)))


def pearson(predicted: Sequence[float] | Tensor, true: Sequence[float] | Tensor) -> float:
    """Pearson correlation of two equally long sequences."""
    from scipy.stats import pearsonr

    return float(pearsonr(np.asarray(predicted), np.asarray(true)).statistic)


def spearman(predicted: Sequence[float] | Tensor, true: Sequence[float] | Tensor) -> float:
    """Spearman rank correlation of two equally long sequences."""
    from scipy.stats import spearmanr

    return float(spearmanr(np.asarray(predicted), np.asarray(true)).statistic)


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
    if len(x) == 1:
        return Interval(mean, -float("inf"), float("inf"), 1)
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """t-interval of the mean of ``a`` - ``b``, taken pair by pair (seed by seed).

    Raises:
        ValueError: the two differ in length.
    """
    _same_length(a, b)
    return t_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), level)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, level: float = 0.95, draws: int = 10_000) -> Interval:
    """Percentile bootstrap interval of the mean."""
    x = np.asarray(values, dtype=float)
    if not len(x):
        raise ValueError("no values to take a mean of; did every run of this arm fail?")
    means = np.random.default_rng(seed).choice(x, (draws, len(x))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high), len(x))


@torch.no_grad()
def predict(model: nn.Module, data: Any, batch_size: int = 512) -> Tensor:
    """Logits [N, C] on the CPU of all of ``data`` (something with ``view_batches``), in order, in evaluation mode.

    A model is called with ``batch["x"]`` if there is one, else with the batch's ``input_ids`` and
    ``attention_mask``; every submodule's mode is restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        rows = [_forward(model, batch, device).float().cpu() for batch in data.view_batches(0, batch_size)]
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(rows)


def _forward(model: nn.Module, batch: dict[str, Any], device: torch.device) -> Tensor:
    if "x" in batch:
        out = model(batch["x"].to(device))
    else:
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
        out = model(**{name: batch[name].to(device) for name in names})
    return getattr(out, "logits", out)


def _same_length(a: Any, b: Any) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}; the two must belong to the same examples or seeds")


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False) -> float:
    """Corpus BLEU in 0-100 (sacrebleu: 13a tokens, exponential smoothing), one reference each.

    ``lowercase`` ignores case on both sides. :func:`bleu_signature` names the settings for a report.

    Raises:
        ValueError: not as many hypotheses as references.
    """
    from sacrebleu.metrics import BLEU

    _same_length(hypotheses, references)
    return float(BLEU(lowercase=lowercase).corpus_score(list(hypotheses), [list(references)]).score)


def bleu_signature(lowercase: bool = False) -> str:
    """sacrebleu's own name for the settings of :func:`bleu`, with its version (Post 2018): cite it beside a score."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(lowercase=lowercase)
    scorer.corpus_score(["a"], [["a"]])  # the signature counts the references that it has seen
    return str(scorer.get_signature())


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 in 0-100 (sacrebleu's defaults), one reference each."""
    from sacrebleu import corpus_chrf

    _same_length(hypotheses, references)
    return float(corpus_chrf(list(hypotheses), [list(references)]).score)


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L, the F-measure with stemming in 0-100, mean over examples."""
    from rouge_score.rouge_scorer import RougeScorer

    _same_length(hypotheses, references)
    if not len(references):
        raise ValueError("no texts to score")
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    rows = [scorer.score(truth, made) for truth, made in zip(references, hypotheses, strict=True)]
    return {name: 100 * float(np.mean([row[name].fmeasure for row in rows])) for name in names}
