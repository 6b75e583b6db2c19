"""The chapters there are, and what the README and the headers say of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdlib.scoreboard import clone_folder


@dataclass(frozen=True)
class Headline:
    """A table of results shown in the README: which of a results file's tables, which metric, against which arm."""

    table: str
    metric: str
    baseline: str
    title: str
    arms: tuple[str, ...] = ()  # all, if none are named


@dataclass(frozen=True)
class Chapter:
    """One notebook."""

    number: str
    name: str
    title: str
    question: str
    data: dict[str, str]  # by scale, with the size of the download
    headlines: tuple[Headline, ...]

    @property
    def path(self) -> Path:
        return root() / "notebooks" / f"{self.name}.ipynb"


CIFAR = "CIFAR-10, 170 MB"
CHAPTERS = (
    Chapter(
        "00", "00_foundations", "Foundations",
        "What is in a teacher's wrong answers, where does T² come from, and does a better teacher teach better?",
        {"smoke": "embedded digits, no download", "lab": CIFAR, "full": CIFAR},
        (
            Headline("students", "test_accuracy", "labels only", "one small student, what it learns from"),
            Headline("capacity_gap", "test_accuracy", "labels only", "the same student, who teaches it (KD, T = 4)"),
        ),
    ),
    Chapter(
        "01", "01_annealing_kd", "Annealing-KD",
        "Does a teacher that starts by whispering close the capacity gap, and is it the annealing that does it?",
        {"smoke": "embedded digits and reviews, no download", "lab": f"{CIFAR}; GLUE and TREC, 15 MB; MiniLM, 90 MB",
         "full": f"{CIFAR}, CIFAR-100, 169 MB; GLUE, 600 MB; BERT and RoBERTa, 3 GB"},
        (
            Headline("students", "test", "labels", "images: every method at the same budget"),
            Headline("pair ResNet-56 to ResNet-8, 32 px", "test", "labels", "fourteen times as many images, at 32 × 32: ResNet-56 to ResNet-8"),
            Headline("text sst2, BiLSTM", "test", "labels", "SST-2, BiLSTM student of a MiniLM teacher"),
            Headline("text trec, BiLSTM", "test", "labels", "TREC (6 classes), BiLSTM student of a MiniLM teacher"),
        ),
    ),
    Chapter(
        "02", "02_imitation_kd", "ImitKD",
        "Should a student that writes learn from its own prefixes, and is it the prefixes or the teacher's targets that help?",
        {"smoke": "embedded parallel sentences and headlines, no download", "lab": "Multi30k, 5 MB; AESLC, 15 MB",
         "full": "IWSLT14, 20 MB; WMT16, 1.7 GB; CNN/DM, 600 MB"},
        (
            Headline("students", "score", "vanilla", "translation (BLEU; at `lab` Multi30k de→en): every method at the same number of updates"),
            Headline("students", "runaway", "vanilla", "the same students: outputs that never end (%)"),
            Headline("task aeslc", "score", "vanilla", "AESLC e-mail subjects (ROUGE-1)"),
        ),
    ),
    Chapter(
        "03", "03_reinforced_teacher_selection", "Reinforced multi-teacher selection",
        "Does a policy that chooses teachers for every example beat the plain mean, random subsets and one-line weights?",
        {"smoke": "embedded requests and reviews, no download",
         "lab": "CLINC150, TREC, reviews and GLUE, 20 MB; MiniLM, 90 MB",
         "full": "CLINC150; GLUE, 600 MB; BERT, RoBERTa, ALBERT and XLNet, 2 GB"},
        (
            Headline("domains", "test", "uniform mean", "domains, teachers that know a part of them each (at `lab` five teachers, four of ten)"),
            Headline("few_labels", "test", "uniform mean", "the same with few labels (at `lab` 300 of 3,000 texts)"),
            Headline("families", "test", "uniform mean", "150 intents, five families of teachers"),
        ),
    ),
)  # fmt: skip


def root() -> Path:
    """The clone of the course.

    Raises:
        FileNotFoundError: there is none around this package or the working folder.
    """
    folder = clone_folder()
    if folder is None:
        raise FileNotFoundError("this command works in a clone of the course; go to its folder and call it again")
    return folder


def chapters(numbers: list[str]) -> list[Chapter]:
    """The chapters of these numbers, ``all`` for all.

    Raises:
        ValueError: no such chapter.
    """
    known = {chapter.number: chapter for chapter in CHAPTERS}
    if numbers == ["all"]:
        return list(known.values())
    for number in numbers:
        if number not in known:
            raise ValueError(f"there is no chapter {number!r}; there are {', '.join(known)}")
    return [known[number] for number in numbers]
