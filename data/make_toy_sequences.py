"""Make data/toy_translation.jsonl and data/toy_headlines.jsonl: a made-up language into English of a sort, and stories with headlines.

    python data/make_toy_sequences.py  # writes the files again, byte for byte

The language puts its verb last, its adjectives and its plural mark behind the noun, and what else describes a noun
before it. The target puts the verb second, agrees it with its subject, and has several words for one thing, so that one source
has many right translations. Some source words mean two things; the verb or the subject tells which. A story is three
or four such sentences in the target language; its headline tells the one that is past, in the present tense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from draws import Writer

SEED = 20_261
FOLDER = Path(__file__).parent
PARTS = {
    "toy_translation": {"train": 2_000, "validation": 200, "test": 300},
    "toy_headlines": {"train": 800, "validation": 100, "test": 150},
}
WORDS = (4, 25)  # of a source sentence, least and most

# source word: its translations, the likelier ones first (weights 1, 1/2, 1/3)
PEOPLE = {
    "rela": "king", "simo": "farmer", "tuna": "doctor physician", "bako": "baker", "lemi": "girl", "dori": "boy lad",
    "sena": "teacher tutor", "kuro": "sailor", "mapi": "child kid",
}  # fmt: skip
ANIMALS = {"wufa": "dog hound", "mina": "cat", "holo": "horse", "piri": "bird", "sulu": "wolf"}
PLACES = {"kasa": "house home", "arbo": "tree", "fluva": "river stream", "monu": "hill", "gate": "gate door"}
THINGS = {
    "mind": {"libo": "book volume", "karti": "map", "pelo": "letter", "sato": "song"},
    "hand": {"petra": "stone rock", "boti": "boat", "pelo": "leaf", "kimu": "cup", "lampa": "lamp lantern"},
    "food": {"pano": "loaf", "poma": "apple", "sato": "soup", "kimu": "cake tart", "fiso": "fish"},
}  # pelo, sato and kimu: the verb tells which
VERBS = {
    "mind": {"legi": "read", "skri": "write", "memo": "remember recall"},
    "hand": {"tragi": "carry", "fali": "drop", "trovi": "find discover", "rompi": "break"},
    "food": {"mangi": "eat", "kuki": "cook prepare", "asa": "buy purchase"},
    "meet": {"vidi": "see notice", "seki": "follow", "gora": "call", "ami": "love like"},
}
OF_ANIMALS = {"gora": "chase"}  # what a verb means when an animal does it
SYNONYMS = [words for verbs in VERBS.values() for words in verbs.values()]
ADJECTIVES = {
    "gra": "big large huge", "eti": "small little", "vet": "old aged", "nov": "new", "rug": "red", "blu": "blue",
    "gai": "happy glad merry", "tri": "sad", "rap": "quick fast", "bel": "pretty lovely",
}  # fmt: skip
PREPOSITIONS = {"apu": "near by", "kon": "with", "subi": "under below"}
TIMES = {
    "past": {"yer": "yesterday", "antu": "once formerly"},
    "present": {"hod": "today", "semi": "always ever", "nok": "now"},
    "future": {"mor": "tomorrow", "poku": "soon shortly"},
}
MARKS = {"past": ["ri"], "present": [], "future": ["so"]}
JOINS = {"ka": "and", "ma": "but yet", "kia": "because since", "dum": "while"}
PAST = {
    "read": "read", "write": "wrote", "find": "found", "break": "broke", "eat": "ate", "buy": "bought", "see": "saw",
    "drop": "dropped", "carry": "carried",
}  # fmt: skip
PLURAL = {"child": "children", "leaf": "leaves", "loaf": "loaves", "fish": "fish", "wolf": "wolves"}


@dataclass
class Noun:
    """A noun with what describes it: its words in the source, and in the target without an article."""

    kind: str
    plural: bool
    definite: bool
    source: list[str]
    before: list[str]
    word: str
    after: list[str]

    def target(self) -> list[str]:
        words = [*self.before, self.word, *self.after]
        article = "the" if self.definite else "some" if self.plural else "an" if words[0][0] in "aeiou" else "a"
        return [article, *words]


def conjugate(verb: str, tense: str, plural: bool) -> list[str]:
    """The verb's words: an auxiliary first, if there is one."""
    if tense == "future":
        return ["will", verb]
    if tense == "past":
        return [PAST.get(verb) or verb + ("d" if verb.endswith("e") else "ed")]
    if plural:
        return [verb]
    return [verb[:-1] + "ies" if verb.endswith("ry") else verb + "s"]


class Sentences(Writer):
    """Draws sentences."""

    def say(self, translations: str) -> str:
        """One of the words that mean the same."""
        words = translations.split()
        return self.pick(words, [1 / rank for rank in range(1, len(words) + 1)])

    def noun(self, kind: str, depth: int) -> Noun:
        """``kind`` is ``people``, ``animals``, ``places`` or a class of things; ``depth`` bounds what describes it."""
        names = {"people": PEOPLE, "animals": ANIMALS, "places": PLACES, **THINGS}[kind]
        name = self.pick(names)
        word, plural = self.say(names[name]), self.chance(0.35)
        if plural:
            word = PLURAL.get(word) or word + "s"
        marks = ["mu"] if plural else []
        made = Noun(kind, plural, self.chance(0.7), [name], [], word, [])
        if self.chance(0.4):
            adjective = self.pick(ADJECTIVES)
            made.source.append(adjective)
            made.before.append(self.say(ADJECTIVES[adjective]))
        made.source += marks
        if not made.definite:
            made.source.append("un")
        if depth and self.chance(0.45):
            (self.relative if kind in ("people", "animals") and self.chance(0.4) else self.place)(made)
        return made

    def place(self, noun: Noun) -> None:
        preposition, where = self.pick(PREPOSITIONS), self.noun("places", 0)
        noun.source[:0] = [*where.source, preposition]
        noun.after += [self.say(PREPOSITIONS[preposition]), *where.target()]

    def relative(self, noun: Noun) -> None:
        verb, meaning, thing = self.deed(noun, 0)
        noun.source[:0] = [*thing.source, "wo", verb, "ke"]
        noun.after += ["that", *conjugate(meaning, "present", noun.plural), *thing.target()]

    def deed(self, subject: Noun, depth: int) -> tuple[str, str, Noun]:
        """A verb, what it means here, and its object."""
        classes = ["meet", "mind", "hand", "food"] if subject.kind == "people" else ["meet", "hand", "food"]
        of = self.pick(classes)
        verb = self.pick(VERBS[of])
        meaning = OF_ANIMALS[verb] if subject.kind == "animals" and verb in OF_ANIMALS else self.say(VERBS[of][verb])
        return verb, meaning, self.noun(self.pick(("people", "animals")) if of == "meet" else of, depth)

    def clause(self, tense: str, timed: bool, depth: int = 1) -> tuple[list[str], list[str], dict]:
        """Source and target words, and what a headline needs."""
        subject = self.noun(self.pick(("people", "animals"), (2, 1)), depth)
        verb, meaning, thing = self.deed(subject, depth if self.chance(0.3) else 0)
        source = [*subject.source, "ga", *thing.source, "wo", verb, *MARKS[tense]]
        finite, *rest = conjugate(meaning, tense, subject.plural)
        target = [*subject.target(), finite, *rest, *thing.target()]
        if timed:
            time = self.pick(TIMES[tense])
            when = self.say(TIMES[tense][time])
            source[:0] = [time]
            if self.chance(0.6):  # in front, and the verb keeps its second place
                target = [when, finite, *subject.target(), *rest, *thing.target()]
            else:
                target.append(when)
        alike = next((words for words in SYNONYMS if meaning in words.split()), meaning)
        return source, target, {"subject": subject, "verbs": alike, "object": thing}

    def sentence(self) -> tuple[str, str]:
        """One or two clauses, source and target."""
        source, target, _ = self.clause(self.pick(TIMES), self.chance(0.6))
        if self.chance(0.3):
            join = self.pick(JOINS)
            more, further, _ = self.clause(self.pick(TIMES), False, 0)
            source, target = [*source, join, *more], [*target, self.say(JOINS[join]), *further]
        return " ".join(source) + ".", " ".join(target) + "."

    def story(self) -> tuple[str, str]:
        """Three or four sentences of which one is past, and a headline of that one."""
        count = self.pick((3, 4))
        news = int(self.random.random() * count)
        sentences = []
        for number in range(count):
            tense = "past" if number == news else self.pick(("present", "future"))
            _, words, told = self.clause(tense, self.chance(0.5))
            sentences.append(" ".join(words) + ".")
            if number == news:
                headline = self.headline(**told)
        return " ".join(sentences), headline

    def headline(self, subject: Noun, verbs: str, object: Noun) -> str:
        """Who does what, now, in words of its own: no articles, nothing behind a noun, some adjectives."""
        before = subject.before if self.chance(0.6) else []
        return " ".join([*before, subject.word, *conjugate(self.say(verbs), "present", subject.plural), object.word])


def pairs(name: str, seed: int = SEED) -> list[dict]:
    """All parts' rows; no source occurs twice."""
    writer, seen, rows = Sentences(seed), set(), []
    draw = writer.sentence if name == "toy_translation" else writer.story
    for part, count in PARTS[name].items():
        made = 0
        while made < count:
            source, target = draw()
            fits = name != "toy_translation" or WORDS[0] <= len(source.split()) <= WORDS[1]
            if source in seen or not fits:
                continue
            seen.add(source)
            rows.append({"part": part, "source": source, "target": target})
            made += 1
    return rows


def lines(name: str, seed: int = SEED) -> str:
    """A file's content."""
    return "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in pairs(name, seed))


if __name__ == "__main__":
    for name in PARTS:
        file = FOLDER / f"{name}.jsonl"
        file.write_text(lines(name), encoding="utf-8")
        print(f"{file}: {file.stat().st_size:,} bytes")
