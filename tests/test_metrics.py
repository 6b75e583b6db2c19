"""Measures against independent formulas, intervals against textbook values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdlib as kd
from kdlib import metrics


def logits(n=200, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, c, generator=generator), torch.randint(c, (n,), generator=generator)


def test_accuracy():
    z = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert metrics.accuracy(z, torch.tensor([0, 0, 0])) == pytest.approx(2 / 3)


def test_ece_against_a_loop():
    z, y = logits()
    p = z.double().softmax(-1).numpy()
    confidence, right = p.max(1), p.argmax(1) == y.numpy()
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert kd.lesson("00").calibration_error(z, y) == pytest.approx(expected, abs=1e-9)


def test_ece_of_a_perfect_and_of_a_certain_wrong_model():
    certain = 1000 * torch.eye(3)
    assert kd.lesson("00").calibration_error(certain, torch.arange(3)) == pytest.approx(0, abs=1e-6)
    assert kd.lesson("00").calibration_error(certain, torch.tensor([1, 2, 0])) == pytest.approx(1, abs=1e-6)


def test_f1_and_mcc_from_the_confusion_matrix():
    z, y = logits(c=2)
    predicted = z.argmax(-1)
    tp, fp = ((predicted == 1) & (y == 1)).sum().item(), ((predicted == 1) & (y == 0)).sum().item()
    fn, tn = ((predicted == 0) & (y == 1)).sum().item(), ((predicted == 0) & (y == 0)).sum().item()
    assert metrics.f1(z, y) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.mcc(z, y) == pytest.approx(expected)


def test_correlations():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert metrics.pearson(x, 2 * x + 1) == pytest.approx(1)
    assert metrics.spearman(x, x.exp()) == pytest.approx(1) and metrics.pearson(x, x.exp()) < 1


def test_t_interval_is_the_textbook_one():
    interval = metrics.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(0.975, 4)
    assert (interval.mean, interval.n) == (3.0, 5)
    assert interval.low == pytest.approx(3 - half, abs=1e-5) and interval.high == pytest.approx(3 + half, abs=1e-5)


def test_one_seed_says_nothing():
    interval = metrics.t_interval([0.7])
    assert interval.low == -math.inf and interval.high == math.inf


def test_pairing_removes_what_the_seeds_share():
    shared = np.random.default_rng(0).normal(0, 10, 6)
    interval = metrics.paired_difference(shared + [1, 1.1, 0.9, 1, 1.05, 0.95], shared)
    assert interval.low > 0.9 and interval.high < 1.1


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_a_difference_turned_round_is_its_negative(values):
    zero = [0.0] * len(values)
    a, b = metrics.paired_difference(values, zero), metrics.paired_difference(zero, values)
    assert a.mean == pytest.approx(-b.mean) and a.low == pytest.approx(-b.high)


@pytest.mark.parametrize("call", [metrics.accuracy, metrics.f1, metrics.mcc])
@pytest.mark.parametrize(
    "z, y", [((3, 2), (2,)), ((3, 2), (3, 1)), ((3, 2), (3, 2)), ((3,), ()), ((3, 1), (3,)), ((3, 4, 2), (3, 4))]
)
def test_shapes_that_would_broadcast_are_refused(call, z, y):
    """Of a perfect classifier, labels [N, 1] would give a third."""
    with pytest.raises(ValueError, match=r"must be \[N, C\]"):
        call(torch.zeros(z), torch.zeros(y, dtype=torch.int64))


@pytest.mark.parametrize("call", [metrics.pearson, metrics.spearman])
def test_correlations_want_plain_rows(call):
    x = torch.arange(5.0)
    for a, b in ((x[:, None], x[:, None]), (x[:, None], x), (x, x[:4]), (x[:, None], list(range(5)))):
        with pytest.raises(ValueError, match=r"both must be \[N\]"):
            call(a, b)
    assert call(x[:, None].squeeze(-1), x.tolist()) == pytest.approx(1)


def test_no_values_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        metrics.t_interval([])


class Rows:
    """The face of a data set."""

    def __init__(self, x):
        self.x = x

    def view_batches(self, view, batch_size):
        for part in self.x.split(batch_size):
            yield {"x": part, "id": torch.arange(len(part))}


def test_predict_is_in_order_without_gradients_and_restores_every_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.train()
    model[2].eval()
    x = torch.randn(11, 3)
    out = metrics.predict(model, Rows(x), batch_size=4)
    assert not out.requires_grad and [m.training for m in model] == [True, True, False]
    model.eval()
    assert torch.allclose(out, model(x), atol=1e-6)


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    made, truth = "the cat sat on the red mat", "the cat sat on the mat"
    precisions = [6 / 7, 4 / 6, 3 / 5, 2 / 4]  # 1- to 4-grams; no brevity penalty
    assert metrics.bleu([made], [truth]) == pytest.approx(100 * math.prod(precisions) ** 0.25)
    assert metrics.bleu([truth], [truth]) == pytest.approx(100)


def test_bleu_is_of_the_corpus_and_not_a_mean_of_sentences():
    pytest.importorskip("sacrebleu")
    made, truth = ["a b c d e f", "g h i j"], ["a b c d e f", "g h x j"]
    alone = [metrics.bleu([m], [t]) for m, t in zip(made, truth, strict=True)]
    assert metrics.bleu(made, truth) != pytest.approx(np.mean(alone), abs=1)


def test_bleu_may_ignore_case():
    pytest.importorskip("sacrebleu")
    made, truth = ["The Cat sat on the mat"], ["the cat sat on THE mat"]
    assert metrics.bleu(made, truth) < 50 and metrics.bleu(made, truth, lowercase=True) == pytest.approx(100)


@pytest.mark.parametrize("made", ["", "...", "x"])
def test_texts_without_a_word_in_common_score_nothing(made):
    """As a rehearsal's untrained models write them."""
    pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score")
    truth = ["a house by the river"] * 3
    assert metrics.bleu([made] * 3, truth) == 0 and metrics.chrf([made] * 3, truth) == 0
    assert metrics.rouge([made] * 3, truth) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_chrf_orders_by_characters_in_common():
    pytest.importorskip("sacrebleu")
    scores = [metrics.chrf([made], ["distillation"]) for made in ("distillation", "distilling", "teacher")]
    assert scores[0] == pytest.approx(100) and scores == sorted(scores, reverse=True)


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    scores = metrics.rouge(["the cat sat", "b a"], ["the cat ran home", "a b"])
    f = lambda hits, made, truth: 2 * hits / (made + truth)  # noqa: E731
    assert scores["rouge1"] == pytest.approx(50 * (f(2, 3, 4) + 1))
    assert scores["rouge2"] == pytest.approx(50 * (f(1, 2, 3) + 0))
    assert scores["rougeL"] == pytest.approx(50 * (f(2, 3, 4) + f(1, 2, 2)))


@pytest.mark.parametrize("text", ["यह एक घर है", "это большой дом", "这是一座房子"])
def test_rouge_refuses_scripts_that_it_does_not_see(text):
    """Equal texts would score 0."""
    pytest.importorskip("rouge_score")
    with pytest.raises(ValueError, match="not Latin.*chrf"):
        metrics.rouge([text], [text])
    assert metrics.chrf([text], [text]) == pytest.approx(100)
    assert metrics.rouge(["ein schönes Haus"], ["ein schönes Haus"])["rouge2"] == pytest.approx(100)
    assert metrics.rouge([""], [""]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


@pytest.mark.parametrize("name, package", [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge", "rouge_score")])
def test_texts_that_do_not_pair_are_named(name, package):
    pytest.importorskip(package)
    with pytest.raises(ValueError, match="2 values against 1"):
        getattr(metrics, name)(["a", "b"], ["a"])
