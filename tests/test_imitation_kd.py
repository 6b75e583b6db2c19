"""Notebook 02: the method cells, lifted out and held to the paper's rules, and mutants of them that must be noticed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chapters import namespace, tagged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kdlib as kd
from kdlib.data.rows import part
from kdlib.seq2seq import generate

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "02_imitation_kd.ipynb"
PAD, BOS, EOS, UNK, IGNORE = 0, 1, 2, 3, -100
PAIRS, CAP, BATCH = 20, 8, 4
TINY = "recurrent", dict(embedding=6, encoder_hidden=6, decoder_hidden=8, dropout=0.4)
ATTENTIVE = "transformer", dict(d_model=8, layers=1, heads=2, dropout=0.4)
ARMS = [
    "vanilla",
    "SeqKD",
    "argmax",
    "word-KD",
    "argmax, own",
    "ImitKD",
    "ImitKD + full",
    "SeqKD + full",
    "ImitKD*",
    "ImitKD* + full",
]


class Method(SimpleNamespace):
    """What the method cells define."""

    def __repr__(self) -> str:  # hypothesis prints it with a failing example
        return "the method of notebook 02"


@pytest.fixture(scope="module")
def nb():
    return Method(**namespace(tagged(NOTEBOOK, "setup", "method"), "02"))


@pytest.fixture(scope="module")
def task(nb):
    """Twenty pairs, and as D* the same sources with the next pair's target."""
    toy = kd.data.text("toy_translation")
    data = toy.train.take(slice(0, PAIRS))
    tokenizer = kd.data.train_subwords([*data.sources, *data.targets], vocab_size=90)
    rewritten = data.with_targets([*data.targets[1:], data.targets[0]])
    return nb.SequenceTask(
        tokenizer, {"D": data, "D*": rewritten}, toy.validation.take(slice(0, 6)), toy.test.take(slice(0, 6)),
        metric=lambda made, truth: float(np.mean([len(text) for text in made])), max_source=12, max_target=CAP, batch_size=BATCH,
    )  # fmt: skip


class Rule:
    """A teacher whose choice at a position is a known function of the whole prefix; it keeps what it was asked."""

    name, fingerprint, classes = "rule", "rule", None

    def __init__(self, vocabulary: int = 90) -> None:
        self.vocabulary, self.asked = vocabulary, []

    def choice(self, context):
        places = torch.arange(1, context.shape[1] + 1)
        return 3 + ((context + 1) * places**2).cumsum(1) % (self.vocabulary - 3)

    def __call__(self, batch):
        self.asked.append(batch)
        chosen = F.one_hot(self.choice(batch["decoder_input_ids"]), self.vocabulary)
        return 6.0 * chosen + torch.linspace(0, 2, self.vocabulary)


def student_of(nb, task, seed=0, arch=TINY) -> nn.Module:
    torch.manual_seed(seed)
    return nb.build(arch, task.tokenizer).train()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contexts(nb, student, task, *, epochs=1, seed=0, **options):
    return nb.imitation(student, task, None, epochs=epochs, seed=seed, **options)[0]


def reference_batch(lengths: list[int], cap: int) -> dict:
    """Gold rows of so many words and EOS, cut at the cap, as the data sets make them."""
    rows = [[*range(30, 30 + n), EOS][:cap] for n in lengths]
    width = max(map(len, rows))
    labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
    context = torch.tensor([[BOS, *row[:-1]] + [PAD] * (width - len(row)) for row in rows])
    sources = torch.full((len(rows), 3), 5)
    return {
        "input_ids": sources, "attention_mask": torch.ones_like(sources), "labels": labels, "decoder_input_ids": context,
        "id": torch.arange(len(rows)),
    }  # fmt: skip


def rollouts_of(lengths: list[int], width: int) -> torch.Tensor:
    """Rows of so many words, then EOS if it fits, then padding: [N, width]."""
    rows = [[*range(50, 50 + n), EOS][:width] for n in lengths]
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)


@pytest.fixture
def quick(monkeypatch):
    """Rollouts of one word and EOS, at no cost, for tests that look at coins alone."""

    def one_word(model, batch, **_):
        return torch.tensor([[7, EOS]]).expand(len(batch["input_ids"]), 2)

    monkeypatch.setattr(kd.seq2seq, "generate", one_word)


# --- contexts and masks ------------------------------------------------------------------------------------


def check_mix(nb, own: list[int], gold: list[int], keep: list[bool], width: int) -> None:
    """Row by row against the rule in words: what is read, what counts, what is left of the reference."""
    batch = reference_batch(gold, CAP)
    rollouts = rollouts_of([n for n, kept in zip(own, keep, strict=True) if not kept], width)
    before = copy.deepcopy(batch)
    mixed = nb.mix(batch, torch.tensor(keep), rollouts)
    assert all(torch.equal(batch[name], before[name]) for name in before)  # the data's batch stays as it was
    assert mixed["rolled"].tolist() == [not kept for kept in keep]
    for row, kept in enumerate(keep):
        read, mask, labels = (mixed[name][row].tolist() for name in ("decoder_input_ids", "loss_mask", "labels"))
        if kept:
            count, expected = min(gold[row] + 1, CAP), [BOS, *range(30, 30 + gold[row])]
            assert [label for label in labels if label != IGNORE] == [*range(30, 30 + gold[row]), EOS][:CAP]
        else:
            count = min(own[row] + 1, width)  # n words and EOS; at the cap as many as the context has tokens
            expected = [BOS, *range(50, 50 + own[row])]
            assert set(labels) == {IGNORE}
        assert read[:count] == expected[:count]
        assert mask == [True] * count + [False] * (len(mask) - count)
        assert set(read[count:]) <= {PAD, EOS}


@given(st.integers(1, CAP), st.data())
def test_n_words_and_eos_make_n_plus_one_positions(nb, width, data):
    rows = data.draw(st.integers(1, 5))

    def draw(strategy):
        return data.draw(st.lists(strategy, min_size=rows, max_size=rows))

    keep = draw(st.booleans())
    own = draw(st.integers(0, width))  # width words: cut at the cap, without EOS
    check_mix(nb, own, draw(st.integers(0, CAP + 2)), keep, width)


@given(st.lists(st.integers(0, CAP + 2), min_size=1, max_size=5))
def test_both_masks_agree_where_the_student_writes_the_reference(nb, lengths):
    batch = reference_batch(lengths, CAP)
    rollouts = batch["labels"].masked_fill(batch["labels"] == IGNORE, PAD)
    nobody = torch.zeros(len(lengths), dtype=torch.bool)
    own, data = nb.mix(batch, nobody, rollouts), nb.mix(batch, ~nobody, rollouts[:0])
    assert torch.equal(own["loss_mask"], data["loss_mask"])
    assert torch.equal(own["decoder_input_ids"][own["loss_mask"]], data["decoder_input_ids"][data["loss_mask"]])


def check_position_zero(nb) -> None:
    for start in (EOS, PAD, BOS):  # fairseq's start is EOS, Marian's and T5's PAD
        context = torch.tensor([[start, 5, 6, 9, EOS, PAD], [start, EOS, PAD, PAD, PAD, PAD]])
        before = context.clone()
        assert nb.rollout_mask(context).sum(1).tolist() == [4, 1]
        assert nb.rollout_mask(context)[:, 0].all()
        assert torch.equal(context, before)


def test_position_zero_always_trains(nb):
    check_position_zero(nb)


def test_a_rollout_cut_without_an_end_has_as_many_positions_as_context_tokens(nb):
    """Also one that is cut earlier than its neighbour, by 1.5 |x| + 5."""
    cut = torch.tensor([[5, 6, PAD, PAD], [5, 6, 7, 8]])
    mixed = nb.mix(reference_batch([2, 2], CAP), torch.zeros(2, dtype=torch.bool), cut)
    assert mixed["decoder_input_ids"].tolist() == [[BOS, 5, 6, PAD], [BOS, 5, 6, 7]]
    assert torch.equal(mixed["loss_mask"], mixed["decoder_input_ids"] != PAD)


def test_rollouts_that_do_not_fit_the_coins_are_refused(nb):
    batch, nobody = reference_batch([2, 3], CAP), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"2 rows need a rollout .* shape \(2, 0\)"):
        nb.mix(batch, nobody, torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"2 rows need .* shape \(1, 4\)"):
        nb.mix(batch, nobody, rollouts_of([2], 4))
    with pytest.raises(ValueError, match="0 rows need"):
        nb.mix(batch, ~nobody, rollouts_of([2], 4))


# --- the coin ----------------------------------------------------------------------------------------------


def check_coin(nb) -> None:
    """β is the probability of True, which keeps the data; the two ends are certain."""
    assert nb.toss(500, 1.0, generator()).all()
    assert not nb.toss(500, 0.0, generator()).any()
    kept = nb.toss(20_000, 0.2, generator()).float().mean()
    assert abs(kept - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 20_000)


def check_coin_per_example(nb) -> None:
    """Counts of 400 batches of 16 vary as those of independent coins: variance n β (1 - β), not n² β (1 - β)."""
    counts = torch.stack([nb.toss(16, 0.5, generator(seed)).sum() for seed in range(400)]).float()
    assert 0 < counts.min() and counts.max() < 16
    assert 2.5 < counts.var() < 6  # 4 for independent coins, 64 for one a batch


def test_beta_is_the_probability_of_the_data(nb):
    check_coin(nb)


def test_one_coin_an_example(nb):
    check_coin_per_example(nb)


@pytest.mark.parametrize("beta", [0.2, 0.8])
def test_share_of_data_contexts_is_beta(nb, task, quick, beta):
    batches = contexts(nb, None, task, epochs=40, beta=("constant", beta))
    rolled = [batch["rolled"] for epoch in range(40) for batch in batches.epoch(epoch)]
    count = 40 * PAIRS
    assert abs(1 - torch.cat(rolled).float().mean() - beta) < 4 * math.sqrt(beta * (1 - beta) / count)
    assert any(row.any() and not row.all() for row in rolled)


def test_share_over_training_is_that_of_the_schedule(nb, task, quick):
    schedule = ("exponential", 10.0)
    batches = contexts(nb, None, task, epochs=60, beta=schedule, group=1)
    rolled = torch.cat([batch["rolled"] for epoch in range(60) for batch in batches.epoch(epoch)]).float()
    assert abs(rolled.mean() - nb.rollout_share(*schedule)) < 4 * 0.5 / math.sqrt(60 * PAIRS) + 1 / 300
    assert rolled[:100].mean() < 0.25 and rolled[-100:].mean() > 0.75


def test_beta_one_is_exactly_the_data(nb, task):
    plain = task.batches("D", 3)
    for ours, theirs in zip(contexts(nb, None, task, seed=3).epoch(0), plain.epoch(0), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert torch.equal(ours["loss_mask"], theirs["labels"] != IGNORE) and not ours["rolled"].any()


def test_beta_zero_is_all_rollouts_of_the_student(nb, task):
    student = student_of(nb, task)
    for batch in contexts(nb, student, task, beta=("constant", 0.0)).epoch(0):
        assert batch["rolled"].all() and (batch["labels"] == IGNORE).all() and written_by(student, batch)
        ends = (generate(student, batch, max_length=CAP) == EOS).int()
        assert batch["loss_mask"].sum(1).tolist() == torch.where(ends.any(1), ends.argmax(1) + 1, CAP).tolist()


def test_a_context_is_one_text_never_a_blend(nb, task):
    student = student_of(nb, task)
    plain = task.batches("D", 0).epoch(0)
    for batch, data in zip(contexts(nb, student, task, beta=("constant", 0.5)).epoch(0), plain, strict=True):
        width = data["labels"].shape[1]
        for name in ("decoder_input_ids", "labels"):
            assert torch.equal(batch[name][~batch["rolled"], :width], data[name][~batch["rolled"]])
        assert written_by(student, batch)


# --- β -----------------------------------------------------------------------------------------------------


@given(st.floats(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_schedules_have_their_closed_forms_and_never_rise(nb, base, early, end):
    late = early + (1 - early) / 2
    beta = nb.beta_at
    assert beta(early, "exponential", base) == pytest.approx(math.exp(-early * math.log(base)))
    assert beta(early, "linear", end) == pytest.approx((1 - early) + end * early)
    assert beta(early, "reverse sigmoid", 20.0) == pytest.approx(1 - 1 / (1 + math.exp(-20 * (early - 0.5))))
    assert beta(early, "constant", end) == end
    for kind, value in (("exponential", base), ("linear", end), ("reverse sigmoid", 20.0)):
        assert (
            0
            <= beta(1, kind, value)
            <= beta(late, kind, value)
            <= beta(early, kind, value)
            <= beta(0, kind, value)
            <= 1
        )
    assert beta(0, "exponential", base) == beta(0, "linear", end) == 1
    assert beta(1, "exponential", base) == pytest.approx(1 / base) and beta(1, "linear", end) == pytest.approx(end)
    assert beta(early, "reverse sigmoid", 20.0) + beta(1 - early, "reverse sigmoid", 20.0) == pytest.approx(1)


@pytest.mark.parametrize(("base", "percent"), [(2, 28), (10, 61), (200, 81)])
def test_share_of_rollouts_of_the_published_schedules(nb, base, percent):
    share = nb.rollout_share("exponential", float(base), points=2000)
    assert share == pytest.approx(1 - (1 - 1 / base) / math.log(base), abs=1e-4)
    assert round(100 * share) == percent


@pytest.mark.parametrize("schedule", [("linear", 0.0), ("reverse sigmoid", 20.0), ("constant", 0.5)])
def test_share_of_rollouts_is_half(nb, schedule):
    assert nb.rollout_share(*schedule, points=2000) == pytest.approx(0.5, abs=1e-6)


def test_beta_is_that_of_the_groups_first_update(nb, task, quick):
    batches = contexts(nb, None, task, epochs=3, beta=("exponential", 10.0), group=2)
    assert len(batches) == PAIRS // BATCH == 5
    found = [batch["beta"] for epoch in range(3) for batch in batches.epoch(epoch)]
    firsts = [epoch * 5 + first for epoch in range(3) for first in (0, 0, 2, 2, 4)]
    assert found == pytest.approx([10 ** -(first / 15) for first in firsts])


# --- targets and loss --------------------------------------------------------------------------------------


def mixed_batch(nb) -> dict:
    return nb.mix(reference_batch([4, 1, 6, 2], CAP), torch.tensor([True, False, True, False]), rollouts_of([5, 0], 6))


def check_targets(nb) -> None:
    """Hard: gold on data, the teacher's choice at the same position on rollouts. Argmax: the teacher's on both."""
    batch, teacher = mixed_batch(nb), Rule()
    z = torch.randn(*batch["labels"].shape, 90, generator=generator())
    choice, log_p = teacher.choice(batch["decoder_input_ids"]), z.log_softmax(-1)
    for target in ("hard", "argmax"):
        terms = [
            -log_p[row, j, int(batch["labels"][row, j] if target == "hard" and not rolled else choice[row, j])]
            for row, rolled in enumerate(batch["rolled"])
            for j in batch["loss_mask"][row].nonzero().flatten().tolist()
        ]
        assert len(terms) == 5 + 6 + 7 + 1
        loss = nb.imitation_loss(z, batch, teacher, target=target)
        assert float(loss) == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)


def check_full(nb) -> None:
    """The loss is zero for the teacher's own logits, and far from it when they are moved by a position."""
    batch, teacher = mixed_batch(nb), Rule()
    answers = teacher(batch)
    assert float(nb.imitation_loss(answers.clone(), batch, teacher, target="full")) == pytest.approx(0, abs=1e-6)
    for shift in (-1, 1):
        assert float(nb.imitation_loss(answers.roll(shift, 1), batch, teacher, target="full")) > 1


def test_hard_targets_are_gold_on_data_and_the_teachers_choice_on_rollouts(nb):
    check_targets(nb)


def test_full_targets_are_the_teachers_distribution_everywhere(nb):
    check_full(nb)


def test_the_teacher_is_asked_only_where_its_answer_is_used(nb):
    batch, teacher = mixed_batch(nb), Rule()
    z = torch.zeros(*batch["labels"].shape, 90)
    for target, asked in (
        ("hard", batch["rolled"]),
        ("argmax", batch["rolled"] | True),
        ("full", batch["rolled"] | True),
    ):
        nb.imitation_loss(z, batch, teacher, target=target)
        assert torch.equal(teacher.asked.pop()["decoder_input_ids"], batch["decoder_input_ids"][asked])
    only_data = nb.mix(reference_batch([4, 1], CAP), torch.ones(2, dtype=torch.bool), rollouts_of([], 3))
    nb.imitation_loss(torch.zeros(2, 5, 90), only_data, teacher)
    assert not teacher.asked


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_gradients_at_the_logits_are_the_closed_forms(nb, seed):
    """(p_S - target) / positions, and nothing where nothing counts: word-KD's gradient, and cross-entropy's."""
    batch, teacher = mixed_batch(nb), Rule()
    z = torch.randn(*batch["labels"].shape, 90, generator=generator(seed)).requires_grad_()
    mask, p_student = batch["loss_mask"], z.detach().softmax(-1)
    wanted = {
        "full": teacher(batch).softmax(-1),
        "argmax": F.one_hot(teacher.choice(batch["decoder_input_ids"]), 90).float(),
    }
    for target, distribution in wanted.items():
        (gradient,) = torch.autograd.grad(nb.imitation_loss(z, batch, teacher, target=target), z)
        assert torch.allclose(gradient, mask[..., None] * (p_student - distribution) / mask.sum(), atol=1e-6)


@pytest.mark.parametrize(("target", "base"), [("hard", "teacher forcing"), ("full", "word-KD")])
def test_without_rollouts_the_gradient_is_that_of_the_baseline(nb, task, target, base):
    """λ = 1 - β = 0, on the student's parameters."""
    student, teacher = student_of(nb, task).eval(), Rule(len(task.tokenizer))
    batches, loss_fn = nb.imitation(student, task, teacher, epochs=1, seed=0, target=target)
    plain, teacher_forcing = nb.teacher_forcing(student, task, None, epochs=1, seed=0)
    ours, data = next(iter(batches.epoch(0))), next(iter(plain.epoch(0)))
    loss, logs = loss_fn(student, ours)
    if base == "teacher forcing":
        reference = teacher_forcing(student, data)[0]
    else:
        p = teacher(data).softmax(-1)
        terms = -(p * nb.logits_of(student, data).log_softmax(-1)).sum(-1)  # cross-entropy: the same up to a constant
        reference = terms[data["labels"] != IGNORE].mean()
    pairs = zip(*(torch.autograd.grad(part, list(student.parameters())) for part in (loss, reference)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert logs["rollouts"] == 0 and "length of rollouts" not in logs
    assert logs["length of data"] == (data["labels"] != IGNORE).sum(1).float().mean()


def test_micro_batches_weighted_by_their_positions_make_the_whole(nb):
    batch, teacher = mixed_batch(nb), Rule()
    z = torch.randn(*batch["labels"].shape, 90, generator=generator())
    for target in ("hard", "argmax", "full"):
        whole, parts = nb.imitation_loss(z, batch, teacher, target=target), 0.0
        for index in range(2):
            piece = part(batch | {"z": z}, index, 2)
            share = piece["loss_mask"].sum() / batch["loss_mask"].sum()
            parts += share * nb.imitation_loss(piece["z"], piece, teacher, target=target)
        assert torch.allclose(whole, parts, rtol=1e-5)


def padded(batch: dict, read: int, write: int) -> dict:
    """A data batch with so many columns of padding more on either side."""
    sides = {
        "input_ids": (read, PAD),
        "attention_mask": (read, 0),
        "labels": (write, IGNORE),
        "decoder_input_ids": (write, PAD),
    }
    return batch | {name: F.pad(batch[name], (0, columns), value=fill) for name, (columns, fill) in sides.items()}


@pytest.mark.parametrize("arch", [TINY, ATTENTIVE])
@pytest.mark.parametrize("target", ["hard", "argmax", "full"])
def test_padding_changes_neither_the_loss_nor_its_gradient(nb, arch, target):
    """Of sources of unequal length, of references and of rollouts: a student and a teacher that read them."""
    torch.manual_seed(0)
    models = [nb.build(arch, 90).eval() for _ in range(2)]
    for seed, model in enumerate(models):
        disturb(model, seed)  # so that every word makes a difference, also that of padding
    student, teacher = models[0], nb.as_teacher(models[1])
    keep, rollouts = torch.tensor([True, False, True, False]), rollouts_of([5, 0], 6)
    batch = reference_batch([4, 1, 6, 2], CAP)
    sources = torch.tensor([[9, 8, 7, 6, EOS], [9, EOS, 0, 0, 0], [EOS, 0, 0, 0, 0], [5, 6, 7, EOS, 0]])
    batch |= {"input_ids": sources, "attention_mask": (sources != PAD).long()}

    def loss_and_gradient(read, write, more):
        mixed = nb.mix(padded(batch, read, write), keep, F.pad(rollouts, (0, more), value=PAD))
        loss = nb.imitation_loss(nb.logits_of(student, mixed), mixed, teacher, target=target)
        return loss, torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])

    loss, gradient = loss_and_gradient(0, 0, 0)
    assert loss > 0.1 and any(g.abs().max() > 0.01 for g in gradient)
    for read, write, more in ((3, 0, 0), (0, 4, 0), (0, 0, 3), (2, 5, 1)):
        wider, its_gradient = loss_and_gradient(read, write, more)
        assert torch.allclose(wider, loss, rtol=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(its_gradient, gradient, strict=True))


def test_a_teacher_of_as_many_but_other_tokens_is_refused(nb, task):
    """As many logits, in another order: nothing would fail, and every target would be another word's."""
    student, same = student_of(nb, task), nb.as_teacher(student_of(nb, task, seed=1), task.tokenizer)
    assert same.classes == tuple(task.tokenizer.convert_ids_to_tokens(range(len(task.tokenizer))))
    nb.imitation(student, task, same, epochs=1, seed=0)
    other = kd.Teacher(same.model, name="other", inputs=nb.inputs_of, classes=same.classes[::-1])
    with pytest.raises(ValueError, match="teacher 'other' speaks of other tokens.*one tokenizer.*SeqKD"):
        nb.imitation(student, task, other, epochs=1, seed=0)


def test_the_share_of_rollouts_that_were_cut_is_logged(nb, task, monkeypatch):
    written = torch.tensor([[7, 8, EOS], [7, 8, 9], [7, EOS, PAD], [7, 8, 9]])
    monkeypatch.setattr(nb.kd.seq2seq, "generate", lambda model, batch, **_: written[: len(batch["input_ids"])])
    student = student_of(nb, task)
    batches, loss_fn = nb.imitation(
        student, task, Rule(len(task.tokenizer)), epochs=1, seed=0, beta=("constant", 0.0), target="full", group=1
    )
    _, logs = loss_fn(student, next(iter(batches.epoch(0))))
    assert logs["rollouts"] == 1 and logs["rollouts cut"] == 0.5
    plain, loss_fn = nb.imitation(student, task, Rule(len(task.tokenizer)), epochs=1, seed=0, target="full")
    assert "rollouts cut" not in loss_fn(student, next(iter(plain.epoch(0))))[1]


def lm_of(nb, task, seed=0):
    torch.manual_seed(seed)
    model = nb.language_model((16, 1), task.tokenizer).eval()
    disturb(model, seed)
    return model


def prompt_batch():
    sources = torch.tensor([[9, 8, 7, EOS], [9, EOS, PAD, PAD], [5, 6, EOS, PAD]])
    batch = reference_batch([3, 1, 2], CAP)
    return batch | {"input_ids": sources, "attention_mask": (sources != PAD).long()}


def test_prompts_are_padded_on_the_left_and_end_by_asking(nb):
    prompts = nb.prompts_of(prompt_batch())
    assert prompts["input_ids"].tolist() == [[9, 8, 7, EOS, BOS], [PAD, PAD, 9, EOS, BOS], [PAD, 5, 6, EOS, BOS]]
    assert prompts["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("taught", [True, False])
def test_a_language_models_loss_is_that_of_its_rows_alone(nb, task, taught):
    """An independent formula: every row by itself without any padding, shifted by hand, over the completion's tokens."""
    student, teacher, batch = lm_of(nb, task), lm_of(nb, task, seed=1), prompt_batch()
    loss = nb.lm_loss(student, kd.Teacher(teacher, name="t", inputs=nb.lm_inputs) if taught else None, batch, CAP)
    terms = []
    for source, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        prompt, words = [*source[source != PAD].tolist(), BOS], labels[labels != IGNORE].tolist()
        row = torch.tensor([prompt + words])
        log_q, log_p = (model(input_ids=row).logits[0].log_softmax(-1) for model in (student, teacher))
        for place, word in enumerate(words, start=len(prompt)):
            p = log_p[place - 1].exp()
            terms.append((p * (log_p[place - 1] - log_q[place - 1])).sum() if taught else -log_q[place - 1, word])
    assert torch.allclose(loss, torch.stack(terms).mean(), rtol=1e-4)


def test_a_language_model_learns_on_policy_from_where_it_is(nb, task, monkeypatch):
    """Its own writing is a constant: it carries no gradient, is drawn in evaluation mode, and a perfect student has no loss."""
    student, asked = lm_of(nb, task).train(), []
    itself = kd.Teacher(copy.deepcopy(student), name="itself", inputs=nb.lm_inputs)
    write = nb.kd.seq2seq.generate
    monkeypatch.setattr(nb.kd.seq2seq, "generate", lambda *a, **k: asked.append(write(*a, **k)) or asked[-1])
    assert nb.lm_loss(student.eval(), itself, prompt_batch(), 5, share=1.0).detach().abs() < 1e-5
    assert len(asked) == 1 and asked[0].shape[0] == 3 and not asked[0].requires_grad
    assert not torch.isin(asked[0][:, :1], torch.tensor([PAD, BOS])).any()
    student.train()
    nb.lm_loss(
        student,
        lm_teacher := kd.Teacher(lm_of(nb, task, seed=2), name="t", inputs=nb.lm_inputs),
        prompt_batch(),
        5,
        share=1.0,
    ).backward()
    assert (
        student.training and not lm_teacher.model.training and any(p.grad.abs().max() > 0 for p in student.parameters())
    )
    nb.lm_loss(student, itself, prompt_batch(), 5, share=0.0)
    assert len(asked) == 2


def test_another_vocabulary_and_an_unknown_target_are_refused(nb):
    batch = mixed_batch(nb)
    z = torch.zeros(*batch["labels"].shape, 90)
    for target in ("hard", "argmax", "full"):
        with pytest.raises(ValueError, match="teacher knows 91 tokens and the student 90.*one tokenizer"):
            nb.imitation_loss(z, batch, Rule(91), target=target)
    with pytest.raises(ValueError, match="target is 'soft'; it must be hard, argmax or full"):
        nb.imitation_loss(z, batch, Rule(), target="soft")


# --- divergences -------------------------------------------------------------------------------------------


def by_hand(name: str, z: torch.Tensor, t: torch.Tensor, alpha: float = 0.1) -> float:
    """The textbook's sums, in double precision."""
    q, p = (np.exp(x - x.max(1, keepdims=True)) for x in (z.double().numpy(), t.double().numpy()))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)

    def kl(a, b):
        return (a * np.log(a / b)).sum(1)

    m = (p + q) / 2
    return {
        "forward KL": kl(p, q), "reverse KL": kl(q, p), "JSD": (kl(p, m) + kl(q, m)) / 2, "TV": np.abs(p - q).sum(1) / 2,
        "skew KL": kl(p, alpha * p + (1 - alpha) * q),
    }[name].mean()  # fmt: skip


def logits(seed: int, scale: float) -> torch.Tensor:
    return scale * torch.randn(2, 5, 7, generator=generator(seed))


@given(st.integers(0, 10_000), st.floats(0.1, 6))
def test_divergences_are_their_formulas_with_their_bounds(nb, seed, scale):
    z, t = logits(seed, scale)
    losses = {name: float(divergence(z, t)) for name, divergence in nb.DIVERGENCES.items()}
    assert list(losses) == ["forward KL", "reverse KL", "JSD", "TV", "skew KL"]
    for name, loss in losses.items():
        assert loss == pytest.approx(by_hand(name, z, t), rel=1e-4, abs=1e-6)
        assert float(nb.DIVERGENCES[name](t.clone(), t)) == pytest.approx(0, abs=1e-6)
    assert losses["JSD"] <= math.log(2) + 1e-6 and losses["TV"] <= 1 + 1e-6 and losses["skew KL"] <= math.log(10) + 1e-6
    assert (
        losses["skew KL"] <= losses["forward KL"] + 1e-5 and 2 * losses["TV"] ** 2 <= losses["forward KL"] + 1e-5
    )  # Pinsker
    for name in ("JSD", "TV"):
        assert losses[name] == pytest.approx(float(nb.DIVERGENCES[name](t, z)), rel=1e-4, abs=1e-6)
    assert float(nb.DIVERGENCES["reverse KL"](z, t)) == pytest.approx(
        float(nb.DIVERGENCES["forward KL"](t, z)), rel=1e-4, abs=1e-6
    )


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_skew_kl_for_any_alpha_and_its_limit(nb, seed, alpha):
    z, t = logits(seed, 1.0)
    assert float(nb.skew_kl_loss(z, t, alpha=alpha)) == pytest.approx(
        by_hand("skew KL", z, t, alpha), rel=1e-4, abs=1e-6
    )
    forward = float(kd.losses.kd_loss(z, t))
    assert float(nb.skew_kl_loss(z, t, alpha=0)) == forward
    assert float(nb.skew_kl_loss(z, t, alpha=1e-5)) == pytest.approx(forward, rel=1e-3, abs=1e-6)


@given(st.integers(0, 10_000), st.floats(0.02, 0.98))
def test_generalised_jsd_and_its_limits(nb, seed, beta):
    z, t = logits(seed, 0.5)
    q, p = z.double().softmax(1), t.double().softmax(1)

    def entropy(a):
        return -(a * a.log()).sum(1)

    by_entropies = entropy(beta * p + (1 - beta) * q) - beta * entropy(p) - (1 - beta) * entropy(q)
    jsd = partial(kd.losses.generalized_jsd_loss, z, t)
    assert float(jsd(beta=beta)) == pytest.approx(float(by_entropies.mean()), rel=1e-3, abs=1e-6)
    assert float(jsd(beta=1e-3)) / 1e-3 == pytest.approx(float(kd.losses.kd_loss(z, t)), rel=2e-2)
    assert float(jsd(beta=1 - 1e-3)) / 1e-3 == pytest.approx(float(kd.losses.reverse_kl_loss(z, t)), rel=2e-2)


@pytest.mark.parametrize("alpha", [-0.1, 1, 1.5])
def test_bad_alpha(nb, alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}"):
        nb.skew_kl_loss(*logits(0, 1.0), alpha=alpha)


def test_gradients_of_divergences_vanish_at_the_teacher_and_lead_to_it(nb):
    z, t = logits(1, 1.0)
    for name, divergence in nb.DIVERGENCES.items():
        here = t.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(here, t), here)
        assert gradient.abs().max() < 1e-6 or name == "TV"  # |·| has a corner there
        start = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(start, t), start)
        assert divergence(z - 0.1 * gradient, t) < divergence(z, t)


def test_the_divergence_sees_only_positions_that_count(nb):
    batch, teacher, seen = mixed_batch(nb), Rule(), []
    z = torch.randn(*batch["labels"].shape, 90, generator=generator())

    def divergence(student_logits, teacher_logits):
        seen.append((student_logits, teacher_logits))
        return student_logits.sum()

    nb.imitation_loss(z, batch, teacher, target="full", divergence=divergence)
    (ours, theirs), mask = seen[0], batch["loss_mask"]
    assert torch.equal(ours, z[mask]) and torch.equal(theirs, teacher(batch)[mask])


def loss_of_trl():
    """``trl``'s generalised JSD, wherever this version of ``trl`` keeps it; without one, the test is skipped."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    places = (
        ("experimental.gkd.gkd_trainer", "GKDTrainer"),
        ("trainer.gkd_trainer", "GKDTrainer"),
        ("experimental.gold.gold_trainer", "GOLDTrainer"),
    )
    failures = []
    for module, name in places:
        try:
            return getattr(importlib.import_module(f"trl.{module}"), name).generalized_jsd_loss
        except (ImportError, AttributeError, RuntimeError) as error:  # moved; or of a package that is not there
            failures.append(f"{module}: {error}")
    pytest.skip(f"trl has its generalised JSD in none of the places known: {'; '.join(failures)}")


def test_equal_to_trl(nb):
    """GKD as in ``trl``: the ends of its β are the two KLs, between them it is the generalised JSD."""
    loss = loss_of_trl()
    z, t = logits(2, 2.0)

    def theirs(beta):
        return float(loss(z[None], t[None], beta=beta, labels=torch.zeros(1, 5)))

    assert theirs(0) == pytest.approx(float(nb.DIVERGENCES["forward KL"](z, t)), rel=1e-4)
    assert theirs(1) == pytest.approx(float(nb.DIVERGENCES["reverse KL"](z, t)), rel=1e-4)
    assert theirs(0.5) == pytest.approx(float(nb.DIVERGENCES["JSD"](z, t)), rel=1e-4)
    assert theirs(0.2) == pytest.approx(float(kd.losses.generalized_jsd_loss(z, t, beta=0.2)), rel=1e-4)


# --- rolling out -------------------------------------------------------------------------------------------


def watch(model: nn.Module) -> list:
    """What every forward pass of the model or a part of it finds: training mode, gradients on."""
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    return seen


def sources_of(task, rows: int = 6) -> dict:
    return task.encode(task.train["D"]).batch(torch.arange(rows))


def check_rollout_mode(nb, task, arch=TINY) -> None:
    """Dropout is off while the student writes, and on again afterwards; no gradient is recorded."""
    student, batch = student_of(nb, task, arch=arch), sources_of(task)
    still = generate(copy.deepcopy(student).eval(), batch, max_length=CAP)
    seen = watch(student)
    assert torch.equal(nb.roll_out(student, batch, cap=CAP), still)
    assert seen and set(seen) == {(False, False)}
    assert all(module.training for module in student.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize("arch", [TINY, ATTENTIVE])
def test_the_student_writes_in_evaluation_mode_and_without_gradients(nb, task, arch):
    check_rollout_mode(nb, task, arch)


def test_every_part_is_back_in_its_mode_also_after_an_error(nb, task):
    student, batch = student_of(nb, task), sources_of(task)
    student.encoder.eval()  # a part that somebody froze on purpose

    def fail(module, inputs):
        raise RuntimeError("no memory")

    modes = [module.training for module in student.modules()]
    nb.roll_out(student, batch, cap=CAP)
    assert [module.training for module in student.modules()] == modes
    student.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        nb.roll_out(student, batch, cap=CAP)
    assert [module.training for module in student.modules()] == modes


def test_rollouts_stop_at_the_cap_and_at_one_and_a_half_sources(nb, task, monkeypatch):
    def endless(model, batch, *, max_length, **_):
        return torch.full((len(batch["input_ids"]), max_length), 7)

    monkeypatch.setattr(kd.seq2seq, "generate", endless)
    real = torch.tensor([[1] * n + [0] * (9 - n) for n in (1, 2, 3, 9)])
    tokens = nb.roll_out(None, {"input_ids": real, "attention_mask": real}, cap=12)
    assert (tokens != PAD).sum(1).tolist() == [6, 8, 9, 12]  # floor(1.5 n + 5), at most the cap
    assert all(row[: int((row != PAD).sum())].eq(7).all() for row in tokens)
    with pytest.raises(ValueError, match="cap is 0"):
        nb.roll_out(None, {"input_ids": real, "attention_mask": real}, cap=0)


def test_sampled_rollouts_are_among_the_top_k_and_leave_the_global_stream_alone(nb, task):
    student, batch = student_of(nb, task), sources_of(task)
    before = torch.get_rng_state()
    first, again, other = (
        nb.roll_out(student, batch, cap=CAP, top_k=3, generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    read = nb.context_of(first)
    scores = nb.logits_of(student.eval(), {**batch, "decoder_input_ids": read}).detach()
    scores[..., [PAD, BOS]] = -torch.inf
    among = (scores.topk(3).indices == first[..., None]).any(-1)
    assert among[nb.rollout_mask(read)].all()
    assert not torch.equal(first, nb.roll_out(student, batch, cap=CAP))  # which is greedy


SAYING_NOTHING = {"unknown characters": ["жж щ", "ю", "ж ж ж ж", "щщ"], "empty": [""] * 4}


@pytest.mark.parametrize("arch", [TINY, ATTENTIVE])
@pytest.mark.parametrize("texts", SAYING_NOTHING.values(), ids=SAYING_NOTHING)
def test_sources_that_say_nothing_have_short_rollouts_and_a_finite_loss(nb, task, arch, texts):
    odd = replace(task.train["D"].take(slice(0, 4)), sources=texts)
    words = [row[row != PAD] for row in task.encode(odd).batch(torch.arange(4))["input_ids"]]
    blank = task.tokenizer.convert_tokens_to_ids("▁")
    assert all(row[-1] == EOS and set(row[:-1].tolist()) <= {UNK, blank} for row in words)
    assert all((UNK in row) == bool(text) for row, text in zip(words, texts, strict=True))
    student, teacher = student_of(nb, task, arch=arch), nb.as_teacher(student_of(nb, task, seed=1, arch=arch))
    with torch.no_grad():  # so that no rollout ends by itself
        (student.bias if arch == TINY else student.final_logits_bias[0])[EOS] = -30
    for target in ("hard", "argmax", "full"):
        batches, loss_fn = nb.imitation(
            student, replace(task, train={"D": odd}), teacher, epochs=1, seed=0, beta=("constant", 0.5), target=target
        )
        (batch,) = batches.epoch(0)
        assert batch["rolled"].any() and not batch["rolled"].all()
        loss, _ = loss_fn(student, batch)
        gradients = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    batch = task.encode(odd).batch(torch.arange(4))
    assert (nb.roll_out(student, batch, cap=40) != PAD).sum(1).tolist() == [int(1.5 * len(row) + 5) for row in words]


@pytest.mark.parametrize("arch", [TINY, ATTENTIVE])
def test_a_source_of_unknown_tokens_alone(nb, task, arch):
    """Without the EOS that a data set would give it."""
    student, teacher = student_of(nb, task, arch=arch), nb.as_teacher(student_of(nb, task, seed=1, arch=arch))
    batch = reference_batch([2, 3], CAP)
    batch |= {"input_ids": torch.full((2, 7), UNK), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    rollouts = nb.roll_out(student, batch, cap=CAP)
    assert rollouts.min() >= 0 and rollouts.max() < len(task.tokenizer) and rollouts.shape[1] <= CAP
    mixed = nb.mix(batch, torch.tensor([True, False]), rollouts[1:])
    for target in ("hard", "argmax", "full"):
        assert nb.imitation_loss(nb.logits_of(student, mixed), mixed, teacher, target=target).isfinite()


# --- groups ------------------------------------------------------------------------------------------------


def disturb(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator(100 * seed + number))


def written_by(model, batch) -> bool:
    """Whether the batch's rollouts are what this model writes greedily."""
    rolled = batch["rolled"]
    if not rolled.any():
        return True
    own = generate(model, {name: batch[name][rolled] for name in ("input_ids", "attention_mask")}, max_length=CAP)
    counts = batch["loss_mask"][rolled].sum(1).tolist()
    read = batch["decoder_input_ids"][rolled]
    return all(read[row, 1:n].tolist() == own[row, : n - 1].tolist() for row, n in enumerate(counts))


def check_group(nb, task, monkeypatch, group: int) -> None:
    """Rollouts of a group are those of the student that was there at its start, made in one call."""
    student, calls, expected, fresh = student_of(nb, task), [], [], []

    def counted(model, batch, **options):
        calls.append((flat(model), len(batch["input_ids"])))
        return generate(model, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kd.seq2seq, "generate", counted)
        source = iter(contexts(nb, student, task, beta=("constant", 0.3), group=group).epoch(0))
        for index in range(PAIRS // BATCH):
            if index % group == 0:
                began = copy.deepcopy(student)
                expected.append([flat(student), 0])
            batch = next(source)
            expected[-1][1] += int(batch["rolled"].sum())
            assert written_by(began, batch)
            fresh.append(written_by(student, batch))
            disturb(student, index)  # an update
    expected = [(weights, count) for weights, count in expected if count]  # nobody rolls out: no call
    assert [count for _, count in calls] == [count for _, count in expected]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(calls, expected, strict=True))
    assert all(fresh) == (group == 1)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_group_shares_the_rollouts_made_at_its_start(nb, task, monkeypatch, group):
    check_group(nb, task, monkeypatch, group)


def test_starting_at_a_groups_border_gives_the_rest_of_the_epoch(nb, task):
    student = student_of(nb, task)
    batches = contexts(nb, student, task, epochs=2, beta=("constant", 0.4), group=2, top_k=3)
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, 2))
    assert len(rest) == 3
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs)
    assert not list(batches.epoch(1, 5))


@pytest.mark.parametrize("start", [1, 3])
def test_a_start_in_mid_group_is_refused(nb, task, start):
    with pytest.raises(ValueError, match=f"batch {start} lies within a group of 2.*beginning of a group"):
        next(iter(contexts(nb, None, task, group=2).epoch(0, start)))


# --- seeds, pairs, resuming --------------------------------------------------------------------------------


def drawn(nb, task, seed=0, epochs=(0,), **options) -> list[dict]:
    student = student_of(nb, task)
    batches = contexts(nb, student, task, epochs=2, seed=seed, **{"beta": ("constant", 0.5), **options})
    return [batch for epoch in epochs for batch in batches.epoch(epoch)]


def check_seed(nb, task) -> None:
    first = drawn(nb, task, top_k=3)
    torch.manual_seed(99)  # what else is drawn changes nothing
    torch.rand(17)
    again, other = drawn(nb, task, top_k=3), drawn(nb, task, seed=1, top_k=3)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("id", "decoder_input_ids", "rolled"))
    assert not all(torch.equal(a["rolled"], b["rolled"]) for a, b in zip(first, other, strict=True))


def test_contexts_are_a_function_of_the_seed(nb, task):
    check_seed(nb, task)


def check_coins_of_epochs(nb, task) -> None:
    coins = [batch["rolled"] for batch in drawn(nb, task, epochs=(0, 1))]
    assert len({tuple(row.tolist()) for row in coins}) > 3  # not the same coins batch after batch
    assert not all(torch.equal(a, b) for a, b in zip(coins[:5], coins[5:], strict=True))  # nor epoch after epoch


def test_coins_change_with_batch_and_epoch(nb, task, quick):
    check_coins_of_epochs(nb, task)


@pytest.mark.parametrize("arm", [dict(group=1), dict(target="full"), dict(top_k=3), dict(data="D*")])
def test_paired_arms_meet_the_same_examples_in_the_same_order_with_the_same_coins(nb, task, quick, arm):
    for a, b in zip(drawn(nb, task), drawn(nb, task, **arm), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("id", "input_ids", "rolled"))


def train(nb, task, folder, *, method=None, teacher=None, stop_at=None, **arm):
    """``train_student``, killed at an update if so asked."""
    method = method or partial(nb.imitation, beta=("constant", 0.4), top_k=3, group=2)

    def mortal(student, *args, **options):
        batches, loss_fn = method(student, *args, **options)

        def dying(student, batch):
            if batch["step"] == stop_at:
                raise KeyboardInterrupt
            return loss_fn(student, batch)

        return batches, dying

    torch.manual_seed(0)
    settings = dict(
        seed=0, folder=folder, task=task, teacher=teacher or Rule(len(task.tokenizer)), arch=TINY, rate=0.01, epochs=2
    )
    return nb.train_student(**settings | dict(method=mortal) | arm)


def test_killed_in_mid_group_and_resumed_equals_uninterrupted(nb, task, tmp_path, monkeypatch):
    """To the bit, with dropout and draws; update 8 of 2 epochs of 5 is the second of a group."""
    monkeypatch.setattr("kdlib.training.CHECKPOINT_SECONDS", 0)
    whole = train(nb, task, tmp_path / "whole", judged=False)
    with pytest.raises(KeyboardInterrupt):
        train(nb, task, tmp_path / "killed", judged=False, stop_at=8)
    steps = []
    counting = partial(nb.imitation, beta=("constant", 0.4), top_k=3, group=2)

    def counted(*args, **options):
        batches, loss_fn = counting(*args, **options)
        return batches, lambda student, batch: (steps.append(batch["step"]), loss_fn(student, batch))[1]

    resumed = train(nb, task, tmp_path / "killed", judged=False, method=counted)
    assert steps == [5, 6, 7, 8, 9]  # from the end of the first epoch, where a group ends
    assert torch.equal(flat(whole.model), flat(resumed.model))

    def strip(history):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in history]

    assert strip(whole.history) == strip(resumed.history)
    assert any(row["rollouts"] > 0 for row in whole.history)


def test_a_checkpoint_in_mid_group_is_refused_on_resuming(nb, task, tmp_path):
    def fit(stop_at=None):
        student = student_of(nb, task)
        batches, loss_fn = nb.imitation(
            student, task, Rule(len(task.tokenizer)), epochs=1, seed=0, beta=("constant", 0.4), group=2
        )

        def dying(student, batch):
            if batch["step"] == stop_at:
                raise KeyboardInterrupt
            return loss_fn(student, batch)

        kd.fit(
            student,
            dying,
            batches,
            epochs=1,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            folder=tmp_path,
            checkpoint_every=3,
            progress=False,
        )

    with pytest.raises(KeyboardInterrupt):
        fit(stop_at=4)
    with pytest.raises(ValueError, match="without checkpoint_every"):
        fit()


# --- teacher, frame, relatives -----------------------------------------------------------------------------


def test_the_teacher_answers_in_evaluation_mode_and_is_never_changed(nb, task, tmp_path):
    teacher = nb.as_teacher(student_of(nb, task, seed=5))
    before, seen = flat(teacher.model), watch(teacher.model)
    outcome = train(
        nb, task, tmp_path, teacher=teacher, method=partial(nb.imitation, beta=("constant", 0.5), target="full")
    )
    assert set(seen) == {(False, False)} and torch.equal(flat(teacher.model), before)
    assert outcome.metrics["updates"] == 2 * PAIRS // BATCH
    assert {"score", "runaway", "length", "KL gold", "KL own", "entropy"} <= set(outcome.metrics)
    teacher.model.train()
    batch = mixed_batch(nb)
    with pytest.raises(RuntimeError, match="training mode"):
        nb.imitation_loss(torch.zeros(*batch["labels"].shape, len(task.tokenizer)), batch, teacher)


def test_validation_and_test_stay_gold_whatever_is_trained_on(nb, task, tmp_path):
    truths = []
    watched = replace(task, metric=lambda made, truth: truths.append(truth) or float(len(truths)))
    outcome = train(nb, watched, tmp_path, method=partial(nb.teacher_forcing, data="D*"))
    assert truths == [task.validation.targets, task.validation.targets, task.test.targets]
    assert (
        outcome.metrics["validation"] == 2.0 and outcome.metrics["score"] == 3.0
    )  # the best checkpoint, then the test


def test_every_arm_of_the_family_has_its_contexts_and_targets(nb, task):
    methods = nb.family(("constant", 0.5), 3, 2)
    assert list(methods) == ARMS
    vocabulary = len(task.tokenizer)
    rows = {int(i): row for row, i in enumerate(task.train["D"].ids)}
    for name, method in methods.items():
        student, teacher = student_of(nb, task), Rule(vocabulary)
        batches, loss_fn = method(student, task, teacher, epochs=1, seed=0)
        truth = task.train["D*" if "SeqKD" in name or "*" in name else "D"]
        outputs = task.encode(truth).outputs.padded(torch.arange(PAIRS), IGNORE)[0]
        rolled = False
        for batch, plain in zip(batches.epoch(0), task.batches("D", 0).epoch(0), strict=True):
            assert torch.equal(batch["input_ids"], plain["input_ids"]) and torch.equal(batch["id"], plain["id"])
            own = batch.get("rolled", torch.zeros(BATCH, dtype=torch.bool))
            rolled |= bool(own.any())
            for row in (~own).nonzero().flatten().tolist():
                labels, wanted = batch["labels"][row], outputs[rows[int(batch["id"][row])]]
                assert labels[labels != IGNORE].tolist() == wanted[wanted != IGNORE].tolist()
            loss_fn(student, batch)
        assert rolled == (name.startswith("ImitKD") or name == "argmax, own")
        assert bool(teacher.asked) == (name not in ("vanilla", "SeqKD"))


def test_an_unknown_training_set_is_refused(nb, task):
    with pytest.raises(ValueError, match=r"no training set 'D\+'; there are D, D\*"):
        task.batches("D+", 0)


def test_beams_are_in_the_sets_order_best_first_without_length_normalisation(nb, task, tmp_path):
    teacher = nb.as_teacher(student_of(nb, task, seed=2))
    with torch.no_grad():
        teacher.model.bias[EOS] += 1.5  # so that hypotheses end, and at different lengths
    teacher = nb.as_teacher(teacher.model)
    few = replace(task, train={"D": task.train["D"].take(slice(0, 6))})
    beams = (
        nb.write_out(seed=0, folder=tmp_path, task=few, teacher=teacher, beams=3, batch_size=4).arrays["beams"].long()
    )
    assert beams.shape == (6, 3, CAP)
    data = few.encode(few.train["D"])
    for row in range(6):
        alone = nb.beams_of(teacher.model, data.batch(torch.tensor([row])), CAP, 3)[0]
        assert torch.equal(beams[row, :, : alone.shape[1]], alone)
    flat_beams, batch = beams.flatten(0, 1), data.batch(torch.arange(6).repeat_interleave(3))
    read = nb.context_of(flat_beams)
    log_p = teacher({**batch, "decoder_input_ids": read}).log_softmax(-1).gather(-1, flat_beams[..., None])[..., 0]
    scores = (log_p * nb.rollout_mask(read)).sum(1).view(6, 3)
    assert (scores[:, :-1] >= scores[:, 1:] - 1e-4).all()
    assert len(set(map(int, nb.lengths(flat_beams)))) > 1


def test_seqinter_takes_the_beam_closest_to_the_reference(nb):
    reference = "the small dog sees a red ball"
    beams = [
        ["a cat", "the small dog", reference.upper()],  # the last is the reference itself
        ["x y z", "a small dog runs", "the big dog sees one"],  # no 4-gram matches: unsmoothed, all would score 0
        ["q", "q"],  # equals: the better beam, which is the first
    ]
    chosen = nb.closest_beams(beams, [reference, "the small dog sleeps", "r"], texts=list)
    assert chosen[0] == reference.upper() and chosen[1] == "a small dog runs" and chosen[2] == "q"


# --- judging -----------------------------------------------------------------------------------------------


def test_divergence_by_position_counts_what_training_counts(nb, task):
    teacher = nb.as_teacher(student_of(nb, task, seed=3))
    data = task.encode(task.test)
    outputs = nb.answers(teacher.model, data, CAP)
    for own in (None, outputs):
        kl, entropy, agreed = nb.kl_by_position(teacher.model, teacher, data, CAP, own, batch_size=4)
        counted = ~kl.isnan()
        expected = data.target_lengths if own is None else (nb.lengths(own) + 1).clamp(max=CAP)
        assert counted.sum(1).tolist() == expected.tolist()
        assert kl[counted].abs().max() < 1e-5 and entropy[counted].min() > 0
        assert (agreed[counted] == 1).all() and torch.equal(~agreed.isnan(), counted)
        other, _, rarely = nb.kl_by_position(student_of(nb, task, seed=4).eval(), teacher, data, CAP, own, batch_size=4)
        assert (other[counted] > 0).all() and torch.equal(~other.isnan(), counted)
        assert rarely[counted].mean() < 1 and set(rarely[counted].tolist()) <= {0.0, 1.0}


def test_outputs_that_never_end_and_their_lengths(nb):
    tokens = rollouts_of([3, 0, 6], 6)
    assert nb.unfinished(tokens).tolist() == [False, False, True]
    assert nb.lengths(tokens).tolist() == [3, 0, 6]
    shares = nb.length_shares(tokens)
    assert shares["runaway"] == pytest.approx(1 / 3)
    assert sum(shares.values()) == pytest.approx(1) and shares["length 0"] == pytest.approx(2 / 3)


def test_the_teacher_completes_the_students_first_words(nb, task):
    teacher = nb.as_teacher(student_of(nb, task, seed=3))
    data = task.encode(task.test)
    own = nb.answers(student_of(nb, task, seed=4), data, CAP)
    assert torch.equal(nb.complete(teacher, data, own, 0, CAP), nb.answers(teacher.model, data, CAP))
    assert torch.equal(nb.complete(teacher, data, own, CAP, CAP), own)
    own[0] = rollouts_of([1], CAP)[0]
    three = nb.complete(teacher, data, own, 3, CAP)
    assert torch.equal(three[:, :3], own[:, :3]) and torch.equal(three[0], own[0])  # what has ended stays as it is


# --- bad settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [-0.01, 1.01])
def test_progress_outside_training_is_refused(nb, progress):
    with pytest.raises(ValueError, match=f"progress is {progress}"):
        nb.beta_at(progress, "linear", 0.0)


OUTSIDE = [("linear", -0.2), ("linear", 1.5), ("constant", 1.5), ("constant", -0.1), ("exponential", 0.5)]


@pytest.mark.parametrize("schedule", OUTSIDE)
def test_beta_outside_0_to_1_is_refused(nb, schedule):
    with pytest.raises(ValueError, match=r"β is a probability, so that must lie in \[0, 1\]"):
        nb.beta_at(1, *schedule)


def test_an_unknown_schedule_is_refused(nb):
    with pytest.raises(ValueError, match="no schedule 'cosine'; there are exponential"):
        nb.beta_at(0.5, "cosine", 1.0)


@pytest.mark.parametrize(
    "schedule", [("linear", -0.2), ("linear", 1.5), ("constant", 1.5), ("constant", -0.1), ("exponential", 0.5)]
)
def test_beta_that_leaves_0_to_1_is_refused_before_training(nb, task, schedule):
    with pytest.raises(ValueError, match="β is a probability"):
        contexts(nb, None, task, beta=schedule)


@pytest.mark.parametrize("group", [0, -1])
def test_a_group_below_one_is_refused(nb, task, group):
    with pytest.raises(ValueError, match=f"group is {group}"):
        contexts(nb, None, task, group=group)


# --- mutants -----------------------------------------------------------------------------------------------


def mutant(nb, old: str, new: str) -> Method:
    """The method with one piece of its source replaced."""
    source = "\n\n".join(tagged(NOTEBOOK, "method"))
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times; the mutant no longer fits the notebook"
    namespace = dict(vars(nb))
    exec(compile(source.replace(old, new), "mutant", "exec", dont_inherit=True), namespace)
    return Method(**namespace)


def check_fixed_mix(nb) -> None:
    check_mix(nb, own=[3, 0, 6, 2], gold=[2, 4, 1, 5], keep=[False, False, False, True], width=6)


def check_schedule(nb) -> None:
    assert nb.beta_at(0.5, "exponential", 4.0) == pytest.approx(0.5) and nb.beta_at(0, "exponential", 4.0) == 1


TRAINING_MODE = """student.train().generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=cap,
        do_sample=False, suppress_tokens=[PAD, BOS])[:, 1:]"""
GROUPS = """range(start, len(self), self.group):
            yield from self.mixed(list(itertools.islice(source, self.group))"""
MUTANTS = {
    "coin inverted": ("generator=generator) < beta", "generator=generator) >= beta", check_coin),
    "one coin a batch": ("torch.rand(count, generator=generator) < beta",
                         "(torch.rand(1, generator=generator) < beta).expand(count)", check_coin_per_example),
    "the same coins every epoch": ('"coins", epoch, first + i', '"coins", first + i', check_coins_of_epochs),
    "the same coins every batch of a group": ('"coins", epoch, first + i', '"coins", 0, 0', check_coins_of_epochs),
    "the same coins for every seed": ('stream(self.seed, "coins"', 'stream(0, "coins"', check_seed),
    "position 0 dropped": ("    mask[:, 0] = True\n", "", check_position_zero),
    "padding trained": ("(context != EOS) & (context != PAD)", "context != EOS", check_fixed_mix),
    "what follows EOS trained": ("(context != EOS) & (context != PAD)", "context != PAD", check_fixed_mix),
    "rollout not shifted": ("F.pad(rollouts[:, :-1], (1, 0), value=BOS)", "rollouts.clone()", check_fixed_mix),
    "reference words left on rollouts": ("    labels[rolled] = IGNORE", "    pass", check_fixed_mix),
    "teacher shifted by one": (".to(student_logits.device)", ".to(student_logits.device).roll(-1, 1)", check_targets),
    "teacher shifted by one, full": (".to(student_logits.device)", ".to(student_logits.device).roll(1, 1)", check_full),
    "argmax of the student": ("answers.argmax(-1)", "student_logits[asked].argmax(-1)", check_targets),
    "teacher's argmax on data too": ('if target == "hard" else', 'if target == "never" else', check_targets),
    "rollouts in training mode": ("kd.seq2seq.generate(student, batch, max_length=cap, top_k=top_k, generator=generator)",
                                  TRAINING_MODE, check_rollout_mode),
    "a rollout for every batch": (GROUPS, GROUPS.replace(", self.group", "", 1).replace("self.group", "1"), check_group),
    "β rises": ("value**-progress", "value ** (progress - 1)", check_schedule),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(nb, task, monkeypatch, name):
    old, new, check = MUTANTS[name]
    needs = {
        check_rollout_mode: (task,),
        check_coins_of_epochs: (task,),
        check_seed: (task,),
        check_group: (task, monkeypatch, 4),
    }
    check(nb, *needs.get(check, ()))
    with pytest.raises(AssertionError):
        check(mutant(nb, old, new), *needs.get(check, ()))


def test_chained_pairs_keep_their_order_and_drop_what_is_left_over(nb):
    data = kd.data.SequenceSet(list("abcdefg"), list("ABCDEFG"), torch.arange(7), "letters")
    chained = nb.chain(data, 3)
    assert (chained.sources, chained.targets) == (["a b c", "d e f"], ["A B C", "D E F"])
    assert chained.ids.tolist() == [0, 3] and chained.name == "letters-by-3"
    assert nb.chain(data, 1).sources == data.sources and chained.fingerprint != data.take(slice(0, 6, 3)).fingerprint
