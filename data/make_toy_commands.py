"""Make data/toy_commands.ogg and toy_commands.jsonl: short spoken commands, and transcribed speech of no task.

    apt-get install espeak-ng           # the course itself needs no system package: the clips lie beside this script
    pip install soundfile torchaudio
    python data/make_toy_commands.py    # writes the index again byte for byte; the sound hangs on espeak-ng's version

A command is an action (said in one of two ways), an object and a place, in one of three orders. The synthesiser speaks it in one
of three voices, at some speed and pitch; noise is added. All parts share the voices. The transcribed speech is
of the commands' words in any order.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from draws import Writer

SEED, RATE, FOLDER = 20_266, 8_000, Path(__file__).parent
COUNTS = {"pool": 360, "train": 160, "validation": 40, "test": 120}
VOICES = ("en-us+m1", "en-us+f2", "en-gb+m3")

ACTIONS = {"on": ("open", "begin"), "off": ("close", "cancel")}
OBJECTS = {"window": ("window",), "music": ("music",)}
PLACES = {"kitchen": ("kitchen",), "bedroom": ("bedroom",)}
WORDS = [word for slot in (ACTIONS, OBJECTS, PLACES) for said in slot.values() for word in said]


class Speech(Writer):
    """Draws what is said, and how."""

    def command(self) -> tuple[str, str]:
        """A text and its intent, the three slots in one word each."""
        values = [self.pick(tuple(slot)) for slot in (ACTIONS, OBJECTS, PLACES)]
        said = [self.pick(slot[value]) for slot, value in zip((ACTIONS, OBJECTS, PLACES), values, strict=True)]
        order = self.pick(((0, 1, 2), (1, 0, 2), (2, 0, 1)))
        return " ".join(said[place] for place in order), " ".join(values)

    def scraps(self) -> tuple[str, None]:
        """Two to four words of commands in any order: transcribed speech that asks for nothing."""
        return " ".join(self.pick(WORDS) for _ in range(self.pick((2, 3, 4)))), None

    def row(self, part: str) -> dict:
        """A clip's text, intent, and the manner in which it is spoken."""
        text, intent = self.scraps() if part == "pool" else self.command()
        how = {"voice": self.pick(VOICES), "speed": self.pick((200, 220)), "pitch": self.pick((45, 55))}
        return {"part": part, "text": text, "intent": intent, **how, "noise": self.pick((0.002, 0.004, 0.008))}


def rows(seed: int = SEED) -> list[dict]:
    """All clips in the order in which they stand in the sound file, without their places there."""
    draw = Speech(seed)
    return [draw.row(part) for part, count in COUNTS.items() for _ in range(count)]


def spoken(row: dict, number: int):
    """A clip as a float tensor [samples] at ``RATE``: spoken, cut of silence, at one loudness, with noise."""
    import soundfile
    import torch
    import torchaudio

    how = ["-v", row["voice"], "-s", str(row["speed"]), "-p", str(row["pitch"]), "-g", "3", "--stdout", row["text"]]
    told = subprocess.run(["espeak-ng", *how], check=True, capture_output=True).stdout
    wave, rate = soundfile.read(io.BytesIO(told), dtype="float32")
    wave = torchaudio.functional.resample(torch.from_numpy(wave), rate, RATE)
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero()[:, 0]
    wave = wave[max(0, int(loud[0]) - 200) : int(loud[-1]) + 400]
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(number))
    return 0.5 * wave / wave.abs().max() + row["noise"] * noise


def index(lengths: list[int], seed: int = SEED) -> str:
    """The index's text: each clip with its first sample and its number of samples."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    found = zip(rows(seed), starts, lengths, strict=True)
    return "".join(json.dumps({**row, "start": start, "samples": n}) + "\n" for row, start, n in found)


if __name__ == "__main__":
    import soundfile
    import torch

    clips = [spoken(row, number) for number, row in enumerate(rows())]
    name = FOLDER / "toy_commands"
    with soundfile.SoundFile(
        f"{name}.ogg", "w", RATE, 1, format="OGG", subtype="VORBIS", compression_level=0.9
    ) as file:
        for part in torch.cat(clips).split(RATE):  # in one piece it is too much for some versions of the encoder
            file.write(part.numpy())
    Path(f"{name}.jsonl").write_text(index([len(clip) for clip in clips]), encoding="utf-8")
    print(f"{sum(map(len, clips)) / RATE:.0f} seconds", file=sys.stderr)
