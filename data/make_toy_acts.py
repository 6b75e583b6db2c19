"""Make data/toy_cinema.jsonl, toy_trains.jsonl and toy_weather.jsonl: dialogue acts and the sentences that say them.

    python data/make_toy_acts.py  # writes the files again, byte for byte

An act is a kind and some slots, as in ``inform(film=night bus;time=9 pm)``. Each domain has a manner of its own, also for
slots that two domains share (``time``, ``price``): who learns one after the other must keep them apart. A slot can be said in
two ways and the slots in several orders, so one act has several right sentences.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

from draws import Writer

SEED = 20_264
FOLDER = Path(__file__).parent
SENTENCES = 3  # of each act

DOMAINS = {
    "cinema": {
        "openings": {
            "inform": ("{film} is shown", "you can watch {film}"),
            "recommend": ("how about {film} , it is shown", "i would pick {film} , shown"),
            "confirm": ("you want to watch {film}", "so that is {film}"),
        },
        "slots": {
            "hall": ("on screen {}", "in hall {}"),
            "time": ("at {}", "starting at {}"),
            "price": ("for {}", "with seats at {}"),
            "language": ("in {}", "spoken in {}"),
            "friend": ("with {}", "together with {}"),
        },
        "values": {
            "film": ("night bus", "the red moon", "two brothers", "paper city", "lost at sea"),
            "hall": ("one", "two", "three"),
            "time": ("6 pm", "8 pm", "half past nine"),
            "price": ("8 pounds", "11 pounds"),
            "language": ("french", "polish", "korean"),
            "friend": ("anna", "your sister", "the club"),
        },
        "end": {"inform": ".", "recommend": ".", "confirm": ", is that right ?"},
    },
    "trains": {
        "openings": {
            "inform": ("the {train} leaves", "there is the {train} , departing"),
            "recommend": ("your best choice is the {train} which goes", "take the {train} going"),
            "confirm": ("did you ask for the {train} that runs", "do you mean the {train} running"),
        },
        "slots": {
            "from": ("from {}", "out of {}"),
            "to": ("to {}", "towards {}"),
            "time": ("when it is {}", "by {}"),
            "price": ("and costs {}", "and a ticket is {}"),
            "platform": ("off platform {}", "on track {}"),
        },
        "values": {
            "train": ("northern line", "coast express", "night mail", "hill railway"),
            "from": ("leeds", "york", "hull"),
            "to": ("london", "bath", "dover"),
            "time": ("noon", "7 am", "ten past four"),
            "price": ("20 pounds", "35 pounds"),
            "platform": ("4", "9", "12"),
        },
        "end": {"inform": "", "recommend": "!", "confirm": "?"},
    },
    "weather": {
        "openings": {
            "inform": ("expect {sky}", "{sky} is likely"),
            "recommend": ("pack for {sky}", "dress for {sky}"),
            "confirm": ("was your question about {sky}", "are you asking about {sky}"),
        },
        "slots": {
            "place": ("all over {}", "around {}"),
            "time": ("{} long", "during {}"),
            "wind": ("under a {} wind", "while {} winds blow"),
            "degrees": ("near {}", "close to {}"),
            "until": ("lasting until {}", "up to {}"),
        },
        "values": {
            "sky": ("fog", "rain", "sunshine", "snow"),
            "place": ("the valley", "the east", "porto"),
            "time": ("monday", "the morning", "the weekend"),
            "wind": ("cold", "western", "weak"),
            "degrees": ("2 degrees", "15 degrees", "30 degrees"),
            "until": ("dusk", "friday", "midnight"),
        },
        "end": {"inform": "", "recommend": ".", "confirm": "?"},
    },
}


class Sentences(Writer):
    """Draws the values of an act and one of the ways to say it."""

    def row(self, domain: str, kind: str, slots: tuple[str, ...]) -> dict[str, str]:
        grammar = DOMAINS[domain]
        subject = next(iter(grammar["values"]))
        values = {slot: self.pick(grammar["values"][slot]) for slot in (subject, *slots)}
        order = list(slots)
        if self.chance(0.4):
            order.reverse()
        opening = self.pick(grammar["openings"][kind], (2, 1)).format(**{subject: values[subject]})
        said = [self.pick(grammar["slots"][slot], (3, 1)).format(values[slot]) for slot in order]
        act = ";".join(f"{slot}={value}" for slot, value in values.items())
        return {"source": f"{kind}({act})", "target": " ".join([opening, *said, grammar["end"][kind]]).strip()}


def rows(domain: str, seed: int = SEED) -> list[dict[str, str]]:
    """Every act of a domain, one to three slots beside its subject; an act's sentences are all in one part."""
    draw, slots = Sentences(seed + len(domain)), tuple(DOMAINS[domain]["slots"])
    acts = [
        (kind, some)
        for kind in ("inform", "recommend", "confirm")
        for n in (1, 2, 3)
        for some in combinations(slots, n)
    ]
    found = []
    for number, (kind, some) in enumerate(sorted(acts, key=lambda _: draw.random.random())):
        part = "train" if number < 50 else "validation" if number < 60 else "test"
        found += [{"part": part, **draw.row(domain, kind, some)} for _ in range(SENTENCES)]
    return found


def lines(domain: str, seed: int = SEED) -> str:
    """The file's text."""
    return "".join(json.dumps(row) + "\n" for row in rows(domain, seed))


if __name__ == "__main__":
    for domain in DOMAINS:
        (FOLDER / f"toy_{domain}.jsonl").write_text(lines(domain), encoding="utf-8")
