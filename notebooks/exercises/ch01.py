"""Exercises of chapter 01, Annealing-KD."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.exercises import Exercise
from kdlib.metrics import paired_difference

# --- 01.1 the staircase: answer(epoch, epochs, tau_max) -> float ---

PLANS = [(epoch, epochs, tau) for epochs, tau in ((40, 10), (25, 10), (7, 1)) for epoch in range(epochs)]


def stairs(epoch: int, epochs: int, tau_max: int) -> float:
    return min(1.0, (epoch // (epochs // tau_max) + 1) / tau_max)


STAIRCASE = {
    "Φ starts at 0: a stage that teaches silence. The first stage is T = τ, with Φ = 1/τ": lambda e, n, t: e // (n // t) / t,
    "Φ starts at 0: a stage that teaches silence, and 1 is reached too early": lambda e, n, t: min(1.0, e // (n // t) / t),
    "the staircase runs downwards: T falls from τ to 1, so Φ rises from 1/τ to 1": lambda e, n, t: max(1 / t, 1 - (e // (n // t)) / t),
    "the staircase runs downwards, and past 0: T falls from τ to 1, so Φ rises": lambda e, n, t: 1 - (e // (n // t)) / t,
    "this is the temperature 1/Φ; the factor on the logits is asked for": lambda e, n, t: 1 / stairs(e, n, t),
    "Φ is not 1/T: temperature and volume climb differently. Φ(T) = 1 − (T − 1)/τ": lambda e, n, t: 1 / max(1, t - e // (n // t)),
    "25 epochs with τ = 10 end above 1: five epochs are left over, clamp at 1": lambda e, n, t: (e // (n // t) + 1) / t,
    "this is the stage T, counted down; put it into Φ(T) = 1 − (T − 1)/τ": lambda e, n, t: max(1, t - e // (n // t)),
    "this is constant Φ = 1, the control; the staircase is asked for": lambda e, n, t: 1.0,
    "Φ climbs every epoch; a stage lasts ⌊n/τ⌋ epochs, and Φ stands still in it": lambda e, n, t: min(1.0, (e + 1) / n),
    "Φ climbs every epoch from 1/τ on; a stage lasts ⌊n/τ⌋ epochs, and Φ stands still in it": lambda e, n, t: max(1 / t, min(1.0, (e + 1) / n)),
    "the stages share all epochs evenly; the paper gives ⌊n/τ⌋ to each, and what is left over stays at Φ = 1": lambda e, n, t: min(1.0, (e * t // n + 1) / t),
    "epochs are counted from 0 here: your first stage is one epoch short": lambda e, n, t: stairs(e + 1, n, t),
}  # fmt: skip

# --- 01.2 the scaling fact, by construction: answer(student, phi) -> module ---


class Student(nn.Module):
    """A body and a linear ``head``; no inputs are special to it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 7), nn.ReLU()), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def scaled(student: nn.Module, phi: float, *parts: str) -> nn.Module:
    made = copy.deepcopy(student)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(parts):
                parameter *= phi
    return made


def fainter(student: nn.Module, phi: float) -> nn.Module:
    return scaled(student, phi, "head")


class Wrapped(nn.Module):
    """The mistake of scaling outside of the student."""

    def __init__(self, student: nn.Module, phi: float) -> None:
        super().__init__()
        self.student, self.phi = student, phi

    def forward(self, x: Tensor) -> Tensor:
        return self.phi * self.student(x)


with torch.random.fork_rng():
    torch.manual_seed(0)
    STUDENT, INPUTS = Student(), torch.randn(20, 5)


def in_place(student: nn.Module, phi: float) -> nn.Module:
    with torch.no_grad():
        student.head.weight *= phi
        student.head.bias *= phi
    return student


def seen_student(made: Any, student: nn.Module, phi: float) -> list[Any]:
    """What a student is judged by: its answers, its shape, and the original's answers afterwards."""
    kind = [type(layer).__name__ for layer in made.modules()] if isinstance(made, nn.Module) else type(made).__name__
    answers = made(INPUTS).detach() if isinstance(made, nn.Module) and not isinstance(made, nn.Linear) else kind
    return [kind, answers, student(INPUTS).detach()]


def is_student(answer: Callable[..., Any]) -> bool:
    return isinstance(answer(copy.deepcopy(STUDENT), 0.3), nn.Module)


def keeps_the_original(answer: Callable[..., Any]) -> bool:
    mine = copy.deepcopy(STUDENT)
    answer(mine, 0.3)
    return torch.equal(mine(INPUTS), STUDENT(INPUTS))


def keeps_the_shape(answer: Callable[..., Any]) -> bool:
    made = answer(copy.deepcopy(STUDENT), 0.3)
    return {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in STUDENT.state_dict().items()}


FAINTER = {
    "the bias is part of the logits as well: scale it too": lambda s, phi: scaled(s, phi, "head.weight"),
    "the weights are part of the logits as well: scale them too": lambda s, phi: scaled(s, phi, "head.bias"),
    "the student that was handed in has changed: copy it first (copy.deepcopy)": in_place,
    "the copy answers as loudly as the original": lambda s, phi: copy.deepcopy(s),
    "only the last layer is linear: scaling every layer scales the logits by more than Φ, and unevenly": lambda s, phi: scaled(s, phi, "head", "body"),
    "the copy is louder, not fainter: multiply by Φ": lambda s, phi: fainter(s, 1 / phi),
    "a wrapper that multiplies is no student of the same shape: put Φ into the head's weights": Wrapped,
    "an extra layer makes another architecture: put Φ into the head's weights": lambda s, phi: nn.Sequential(s, scaled_identity(phi)),
    "return a module, not its logits": lambda s, phi: phi * s(INPUTS),
    "return the whole student, not its head": lambda s, phi: fainter(s, phi).head,
}  # fmt: skip


def scaled_identity(phi: float) -> nn.Linear:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(phi * torch.eye(3)), layer.bias.zero_()
    return layer


# --- 01.3 a fair control: answer(annealed, constant) -> arm ---


def annealing_objective(student_logits, batch, teacher, epochs, *, tau_max=None, constant=None, reverse=False, turned=1.0):  # fmt: skip
    """A stand-in with the signature of the chapter's own."""
    epoch = epochs - 1 - batch["epoch"] if reverse else batch["epoch"]
    volume = constant if constant is not None else stairs(epoch, epochs, tau_max)
    return F.mse_loss(student_logits, volume * turned * teacher(batch))


def labels(student_logits, batch, teacher, epochs):
    return F.cross_entropy(student_logits, batch["y"])


ARM = {"teacher": "strong", "phases": (partial(annealing_objective, tau_max=5, turned=0.5), labels), "rate": 0.1}
BATCH = {"y": torch.tensor([0, 2, 1]), "z": torch.tensor([[3.0, 0.0, 1.0], [0.0, 1.0, 2.0], [2.0, 5.0, 1.0]])}


def seen_arm(made: Any, annealed: dict, constant: float) -> list[Any]:
    """Whom the arm listens to, and the loss of phase I and II at every epoch."""
    if not (isinstance(made, dict) and len(made.get("phases", ())) == 2):
        return ["no arm"]
    rest = {key: value for key, value in made.items() if key != "phases"}
    one, two = made["phases"]
    losses = [
        [objective(torch.ones(3, 3), BATCH | {"epoch": epoch}, lambda batch: batch["z"], 10) for epoch in range(10)]
        for objective in (one, two)
    ]
    return [sorted(rest.items()), losses]


def control(annealed: dict, constant: float) -> dict:
    return with_first(annealed, partial(annealing_objective, constant=constant, turned=0.5))


def with_first(annealed: dict, first: Callable, second: Callable = labels, **more: Any) -> dict:
    return {**annealed, "phases": (first, second), **more}


def mean_volume(epochs: int = 10) -> float:
    return sum(stairs(epoch, epochs, 5) for epoch in range(epochs)) / epochs


def leaves_the_arm_alone(answer: Callable[..., Any]) -> bool:
    mine = {**ARM}
    answer(mine, 0.3)
    return mine == ARM


CONTROL = {
    "nothing has changed: this is still the annealed arm": lambda a, c: dict(a),
    "the constant is lost: hand on the number you were given": lambda a, c: control(a, 1.0),
    "the constant is yours, not the one handed in: `constant` may be any number": lambda a, c: control(a, mean_volume()),
    "other keywords of phase I got lost (here `turned`): a control differs in one thing only": lambda a, c: with_first(a, partial(annealing_objective, constant=c)),
    "phase II has lost its labels: a control that skips them differs in two things": lambda a, c: with_first(a, (one := control(a, c)["phases"][0]), one),
    "both phases are annealing's labels now: phase I keeps its loss": lambda a, c: with_first(a, labels),
    "the phases are swapped: first the teacher, then the labels": lambda a, c: {**a, "phases": control(a, c)["phases"][::-1]},
    "a constant teacher is not a reversed staircase: put the constant": lambda a, c: with_first(a, partial(annealing_objective, tau_max=5, reverse=True, turned=0.5)),
    "the teacher was turned down as well: the constant multiplies once": lambda a, c: with_first(a, partial(annealing_objective, constant=c, turned=0.5 * c)),
    "another teacher: a control listens to the same one": lambda a, c: {**control(a, c), "teacher": "modest"},
    "an arm is a dictionary with `teacher` and `phases`; the objective alone is not one": lambda a, c: control(a, c)["phases"][0],
}  # fmt: skip

# --- 01.4 read a duel: answer(method, control) -> (mean, low, high) ---

SCORES = ([0.561, 0.549, 0.572, 0.558, 0.566], [0.548, 0.541, 0.560, 0.551, 0.549])


def interval(quantile: float = 2.7764451, root: bool = True, correction: int = 1, sign: int = 1, paired: bool = True) -> Callable:  # fmt: skip
    """An interval for five seeds; the defaults are the right ones, each argument is a mistake."""

    def answer(method: Sequence[float], control: Sequence[float]) -> tuple[float, float, float]:
        one, two = torch.tensor(method, dtype=torch.float64), torch.tensor(control, dtype=torch.float64)
        variance = (one - two).var(correction=correction) if paired else one.var() + two.var()
        mean, half = sign * float((one - two).mean()), quantile * float(variance) ** 0.5 / (len(one) ** 0.5 if root else 1)  # fmt: skip
        return mean, mean - half, mean + half

    return answer


def duel(method: Sequence[float], control: Sequence[float]) -> tuple[float, float, float]:
    found = paired_difference(method, control)
    return found.mean, found.low, found.high


DUEL = {
    "the sign is turned round: method minus control": interval(sign=-1),
    "normal quantile: with five seeds 1.96 is too small, use Student's t with n − 1 degrees of freedom": interval(1.959964),
    "divide the standard deviation by √n: the mean of n differences varies less than one of them": interval(root=False),
    "standard deviation with n − 1, not n (ddof=1)": interval(correction=0),
    "0.95 leaves 2.5 % in EACH tail: take the 0.975 quantile": interval(2.1318468),
    "n − 1 degrees of freedom: the mean has used one up": interval(2.5705818),
    "not paired: the seeds' common luck is still in it. Take the differences seed by seed first, then their deviation": interval(paired=False),
    "not paired (Student's t with 2n − 2 degrees of freedom): take the differences seed by seed first": interval(2.3060041, paired=False),
    "not paired (Welch's degrees of freedom): take the differences seed by seed first": interval(2.3301, paired=False),
    "not paired, and with the normal quantile: take the differences seed by seed first": interval(1.959964, paired=False),
    "not paired, and not divided by √n: take the differences seed by seed first": interval(paired=False, root=False),
    "return three numbers: (mean, low, high)": lambda m, c: interval()(m, c)[0],
    "return (mean, low, high), in this order": lambda m, c: sorted(interval()(m, c)),
    "return the ends of the interval, not its half-width": lambda m, c: (interval()(m, c)[0], interval()(m, c)[2] - interval()(m, c)[0]),
}  # fmt: skip


# --- 01.5 where the ladder is steep: answer(teacher_logits, tau_max) -> T ---


def steepest(z: Tensor, tau_max: int, first: float = 1.0) -> int:
    factors = torch.tensor([1 - (t - 1) / tau_max for t in range(tau_max, 0, -1)])
    entropy = torch.distributions.Categorical(logits=first * factors[:, None] * z).entropy()
    return tau_max - int((entropy[:-1] - entropy[1:]).argmax())


LOUD, QUIET = torch.tensor([9.0, 2.0, 0.0, -1.0, -10.0]), torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def with_silence(z: Tensor, tau_max: int) -> int:
    """The mistake of a stage Φ = 0 before the first."""
    factors = torch.tensor([t / tau_max for t in range(tau_max + 1)])
    entropy = torch.distributions.Categorical(logits=factors[:, None] * z).entropy()
    return tau_max + 1 - int((entropy[:-1] - entropy[1:]).argmax())


STEEPEST = {
    "it is not always the first step: near-uniform targets have little entropy to lose. Compute it": lambda z, t: t,
    "this is where the step arrives; the stage it starts from is asked for": lambda z, t: steepest(z, t) - 1,
    "these are Φ's stages counted from below: T runs from τ down to 1": lambda z, t: t + 1 - steepest(z, t),
    "there is no stage Φ = 0: the ladder starts at 1/τ": with_silence,
    "the teacher was scaled twice": lambda z, t: steepest(z, t, 0.5),
}


EXERCISES = {
    "01.1": Exercise("the staircase", 10, 1, stairs, STAIRCASE, PLANS, praise="the staircase is right, also where epochs are left over"),
    "01.2": Exercise(
        "the scaling fact, by construction", 5, 1, fainter, FAINTER, [(STUDENT, 0.3)], look=seen_student,
        rules={
            "return a module, not its logits": is_student,
            "the student that was handed in has changed: copy it first (copy.deepcopy)": keeps_the_original,
            "the copy has other layers or parameters than the student: put Φ into the head's weights": keeps_the_shape,
        },
        praise="same predictions, at any volume: what a linear head can do, annealing cannot add to it",
    ),
    "01.3": Exercise(
        "a fair control", 10, 2, control, CONTROL, [(ARM, 0.3), (ARM, 2.0)], look=seen_arm,
        rules={"the arm that was handed in has changed: make a new dictionary, {**annealed, …}": leaves_the_arm_alone},
        praise="one thing differs: whatever separates the two arms, it is the staircase",
    ),
    "01.4": Exercise(
        "read a duel", 10, 2, duel, DUEL, [SCORES], within=1e-3, praise="a paired interval: the seeds' common luck has gone",
    ),
    "01.5": Exercise(
        "where the ladder is steep", 15, 2, steepest, STEEPEST, [(LOUD, 10), (QUIET, 10), (LOUD, 7), (LOUD, 3)],
        praise="found: it depends on how loud the teacher is",
    ),
}  # fmt: skip
