"""The public battery: every loss × dtype × extreme against properties, and mutants that each fail one.

Each property is a bug that somebody shipped: a missing T², the mean over elements, pads that count, gradients
that are NaN under a finite loss. A property is a plain function of a loss, so that the mutants at the end are
held to the very same one, and a chapter's own loss can be. The references are in numpy and float64, without
torch's softmax or kl_div.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kdlib import losses

BETA, ALPHA = 0.3, 0.6


def pair(n=6, c=9, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, c, generator=generator), scale * torch.randn(n, c, generator=generator)


# --- independent references, in numpy and float64 ---


def probabilities(logits, temperature):
    z = np.asarray(logits, dtype=np.float64) / temperature
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def log_probabilities(logits, temperature):
    z = np.asarray(logits, dtype=np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergence(p, log_p, log_q):
    """KL by rows, with 0 log 0 = 0."""
    with np.errstate(invalid="ignore"):  # -inf - -inf, where p is 0
        return np.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def forward64(s, t, T):
    p, log_p, log_q = probabilities(t, T), log_probabilities(t, T), log_probabilities(s, T)
    return T**2 * divergence(p, log_p, log_q).mean()


def reverse64(s, t, T):
    return forward64(t, s, T)


def jsd64(s, t, T):
    p, q = probabilities(t, T), probabilities(s, T)
    with np.errstate(divide="ignore"):
        log_p, log_q, log_m = np.log(p), np.log(q), np.log(BETA * p + (1 - BETA) * q)
    return T**2 * (BETA * divergence(p, log_p, log_m) + (1 - BETA) * divergence(q, log_q, log_m)).mean()


def squared64(s, t, T):
    return ((np.asarray(s, dtype=np.float64) - np.asarray(t, dtype=np.float64)) ** 2).sum(-1).mean()


def hinton64(s, t, T):
    return ALPHA * forward64(s, t, T) - (1 - ALPHA) * log_probabilities(s, 1.0)[:, -1].mean()


# --- the losses, each as a function of (student, teacher, temperature) ---


def hinton(s, t, T):
    return losses.hinton_loss(s, t, torch.full((len(s),), s.shape[-1] - 1), alpha=ALPHA, temperature=T)


LOSSES = {
    "kd_loss": (lambda s, t, T: losses.kd_loss(s, t, temperature=T), forward64),
    "token_kd_loss": (
        lambda s, t, T: losses.token_kd_loss(s, t, torch.ones(s.shape[:-1], dtype=torch.bool), temperature=T),
        forward64,
    ),
    "reverse_kl_loss": (lambda s, t, T: losses.reverse_kl_loss(s, t, temperature=T), reverse64),
    "generalized_jsd_loss": (
        lambda s, t, T: losses.generalized_jsd_loss(s, t, beta=BETA, temperature=T),
        jsd64,
    ),
    "hinton_loss": (hinton, hinton64),
}
DISTANCES = [name for name in LOSSES if name != "hinton_loss"]  # 0 at equality; the mixture holds a label loss


def gradient(loss, s, t, T):
    z = s.detach().clone().requires_grad_()
    loss(z, t, T).backward()
    return z.grad


# --- the properties ---


def equals_the_float64_reference(loss, reference):
    for n, c, T in ((6, 9, 4.0), (1, 2, 1.0), (7, 100, 0.5), (3, 1000, 20.0)):
        s, t = pair(n, c)
        assert float(loss(s, t, T)) == pytest.approx(reference(s, t, T), rel=1e-4)


def gradient_is_that_of_the_reference(loss, reference):
    """Central differences of the reference, so that autograd is not its own judge."""
    s, t = pair(3, 5)
    grad, h = gradient(loss, s, t, 2.0), 1e-4
    for i in range(3):
        for j in range(5):
            step = np.zeros((3, 5))
            step[i, j] = h
            slope = (reference(s.numpy() + step, t, 2.0) - reference(s.numpy() - step, t, 2.0)) / (2 * h)
            assert float(grad[i, j]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def is_zero_at_equality(loss, reference):
    s, _ = pair()
    assert abs(float(loss(s, s.clone(), 4.0))) < 1e-5
    assert gradient(loss, s, s.clone(), 4.0).abs().max() < 1e-6


def is_never_negative(loss, reference):
    for seed in range(20):
        s, t = pair(seed=seed, scale=1 + seed % 4)
        assert float(loss(s, t, 1.0 + seed % 8)) >= 0


def gradient_keeps_its_size_over_temperature(loss, reference):
    s, t = pair(32, 100, scale=1.0)
    sizes = [float(gradient(loss, s, t, T).norm()) for T in (1.0, 2.0, 4.0, 8.0)]
    assert max(sizes) / min(sizes) < 3  # without T² it falls about as 1 / T²: by 60 from T = 1 to 8


def survives_peaked_logits(loss, reference):
    s, t = torch.full((2, 5), -300.0), torch.full((2, 5), -300.0)
    s[:, 0], t[:, 1] = 300.0, 300.0
    for T in (1.0, 4.0):
        assert float(loss(s, t, T)) == pytest.approx(reference(s, t, T), rel=1e-5)
        assert gradient(loss, s, t, T).isfinite().all()


def survives_a_masked_vocabulary(loss, reference):
    s, t = pair()
    t[:, :3] = -torch.inf
    value, expected = float(loss(s, t, 4.0)), reference(s, t, 4.0)
    # a student that puts mass on what the teacher forbids is infinitely far in reverse KL: huge, but no NaN
    assert value == pytest.approx(expected, rel=1e-5) if math.isfinite(expected) else 1e3 < value < math.inf
    assert gradient(loss, s, t, 4.0).isfinite().all()


def computes_half_inputs_in_fp32(loss, reference):
    for dtype in (torch.float16, torch.bfloat16):
        s, t = (z.to(dtype) for z in pair(32, 100))
        value = loss(s, t, 4.0)
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(reference(s.double(), t.double(), 4.0), rel=1e-4)


PROPERTIES = {
    equals_the_float64_reference: LOSSES,
    gradient_is_that_of_the_reference: LOSSES,
    is_zero_at_equality: DISTANCES,
    is_never_negative: LOSSES,
    gradient_keeps_its_size_over_temperature: DISTANCES,
    survives_peaked_logits: LOSSES,
    survives_a_masked_vocabulary: [*DISTANCES, "hinton_loss"],
    computes_half_inputs_in_fp32: LOSSES,
}


@pytest.mark.parametrize(
    "has, name",
    [pytest.param(has, name, id=f"{has.__name__}-{name}") for has, names in PROPERTIES.items() for name in names],
)
def test_a_loss_has_the_property(has, name):
    has(*LOSSES[name])


# --- every loss × dtype × extreme × autocast ---


def forbid(logits):
    return logits.index_fill(1, torch.tensor([0, 4]), -torch.inf)


EXTREMES = {
    "ordinary": lambda s, t: (s, t),
    "equal": lambda s, t: (s, s.clone()),
    "both certain, of different classes": lambda s, t: (
        300 * (2 * F.one_hot(torch.full((6,), 0), 9) - 1.0),
        300 * (2 * F.one_hot(torch.full((6,), 1), 9) - 1.0),
    ),
    "student certain": lambda s, t: (100 * s, t),
    "teacher certain": lambda s, t: (s, 100 * t),
    "far from zero": lambda s, t: (s + 300, t - 300),
    "teacher masked": lambda s, t: (s, forbid(t)),
    "both masked": lambda s, t: (forbid(s), forbid(t)),
}


CASES = [
    pytest.param(name, extreme, dtype, id=f"{name}-{extreme}-{str(dtype)[6:]}")
    for name in LOSSES
    for extreme in EXTREMES
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name, extreme, dtype", CASES)
def test_extremes(name, extreme, dtype, autocast):
    loss, reference = LOSSES[name]
    s, t = (z.to(dtype) for z in EXTREMES[extreme](*pair()))
    z = s.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(z, t, 2.0)
    value.backward()
    expected = reference(s.double(), t.double(), 2.0)
    assert value.dtype == torch.float32 and z.grad.isfinite().all()
    if math.isfinite(expected):
        assert float(value.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert 1e3 < float(value.detach()) < math.inf


@pytest.mark.parametrize("name", LOSSES)
def test_an_infinite_teacher_is_refused(name):
    s, t = pair()
    t[0, 0] = math.inf  # what an fp16 overflow leaves
    with pytest.raises(ValueError, match="inf"):
        LOSSES[name][0](s, t, 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_layer_under_autocast_gets_a_finite_gradient(name, dtype):
    torch.manual_seed(0)
    layer, x, (_, t) = torch.nn.Linear(5, 9), torch.randn(6, 5), pair()
    with torch.autocast("cpu", dtype=dtype):
        logits = layer(x)
        value = LOSSES[name][0](logits, t, 4.0)
    value.backward()
    assert logits.dtype == dtype and value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(LOSSES[name][1](logits.detach().double(), t, 4.0), rel=1e-4)
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "token_kd_loss"])  # it has to count its rows
def test_no_step_waits_for_a_gpu(name):
    """A tensor of the meta device has no values: looking at one, as on a GPU a sync would, raises."""
    s, t = torch.zeros(4, 10, device="meta", requires_grad=True), torch.zeros(4, 10, device="meta")
    call = LOSSES[name][0]
    if name == "hinton_loss":
        y = torch.zeros(4, dtype=torch.int64, device="meta")
        call = lambda s, t, T: losses.hinton_loss(s, t, y, alpha=ALPHA, temperature=T)  # noqa: E731
    call(s, t, 2.0).backward()
    assert s.grad.shape == s.shape


@pytest.mark.parametrize("name", DISTANCES)
@given(
    seed=st.integers(0, 10_000),
    T=st.floats(0.25, 32),
    scale=st.floats(0.1, 10),
    n=st.integers(1, 5),
    c=st.integers(2, 7),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_any_temperature(name, seed, T, scale, n, c):
    s, t = pair(n, c, scale, seed)
    value, rounding = float(LOSSES[name][0](s, t, T)), 1e-6 * T**2 * (1 + scale)
    assert value >= -rounding
    assert value == pytest.approx(LOSSES[name][1](s, t, T), rel=1e-3, abs=rounding)


@pytest.mark.parametrize("name", DISTANCES)
def test_permuting_classes_or_examples_changes_nothing(name):
    s, t = pair()
    generator = torch.Generator().manual_seed(1)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(9, generator=generator)
    value = float(LOSSES[name][0](s, t, 4.0))
    assert float(LOSSES[name][0](s[rows][:, classes], t[rows][:, classes], 4.0)) == pytest.approx(value, rel=1e-5)


# --- tokens: the same for losses under a mask, of (student, teacher, mask) ---

MASKED = {
    "token_kd_loss": lambda s, t, m: losses.token_kd_loss(s, t, m, temperature=2.0),
    "generalized_jsd_loss": lambda s, t, m: losses.generalized_jsd_loss(s, t, beta=BETA, temperature=2.0, mask=m),
}
OF_A_TOKEN = {"token_kd_loss": forward64, "generalized_jsd_loss": jsd64}


def tokens(lengths, width, vocabulary=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width, vocabulary)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), mask


def is_the_mean_over_valid_tokens(loss, reference):
    s, t, mask = tokens([1, 4, 2], 4)
    rows = [reference(s[i, j][None], t[i, j][None], 2.0) for i, j in mask.nonzero().tolist()]
    assert float(loss(s, t, mask)) == pytest.approx(np.mean(rows), rel=1e-4)


def padding_changes_nothing(loss, reference):
    @given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), extra=st.integers(1, 6))
    # mutants fail on purpose: nothing to shrink, nothing to remember
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def holds(lengths, extra):
        s, t, mask = tokens(lengths, 5)
        z = s.clone().requires_grad_()
        padded = F.pad(s, (0, 0, 0, extra), value=50.0).requires_grad_()
        short = loss(z, t, mask)
        long = loss(padded, F.pad(t, (0, 0, 0, extra), value=-50.0), F.pad(mask, (0, extra)))
        short.backward(), long.backward()
        assert torch.allclose(short, long)
        assert torch.allclose(padded.grad[:, :5], z.grad) and (padded.grad[:, 5:] == 0).all()

    holds()


def only_supervised_positions_move_it(loss, reference):
    s, t, mask = tokens([2, 3], 4)
    mask[1, 0] = False  # a prompt in front, not only padding behind
    z = s.clone().requires_grad_()
    before = loss(z, t, mask)
    before.backward()
    assert torch.equal(z.grad.abs().sum(-1) > 0, mask)
    for i, j in np.ndindex(2, 4):
        for which in range(2):
            moved = [s.clone(), t.clone()]
            moved[which][i, j, 0] += 1
            assert (float(loss(*moved, mask)) != float(before.detach())) == bool(mask[i, j])


def an_empty_batch_gives_zero_with_its_graph(loss, reference):
    s, t, mask = tokens([2, 2], 3)
    s.requires_grad_()
    value = loss(s, t, torch.zeros_like(mask))
    assert value.requires_grad and value.item() == 0
    value.backward()
    assert (s.grad == 0).all()


MASKED_PROPERTIES = [
    is_the_mean_over_valid_tokens,
    padding_changes_nothing,
    only_supervised_positions_move_it,
    an_empty_batch_gives_zero_with_its_graph,
]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("has", MASKED_PROPERTIES, ids=lambda has: has.__name__)
def test_a_masked_loss_has_the_property(has, name):
    has(MASKED[name], OF_A_TOKEN[name])


@pytest.mark.parametrize("name", MASKED)
def test_an_empty_half_batch_is_fp32_like_any_other(name):
    s, t, mask = tokens([2, 2], 3)
    assert MASKED[name](s.half(), t.half(), torch.zeros_like(mask)).dtype == torch.float32


@pytest.mark.parametrize("name", MASKED)
def test_pads_may_hold_nan(name):
    s, t, mask = tokens([2, 3], 4)
    clean = MASKED[name](s, t, mask)
    s[~mask], t[~mask] = math.nan, math.nan
    s.requires_grad_()
    value = MASKED[name](s, t, mask)
    value.backward()
    assert torch.equal(value, clean) and s.grad.isfinite().all()


def test_an_empty_batch_is_checked_like_any_other():
    s, t, mask = tokens([2, 2], 3)
    with pytest.raises(ValueError, match="temperature is -1"):
        losses.token_kd_loss(s, t, torch.zeros_like(mask), temperature=-1)


# --- mutants: bugs of real code bases, each caught by the property named ---


def kl(s, t, T, reduction="batchmean"):
    return F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction=reduction)


def tutorial(s, t, T):
    p = (t / T).softmax(-1)
    return T**2 * (p * (p.log() - (s / T).log_softmax(-1))).sum(-1).mean()


def log_target(s, t, T):
    return T**2 * F.kl_div((s / T).log_softmax(-1), (t / T).log_softmax(-1), log_target=True, reduction="batchmean")


def log_of_softmax(s, t, T):
    return T**2 * F.kl_div((s / T).softmax(-1).log(), (t / T).softmax(-1), reduction="batchmean")


def reverse_of_probabilities(s, t, T):
    q, p = (s / T).softmax(-1), (t / T).softmax(-1)
    return T**2 * (q * (q / p).log()).sum(-1).mean()


def jsd_of_probabilities(s, t, T):
    p, q = (t / T).softmax(-1), (s / T).softmax(-1)
    m = BETA * p + (1 - BETA) * q
    return T**2 * (BETA * p * (p / m).log() + (1 - BETA) * q * (q / m).log()).sum(-1).mean()


MUTANTS = {
    "no T²": (kl, forward64, gradient_keeps_its_size_over_temperature),
    "T in place of T²": (lambda s, t, T: T * kl(s, t, T), forward64, equals_the_float64_reference),
    "mean over elements": (
        lambda s, t, T: T**2 * kl(s, t, T, "none").mean(),
        forward64,
        equals_the_float64_reference,
    ),
    "sum over the batch": (
        lambda s, t, T: T**2 * kl(s, t, T, "sum"),
        forward64,
        equals_the_float64_reference,
    ),
    "swapped roles": (lambda s, t, T: T**2 * kl(t, s, T), forward64, equals_the_float64_reference),
    "swapped roles, by gradient": (
        lambda s, t, T: T**2 * kl(t, s, T),
        forward64,
        gradient_is_that_of_the_reference,
    ),
    "detached student": (
        lambda s, t, T: T**2 * kl(s.detach(), t, T) + 0 * s.sum(),
        forward64,
        gradient_is_that_of_the_reference,
    ),
    "double softmax": (
        lambda s, t, T: T**2 * kl(T * (s / T).softmax(-1), t, T),
        forward64,
        is_zero_at_equality,
    ),
    "softmax for log_softmax on the student": (
        lambda s, t, T: T**2 * F.kl_div((s / T).softmax(-1), (t / T).softmax(-1), reduction="batchmean"),
        forward64,
        is_never_negative,
    ),
    "cross-entropy called KL": (
        lambda s, t, T: -(T**2) * ((t / T).softmax(-1) * (s / T).log_softmax(-1)).sum(-1).mean(),
        forward64,
        is_zero_at_equality,
    ),
    "temperature on the teacher only": (
        lambda s, t, T: T**2 * F.kl_div(s.log_softmax(-1), (t / T).softmax(-1), reduction="batchmean"),
        forward64,
        is_zero_at_equality,
    ),
    "0 log 0 of the tutorial": (tutorial, forward64, survives_peaked_logits),
    "0 log 0 under a mask": (tutorial, forward64, survives_a_masked_vocabulary),
    "log_target under a mask": (log_target, forward64, survives_a_masked_vocabulary),
    "log of an underflowed softmax": (log_of_softmax, forward64, survives_peaked_logits),
    "reverse KL of probabilities": (reverse_of_probabilities, reverse64, survives_peaked_logits),
    "JSD of probabilities": (jsd_of_probabilities, jsd64, survives_a_masked_vocabulary),
    "forward KL called reverse": (
        lambda s, t, T: T**2 * kl(s, t, T),
        reverse64,
        equals_the_float64_reference,
    ),
    "beta on the student": (
        lambda s, t, T: losses.generalized_jsd_loss(s, t, beta=1 - BETA, temperature=T),
        jsd64,
        equals_the_float64_reference,
    ),
    "mean of squares over classes": (
        lambda s, t, T: F.mse_loss(s, t),
        squared64,
        equals_the_float64_reference,
    ),
    "mean squared error of softmaxes": (
        lambda s, t, T: F.mse_loss((s / T).softmax(-1), (t / T).softmax(-1)),
        squared64,
        gradient_is_that_of_the_reference,
    ),
    "alpha on the labels": (
        lambda s, t, T: losses.hinton_loss(
            s, t, torch.full((len(s),), s.shape[-1] - 1), alpha=1 - ALPHA, temperature=T
        ),
        hinton64,
        equals_the_float64_reference,
    ),
    "computed in half precision": (
        lambda s, t, T: T**2 * kl(s, t, T),
        forward64,
        computes_half_inputs_in_fp32,
    ),
}


def rows(s, t):
    return 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none").sum(-1)


MASKED_MUTANTS = {
    "pads counted": (lambda s, t, m: rows(s, t).mean(), padding_changes_nothing),
    "pads in the denominator": (lambda s, t, m: (rows(s, t) * m).mean(), padding_changes_nothing),
    "mean of means over sequences": (
        lambda s, t, m: ((rows(s, t) * m).sum(1) / m.sum(1).clamp(min=1)).mean(),
        is_the_mean_over_valid_tokens,
    ),
    "off by one": (
        lambda s, t, m: losses.token_kd_loss(s[:, :-1], t[:, :-1], m[:, 1:], temperature=2.0),
        only_supervised_positions_move_it,
    ),
    "0 / 0 without a valid token": (
        lambda s, t, m: (rows(s, t) * m).sum() / m.sum(),
        an_empty_batch_gives_zero_with_its_graph,
    ),
    "a constant without a valid token": (
        lambda s, t, m: losses.token_kd_loss(s, t, m, temperature=2.0) if m.any() else torch.tensor(0.0),
        an_empty_batch_gives_zero_with_its_graph,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_fails(mutant):
    loss, reference, named_property = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        named_property(loss, reference)


@pytest.mark.parametrize("mutant", MASKED_MUTANTS)
def test_a_masked_mutant_fails(mutant):
    loss, named_property = MASKED_MUTANTS[mutant]
    with pytest.raises(AssertionError):
        named_property(loss, forward64)


def test_every_property_catches_a_mutant():
    caught_by = {mutant[-1] for mutant in [*MUTANTS.values(), *MASKED_MUTANTS.values()]}
    assert caught_by == {*PROPERTIES, *MASKED_PROPERTIES}
