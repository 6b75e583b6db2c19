"""Notebook 03: the method cells, lifted out and held to eqs. 1 to 8, to its rivals' closed forms and to exact resumption."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chapters import namespace, tagged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kdlib as kd
from kdlib.data.rows import Ragged
from kdlib.data.text import TextSet, TokenSet

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_reinforced_teacher_selection.ipynb"
CLASSES, TEACHERS = 4, 3


class Notebook:
    """What a notebook's setup and method cells define (with a short repr, for messages)."""

    def __init__(self, sources: list[str]) -> None:
        vars(self).update(namespace(sources, "03"))


@pytest.fixture(scope="module")
def nb():
    return Notebook(tagged(NOTEBOOK, "setup", "method"))


# --- a small world: K teachers, each right in its own field and confidently wrong elsewhere ---------------------


def tokens(count: int, first_id: int = 0, seed: int = 0, name: str = "synthetic") -> TokenSet:
    """Texts of 3 to 6 numbers, of which 3 in 5 tell the class."""
    random = torch.Generator().manual_seed(seed)
    labels, lengths = torch.arange(count) % CLASSES, torch.randint(3, 7, (count,), generator=random)
    rows = []
    for label, length in zip(labels.tolist(), lengths.tolist(), strict=True):
        telling, any_word = (1 + torch.randint(n, (length,), generator=random) for n in (5, 30))
        rows.append(torch.where(torch.rand(length, generator=random) < 0.6, 5 * label + telling, any_word))
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    source = TextSet(texts, labels, torch.arange(count) + first_id, [f"class {c}" for c in range(CLASSES)], name)
    return TokenSet(source, Ragged(lengths, torch.cat(rows).to(torch.int32)), None, 0, 31)


def specialists(nb, data: TokenSet, seed: int = 1):
    """Evidence in which teacher k is right exactly in field k, and the field [N] of each example."""
    random = torch.Generator().manual_seed(seed)
    field = torch.randint(TEACHERS, (len(data),), generator=random)
    wrong = (data.labels[:, None] + torch.randint(1, CLASSES, (len(data), TEACHERS), generator=random)) % CLASSES
    said = torch.where(F.one_hot(field, TEACHERS).bool(), data.labels[:, None], wrong)
    vectors = F.one_hot(field, TEACHERS) + 0.1 * torch.randn(len(data), TEACHERS, generator=random)
    answers = 0.03 + 0.88 * F.one_hot(said, CLASSES)
    return nb.Evidence(data.ids, answers, vectors, data.labels, torch.ones(len(data), dtype=torch.bool)), field


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def make_task(nb, count=240, **settings):
    train, validation = tokens(count), tokens(60, 10_000_000, seed=2)
    evidence, field = specialists(nb, train)
    plan = dict(
        student=("bag", 16), train=train, validation=validation, tests={"test": validation}, reward_set=validation,
        evidence=evidence, dev_evidence=specialists(nb, validation)[0], slices=field, slice_names=("a", "b", "c"),
        teacher_names=("1", "2", "3"), metric=accuracy, epochs=12, batch_size=40, alpha=0.7, eval_every=4,
    )  # fmt: skip
    return nb.Task(**{**plan, **settings})


@pytest.fixture(scope="module")
def task(nb):
    return make_task(nb)


@pytest.fixture(scope="module")
def short_task(nb):
    """15 steps, an evaluation every epoch; the last batch of an epoch is uneven."""
    return make_task(nb, count=55, epochs=5, batch_size=20, eval_every=1)


def train(nb, task, chooser, *, seed=0, folder=None, rate=1e-2, policy_rate=3e-2, **engine):
    """One run, as ``kd.run_grid`` starts it: its outcome, and what ``kd.fit`` returned."""
    fit, fits = kd.fit, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "fit", lambda *a, **k: fits.append(fit(*a, **{**k, **engine})) or fits[0])
        kd.seed_everything(seed)
        outcome = nb.train_student(
            seed=seed, folder=folder, tasks={seed: task}, chooser=chooser, rate=rate, policy_rate=policy_rate
        )
    return outcome, fits[0]


def assert_same_run(one, other):
    (outcome, fit), (outcome_, fit_) = one, other
    ours, theirs = fit.model.state_dict(), fit_.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in f.history] for f in (fit, fit_)]
    assert timeless[0] == timeless[1]
    assert outcome.metrics == outcome_.metrics
    assert torch.equal(outcome.arrays["pi"], outcome_.arrays["pi"])


# --- evidence for rules: any number of teachers, from flat to one-hot -------------------------------------------


def any_evidence(nb, rows=5, teachers=3, classes=4, sharpness=1.0, seed=0, labelled=None):
    random = torch.Generator().manual_seed(seed)
    answers = (sharpness * torch.randn(rows, teachers, classes, generator=random)).softmax(2)
    labels = torch.randint(classes, (rows,), generator=random)
    if labelled is None:
        labelled = torch.rand(rows, generator=random) < 0.7
    return nb.Evidence(torch.arange(rows), answers, torch.randn(rows, 2, generator=random), labels, labelled)


def ask(rule, evidence, seed=0, **settings):
    """A rule's weights for a student whose logits are a function of the seed."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(evidence.ids), evidence.probabilities.shape[2], generator=random)
    return rule(evidence, logits, random, **settings)


SHAPES = dict(
    rows=st.integers(1, 5), teachers=st.integers(2, 6), classes=st.integers(2, 7),
    sharpness=st.sampled_from([0.0, 1.0, 20.0, 1e4]), seed=st.integers(0, 999),
)  # fmt: skip
quick = settings(max_examples=60, deadline=None)
RULES = {
    "nobody": {}, "uniform": {}, "random_single": {}, "random_subsets": {"rate": 0.3}, "best_per_instance": {},
    "label_probability": {}, "ca_mkd": {}, "mt_bert": {}, "entropy_weights": {}, "ae_kd": {},
}  # fmt: skip
FITS = {"best_on_dev": {}, "accuracy_on_dev": {}, "regression_on_dev": {"steps": 5}, "logistic_router": {"steps": 5}}
FROM_TWO = ("ca_mkd", "entropy_weights")  # their formulas divide by K - 1; gather() refuses a single teacher


def are_probabilities(weights, shape, total=1.0):
    assert weights.shape == shape
    assert (weights >= -1e-6).all()
    assert torch.allclose(weights.sum(1), torch.full((shape[0],), total), atol=1e-5)


def every_rule_gives_probabilities(nb, **shape):
    evidence = any_evidence(nb, **shape)
    size = evidence.probabilities.shape[:2]
    for name, options in RULES.items():
        if size[1] > 1 or name not in FROM_TWO:
            are_probabilities(ask(getattr(nb, name), evidence, **options), size, total=float(name != "nobody"))


@quick
@given(**SHAPES | {"teachers": st.integers(1, 6)})
def test_every_rule_gives_probabilities(nb, **shape):
    every_rule_gives_probabilities(nb, **shape)


@settings(max_examples=15, deadline=None)
@given(**SHAPES)
def test_every_fit_gives_probabilities(nb, **shape):
    shape["rows"] += 1
    evidence, dev = any_evidence(nb, **shape), any_evidence(nb, **{**shape, "seed": 1000})
    evidence.labelled[0] = True  # the router learns from labelled examples
    for name, options in FITS.items():
        rule = getattr(nb, name)(evidence, dev, **options)
        are_probabilities(ask(rule, evidence), evidence.probabilities.shape[:2])


@quick
@given(rows=st.integers(1, 5), teachers=st.integers(1, 6), rate=st.floats(0, 1), seed=st.integers(0, 999))
def test_a_random_subset_is_never_empty(nb, rows, teachers, rate, seed):
    evidence = any_evidence(nb, rows, teachers)
    weights = ask(partial(nb.random_subsets, rate=rate), evidence, seed)
    are_probabilities(weights, (rows, teachers))
    assert (((weights > 0).sum(1) == 1) if rate == 0 else (weights > 0).any(1)).all()


def rules_have_their_closed_forms(nb, teachers=3, sharpness=2.0, seed=0, classes=5, rows=6):
    """In float64 numpy, row by row, from the papers' formulas."""
    evidence = any_evidence(nb, rows, teachers, classes, sharpness, seed)
    p, found = evidence.probabilities.double().numpy(), {name: ask(getattr(nb, name), evidence) for name in RULES if name != "random_subsets"}  # fmt: skip
    for i in range(rows):
        whole = -np.log(p[i, :, int(evidence.labels[i])])
        ce = np.minimum(whole, 6.0)
        h = -(p[i] * np.log(p[i])).sum(1)
        expected = {
            "ca_mkd": (1 - np.exp(ce) / np.exp(ce).sum()) / (teachers - 1),
            "mt_bert": (1 / (1 + ce)) / (1 / (1 + ce)).sum(),
            "label_probability": np.exp(-ce) / np.exp(-ce).sum(),
            "best_per_instance": (whole == whole.min()).astype(float),
        }
        if not evidence.labelled[i]:
            expected = {name: np.full(teachers, 1 / teachers) for name in expected}
        expected |= {
            "uniform": np.full(teachers, 1 / teachers),
            "entropy_weights": (1 - h / h.sum()) / (teachers - 1),
        }
        for name, weights in expected.items():
            assert np.allclose(found[name][i].numpy(), weights, atol=1e-5), name


@quick
@given(st.integers(2, 6), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 999))
def test_rules_have_their_closed_forms(nb, teachers, sharpness, seed):
    rules_have_their_closed_forms(nb, teachers, sharpness, seed)


def test_teachers_without_any_doubt_get_equal_entropy_weights(nb):
    certain = replace(any_evidence(nb), probabilities=F.one_hot(torch.randint(4, (5, 3)), 4).float())
    assert torch.allclose(ask(nb.entropy_weights, certain), torch.full((5, 3), 1 / 3))


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(2, 6), rows=st.integers(1, 4), sharpness=st.sampled_from([0.5, 2.0, 20.0]), seed=st.integers(0, 999))  # fmt: skip
def test_ae_kd_finds_the_shortest_gradient_of_two_teachers(nb, classes, rows, sharpness, seed):
    evidence = any_evidence(nb, rows, 2, classes, sharpness, seed)
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    one, two = ((logits.softmax(1) - evidence.probabilities[:, k]).flatten() for k in range(2))

    def length(w):
        return (w[:, None] * one + (1 - w[:, None]) * two).square().sum(1)

    shortest = float(length(torch.linspace(0, 1, 1001)).min())
    scale = float((one - two).square().sum() + length(torch.tensor([0.5])))
    for steps, slack in ((30, 0.02), (300, 1e-3)):
        weights = nb.ae_kd(evidence, logits, None, steps=steps)
        assert (weights == weights[0]).all()  # one mixture for the whole batch
        assert float(length(weights[:1, 0])) <= shortest + slack * scale + 1e-7


def test_fits_on_the_validation_set_know_who_is_good(nb):
    """Teacher 1 of 3 is right four times in five, the others never."""
    evidence = any_evidence(nb, 40, labelled=torch.ones(40, dtype=torch.bool))
    said = (evidence.labels[:, None] + torch.tensor([1, 0, 2])) % 4
    said[::5, 1] = (evidence.labels[::5] + 3) % 4
    dev = replace(evidence, probabilities=0.03 + 0.88 * F.one_hot(said, 4))
    only = torch.tensor([0.0, 1.0, 0.0]).expand(40, -1)
    assert torch.equal(ask(nb.best_on_dev(evidence, dev), evidence), only)
    assert torch.allclose(ask(nb.accuracy_on_dev(evidence, dev), evidence), only, atol=1e-4)
    learned = ask(nb.regression_on_dev(evidence, dev), evidence)
    best = min(  # by brute force over the simplex: the mixture of the highest likelihood
        ((i / 20, j / 20, (20 - i - j) / 20) for i in range(21) for j in range(21 - i)),
        key=lambda w: float(-(dev.probabilities[torch.arange(40), :, dev.labels] @ torch.tensor(w)).log().mean()),
    )
    assert (learned[0] - torch.tensor(best)).abs().max() < 0.1


# --- what the student learns from -------------------------------------------------------------------------------


def student_losses_are_eq_one(nb):
    evidence = any_evidence(nb, 6, labelled=torch.tensor([1, 1, 0, 0, 1, 1]).bool())
    weights = torch.tensor([[0.5, 0.5, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0], [0, 0, 0], [0.2, 0.3, 0.5]])
    z = torch.randn(6, 4, requires_grad=True)
    losses = nb.student_losses(z, weights, evidence, 0.7).tolist()
    log_q = z.detach().double().log_softmax(1).numpy()
    for i in range(6):
        target = (weights[i, :, None] * evidence.probabilities[i]).sum(0).double().numpy()
        hard = -log_q[i, int(evidence.labels[i])] * float(evidence.labelled[i])
        soft = (target * (np.log(target) - log_q[i])).sum() if target.any() else None
        assert losses[i] == pytest.approx(hard if soft is None else 0.7 * soft + 0.3 * hard, abs=1e-5)
    hidden = replace(evidence, labels=torch.where(evidence.labelled, evidence.labels, 3 - evidence.labels))
    gradients = [torch.autograd.grad(nb.student_losses(z, weights, e, 0.7).mean(), z)[0] for e in (evidence, hidden)]
    assert torch.equal(*gradients)


def test_student_losses_are_eq_one(nb):
    student_losses_are_eq_one(nb)


def losses_are_of_the_right_teacher_and_cut(nb):
    evidence = any_evidence(nb, 8, 3, 5)
    evidence.probabilities[0, 1] = F.one_hot((evidence.labels[0] + 1) % 5, 5)  # gives the label no chance at all
    found = nb.teacher_losses(evidence)
    for i, k in itertools.product(range(8), range(3)):
        p = float(evidence.probabilities[i, k, evidence.labels[i]])
        assert float(found[i, k]) == pytest.approx(min(-math.log(max(p, 1e-30)), 6.0), abs=1e-5)


def test_losses_are_of_the_right_teacher_and_cut(nb):
    losses_are_of_the_right_teacher_and_cut(nb)


# --- the state --------------------------------------------------------------------------------------------------


def test_the_state_is_standardised_over_the_training_texts_and_cut(nb):
    evidence = any_evidence(nb, 50, labelled=torch.ones(50, dtype=torch.bool))
    evidence.vectors[0, 0] = 1e4
    evidence.vectors[:, 1] = 7.0  # says nothing
    state = nb.state_of(evidence)
    raw = torch.cat([evidence.vectors, evidence.probabilities.flatten(1), nb.teacher_losses(evidence)], 1).double()
    by_hand = ((raw - raw.mean(0)) / raw.std(0).clamp_min(1e-6)).clamp(-5, 5)
    assert state.shape == (50, 2 + 3 * 4 + 3) and torch.allclose(state.double(), by_hand, atol=1e-4)
    assert state[0, 0] == 5 and (state[:, 1] == 0).all() and state.abs().max() <= 5
    shifted = replace(evidence, vectors=30 * evidence.vectors + 2)
    assert torch.allclose(nb.state_of(shifted), state, atol=1e-4)


def test_a_policys_states_know_no_other_part(nb, task):
    """Other validation and test parts leave the states as they are."""
    other = replace(task, dev_evidence=any_evidence(nb), tests={}, validation=task.validation.take(slice(0, 8)))
    states = [nb.Reinforced(t, t.evidence).states for t in (task, other)]
    assert torch.equal(*states) and torch.equal(states[0], nb.state_of(task.evidence))


def test_a_state_without_labels(nb):
    evidence = any_evidence(nb, 20, labelled=torch.arange(20) < 8)
    with pytest.raises(ValueError, match="some examples have none; call it with use_labels=False"):
        nb.state_of(evidence)
    blind = nb.state_of(evidence, use_labels=False)
    assert blind.shape == (20, 2 + 3 * 4)
    assert torch.equal(blind, nb.state_of(replace(evidence, labels=3 - evidence.labels), use_labels=False))


# --- the policy and its selection -------------------------------------------------------------------------------


def all_actions(kind, teachers):
    """All 2^K subsets, or the K single teachers of a softmax policy."""
    if kind == "SoftmaxPolicy":
        return torch.eye(teachers)
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=teachers)))


def random_policy(nb, kind, size, teachers, seed=0):
    policy = getattr(nb, kind)(size, teachers)
    random = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, generator=random)
    return policy.double()


def log_prob_is_eq_three(nb, teachers=3):
    states = torch.randn(4, 2, dtype=torch.float64)
    for kind in ("BernoulliPolicy", "SoftmaxPolicy"):
        policy, actions = random_policy(nb, kind, 2, teachers), all_actions(kind, teachers).double()
        pi = policy.probabilities(states)
        found = torch.stack([policy.log_prob(states, a.expand(4, -1)) for a in actions], 1).exp()
        by_hand = torch.stack([(pi**a).prod(1) if kind == "SoftmaxPolicy" else (pi**a * (1 - pi) ** (1 - a)).prod(1) for a in actions], 1)  # fmt: skip
        assert torch.allclose(found, by_hand)
        assert torch.allclose(found.sum(1), torch.ones(4).double())


@pytest.mark.parametrize("teachers", range(1, 7))
def test_log_prob_is_eq_three(nb, teachers):
    log_prob_is_eq_three(nb, teachers)


@pytest.mark.parametrize("kind", ["BernoulliPolicy", "SoftmaxPolicy"])
def test_actions_are_drawn_with_the_policys_probabilities(nb, kind):
    policy, state = random_policy(nb, kind, 2, 4), torch.tensor([[0.3, -0.8]]).double()
    pi = policy.probabilities(state)[0].detach()
    actions = policy.sample(state.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert ((actions == 0) | (actions == 1)).all() and not actions.requires_grad
    assert (actions.mean(0) - pi).abs().max() < 0.02  # more than five standard errors
    if kind == "SoftmaxPolicy":
        assert (actions.sum(1) == 1).all() and float(pi.sum()) == pytest.approx(1)
    again = policy.sample(state.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert torch.equal(actions, again)


def test_an_untrained_policy_prefers_nobody(nb):
    states = torch.randn(5, 7)
    assert (nb.BernoulliPolicy(7, 3).probabilities(states) == 0.5).all()
    assert torch.allclose(nb.SoftmaxPolicy(7, 3).probabilities(states), torch.full((5, 3), 1 / 3))


def selection_shares_equally_and_is_never_empty(nb, teachers=4):
    actions = all_actions("BernoulliPolicy", teachers)
    pi = torch.rand(len(actions), teachers, generator=torch.Generator().manual_seed(0))
    some, count = actions.sum(1) > 0, actions.sum(1, keepdim=True)
    for empty in ("best", "labels"):
        weights = nb.selection_weights(actions, pi, empty)
        assert torch.allclose(weights[some], actions[some] / count[some])
        for row in weights[~some]:
            assert torch.equal(row, F.one_hot(pi[0].argmax(), teachers).float() if empty == "best" else torch.zeros(teachers))  # fmt: skip


@pytest.mark.parametrize("teachers", range(1, 7))
def test_selection_shares_equally_and_is_never_empty(nb, teachers):
    selection_shares_equally_and_is_never_empty(nb, teachers)


def test_an_unknown_fallback_is_refused(nb):
    with pytest.raises(ValueError, match="empty is 'mean'.*'best'.*'labels'"):
        nb.selection_weights(torch.ones(1, 2), torch.ones(1, 2), "mean")


# --- REINFORCE against the exact expectation: every joint action of a batch is listed ------------------------------


def listed(nb, kind, baseline, rewards, states):
    """Every joint action's probability [A] and gradient estimate [A, P], and the exact gradient [P] of E[r].

    rewards [B, actions]: of each example, by its own action.
    """
    policy = random_policy(nb, kind, states.shape[1], TEACHERS)
    actions = all_actions(kind, TEACHERS).double()
    log_probs = torch.stack([policy.log_prob(states, a.expand(len(states), -1)) for a in actions], 1)

    def flat(value):
        gradient = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in gradient])

    exact = flat((log_probs.exp() * rewards).sum(1).mean())
    chances, estimates, rows = [], [], torch.arange(len(states))
    for joint in itertools.product(range(len(actions)), repeat=len(states)):
        log_prob = log_probs[rows, list(joint)]
        chances.append(log_prob.detach().sum().exp())
        estimates.append(-flat(nb.reinforce_loss(log_prob, rewards[rows, list(joint)], baseline)))
    return torch.stack(chances), torch.stack(estimates), exact


def toy(kind, batch, seed=0):
    """Rewards of the size and sign of a cross-entropy, and states."""
    random = torch.Generator().manual_seed(seed)
    count = len(all_actions(kind, TEACHERS))
    rewards = -2 + 0.5 * torch.randn(batch, count, generator=random, dtype=torch.float64)
    return rewards, torch.randn(batch, 2, generator=random, dtype=torch.float64)


def the_estimator_is_unbiased(nb, kind="BernoulliPolicy", batch=2):
    rewards, states = toy(kind, batch)
    variances = {}
    for baseline in (None, "mean"):
        chances, estimates, exact = listed(nb, kind, baseline, rewards, states)
        assert float(chances.sum()) == pytest.approx(1)
        assert exact.abs().max() > 0.01
        assert torch.allclose(chances @ estimates, exact, atol=1e-10)
        variances[baseline] = float(chances @ (estimates - exact).square().sum(1))
    assert batch == 1 or variances["mean"] < 0.5 * variances[None]


@pytest.mark.parametrize(
    ("kind", "batch"), [("BernoulliPolicy", 1), ("BernoulliPolicy", 2), ("SoftmaxPolicy", 1), ("SoftmaxPolicy", 3)]
)
def test_the_estimator_is_unbiased(nb, kind, batch):
    the_estimator_is_unbiased(nb, kind, batch)


@pytest.mark.parametrize("baseline", [None, "mean", "scaled"])
@pytest.mark.parametrize("kind", ["BernoulliPolicy", "SoftmaxPolicy"])
def test_a_reward_blind_to_the_action_has_no_expected_gradient(nb, kind, baseline):
    rewards, states = toy(kind, 2)
    chances, estimates, _ = listed(nb, kind, baseline, rewards[:, :1].expand_as(rewards), states)
    assert torch.allclose(chances @ estimates, torch.zeros(estimates.shape[1]).double(), atol=1e-10)
    assert estimates.abs().max() > 0.01  # a walk, not a rest


def no_gradient_goes_through_the_reward(nb):
    log_prob, reward = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    for baseline in (None, "mean", "scaled"):
        loss = nb.reinforce_loss(log_prob, reward, baseline)
        assert torch.autograd.grad(loss, reward, allow_unused=True, retain_graph=True)[0] is None
        assert torch.autograd.grad(loss, log_prob)[0].abs().sum() > 0


def test_no_gradient_goes_through_the_reward(nb):
    no_gradient_goes_through_the_reward(nb)


@quick
@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 99))
def test_the_scaled_baseline_does_not_see_the_rewards_scale(nb, factor, shift, seed):
    log_prob, reward = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = nb.reinforce_loss(log_prob, factor * reward + shift, "scaled")
    assert float(moved) == pytest.approx(float(nb.reinforce_loss(log_prob, reward, "scaled")), abs=1e-6)


def test_impossible_decisions_are_refused(nb):
    with pytest.raises(ValueError, match=r"log_prob \(4, 3\) and reward \(4,\)"):
        nb.reinforce_loss(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="baseline is 'median'"):
        nb.reinforce_loss(torch.zeros(4), torch.zeros(4), "median")
    with pytest.raises(ValueError, match="no reward 'r4'; there are r1, r2, r3"):
        nb.reward_of("r4", before=torch.zeros(2), after=torch.zeros(2), distance=torch.zeros(2))


# --- one batch late ---------------------------------------------------------------------------------------------


def after_one_update(nb, task, **options):
    """A chooser that is no longer undecided and has chosen for a batch, and the student after its update."""
    kd.seed_everything(0)
    chooser = nb.Reinforced(task, task.evidence, warm=0, **options)
    nn.init.normal_(chooser.policy.linear.weight, std=0.3)
    student = nb.build_student(task.student, task.train)
    batch = {**next(iter(task.train.batches(20, seed=0).epoch(0))), "epoch": 0, "step": 0}
    logits = student(**nb.tokens_of(batch))
    weights = chooser.choose(student, batch, logits, torch.Generator().manual_seed(0))
    seen = task.evidence.take(task.evidence.rows(batch["id"]))
    before = F.cross_entropy(logits, batch["y"], reduction="none").detach()
    nb.student_losses(logits, weights, seen, task.alpha).mean().backward()
    assert not weights.requires_grad and all(p.grad is None for p in chooser.parameters())
    torch.optim.SGD(student.parameters(), lr=0.5).step()
    student.zero_grad()
    return chooser, student, batch, weights, before, seen


def half_labelled(task):
    labelled = torch.rand(len(task.evidence.ids), generator=torch.Generator().manual_seed(3)) < 0.5
    return replace(task, evidence=replace(task.evidence, labelled=labelled))


def the_policy_learns_from_the_update_of_its_own_batch(nb, task=None, reward="gain", labels="all"):
    task = task or make_task(nb)
    task = task if labels == "all" else half_labelled(task)
    chooser, student, batch, weights, before, seen = after_one_update(
        nb, task, reward=reward, baseline="mean", gamma=0.3, use_labels=labels == "all"
    )
    late, logs = chooser.settle(student)
    with torch.no_grad():
        z = student(**nb.tokens_of(batch))
        after = F.cross_entropy(z, batch["y"], reduction="none")
        target = torch.einsum("bk,bkc->bc", weights, seen.probabilities)
        distance = F.kl_div(z.log_softmax(1), target, reduction="none").sum(1)
        dev = accuracy(kd.metrics.predict(student, task.reward_set), task.reward_set.labels)
        keep = seen.labelled
        rewards = {
            "gain": before - after, "r1": -after, "r2": -after - distance, "stale": -before,
            "r3": 0.3 * (-after - distance) + 0.7 * dev, "batch": -(after + distance)[keep].mean().expand(20),
        }[reward][keep]  # fmt: skip
        pi = chooser.policy.probabilities(chooser.states[task.evidence.rows(batch["id"])])
    action = chooser.memory.read()["action"]
    assert torch.equal(weights, nb.selection_weights(action, pi, "best"))
    log_prob = (action * pi.log() + (1 - action) * (1 - pi).log()).sum(1)[keep]
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    assert float(logs["reward"]) == pytest.approx(float(rewards.mean()), abs=1e-5)
    assert float(late.detach()) == pytest.approx(float(-((rewards - others) * log_prob).mean()), abs=1e-5)
    late.backward()
    assert all(p.grad is None for p in student.parameters())
    assert reward == "batch" or chooser.policy.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("labels", ["all", "half"])
@pytest.mark.parametrize("reward", ["gain", "r1", "r2", "r3", "batch", "stale"])
def test_the_policy_learns_from_the_update_of_its_own_batch(nb, task, reward, labels):
    the_policy_learns_from_the_update_of_its_own_batch(nb, task, reward, labels)


def the_memory_holds_exactly_the_last_batch(nb):
    memory, random = nb.Memory(6, 9, 3), torch.Generator().manual_seed(0)
    for rows, length in ((6, 9), (4, 3), (1, 1), (5, 9)):
        facts = {name: torch.randint(1, 9, (rows, length), generator=random) for name in ("input_ids", "attention_mask")}  # fmt: skip
        facts |= {"id": torch.arange(rows) + 1, "before": torch.rand(rows, generator=random)}
        facts |= {name: torch.rand(rows, 3, generator=random) for name in ("action", "weights")}
        memory.write(facts)
        kept = memory.read()
        for name, value in facts.items():
            assert torch.equal(kept[name][(..., *(slice(n) for n in value.shape[1:]))], value)
        assert (kept["attention_mask"][:, length:] == 0).all() and (memory.id[rows:] == 0).all()
        before = {name: value.clone() for name, value in kept.items()}
        memory.write({name: value[:1] for name, value in facts.items()})
        assert all(torch.equal(kept[name], before[name]) for name in kept)  # copies


def test_the_memory_holds_exactly_the_last_batch(nb):
    the_memory_holds_exactly_the_last_batch(nb)


def silenced(nb):
    """A chooser that selects as ever and never learns."""

    class Silent(nb.Reinforced):
        def settle(self, student):
            return None, {}

    return Silent


def test_only_reinforce_moves_the_policy(nb, short_task):
    outcome, fit = train(nb, short_task, partial(silenced(nb), warm=1), policy_rate=0.1, keep="last")
    assert (outcome.arrays["pi"] == 0.5).all()
    learned, _ = train(nb, short_task, partial(nb.Reinforced, warm=1), policy_rate=0.1, keep="last")
    assert (learned.arrays["pi"] != 0.5).all()


def test_reinforce_never_moves_the_student(nb, short_task):
    """A policy that may not move: with its loss and without it, the student is the same to the bit."""
    students = [
        train(nb, short_task, partial(kind, warm=1), policy_rate=0.0, keep="last")[1].model.student.state_dict()
        for kind in (nb.Reinforced, silenced(nb))
    ]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def attention_takes_the_student_as_it_is(nb, task=None):
    """AMTML-KD's weights learn from the student's loss; the student's gradient is that of fixed weights."""
    task = task or make_task(nb)
    kd.seed_everything(0)
    student, chooser = nb.build_student(task.student, task.train), nb.Attentive(task, task.evidence, width=16)
    batch = next(iter(task.train.batches(20, seed=0).epoch(0)))
    logits = student(**nb.tokens_of(batch))
    weights = chooser.choose(student, batch, logits, None)
    are_probabilities(weights, (20, TEACHERS))
    seen = task.evidence.take(task.evidence.rows(batch["id"]))
    theirs, ours = list(student.parameters()), list(chooser.parameters())
    live, still = (nb.student_losses(logits, w, seen, 0.7).mean() for w in (weights, weights.detach()))
    assert torch.autograd.grad(live, ours[0], retain_graph=True)[0].abs().sum() > 0
    gradients = [torch.autograd.grad(loss, theirs, retain_graph=True) for loss in (live, still)]
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*gradients, strict=True))


def test_attention_takes_the_student_as_it_is(nb, task):
    attention_takes_the_student_as_it_is(nb, task)


def test_warm_start_listens_to_the_mean(nb, short_task):
    def until(warm):
        return train(nb, short_task, partial(nb.Reinforced, warm=warm), keep="last")

    outcome, fit = until(5)
    _, mean = train(nb, short_task, partial(nb.Rule, rule=nb.uniform), keep="last")
    assert (outcome.arrays["pi"] == 0.5).all() and int(fit.model.chooser.memory.count) == 0
    assert all(torch.equal(v, mean.model.state_dict()[k]) for k, v in fit.model.state_dict().items() if "student" in k)
    assert [("reward" in row) for row in until(3)[1].history] == [False, False, False, True, True]


# --- does it find the right teacher? ------------------------------------------------------------------------------


def test_the_policy_finds_the_right_teacher_and_a_blind_reward_does_not(nb, task):
    right = F.one_hot(task.slices, TEACHERS).bool()
    lead = {"gain": [], "stale": []}
    for reward, seed in itertools.product(lead, range(3)):
        outcome, _ = train(nb, task, partial(nb.Reinforced, reward=reward, warm=2), seed=seed)
        pi = outcome.arrays["pi"]
        lead[reward].append(float(pi[right].mean() - pi[~right].mean()))
        if reward == "gain":
            assert (pi.argmax(1) == task.slices).float().mean() > 0.8  # a guess is right one time in three
    assert min(lead["gain"]) > 0.25
    assert abs(np.mean(lead["stale"])) < 0.15 and max(lead["stale"]) < min(lead["gain"])


# --- the same seed, the same run; a run that was cut goes on to the same policy -----------------------------------


def test_a_run_is_a_function_of_its_seed(nb, short_task):
    chooser = partial(nb.Reinforced, warm=1)
    one, again = (train(nb, short_task, chooser, keep="last") for _ in range(2))
    assert_same_run(one, again)
    other, _ = train(nb, short_task, chooser, seed=1, keep="last")
    assert not torch.equal(one[0].arrays["pi"], other.arrays["pi"])


def cut_at(nb, step):
    """A chooser whose notebook is interrupted at ``step``: half of the time before it learns, half after it chose."""
    calls = itertools.count()

    class Cut(nb.Reinforced):
        def settle(self, student):
            if (now := next(calls)) == step and step % 2:
                raise KeyboardInterrupt
            self.late = now == step
            return super().settle(student)

        def choose(self, *arguments):
            weights = super().choose(*arguments)
            if self.late:
                raise KeyboardInterrupt
            return weights

    return Cut


VARIANTS = {
    "gain": dict(warm=1),
    "softmax, reward 3": dict(warm=1, reward="r3", policy="SoftmaxPolicy", baseline="mean", empty="labels"),
}


@pytest.fixture(scope="module")
def chooser_options(nb):
    return {
        name: {k: getattr(nb, v) if k == "policy" else v for k, v in options.items()}
        for name, options in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def whole(nb, short_task, chooser_options):
    """The uninterrupted runs."""
    return {
        name: train(nb, short_task, partial(nb.Reinforced, **options), keep="last")
        for name, options in chooser_options.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "step", [2, 4, 5, 9, 14]
)  # in the warm start, in mid-epoch, around an epoch's end, at the last
def test_a_cut_run_goes_on_to_the_same_policy(nb, short_task, chooser_options, whole, tmp_path, variant, step):
    """A checkpoint every second step; what was not in it (policy, memory, chance, averages) would be missing here."""
    options, engine = chooser_options[variant], dict(folder=tmp_path, checkpoint_every=2, keep="last")
    with pytest.raises(KeyboardInterrupt):
        train(nb, short_task, partial(cut_at(nb, step), **options), **engine)
    torch.rand(7), np.random.rand(7)  # the next process starts from anywhere
    resumed = train(nb, short_task, partial(nb.Reinforced, **options), **engine)
    assert resumed[1].resumed
    assert_same_run(resumed, whole[variant])
    assert int(resumed[1].model.chooser.memory.count) == 15  # 55 examples: the last batch of an epoch has 15


# --- labels that are hidden reach nothing ---------------------------------------------------------------------------


def with_other_hidden_labels(task):
    """The same task; the labels of the rows that have none are others, in the texts and in the evidence."""
    labels = torch.where(task.evidence.labelled, task.evidence.labels, (task.evidence.labels + 1) % CLASSES)
    texts = replace(task.train, source=replace(task.train.source, labels=labels))
    return replace(task, train=texts, evidence=replace(task.evidence, labels=labels))


@pytest.mark.parametrize("reward", ["gain", "r1", "r2", "r3", "batch", "stale"])
def test_hidden_labels_reach_neither_student_nor_policy(nb, short_task, reward):
    half = half_labelled(short_task)
    chooser = partial(nb.Reinforced, warm=1, reward=reward, use_labels=False)
    runs = [train(nb, t, chooser, keep="last") for t in (half, with_other_hidden_labels(half))]
    for _, fit in runs:
        fit.model.chooser.memory.before[~half.evidence.labelled[fit.model.chooser.memory.id]] = 0  # kept, never used
    assert_same_run(*runs)


def hidden_labels_weigh_nothing(nb):
    evidence = any_evidence(nb, 12, labelled=torch.arange(12) < 5)
    other = replace(evidence, labels=torch.where(evidence.labelled, evidence.labels, 3 - evidence.labels))
    dev = any_evidence(nb, 12, seed=1)
    for name, options in RULES.items():
        assert torch.equal(*(ask(getattr(nb, name), e, **options) for e in (evidence, other))), name
    for name, options in FITS.items():
        weights = []
        for e in (evidence, other):
            torch.manual_seed(0)
            weights.append(ask(getattr(nb, name)(e, dev, **options), e))
        assert torch.equal(*weights), name


def test_hidden_labels_weigh_nothing(nb):
    hidden_labels_weigh_nothing(nb)


def test_the_router_finds_the_right_teacher_from_few_labels(nb, task):
    half = half_labelled(task)
    kd.seed_everything(0)
    weights = ask(nb.fitted(half, half.evidence, fit=partial(nb.logistic_router, steps=100)).rule, half.evidence)
    hidden = ~half.evidence.labelled
    assert (weights.argmax(1) == half.slices)[hidden].float().mean() > 0.9


def test_a_router_can_weigh_select_or_toss_coins(nb):
    evidence = any_evidence(nb, 400)
    share = torch.tensor([[0.6, 0.9, 0.2]]).expand(400, 3)
    answer = partial(nb.looked_up, evidence, None, ids=evidence.ids, share=share)
    assert torch.allclose(answer(None, use="weights"), share / 1.7)
    assert torch.equal(answer(None, use="selection"), torch.tensor([[0.5, 0.5, 0.0]]).expand(400, 3))
    coins = answer(torch.Generator().manual_seed(0), use="coins")
    assert torch.allclose(coins.sum(1), torch.ones(400)) and (coins > 0).float().mean(0).sub(share[0]).abs().max() < 0.1
    assert coins.unique(dim=0).shape[0] == 7  # every subset but the empty one, which hears the likeliest teacher
    with pytest.raises(ValueError, match="use is 'votes'; it must be weights, selection or coins"):
        nb.logistic_router(evidence, None, use="votes")


def test_the_oracle_of_hidden_labels_sees_them(nb, task):
    weights = ask(nb.hidden_best, half_labelled(task).evidence)
    assert torch.equal(weights.argmax(1), task.slices) and torch.equal(
        weights, ask(nb.best_per_instance, task.evidence)
    )


# --- teachers that do not fit ---------------------------------------------------------------------------------------


class Told:
    """A teacher with a table of logits, one row an id."""

    def __init__(self, classes, change=lambda logits: logits, seed=0):
        self.table = torch.randn(100, CLASSES, generator=torch.Generator().manual_seed(seed))
        self.change, self.classes = change, classes

    def __call__(self, batch):
        return self.change(self.table[batch["id"] % 100])


NAMES = [f"class {c}" for c in range(CLASSES)]
BROKEN = {
    "NaN": (NAMES, lambda z: z * math.nan, "'odd' answers NaN or infinity"),
    "infinity": (NAMES, lambda z: z / 0, "'odd' answers NaN or infinity"),
    "fewer classes": (NAMES[1:], lambda z: z[:, 1:], "'odd' has 3 classes.*the data 4.*map its classes"),
    "fewer logits": (NAMES, lambda z: z[:, 1:], r"'odd' answers \(60, 3\) for 60 examples of 4 classes"),
    "one sample short": (NAMES, lambda z: z[1:], r"'odd' answers \(59, 4\) for 60 examples"),
    "other order": (NAMES[::-1], lambda z: z.flip(1), "'odd' has 4 classes.*the order differs: reorder"),
    "other names": (list("abcd"), lambda z: z, "'odd' has 4 classes.*map its classes to the data's"),
    "no names": (None, lambda z: z, "'odd' does not say which class is which"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_teacher_that_does_not_fit_is_refused_by_name(nb, what):
    classes, change, message = BROKEN[what]
    with pytest.raises(ValueError, match=message):
        nb.gather({"good": Told(NAMES), "odd": Told(classes, change)}, tokens(60), torch.zeros(60, 2))


def test_too_few_teachers_or_vectors_are_refused(nb):
    with pytest.raises(ValueError, match="nothing to select among 1 teachers"):
        nb.gather({"good": Told(NAMES)}, tokens(60), torch.zeros(60, 2))
    with pytest.raises(ValueError, match="59 sentence vectors for 60 examples"):
        nb.gather({"a": Told(NAMES), "b": Told(NAMES)}, tokens(60), torch.zeros(59, 2))


def test_answers_about_another_set_are_refused(nb, short_task):
    """Other ids, and the same ids of another set with the same classes: all answers would be about other texts."""
    model = nb.Bag(31, 8, CLASSES)
    teacher = kd.Teacher(model, name="asked elsewhere", inputs=nb.tokens_of, classes=NAMES)
    data = short_task.train
    good = kd.cache_teacher(teacher, data)
    assert len(nb.gather({"a": good, "b": good}, data, torch.zeros(55, 2)).ids) == 55
    for stranger, message in (
        (tokens(55, first_id=10_000_000), "never asked about id"),
        (tokens(55, seed=9, name="another"), "'another'"),
    ):
        pack = kd.cache_teacher(teacher, stranger)
        with pytest.raises(ValueError, match=message):
            nb.gather({"good": good, "odd": pack}, data, torch.zeros(55, 2))


def test_evidence_about_other_examples_is_refused(nb, short_task):
    for rows in (slice(1, None), torch.arange(55).roll(1)[:54].sort().values):
        with pytest.raises(ValueError, match="answered about 54 examples, the student is trained on 55.*gather"):
            replace(short_task, evidence=short_task.evidence.take(rows))
    other = replace(short_task.evidence, ids=short_task.evidence.ids + 1)
    with pytest.raises(ValueError, match="gather their answers for the very set"):
        replace(short_task, evidence=other)


def evidence_is_in_the_order_of_the_ids(nb):
    """Whatever the order of the data, each row is about its own id."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    data, teachers = tokens(40).take(order), {"a": Told(NAMES), "b": Told(NAMES, seed=1)}
    evidence = nb.gather(teachers, data, data.ids[:, None].float(), labelled=data.ids % 2 == 0)
    assert torch.equal(evidence.ids, torch.arange(40))
    for k, teacher in enumerate(teachers.values()):
        assert torch.allclose(evidence.probabilities[:, k], teacher.table[:40].softmax(1))
    assert torch.equal(evidence.vectors[:, 0], torch.arange(40.0))
    assert torch.equal(evidence.labels, tokens(40).labels) and torch.equal(evidence.labelled, torch.arange(40) % 2 == 0)
    some = torch.tensor([31, 2, 17])
    assert torch.equal(evidence.take(evidence.rows(some)).ids, some)


def test_evidence_is_in_the_order_of_the_ids(nb):
    evidence_is_in_the_order_of_the_ids(nb)


# --- mutants: bugs of public code, written into the notebook's own source, each caught by the property named ---------


MUTANTS = {
    "pi instead of log pi": (
        'action, reduction="none").sum(1)', 'action, reduction="none").sum(1).exp()', the_estimator_is_unbiased,
    ),
    "log-prob of one coin": ('action, reduction="none").sum(1)', 'action, reduction="none")[:, 0]', log_prob_is_eq_three),
    "ascent": ("return -(advantage * log_prob)", "return (advantage * log_prob)", the_estimator_is_unbiased),
    "baseline added": ("(advantage - advantage.mean())", "(advantage + advantage.mean())", the_estimator_is_unbiased),
    "own reward in the baseline": (" * count / (count - 1)", "", the_estimator_is_unbiased),
    "reward not detached": ("advantage, count = reward.detach()", "advantage, count = reward", no_gradient_goes_through_the_reward),
    "loss read the wrong way": ('"gain": before - after', '"gain": after - before', the_policy_learns_from_the_update_of_its_own_batch),
    "sum instead of mean": (
        "return action / action.sum(1, keepdim=True).clamp_min(1)", "return action", selection_shares_equally_and_is_never_empty,
    ),
    "MT-BERT as published": ("return known(evidence, w / w.sum(1, keepdim=True))", "return known(evidence, w)", every_rule_gives_probabilities),
    "CE of the next teacher": (".squeeze(2).clamp_min(", ".squeeze(2).roll(1, 1).clamp_min(", losses_are_of_the_right_teacher_and_cut),
    "CE without a bound": (".clamp_min(math.exp(-largest)).log()", ".log()", losses_are_of_the_right_teacher_and_cut),
    "answers in the loader's order": ("return probabilities[ids.argsort()]", "return probabilities", evidence_is_in_the_order_of_the_ids),
    "the hidden label weighs": ("torch.where(evidence.labelled[:, None], weights, ", "torch.where(evidence.labelled[:, None] | True, weights, ", hidden_labels_weigh_nothing),
    "the hidden label is learned": (', reduction="none") * evidence.labelled', ', reduction="none")', student_losses_are_eq_one),
    "what was longer stays in the memory": (".zero_()[", "[", the_memory_holds_exactly_the_last_batch),
    "attention through the student": ("student.hidden(**tokens_of(batch)).detach()", "student.hidden(**tokens_of(batch))", attention_takes_the_student_as_it_is),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant):
    right, wrong, named_property = MUTANTS[mutant]
    sources = tagged(NOTEBOOK, "setup", "method")
    assert sum(source.count(right) for source in sources) == 1
    with pytest.raises(AssertionError):
        named_property(Notebook([source.replace(right, wrong) for source in sources]))
