"""Exercises of notebook 01, Annealing-KD."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdlib.exercises import Exercise, expect
from kdlib.metrics import paired_difference

# --- 01.1 the staircase ---


def _right_phi(epoch: int, epochs: int, tau_max: int) -> float:
    return min(1.0, (epoch // (epochs // tau_max) + 1) / tau_max)


def check_phi(answer: Callable[[int, int, int], float]) -> str:
    even = [float(answer(e, 40, 10)) for e in range(40)]
    expect(even[0] != 0, "Φ starts at 0: a stage that teaches silence. The first stage is T = τ, with Φ = 1/τ")
    expect(
        not math.isclose(even[0], 1.0), "the staircase runs downwards: T falls from τ to 1, so Φ rises from 1/τ to 1"
    )
    expect(not math.isclose(even[0], 10.0), "this is the temperature 1/Φ; the factor on the logits is asked for")
    expect(math.isclose(even[0], 0.1), f"in the first epoch of 40, with τ = 10, Φ is {even[0]:.3f}; it should be 0.1")
    expect(
        math.isclose(even[3], 0.1) and math.isclose(even[4], 0.2),
        "a stage lasts ⌊40/10⌋ = 4 epochs: Φ stays at 0.1 for four of them",
    )
    left_over = [float(answer(e, 25, 10)) for e in range(25)]
    expect(
        max(left_over) <= 1 + 1e-9,
        f"25 epochs with τ = 10 end at Φ = {max(left_over):.1f}: five are left over, clamp at 1",
    )
    wrong = [e for e in range(25) if not math.isclose(left_over[e], _right_phi(e, 25, 10))]
    expect(
        not wrong,
        f"for 25 epochs and τ = 10, Φ of epoch {wrong[0] if wrong else 0} is off; stages last ⌊25/10⌋ = 2 epochs",
    )
    expect(math.isclose(float(answer(3, 7, 1)), 1.0), "with τ = 1 there is one stage, at Φ = 1")
    return "the staircase is right, also where epochs are left over"


WRONG_PHI = [
    (lambda e, n, t: e // (n // t) / t, "starts at 0"),
    (lambda e, n, t: 1 - (e // (n // t)) / t, "runs downwards"),
    (lambda e, n, t: t / (e // (n // t) + 1), "this is the temperature"),
    (lambda e, n, t: (e // (n // t) + 1) / t, "clamp at 1"),
    (lambda e, n, t: min(1.0, (e + 1) / n), "should be 0.1"),
    (lambda e, n, t: max(1 / t, min(1.0, (e + 1) / n)), "stays at 0.1 for four"),
    (lambda e, n, t: min(1.0, (int(e / (n / t)) + 1) / t), "of epoch 2 is off"),
]


# --- 01.2 where the ladder is steep ---


def _entropies(z: Tensor, tau_max: int) -> Tensor:
    factors = torch.tensor([1 - (t - 1) / tau_max for t in range(tau_max, 0, -1)])
    return torch.distributions.Categorical(logits=factors[:, None] * z).entropy()


def _right_step(z: Tensor, tau_max: int) -> int:
    entropy = _entropies(z, tau_max)
    return tau_max - int((entropy[:-1] - entropy[1:]).argmax())


def check_steepest(answer: Callable[[Tensor, int], int]) -> str:
    loud, quiet = torch.tensor([9.0, 2.0, 0.0, -1.0, -10.0]), torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    cases = [(loud, 10), (quiet, 10), (loud, 7)]
    got, right = [int(answer(z, t)) for z, t in cases], [_right_step(z, t) for z, t in cases]
    expect(
        got != [10, 10, 7],
        "it is not always the first step: near-uniform targets have little entropy to lose. Compute it",
    )
    expect(got != [r - 1 for r in right], "this is where the step arrives; the stage it starts from is asked for")
    expect(
        got != [11 - right[0], 11 - right[1], 8 - right[2]],
        "these are Φ's stages counted from below: T runs from τ down to 1",
    )
    expect(
        got == right,
        f"for loud and quiet logits with τ = 10, and loud ones with τ = 7, you found {got}, it should be {right}",
    )
    return "found: it depends on how loud the teacher is"


WRONG_STEEPEST = [
    (lambda z, t: t, "not always the first"),
    (lambda z, t: _right_step(z, t) - 1, "where the step arrives"),
    (lambda z, t: t + 1 - _right_step(z, t), "counted from below"),
    (lambda z, t: _right_step(z / 2, t), "it should be"),
]


# --- 01.3 the scaling fact, constructively ---


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 7), nn.ReLU()), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _right_fainter(student: nn.Module, phi: float) -> nn.Module:
    fainter = copy.deepcopy(student)
    with torch.no_grad():
        fainter.head.weight *= phi
        fainter.head.bias *= phi
    return fainter


def check_fainter(answer: Callable[[nn.Module, float], nn.Module]) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, x = _Student(), torch.randn(20, 5)
    before = student(x).detach()
    fainter = answer(student, 0.3)
    expect(isinstance(fainter, nn.Module), "return a module, not its logits")
    expect(torch.equal(student(x), before), "the student that was handed in has changed: copy it first (copy.deepcopy)")
    after = fainter(x).detach()
    only_weight = 0.3 * (before - student.head.bias) + student.head.bias
    expect(not torch.allclose(after, only_weight, atol=1e-5), "the bias is part of the logits as well: scale it too")
    expect(not torch.allclose(after, before, atol=1e-6), "the copy answers as loudly as the original")
    expect(torch.allclose(after, 0.3 * before, atol=1e-5), "the copy's logits are not 0.3 times the original's for every input; only the last layer is linear")  # fmt: skip
    return "same predictions, at any volume: what a linear head can do, annealing cannot add to it"


def _scaled(student: nn.Module, phi: float, *parts: str) -> nn.Module:
    made = copy.deepcopy(student)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(parts):
                parameter *= phi
    return made


def _in_place(student: nn.Module, phi: float) -> nn.Module:
    with torch.no_grad():
        student.head.weight *= phi
        student.head.bias *= phi
    return student


WRONG_FAINTER = [
    (lambda s, phi: _scaled(s, phi, "head.weight"), "the bias is part"),
    (_in_place, "copy it first"),
    (lambda s, phi: copy.deepcopy(s), "as loudly"),
    (lambda s, phi: _scaled(s, phi, "head", "body"), "only the last layer is linear"),
    (lambda s, phi: phi * s(torch.ones(1, 5)), "return a module"),
]


# --- 01.4 read a duel ---


def _right_interval(method: Sequence[float], control: Sequence[float]) -> tuple[float, float, float]:
    found = paired_difference(method, control)
    return found.mean, found.low, found.high


def check_interval(answer: Callable[..., tuple[float, float, float]]) -> str:
    from scipy.stats import norm, t

    method, control = [0.561, 0.549, 0.572, 0.558, 0.566], [0.548, 0.541, 0.560, 0.551, 0.549]
    got = answer(method, control)
    expect(isinstance(got, (tuple, list)) and len(got) == 3, "return three numbers: (mean, low, high)")
    mean, low, high = map(float, got)
    right = _right_interval(method, control)
    d = torch.tensor(method, dtype=torch.float64) - torch.tensor(control, dtype=torch.float64)
    half, n = high - mean, len(d)
    sd = float(d.std())
    expect(not math.isclose(mean, -right[0], abs_tol=1e-9), "the sign is turned round: method minus control")
    expect(
        math.isclose(mean, right[0], abs_tol=1e-6), f"the mean difference is {mean:.4f}, it should be {right[0]:.4f}"
    )
    mistakes = {
        "normal quantile: with five seeds 1.96 is too small, use Student's t with n − 1 degrees of freedom": float(norm.ppf(0.975)) * sd / n**0.5,
        "divide the standard deviation by √n: the mean of n differences varies less than one of them": float(t.ppf(0.975, n - 1)) * sd,
        "standard deviation with n − 1, not n (ddof=1)": float(t.ppf(0.975, n - 1)) * float(d.std(correction=0)) / n**0.5,
        "0.95 leaves 2.5 % in EACH tail: take the 0.975 quantile": float(t.ppf(0.95, n - 1)) * sd / n**0.5,
    }  # fmt: skip
    for hint, value in mistakes.items():
        expect(not math.isclose(half, value, rel_tol=1e-4), hint)
    expect(half < 0.02, "the interval is as wide as without pairing: take the differences seed by seed first")
    expect(math.isclose(half, right[2] - right[0], rel_tol=1e-3) and math.isclose(mean - low, half, rel_tol=1e-6),
           f"the interval is [{low:.4f}, {high:.4f}], it should be [{right[1]:.4f}, {right[2]:.4f}]")  # fmt: skip
    return "a paired interval: the seeds' common luck has gone"


def _variant(quantile: float | None = None, root: bool = True, correction: int = 1, sign: int = 1) -> Callable:
    def interval(method: Sequence[float], control: Sequence[float]) -> tuple[float, float, float]:
        from scipy.stats import t

        d = sign * (torch.tensor(method, dtype=torch.float64) - torch.tensor(control, dtype=torch.float64))
        factor = quantile or float(t.ppf(0.975, len(d) - 1))
        half = factor * float(d.std(correction=correction)) / (len(d) ** 0.5 if root else 1)
        return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half

    return interval


def _unpaired(method: Sequence[float], control: Sequence[float]) -> tuple[float, float, float]:
    a, b = torch.tensor(method), torch.tensor(control)
    half = 2.776 * 3 * float((a.var() + b.var()).sqrt())
    mean = float((a - b).mean())
    return mean, mean - half, mean + half


WRONG_INTERVAL = [
    (_variant(sign=-1), "turned round"),
    (_variant(quantile=1.959964), "normal quantile"),
    (_variant(root=False), "divide the standard deviation by √n"),
    (_variant(correction=0), "with n − 1, not n"),
    (_variant(quantile=2.131847), "in EACH tail"),
    (_unpaired, "without pairing"),
    (lambda m, c: 0.01, "three numbers"),
]


EXERCISES = [
    Exercise("01.1", "the staircase", 10, 1, check_phi, _right_phi, WRONG_PHI),
    Exercise("01.2", "where the ladder is steep", 15, 2, check_steepest, _right_step, WRONG_STEEPEST),
    Exercise("01.3", "the scaling fact, constructively", 15, 2, check_fainter, _right_fainter, WRONG_FAINTER),
    Exercise("01.4", "read a duel", 15, 2, check_interval, _right_interval, WRONG_INTERVAL),
]
