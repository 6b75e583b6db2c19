"""Exercises that answer at once: a right answer, cases to try it on, and a bank of mistakes known by what they answer.

The bank is the check: an answer that agrees with a mistake on every case gets that mistake's hint. So a hint stands
once, with the code that makes the mistake, and the tests need no second list. A chapter's exercises are in
``ch00.py``, ``ch01.py``, … as a dictionary ``EXERCISES``.
"""

from __future__ import annotations

import copy
import dis
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

IDLE = {"RESUME", "NOP", "COPY_FREE_VARS", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}  # all that a stub does


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        title, minutes, difficulty: for the reader; difficulty from 1 to 3.
        right: the answer, a function or a value.
        mistakes: hint -> an answer that deserves it.
        cases: arguments that a function is tried on, or a function that makes them afresh.
        alternatives: further answers that are right as well.
        look: ``look(result, *arguments)`` is what is compared, where that is not the result itself (a gradient, say).
        rules: hint -> test of the answer, for what no value shows; asked after the mistakes.
        praise: what a right answer hears.
        within: relative tolerance.
    """

    title: str
    minutes: int
    difficulty: int
    right: Any
    mistakes: dict[str, Any]
    cases: Sequence[tuple] | Callable[[], Sequence[tuple]] = ((),)
    alternatives: Sequence[Any] = ()
    look: Callable[..., Any] = lambda result, *arguments: result
    rules: dict[str, Callable[[Any], bool]] | None = None
    praise: str = "right"
    within: float = 1e-4

    def verdict(self, answer: Any) -> str:
        """What the reader is told: ✓ and praise, ✗ and a hint, or … while the answer is a stub. Nothing is raised."""
        if answer is ... or answer is None or _is_stub(answer):
            return f"… {self.title} waits for your answer"
        if callable(self.right) and not callable(answer):
            return "✗ hand over the function itself, not what it returns"
        try:
            with torch.random.fork_rng():
                return self._judge(answer)
        except NotImplementedError:
            return f"… {self.title} waits for your answer"
        except Exception as error:
            return f"✗ your answer stopped with {type(error).__name__}: {error}"

    def _judge(self, answer: Any) -> str:
        if callable(answer):
            silent = True
            for mine, case in zip(self._fresh(), self._fresh(), strict=True):
                silent &= answer(*mine) is None
                if self.look is Exercise.look and not all(map(_untouched, mine, case)):
                    return "✗ what was handed in has changed: build something new (z / T, not z /= T)"
            if silent:
                return "✗ your function returns nothing: is the return forgotten?"
        got, want = self.observe(answer), self.observe(self.right)
        for other in self.alternatives:
            want = got if alike(got, self.observe(other), self.within) else want
        right = [alike(g, w, self.within) for g, w in zip(got, want, strict=True)]
        for hint, mistake in self._bank.items() if not all(right) else ():
            if alike(got, mistake, self.within):
                return f"✗ {hint}"
        for hint, holds in (self.rules or {}).items():
            if not _holds(holds, answer):
                return f"✗ {hint}"
        if all(right):
            return f"✓ {self.praise}"
        case = right.index(False)
        where = f" on case {case + 1} of {len(right)}" if len(right) > 1 else ""
        return f"✗{where} your answer is {_short(got[case])}, it should be {_short(want[case])}"

    def observe(self, answer: Any) -> list[Any]:
        """What ``answer`` shows on each case, from the same random state and on fresh copies of the arguments."""
        if not callable(answer):
            return [answer]
        torch.manual_seed(0)
        return [self.look(answer(*case), *case) for case in self._fresh()]

    @cached_property
    def _bank(self) -> dict[str, list[Any]]:
        return {hint: self.observe(mistake) for hint, mistake in self.mistakes.items()}

    def _fresh(self) -> Sequence[tuple]:
        return self.cases() if callable(self.cases) else copy.deepcopy(self.cases)


def _is_stub(answer: Any) -> bool:
    code = getattr(answer, "__code__", None)
    if code is None or {step.opname for step in dis.get_instructions(code)} - IDLE:
        return False
    return {value for value in code.co_consts if not isinstance(value, str)} <= {None, ...}


def _holds(rule: Callable[[Any], bool], answer: Any) -> bool:
    try:
        return bool(rule(answer))
    except Exception:  # a rule asks for what a wrong answer may not even allow
        return False


def _untouched(now: Any, before: Any) -> bool:
    if isinstance(before, nn.Module):
        return all(map(torch.equal, now.state_dict().values(), before.state_dict().values()))
    return torch.equal(now, before) if isinstance(before, Tensor) else True


def alike(one: Any, other: Any, within: float = 1e-4) -> bool:
    """Whether two answers agree to a relative tolerance, whatever kind of number, list or tensor they are."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(alike(a, b, within) for a, b in zip(one, other, strict=True))
    try:
        a, b = (torch.as_tensor(x).detach().to(torch.float64) for x in (one, other))
        return a.shape == b.shape and torch.allclose(a, b, rtol=within, atol=within / 100, equal_nan=True)
    except (TypeError, ValueError, RuntimeError):
        return type(one) is type(other) and one == other


def _short(value: Any) -> str:
    value = value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value.numel() > 12:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_short, value)) + ")"
    if isinstance(value, Tensor):
        return f"{value.item():.4g}" if value.ndim == 0 else str(value.tolist())[:120]
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]


def exercises(chapter: str) -> dict[str, Exercise]:
    """A chapter's exercises by key, ``"01.2"``.

    Raises:
        ValueError: the chapter has none.
    """
    try:
        return importlib.import_module(f"kdlib.exercises.ch{chapter}").EXERCISES
    except ModuleNotFoundError as error:
        raise ValueError(f"chapter {chapter!r} has no exercises") from error


def check(key: str, answer: Any) -> None:
    """Print the verdict on an answer; nothing is raised for a wrong one.

    Raises:
        ValueError: there is no such exercise.
    """
    known = exercises(key.split(".")[0])
    if key not in known:
        raise ValueError(f"there is no exercise {key!r}; there are {', '.join(known)}")
    mark, _, said = known[key].verdict(answer).partition(" ")
    print(f"{mark} {key}: {said}")
