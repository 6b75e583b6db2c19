"""Make data/toy_requests.jsonl: short requests to an assistant, 18 intents in 6 domains, written by a small grammar.

    python data/make_toy_requests.py  # writes the file again, byte for byte

A request has a frame ("could you …"), an action and a thing. Every domain has things of its own, every intent actions
of its own; but things go missing ("i want to cancel that"), actions are shared between domains ("book", "cancel"), and
some requests drag in a thing of another domain ("… before my flight"). So a reader that knows one domain well has
nothing to hold on to in another, and is wrong there with more or less confidence.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 20_261
PARTS = {"train": 120, "validation": 20, "test": 30}  # requests of each intent
FILE = Path(__file__).with_name("toy_requests.jsonl")

# domain -> its things, and intent -> its actions ("{}" is where the thing goes)
DOMAINS = {
    "bank": (
        "account|savings|card|loan|statement|deposit|overdraft|mortgage|cheque|pension",
        {
            "balance": "how much is in {}|show {}|what is left on {}|check {}|tell me about {}",
            "transfer": "move money to {}|send fifty to {}|pay into {}|top up {}|transfer from {}",
            "freeze": "block {}|freeze {}|someone stole {}|cancel {}|i lost {}",
        },
    ),
    "travel": (
        "flight|hotel|train|ticket|passport|suitcase|visa|ferry|hostel|seat",
        {
            "reserve": "book {}|reserve {}|get me {}|find {} for two|i need {} on friday",
            "status": "is {} late|when does {} leave|check {}|track {}|any delay for {}",
            "refund": "cancel {}|give me the money back for {}|refund {}|i cannot use {}|call off {}",
        },
    ),
    "kitchen": (
        "soup|oven|recipe|pasta|dinner|cake|salad|curry|bread|pan",
        {
            "cook": "how do i make {}|explain {}|steps for {}|teach me {}|what goes into {}",
            "order": "order {}|get me {}|deliver {}|book {} for two|bring {}",
            "warmth": "heat {}|how hot must {} be|warm up {}|is {} done|set {} to two hundred",
        },
    ),
    "home": (
        "lamp|heating|door|alarm|curtain|vacuum|garage|radiator|window|boiler",
        {
            "on": "switch on {}|start {}|turn {} up|open {}|activate {}",
            "off": "switch off {}|stop {}|turn {} down|close {}|block {}",
            "repair": "mend {}|{} is broken|who repairs {}|explain {}|replace {}",
        },
    ),
    "work": (
        "meeting|report|boss|calendar|email|contract|holiday|salary|office|deadline",
        {
            "plan": "schedule {}|book {}|put {} on friday|plan {}|arrange {}",
            "write": "draft {}|write {}|answer {}|send {}|reply about {}",
            "remind": "remind me of {}|do not let me forget {}|when is {}|tell me about {}|note {}",
        },
    ),
    "music": (
        "song|album|playlist|concert|radio|singer|guitar|podcast|band|speaker",
        {
            "play": "play {}|start {}|put on {}|let me hear {}|find {}",
            "louder": "turn {} up|louder {}|more bass on {}|i cannot hear {}|raise {}",
            "name": "what is {} called|who made {}|name {}|show {}|what year is {}",
        },
    ),
}  # fmt: skip
FRAMES = "{}|please {}|could you {}|hey {}|{} now|i would like to know {}|can you {} please|quick question {}|{} thanks"
OWNERS = "the|my|that|our|this"
NO_THING, STRANGER = 0.12, 0.15  # shares of requests without their thing, and with a thing of another domain


def request(chance: random.Random, domain: str, intent: str) -> str:
    """One request of an intent."""
    things, intents = DOMAINS[domain]
    thing = chance.choice(OWNERS.split("|")) + " " + chance.choice(things.split("|"))
    if chance.random() < NO_THING:
        thing = chance.choice(["that", "it", "this one"])
    text = chance.choice(intents[intent].split("|")).format(thing)
    if chance.random() < STRANGER:
        other = chance.choice([name for name in DOMAINS if name != domain])
        text += f" {chance.choice(['before', 'after', 'not'])} the {chance.choice(DOMAINS[other][0].split('|'))}"
    return chance.choice(FRAMES.split("|")).format(text)


def requests(seed: int = SEED) -> list[dict]:
    """All parts' requests; no text occurs twice."""
    chance, seen, rows = random.Random(seed), set(), []
    for part, count in PARTS.items():
        for domain, (_, intents) in DOMAINS.items():
            for intent in intents:
                made = 0
                while made < count:
                    text = request(chance, domain, intent)
                    if text in seen:
                        continue
                    seen.add(text)
                    rows.append({"part": part, "label": f"{domain}: {intent}", "domain": domain, "text": text})
                    made += 1
    return rows


def lines(seed: int = SEED) -> str:
    """The file's content."""
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in requests(seed))


if __name__ == "__main__":
    FILE.write_text(lines(), encoding="utf-8")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")
