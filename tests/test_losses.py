"""The battery every distillation loss has to pass, and mutants that must fail it by name.

Value against an independent float64 reference, zero at equality, the gradient's size over T, extreme logits, masked
vocabularies, half precision, empty masks, padding: each row of the battery is a bug that has been shipped somewhere.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib import losses

N, C, T = 32, 100, 4.0


def pair(n=N, c=C, scale=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, c, generator=generator)).to(dtype), (
        scale * torch.randn(n, c, generator=generator)
    ).to(dtype)


def softmax64(z, temperature):
    z = np.asarray(z.detach().double()) / temperature
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl64(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(-1)


def kd64(s, t, temperature):
    return temperature**2 * kl64(softmax64(t, temperature), softmax64(s, temperature)).mean()


def reverse64(s, t, temperature):
    return kd64(t, s, temperature)


def jsd64(s, t, temperature, beta=0.3):
    p, q = softmax64(t, temperature), softmax64(s, temperature)
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * kl64(p, m) + (1 - beta) * kl64(q, m)).mean()


def mse64(s, t, temperature):
    return ((s.double() - t.double()) ** 2).sum(-1).mean().item()


LOSSES = {
    "kd": (lambda s, t, T: losses.kd_loss(s, t, temperature=T), kd64),
    "token kd": (lambda s, t, T: losses.token_kd_loss(s, t, torch.ones(s.shape[:-1]), temperature=T), kd64),
    "reverse kl": (lambda s, t, T: losses.reverse_kl_loss(s, t, temperature=T), reverse64),
    "jsd": (lambda s, t, T: losses.generalized_jsd_loss(s, t, beta=0.3, temperature=T), jsd64),
    "logit mse": (lambda s, t, T: losses.logit_mse_loss(s, t), mse64),
}
DIVERGENCES = [name for name in LOSSES if name != "logit mse"]
every_loss = pytest.mark.parametrize("name", LOSSES)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def gradient(loss, s, t, temperature=T):
    z = s.clone().requires_grad_()
    loss(z, t, temperature).backward()
    return z.grad


# --- properties, each a function of a loss so that mutants can be held to it ---


def equals_reference(loss, reference, n=N, c=C, temperature=T):
    s, t = pair(n, c)
    assert float(loss(s, t, temperature)) == pytest.approx(reference(s, t, temperature), rel=1e-4)


def is_zero_at_equality(loss):
    s, _ = pair()
    assert abs(float(loss(s, s.clone(), T))) < 1e-5
    assert gradient(loss, s, s.clone()).abs().max() < 1e-6


def gradient_keeps_its_size_over_temperature(loss):
    s, t = pair(scale=1.0)
    sizes = [gradient(loss, s, t, float(temperature)).norm() for temperature in (1, 2, 4, 8)]
    assert max(sizes) / min(sizes) < 3


def follows_equation_3(loss):
    s, t = pair()
    by_hand = T * ((s / T).softmax(-1) - (t / T).softmax(-1)) / len(s)
    assert torch.allclose(gradient(loss, s, t), by_hand, atol=1e-6)


def survives_a_masked_class(loss):
    s, t = pair()
    t[:, :3] = -torch.inf
    value = loss(s, t, T)
    assert value.isfinite() and gradient(loss, s, t).isfinite().all()


# --- the battery ---


@every_loss
@pytest.mark.parametrize("n, c, temperature", [(32, 100, 4.0), (1, 2, 1.0), (7, 10, 0.5), (3, 1000, 20.0)])
def test_value_is_the_float64_reference(name, n, c, temperature):
    equals_reference(*LOSSES[name], n, c, temperature)


@every_loss
def test_zero_at_equality(name):
    is_zero_at_equality(LOSSES[name][0])


@every_loss
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.25, 32), scale=st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_never_negative(name, seed, temperature, scale):
    s, t = pair(4, 6, scale, seed)
    assert float(LOSSES[name][0](s, t, temperature)) >= -1e-6 * temperature**2


@every_divergence
def test_temperature_does_not_change_the_balance(name):
    gradient_keeps_its_size_over_temperature(LOSSES[name][0])


def test_gradient_is_equation_3():
    follows_equation_3(LOSSES["kd"][0])


def test_high_temperature_is_logit_matching():
    s, t = pair(scale=1.0)
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert torch.allclose(gradient(LOSSES["kd"][0], s, t, 500.0), centred / centred.numel(), rtol=0.02, atol=1e-5)


@every_loss
def test_peaked_logits(name):
    s, t = torch.full((2, 5), -300.0), torch.full((2, 5), -300.0)
    s[:, 0], t[:, 1] = 300.0, 300.0
    value = LOSSES[name][0](s, t, 1.0)
    assert value.isfinite() and value > 0
    assert gradient(LOSSES[name][0], s, t, 1.0).isfinite().all()


@every_divergence
def test_a_teacher_with_a_masked_vocabulary(name):
    survives_a_masked_class(LOSSES[name][0])


@every_loss
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_computed_in_fp32(name, dtype, tolerance):
    s, t = pair(dtype=dtype)
    value = LOSSES[name][0](s, t, T)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(
        LOSSES[name][1](s.float(), t.float(), T), rel=1e-4
    )  # same inputs: no loss after them
    assert float(value) == pytest.approx(LOSSES[name][1](*pair(), T), rel=tolerance)


@every_loss
def test_autocast_changes_nothing(name):
    s, t = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name][0](s, t, T)
    assert float(inside) == float(LOSSES[name][0](s, t, T))


@every_loss
def test_permuting_classes_or_examples_changes_nothing(name):
    s, t = pair()
    classes, rows = torch.randperm(C), torch.randperm(N)
    value = float(LOSSES[name][0](s, t, T))
    assert float(LOSSES[name][0](s[rows][:, classes], t[rows][:, classes], T)) == pytest.approx(value, rel=1e-5)


@every_divergence
def test_a_constant_added_to_the_logits_changes_nothing(name):
    s, t = pair()
    value = float(LOSSES[name][0](s, t, T))
    assert float(LOSSES[name][0](s + 5, t - 7, T)) == pytest.approx(value, rel=1e-4)


def test_hinton_loss_is_the_mixture():
    s, t = pair()
    y = torch.randint(C, (N,))
    for alpha in (0.0, 0.3, 1.0):
        expected = alpha * kd64(s, t, T) + (1 - alpha) * F.cross_entropy(s.double(), y).item()
        assert float(losses.hinton_loss(s, t, y, alpha=alpha, temperature=T)) == pytest.approx(expected, rel=1e-5)


def test_logit_mse_is_c_times_mse():
    s, t = pair()
    assert torch.allclose(losses.logit_mse_loss(s, t), C * F.mse_loss(s, t), rtol=1e-5)


def test_jsd_tends_to_both_kls():
    s, t = pair(8, 10)
    near0 = losses.generalized_jsd_loss(s.double(), t.double(), beta=1e-3) / 1e-3
    near1 = losses.generalized_jsd_loss(s.double(), t.double(), beta=1 - 1e-3) / 1e-3
    assert float(near0) == pytest.approx(kd64(s, t, 1.0), rel=0.1)
    assert float(near1) == pytest.approx(reverse64(s, t, 1.0), rel=0.1)


# --- tokens ---

MASKED = {
    "token kd": lambda s, t, m: losses.token_kd_loss(s, t, m, temperature=2.0),
    "jsd": lambda s, t, m: losses.generalized_jsd_loss(s, t, beta=0.5, temperature=2.0, mask=m),
}
every_masked = pytest.mark.parametrize("name", MASKED)


def tokens(lengths, width, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width, vocabulary)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), mask


@every_masked
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), extra=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_padding_never_changes_loss_or_gradient(name, lengths, extra):
    s, t, mask = tokens(lengths, 5)
    wide = lambda z, fill: F.pad(z, (0, 0, 0, extra), value=fill)  # noqa: E731
    z, padded = s.clone().requires_grad_(), wide(s, 50.0).requires_grad_()
    short = MASKED[name](z, t, mask)
    long = MASKED[name](padded, wide(t, float("nan")), F.pad(mask, (0, extra)))
    short.backward(), long.backward()
    assert torch.allclose(short, long)
    assert torch.allclose(padded.grad[:, :5], z.grad) and (padded.grad[:, 5:] == 0).all()


@every_masked
def test_ragged_rows_equal_a_loop_over_tokens(name):
    s, t, mask = tokens([1, 4, 2], 4)
    rows = [
        MASKED[name](s[i : i + 1, j : j + 1], t[i : i + 1, j : j + 1], torch.ones(1, 1))
        for i, j in mask.nonzero().tolist()
    ]
    assert torch.allclose(MASKED[name](s, t, mask), torch.stack(rows).mean())


@every_masked
def test_no_valid_token_gives_zero_with_its_graph(name):
    s, t, mask = tokens([2, 2], 3)
    s.requires_grad_()
    loss = MASKED[name](s, t, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()


@every_masked
def test_only_supervised_positions_move_the_loss(name):
    s, t, mask = tokens([2, 3], 4)
    before = MASKED[name](s, t, mask)
    for i in range(2):
        for j in range(4):
            moved = s.clone()
            moved[i, j, 0] += 1
            assert (MASKED[name](moved, t, mask) != before) == mask[i, j]


# --- errors ---


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        losses.kd_loss(*pair(), temperature=temperature)


def test_class_counts_are_named():
    with pytest.raises(ValueError, match="student has 10 classes and the teacher 12"):
        losses.kd_loss(torch.zeros(2, 10), torch.zeros(2, 12))


def test_batch_sizes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 10\).*\(3, 10\)"):
        losses.kd_loss(torch.zeros(2, 10), torch.zeros(3, 10))


def test_swapped_roles_are_noticed():
    s, t = pair()
    with pytest.raises(ValueError, match="swapped"):
        losses.kd_loss(t, s.requires_grad_())


@every_loss
def test_nan_from_the_teacher_is_noticed(name):
    s, t = pair()
    t[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        LOSSES[name][0](s, t, T)


def test_labels_in_place_of_logits():
    with pytest.raises(ValueError, match="not labels"):
        losses.kd_loss(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside_the_unit_interval(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}.*weights the teacher"):
        losses.hinton_loss(*pair(), torch.zeros(N, dtype=torch.int64), alpha=alpha, temperature=1)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_jsd_names_its_limits(beta):
    with pytest.raises(ValueError, match="kd_loss.*reverse_kl_loss"):
        losses.generalized_jsd_loss(*pair(), beta=beta)


def test_a_mask_of_another_shape():
    s, t, mask = tokens([2, 3], 4)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\)"):
        losses.token_kd_loss(s, t, mask[:, :3])


# --- mutants: the battery has to catch each, by the property named ---


def _kl(s, t, temperature, how="batchmean"):
    return F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction=how)


def _tutorial(s, t, temperature):
    p = (t / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - (s / temperature).log_softmax(-1))).sum(-1).mean()


MUTANTS = {
    "no T²": (_kl, gradient_keeps_its_size_over_temperature),
    "element mean": (lambda s, t, T: T**2 * _kl(s, t, T, "none").mean(), follows_equation_3),
    "swapped roles": (lambda s, t, T: T**2 * _kl(t, s, T), follows_equation_3),
    "double softmax": (
        lambda s, t, T: T**2 * F.kl_div((s / T).softmax(-1).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean"),
        is_zero_at_equality,
    ),
    "softmax for log-softmax": (
        lambda s, t, T: T**2 * F.kl_div((s / T).softmax(-1), (t / T).softmax(-1), reduction="batchmean"),
        is_zero_at_equality,
    ),
    "0 log 0": (_tutorial, survives_a_masked_class),
    "cross-entropy": (
        lambda s, t, T: -(T**2) * ((t / T).softmax(-1) * (s / T).log_softmax(-1)).sum(-1).mean(),
        is_zero_at_equality,
    ),
    "student not softened": (
        lambda s, t, T: T**2 * F.kl_div(s.log_softmax(-1), (t / T).softmax(-1), reduction="batchmean"),
        is_zero_at_equality,
    ),
    "sum over the batch": (lambda s, t, T: T**2 * _kl(s, t, T, "sum"), follows_equation_3),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_battery_catches_the_mutant(mutant):
    loss, named_property = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        named_property(loss)


@pytest.mark.parametrize("named_property", dict.fromkeys(p for _, p in MUTANTS.values()), ids=lambda p: p.__name__)
def test_the_real_loss_has_the_property(named_property):
    named_property(LOSSES["kd"][0])
