"""Exercises of chapter 04, lifelong KD."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdlib.exercises import Exercise

# --- 04.1 what the solver sees and is asked: answer(act, text, ans, eos) -> (inputs, targets) ---


def qa(act: list[int], text: list[int], ans: int, eos: int) -> tuple[list[int], list[int]]:
    whole = [*act, ans, *text, eos]
    return whole[:-1], [-100] * len(act) + [*text, eos]


QA = {
    "the act is asked for as well: in the QA role its places are −100": lambda a, t, ans, eos: ([*a, ans, *t], [*a[1:], ans, *t, eos]),
    "targets are not shifted: at each place stands the NEXT token, so the answer's first word at ANS": lambda a, t, ans, eos: ([*a, ans, *t, eos], [-100] * (len(a) + 1) + [*t, eos]),
    "EOS is read here: it is a target, never an input": lambda a, t, ans, eos: ([*a, ans, *t, eos], [-100] * len(a) + [*t, eos, -100]),
    "EOS is missing: a model that is never asked for it never stops": lambda a, t, ans, eos: ([*a, ans, *t], [-100] * len(a) + [*t, -100]),
    "EOS is missing, and with it the last word's place: inputs are act, ANS and the whole text": lambda a, t, ans, eos: ([*a, ans, *t[:-1]], [-100] * len(a) + [*t]),
    "ANS is asked for: it is part of the question here, given and not predicted": lambda a, t, ans, eos: ([*a, ans, *t], [-100] * (len(a) - 1) + [ans, *t, eos]),
    "the first word of the answer is not asked for: it is predicted where ANS is read": lambda a, t, ans, eos: ([*a, ans, *t], [-100] * (len(a) + 1) + [*t[1:], eos]),
    "the inputs lack ANS: nothing tells the model that the act is over": lambda a, t, ans, eos: ([*a, *t], [-100] * (len(a) - 1) + [*t, eos]),
    "the model cannot see its own answer so far: the text is part of the inputs": lambda a, t, ans, eos: ([*a, ans], [*t, eos]),
    "inputs and targets have one length: ANS is where the first word of the answer is asked for, so it is not masked": lambda a, t, ans, eos: ([*a, ans, *t], [-100] * (len(a) + 1) + [*t, eos]),
    "what is not asked for is -100, which cross-entropy ignores; 0 is a word": lambda a, t, ans, eos: ([*a, ans, *t], [0] * len(a) + [*t, eos]),
    "inputs and targets are swapped": lambda a, t, ans, eos: qa(a, t, ans, eos)[::-1],
}  # fmt: skip

# --- 04.2 forgetting: answer(R) -> float ---


def forgetting(R: Any) -> float:
    R = np.asarray(R, dtype=float)
    return float((R.max(0) - R[-1])[:-1].mean())


MATRICES = [
    (np.array([[40.0, 2.0, 1.0], [30.0, 50.0, 3.0], [22.0, 41.0, 60.0]]),),
    (np.array([[40.0, 2.0, 1.0], [44.0, 50.0, 3.0], [41.0, 41.0, 60.0]]),),
    (np.array([[10.0, 0.0], [4.0, 20.0]]),),
    (np.array([[10.0, 0.0, 0.0], [4.0, 20.0, 0.0], [13.0, 11.0, 30.0]]),),  # the first task is best at the end
]
FORGETTING = {
    "the mean is over the old tasks, one less than all: the last one cannot have been forgotten yet": lambda R: float((np.max(R, 0) - np.asarray(R)[-1]).mean()),
    "this is minus the backward transfer: a task may have become BETTER later, take the best it ever was": lambda R: float((np.diagonal(R) - np.asarray(R)[-1])[:-1].mean()),
    "this is the backward transfer: turn the sign, and take the best the task ever was": lambda R: float((np.asarray(R)[-1] - np.diagonal(R))[:-1].mean()),
    "the sign is turned round: forgetting is a loss, best minus last": lambda R: -forgetting(R),
    "rows and columns are mixed up: a row is a moment, a column a task": lambda R: forgetting(np.transpose(R)),
    "the mean over the old tasks is asked for, not the sum": lambda R: float((np.max(R, 0) - np.asarray(R)[-1])[:-1].sum()),
    "the mean over the old tasks is asked for, not the worst": lambda R: float((np.max(R, 0) - np.asarray(R)[-1])[:-1].max()),
    "this is how much the first task has lost; there are more": lambda R: float((np.max(R, 0) - np.asarray(R)[-1])[0]),
    "this is the average of the last row: how good the tasks are, not what they lost": lambda R: float(np.mean(R[-1])),
    "the best is over ALL rows, the last one too: a task that is best at the end has forgotten nothing": lambda R: float((np.max(R[:-1], 0) - R[-1])[:-1].mean()),
    "the difference is asked for, not its share of the best": lambda R: float(((np.max(R, 0) - R[-1]) / np.max(R, 0))[:-1].mean()),
    "one number is asked for, not one a task": lambda R: (np.max(R, 0) - np.asarray(R)[-1])[:-1].tolist(),
}  # fmt: skip

# --- 04.3 replay's share of the loss: answer(gamma, batch_size, equal) -> float ---


def share(gamma: float, batch_size: int, equal: bool, s: float | None = None) -> float:
    s = gamma / (1 + gamma) if s is None else s
    present = 1 - (1 - s) ** batch_size
    return present / (1 + present) if equal else s


SHARES = [(0.2, 4, True), (0.2, 4, False), (0.2, 32, True), (0.05, 4, True), (1.0, 2, False)]
SHARE = {
    "γ is measured against the new data: of ALL examples γ/(1 + γ) are replayed": lambda g, b, e: share(g, b, e, g),
    "γ is measured against the new data: of all examples γ/(1 + γ) are replayed, pooled; the other case is right": lambda g, b, e: share(g, b, e) if e else g,
    "the two means are added: a batch that holds one replayed example gives it as much weight as all new ones": lambda g, b, e: share(g, b, False),
    "not every batch holds a replayed example: where there is none, its mean is 0": lambda g, b, e: 0.5 if e else share(g, b, e),
    "this is how often a batch holds replay; the share is its weight over the weight of both": lambda g, b, e: 1 - (1 - g / (1 + g)) ** b if e else share(g, b, e),
    "pooled, the share does not depend on the batch": lambda g, b, e: share(g, b, True),
    "the cases are swapped: `equal=True` is the sum of two means": lambda g, b, e: share(g, b, not e),
    "half of what is left: divide by new plus replay (1 + present), not by 2": lambda g, b, e: (1 - (1 - g / (1 + g)) ** b) / 2 if e else share(g, b, e),
    "this is the share of the NEW examples": lambda g, b, e: 1 - share(g, b, e),
    "a share is between 0 and 1, not in per cent": lambda g, b, e: 100 * share(g, b, e),
}  # fmt: skip

# --- 04.4 parse a dream: answer(row, ans, eos) -> (act, text) or False ---
EOS, ANS = 50, 51
DREAMS = [
    ([3, 4, ANS, 7, 8, EOS], ANS, EOS),
    ([3, 4, 7, 8, EOS], ANS, EOS),
    ([3, ANS, 7, ANS, 8, EOS], ANS, EOS),
    ([3, 4, ANS, 7, 8], ANS, EOS),
    ([ANS, 7, 8, EOS], ANS, EOS),
    ([3, 4, ANS, EOS], ANS, EOS),
    ([3, 52, ANS, 7, EOS], ANS, EOS),
    ([3, ANS, 7, 53, EOS], ANS, EOS),
    ([3, EOS, ANS, 7, EOS], ANS, EOS),
    ([EOS], ANS, EOS),
    ([5, ANS, 6, EOS], ANS, EOS),
]


def parsed(row: list[int], ans: int, eos: int, *, skip: str = "", keep_eos: bool = False) -> Any:
    """The right answer; ``skip`` leaves one of the questions out."""
    if ans not in row or (row.count(ans) != 1 and skip != "two"):
        return False
    if row[-1] != eos and skip != "cut":
        return False
    at = row.index(ans)
    act, text = row[:at], row[at + 1 :] if keep_eos or row[-1] != eos else row[at + 1 : -1]
    if (not act and skip not in ("empty", "act")) or (not text and skip not in ("empty", "text")):
        return False
    if skip != "special" and any(
        i >= eos and not (skip == "two" and i == ans) for i in act + text if not (keep_eos and i == eos)
    ):
        return False
    return act, text


PARSE = {
    "two ANS: where does the act end? Such a row is no example": lambda r, a, e: parsed(r, a, e, skip="two"),
    "a row without EOS was cut off in its middle: drop it": lambda r, a, e: parsed(r, a, e, skip="cut"),
    "an empty act and an empty text teach nothing: drop them": lambda r, a, e: parsed(r, a, e, skip="empty"),
    "an empty act is no example": lambda r, a, e: parsed(r, a, e, skip="act"),
    "an empty text is no example": lambda r, a, e: parsed(r, a, e, skip="text"),
    "a special token inside (another task's GEN, say) would be rehearsed as a word: all ids from eos on are special": lambda r, a, e: parsed(r, a, e, skip="special"),
    "EOS is still in the text": lambda r, a, e: parsed(r, a, e, keep_eos=True),
    "ANS is still in the act": lambda r, a, e: ([*found[0], a], found[1]) if (found := parsed(r, a, e)) else False,
    "ANS is still in the text": lambda r, a, e: (found[0], [a, *found[1]]) if (found := parsed(r, a, e)) else False,
    "act and text are swapped": lambda r, a, e: found[::-1] if (found := parsed(r, a, e)) else False,
    "return the pair (act, text), not whether there is one": lambda r, a, e: bool(parsed(r, a, e)),
    "where there is no example, return False, not None": lambda r, a, e: parsed(r, a, e) or None,
    "eos itself is special too: in the middle of a row it is no word": lambda r, a, e: (r[: (k := r.index(a))], r[k + 1 : -1]) if r.count(a) == 1 and r[-1] == e and 0 < r.index(a) < len(r) - 2 and max(i for i in r[:-1] if i != a) <= e else False,
    "good rows are dropped as well": lambda r, a, e: False,
}  # fmt: skip

EXERCISES = {
    "04.1": Exercise(
        "what the solver sees", 10, 1, qa, QA, cases=[([3, 4, 5], [7, 8], ANS, EOS), ([3], [9, 6, 7], ANS, EOS)],
        praise="right. Note that inputs and targets have one length, and that the loss counts len(text) + 1 tokens",
    ),
    "04.2": Exercise(
        "forgetting", 8, 1, forgetting, FORGETTING, cases=MATRICES,
        praise="right. In the second case the first task had become better in between, and that counts",
    ),
    "04.3": Exercise(
        "replay's share", 10, 3, share, SHARE, cases=SHARES, within=2e-3,
        praise="right: a sixth of the data can be half of the loss",
    ),
    "04.4": Exercise(
        "parse a dream", 10, 2, parsed, PARSE, cases=DREAMS,
        praise="right. What is dropped, and why, is worth a look: § 5",
    ),
}  # fmt: skip
