"""Make data/toy_quality.jsonl: sentence pairs whose errors are known, as noisy raters and an imperfect teacher score them.

    python data/make_toy_quality.py  # writes the file again, byte for byte

A sentence of a made-up language (verb last, adjective behind its noun, the definite article as an ending) is translated into
English by its dictionary; then errors are put in. An error costs what ``SEVERITY`` says, and ``truth`` is what is left of 100.
Raters see the truth through a habit of their own and a lot of noise; ``z_mean`` is the mean of their scores, each rater's
standardised, as in MLQE-PE. The teacher knows most of the dictionary: it counts what it finds wrong with a pair, and weighs
the counts by a regression on the noisy ``z_mean`` of the training part.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from draws import Writer

SEED = 20_271
FOLDER = Path(__file__).parent
SIZES = {"train": (600, 3), "dev": (200, 6), "test20": (300, 6)}  # pairs, raters of each
RATERS, NOISE = 12, 40.0  # how many there are; the deviation of a score from what the rater means, points of 100
SEVERITY = {"untranslated": 26, "repeated": 14, "swapped": 18, "wrong": 22, "missing": 16}

WORDS = {
    "noun": "dog tree house river child teacher window letter garden road horse market doctor village song bridge king "
    "island kitchen sailor lamp forest winter museum painter mirror harbour piano judge baker tower engine",
    "adjective": "old small red quiet young heavy strange wooden happy cold famous empty clever narrow broken golden "
    "hungry distant gentle ancient",
    "verb": "sees finds loves leaves paints sells hears follows needs builds visits carries forgets remembers opens "
    "watches repairs describes",
    "adverb": "today often never slowly again yesterday gladly rarely suddenly together",
}
SYLLABLES = "ka mo ri te su na lo vi pe du za ho ne gi bu".split()


class Pairs(Writer):
    """Draws the dictionary, sentences, their translations, the errors in these, and what raters say of them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.words = {kind: text.split() for kind, text in WORDS.items()}
        made: dict[str, None] = {}  # a set that keeps its order
        while len(made) < sum(map(len, self.words.values())):
            made["".join(self.pick(SYLLABLES) for _ in range(2 + self.chance(0.5)))] = None
        coined = iter(made)
        self.foreign = {word: next(coined) for words in self.words.values() for word in words}
        self.habits = [(self.near(0, 9), 0.7 + 0.6 * self.random.random()) for _ in range(RATERS)]

    def near(self, mean: float, deviation: float) -> float:
        """A draw from a bell curve: the sum of twelve uniform ones."""
        return mean + deviation * (sum(self.random.random() for _ in range(12)) - 6)

    def word(self, kind: str) -> str:
        """A word; the later in its list, the rarer."""
        words = self.words[kind]
        return self.pick(words, [1 / (2 + rank) for rank in range(len(words))])

    def phrase(self) -> tuple[list[str], list[str]]:
        """A noun with its article and perhaps an adjective, in both languages."""
        noun, definite = self.word("noun"), self.chance(0.5)
        adjective = [self.word("adjective")] * self.chance(0.55)
        foreign = [self.foreign[noun] + ("-li" if definite else ""), *(self.foreign[word] for word in adjective)]
        return foreign, ["the" if definite else "one", *adjective, noun]

    def sentence(self) -> tuple[list[str], list[str]]:
        """A sentence and its right translation."""
        (subject, who), (object, whom) = self.phrase(), self.phrase()
        verb, adverb = self.word("verb"), [self.word("adverb")] * self.chance(0.4)
        foreign = [self.foreign[word] for word in adverb] + subject + object + [self.foreign[verb]]
        return [*foreign, "."], [*who, verb, *whom, *adverb, "."]

    def spoil(self, source: list[str], words: list[str]) -> tuple[list[str], float]:
        """The translation with some errors, and what they cost; rare words are translated wrongly more often."""
        words, cost = list(words), 0.0
        kinds = {word: (kind, rank) for kind, some in self.words.items() for rank, word in enumerate(some)}
        for at in range(len(words) - 2, -1, -1):
            word = words[at]
            kind, rank = kinds.get(word, ("", 0))
            if kind and self.chance(0.05 + 0.016 * rank):
                error = self.pick(("untranslated", "wrong", "missing"), (3, 2, 1.5))
            elif self.chance(0.07):
                error = self.pick(("repeated", "swapped"))
            else:
                continue
            cost += SEVERITY[error]
            if error == "untranslated":
                words[at] = self.foreign[word]
            elif error == "wrong":
                words[at] = self.pick([other for other in self.words[kind] if other != word])
            elif error == "missing":
                del words[at]
            elif error == "repeated":
                words.insert(at, word)
            else:
                words[at : at + 2] = words[at : at + 2][::-1]
        return words, cost

    def rated(self, truth: float, raters: int) -> list[tuple[int, int]]:
        """Who rated, and the scores."""
        who = sorted(range(RATERS), key=lambda _: self.random.random())[:raters]
        meant = [(rater, self.habits[rater][0] + 65 + self.habits[rater][1] * (truth - 65)) for rater in who]
        return [(rater, round(min(100, max(0, self.near(score, NOISE))))) for rater, score in meant]


def found_wrong(row: dict, foreign: dict[str, str]) -> list[float]:
    """What a reader with the dictionary ``foreign`` counts: stray, repeated, unexplained, untranslated, bad neighbours."""
    source = [word.removesuffix("-li") for word in row["original"].split()]
    words, known = row["translation"].split(), set(foreign) | {"the", "one", "."}
    wanted = [word for word, coined in foreign.items() if coined in source]
    order = [words.index(word) for word in wanted if word in words]
    pairs = list(zip(words, words[1:], strict=False))
    return [
        sum(word not in known for word in words),
        sum(one == other for one, other in pairs),
        sum(word in foreign and word not in wanted for word in words),
        len(wanted) - len(order),
        sum(one in ("the", "one") and other not in foreign for one, other in pairs) + (words[-1] != "."),
    ]


def rows(seed: int = SEED) -> list[dict]:
    """All pairs, part by part, with what raters, the translating model and the teacher make of them."""
    draw, made, seen = Pairs(seed), [], set()
    for part, (count, raters) in SIZES.items():
        index = 0
        while index < count:
            source, right = draw.sentence()
            words, cost = draw.spoil(source, right)
            if (key := (*source, *words)) in seen:
                continue
            seen.add(key)
            truth = max(0.0, 100.0 - cost)
            row = {"part": part, "index": index, "original": " ".join(source), "translation": " ".join(words)}
            logprob = round(draw.near(-0.3 - 0.004 * cost, 0.12), 4)
            made.append({**row, "rated": draw.rated(truth, raters), "model_scores": logprob, "truth": truth})
            index += 1
    return taught(standardised(made), draw)


def standardised(made: list[dict]) -> list[dict]:
    """With ``z_mean``: the mean of the raters' scores, each rater's standardised over all that he rated."""
    given = {rater: [s for row in made for who, s in row["rated"] if who == rater] for rater in range(RATERS)}
    scale = {rater: (np.mean(scores), np.std(scores)) for rater, scores in given.items()}
    for row in made:
        rated = row.pop("rated")
        z = [(score - scale[rater][0]) / scale[rater][1] for rater, score in rated]
        row |= {"scores": [score for _, score in rated], "z_mean": round(float(np.mean(z)), 4)}
    return made


def taught(made: list[dict], draw: Pairs) -> list[dict]:
    """With ``teacher``: a regression of the training part's ``z_mean`` on what the teacher finds wrong, in 0 to 1."""
    common = {w: draw.foreign[w] for words in draw.words.values() for w in words[: round(0.8 * len(words))]}
    counts = np.array([[1.0, *found_wrong(row, common)] for row in made])
    gold, train = np.array([row["z_mean"] for row in made]), np.array([row["part"] == "train" for row in made])
    weights = np.linalg.lstsq(counts[train], gold[train], rcond=None)[0]
    low, high = gold[train].min(), gold[train].max()
    for row, score in zip(made, (counts @ weights - low) / (high - low), strict=True):
        row["teacher"] = round(float(score), 4)
    return made


def lines(seed: int = SEED) -> str:
    """The file's text."""
    return "".join(json.dumps(row) + "\n" for row in rows(seed))


if __name__ == "__main__":
    (FOLDER / "toy_quality.jsonl").write_text(lines(), encoding="utf-8")
