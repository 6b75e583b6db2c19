"""Each loss in particular: closed forms, limits and errors. The common battery is test_loss_invariants.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdlib import losses

N, C, T = 32, 100, 4.0


def pair(n=N, c=C, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, c, generator=generator), scale * torch.randn(n, c, generator=generator)


def gradient(s, t, temperature):
    z = s.clone().requires_grad_()
    losses.kd_loss(z, t, temperature=temperature).backward()
    return z.grad


def test_gradient_is_t_times_the_difference_of_the_softmaxes():
    s, t = pair()
    by_hand = T * ((s / T).softmax(-1) - (t / T).softmax(-1)) / N
    assert torch.allclose(gradient(s, t, T), by_hand, atol=1e-6)


def test_high_temperature_is_logit_matching():
    s, t = pair(scale=1.0)
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert torch.allclose(gradient(s, t, 500.0), centred / centred.numel(), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("loss", [losses.kd_loss, losses.reverse_kl_loss])
def test_a_constant_added_to_the_logits_changes_nothing(loss):
    s, t = pair()
    assert float(loss(s + 5, t - 7, temperature=T)) == pytest.approx(float(loss(s, t, temperature=T)), rel=1e-4)


def test_two_coins_by_hand():
    """Teacher 3/4 : 1/4, student even: KL is 3/4 ln 3/2 + 1/4 ln 1/2, the other way 1/2 ln 2/3 + 1/2 ln 2."""
    s, t = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert float(losses.kd_loss(s, t)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(losses.reverse_kl_loss(s, t)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def test_hinton_loss_is_the_mixture():
    s, t = pair()
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
    for alpha in (0.0, 0.3, 1.0):
        expected = alpha * losses.kd_loss(s, t, temperature=T) + (1 - alpha) * F.cross_entropy(s, y)
        assert torch.allclose(losses.hinton_loss(s, t, y, alpha=alpha, temperature=T), expected)


def test_examples_without_a_label_are_taught_by_the_teacher_alone():
    """Also a batch of nothing else; the cross-entropy is that of the labelled ones."""
    s, t = pair()
    soft, none = losses.kd_loss(s, t, temperature=T), torch.full((N,), -100)
    for alpha in (0.3, 1.0):
        z = s.clone().requires_grad_()
        loss = losses.hinton_loss(z, t, none, alpha=alpha, temperature=T)
        loss.backward()
        assert torch.equal(loss.detach(), alpha * soft) and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    some = none.clone()
    some[::2] = 1
    expected = 0.4 * soft + 0.6 * F.cross_entropy(s[::2], some[::2])
    assert torch.allclose(losses.hinton_loss(s, t, some, alpha=0.4, temperature=T), expected)


def test_jsd_tends_to_both_kls():
    s, t = pair(8, 10)
    near0 = losses.generalized_jsd_loss(s, t, beta=1e-3) / 1e-3
    near1 = losses.generalized_jsd_loss(s, t, beta=1 - 1e-3) / 1e-3
    assert float(near0) == pytest.approx(float(losses.kd_loss(s, t)), rel=0.1)
    assert float(near1) == pytest.approx(float(losses.reverse_kl_loss(s, t)), rel=0.1)


def test_jsd_of_one_half_is_symmetric_and_bounded_by_ln_2():
    s, t = pair(scale=30.0)
    there = float(losses.generalized_jsd_loss(s, t, beta=0.5))
    assert there == pytest.approx(float(losses.generalized_jsd_loss(t, s, beta=0.5)), rel=1e-5)
    assert 0.5 * math.log(2) < there <= math.log(2) * (1 + 1e-6)


def test_the_teacher_gets_no_gradient():
    s, t = pair()
    losses.kd_loss(s.requires_grad_(), t).backward()
    assert t.grad is None and s.grad is not None


# --- errors ---

EVERY = {
    "kd_loss": losses.kd_loss,
    "hinton_loss": lambda s, t: losses.hinton_loss(s, t, torch.zeros(len(s)).long(), alpha=0.5, temperature=T),
    "token_kd_loss": lambda s, t: losses.token_kd_loss(s, t, torch.ones(s.shape[:-1])),
    "reverse_kl_loss": losses.reverse_kl_loss,
    "generalized_jsd_loss": lambda s, t: losses.generalized_jsd_loss(s, t, beta=0.5),
}
every_loss = pytest.mark.parametrize("name", EVERY)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        losses.kd_loss(*pair(), temperature=temperature)


@every_loss
def test_class_counts_are_named_with_a_remedy(name):
    with pytest.raises(ValueError, match="student has 10 classes and the teacher 12.*vocabular"):
        EVERY[name](torch.zeros(2, 10), torch.zeros(2, 12))


@every_loss
def test_batch_sizes_are_named(name):
    with pytest.raises(ValueError, match=r"\(2, 10\).*\(3, 10\)"):
        EVERY[name](torch.zeros(2, 10), torch.zeros(3, 10))


@every_loss
def test_swapped_roles_are_noticed(name):
    s, t = pair()
    with pytest.raises(ValueError, match="swapped"):
        EVERY[name](t, s.requires_grad_())


@every_loss
def test_nan_from_the_teacher_is_noticed(name):
    s, t = pair()
    t[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        EVERY[name](s, t)


@every_loss
def test_labels_in_place_of_logits(name):
    with pytest.raises(ValueError, match="not labels"):
        EVERY[name](torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))


@every_loss
def test_a_single_logit_is_refused(name):
    """A softmax over it is 1, whatever it says: loss and gradient would be 0."""
    s, t = torch.zeros(4, 1), torch.ones(4, 1)
    with pytest.raises(ValueError, match="single column.*two classes"):
        EVERY[name](s, t)
    two = lambda z: torch.cat([torch.zeros_like(z), z], -1)  # noqa: E731
    assert EVERY[name](two(s), two(t)) > 0.02, "the remedy"


@pytest.mark.parametrize(
    "labels", [torch.eye(10)[:4], torch.eye(10)[:4].long(), torch.zeros(4), torch.zeros(4, 1).long()]
)
def test_labels_of_several_classes_are_refused(labels):
    with pytest.raises(ValueError, match="numbers of 10 classes.*multi-hot"):
        losses.hinton_loss(torch.zeros(4, 10), torch.zeros(4, 10), labels, alpha=0.5, temperature=1)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside_the_unit_interval(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}.*weights the teacher"):
        losses.hinton_loss(*pair(), torch.zeros(N, dtype=torch.int64), alpha=alpha, temperature=1)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_jsd_names_its_limits(beta):
    with pytest.raises(ValueError, match="kd_loss.*reverse_kl_loss"):
        losses.generalized_jsd_loss(*pair(), beta=beta)


def test_a_mask_of_another_shape():
    logits = torch.zeros(2, 4, 11)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\)"):
        losses.token_kd_loss(logits, logits, torch.ones(2, 3))
