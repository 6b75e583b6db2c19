"""Make data/toy_reviews.jsonl: short reviews with one to five stars, written by a small grammar.

    python data/make_toy_reviews.py  # writes the file again, byte for byte

A review says something about one or two aspects of a restaurant, hotel, film or phone. Each clause has a value: that of
its opinion word, after whatever in the clause turns it round. The stars are drawn from the value, so that a
mixed review really has several plausible ratings; `soft` in the file holds the true probabilities in percent.
"""

from __future__ import annotations

import json
from math import erf, sqrt
from pathlib import Path

from draws import Writer

SEED = 20_260
PARTS = {"train": 2_300, "validation": 400, "test": 700}
STARS = (1, 2, 3, 4, 5)
FILE = Path(__file__).with_name("toy_reviews.jsonl")

# Opinion words by strength, the common ones first: the k-th is drawn with weight 1 / k^1.4, so that the last are rare.
WORDS = {
    2: "great excellent wonderful superb fantastic brilliant outstanding terrific exquisite impeccable sublime stellar "
    "peerless resplendent consummate",
    1: "good nice pleasant decent solid enjoyable likeable agreeable commendable respectable congenial creditable "
    "palatable serviceable felicitous",
    -1: "bad poor dull weak mediocre tired disappointing bland shoddy lacklustre insipid middling pedestrian "
    "humdrum unprepossessing",
    -2: "awful terrible horrible dreadful appalling disgraceful atrocious abysmal deplorable execrable ghastly wretched "
    "woeful lamentable abominable",
}  # fmt: skip
ASPECTS = {
    "restaurant": "food service menu wine soup dessert atmosphere",
    "hotel": "room bed staff breakfast location pool reception",
    "film": "plot acting music ending dialogue camerawork script",
    "phone": "camera screen keyboard sound design speaker software",
}
MORE_IS_BETTER = {
    "restaurant": "portions",
    "hotel": "garden",
    "film": "budget for ideas",
    "phone": "battery life",
}
LESS_IS_BETTER = {"restaurant": "bill", "hotel": "noise", "film": "number of clichés", "phone": "delay"}
AMOUNTS = {"huge": 1.5, "generous": 1.0, "considerable": 1.0, "modest": -1.0, "small": -1.0, "tiny": -1.5}
DEGREES = (("", 1.0), ("really ", 1.3), ("very ", 1.3), ("rather ", 0.8), ("slightly ", 0.5))
# What turns an opinion round, and what only seems to. {a}: aspect, {w}: opinion with its degree.
FRAMES = (
    ("the {a} was {w}", 1.0, 18),
    ("i found the {a} {w}", 1.0, 8),
    ("the {a} was not {w}", -0.7, 8),
    ("i would not call the {a} {w}", -0.7, 3),
    ("the {a} was anything but {w}", -1.0, 3),
    ("the {a} used to be {w}", -0.8, 3),
    ("they said the {a} was {w} and it was not", -0.8, 2),
    ("they said the {a} was {w} and it was", 1.0, 2),
)
# Two clauses: how they are joined, and what each counts.
JOINS = (
    ("{one} and {two}", 0.6, 0.6, 4),
    ("{one} but {two}", 0.2, 0.9, 5),
    ("although {one} , {two}", 0.2, 0.9, 3),
    ("{one} , although {two}", 0.9, 0.2, 3),
)
OPENINGS = ("", "", "", "", "honestly , ", "in the end ")
WRONG_STARS = 0.04  # of all reviews carry stars drawn blindly


class Reviews(Writer):
    """Draws reviews."""

    def opinion(self) -> tuple[str, float]:
        strength = self.pick((2, 1, -1, -2))
        words = WORDS[strength].split()
        degree, factor = self.pick(DEGREES, (8, 2, 2, 1, 1))
        return degree + self.pick(words, [rank**-1.4 for rank in range(1, len(words) + 1)]), strength * factor

    def clause(self, kind: str) -> tuple[str, float]:
        if self.chance(0.12):  # a word that is praise for one thing and blame for another
            better = self.chance(0.5)
            aspect = (MORE_IS_BETTER if better else LESS_IS_BETTER)[kind]
            word = self.pick(list(AMOUNTS))
            value = AMOUNTS[word] if better else -AMOUNTS[word]
        else:
            aspect = self.pick(ASPECTS[kind].split())
            word, value = self.opinion()
        frame, factor, _ = self.pick(FRAMES, [frame[2] for frame in FRAMES])
        return frame.format(a=aspect, w=word), value * factor

    def review(self) -> tuple[str, float, float]:
        """A text, its value, and how much readers differ about it."""
        kind = self.pick(list(ASPECTS))
        opening = self.pick(OPENINGS)
        one, value = self.clause(kind)
        if self.chance(0.5):
            return opening + one, value, 0.25
        two, second = self.clause(kind)
        join, weight_one, weight_two, _ = self.pick(JOINS, [join[3] for join in JOINS])
        spread = 0.25 + 0.3 * abs(value - second) / 2  # the more the clauses differ, the more the readers do
        return opening + join.format(one=one, two=two), weight_one * value + weight_two * second, spread


def soft_stars(value: float, spread: float) -> list[float]:
    """The probability of each number of stars: a normal around the value, cut at -1.4, -0.4, 0.4 and 1.4."""
    below = [
        0.0,
        *(0.5 * (1 + erf((edge - value) / (spread * sqrt(2)))) for edge in (-1.4, -0.4, 0.4, 1.4)),
        1.0,
    ]
    sure = [high - low for low, high in zip(below, below[1:], strict=False)]
    return [(1 - WRONG_STARS) * p + WRONG_STARS / len(STARS) for p in sure]


def percent(shares: list[float]) -> list[int]:
    """Whole percent that sum to 100."""
    whole = [round(100 * share) for share in shares]
    whole[whole.index(max(whole))] += 100 - sum(whole)
    return whole


def reviews(seed: int = SEED) -> list[dict]:
    """All parts' reviews; no text occurs twice."""
    writer, seen, rows = Reviews(seed), set(), []
    for part, count in PARTS.items():
        made = 0
        while made < count:
            text, value, spread = writer.review()
            if text in seen:
                continue
            seen.add(text)
            soft = soft_stars(value, spread)
            rows.append({"part": part, "label": writer.pick(STARS, soft), "soft": percent(soft), "text": text})
            made += 1
    return rows


def lines(seed: int = SEED) -> str:
    """The file's content."""
    return "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in reviews(seed))


if __name__ == "__main__":
    FILE.write_text(lines(), encoding="utf-8")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")
