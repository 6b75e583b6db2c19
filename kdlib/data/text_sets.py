"""Text sets: sentences or pairs with labels, tokens in one flat tensor, batches of texts of like length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlib import scale
from kdlib.data import sources
from kdlib.data.rows import FIRST_ID, STAND_IN, Rows
from kdlib.data.tokens import Ragged, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True, repr=False)
class TextSet(Rows):
    """Texts with labels and ids.

    Attributes:
        texts: N sentences, or N pairs ``(first, second)``.
        labels: int64 [N], or float32 [N] for scores.
        ids: int64 [N], the row in the original set; ``take``, ``sample`` and ``split`` keep it.
        classes: the class names, in the order of the labels; empty for scores.
        name: of the set.
    """

    texts: list[str] | list[tuple[str, str]]
    labels: Tensor
    ids: Tensor
    classes: list[str]
    name: str
    stands_for: int | None = None

    def __repr__(self) -> str:
        what = "pairs" if self.pairs else "texts"
        return f"TextSet({self.name}: {self.planned:,} {what}, {len(self.classes) or 'no'} classes)"

    @property
    def pairs(self) -> bool:
        """Whether each text is a pair."""
        return bool(self.texts) and not isinstance(self.texts[0], str)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of texts, labels, ids and class names."""
        content = json.dumps([self.texts, self.labels.tolist(), self.ids.tolist(), self.classes])
        return hashlib.sha256(content.encode()).hexdigest()

    def take(self, rows: Tensor | slice) -> TextSet:
        """The texts of ``rows``: row numbers, a boolean mask or a slice. Ids stay."""
        numbers = torch.arange(len(self))[rows]
        return replace(
            self, texts=[self.texts[row] for row in numbers.tolist()], labels=self.labels[numbers],
            ids=self.ids[numbers], stands_for=self._scaled(numbers),
        )  # fmt: skip

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> TokenSet:
        """Tokenise, cutting off what is longer than ``max_length`` tokens (of a pair, from the longer text)."""
        columns = [list(column) for column in zip(*self.texts, strict=True)] if self.pairs else [self.texts]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        kinds = encoded.get("token_type_ids") if self.pairs else None
        return TokenSet(
            source=self, tokens=Ragged.of(encoded["input_ids"]), kinds=None if kinds is None else Ragged.of(kinds),
            pad=tokenizer.pad_token_id, vocabulary=len(tokenizer),
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class TokenSet(TokenRows):
    """A text set in tokens; a row is as long as its text, and a batch as its longest row.

    Attributes:
        source: the texts.
        tokens: of each row.
        kinds: the tokens' types (0 in a pair's first text, 1 in its second), where the tokenizer has them.
        pad: the token that fills shorter rows.
        vocabulary: number of tokens known to the tokenizer.
    """

    source: TextSet
    tokens: Ragged
    kinds: Ragged | None
    pad: int
    vocabulary: int

    def __repr__(self) -> str:
        return f"TokenSet({self.source.name}: {self.planned:,} rows, {self.lengths.float().mean():.1f} tokens each)"

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each row."""
        return self.tokens.lengths

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the labels."""
        return self.source.classes

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tokens, labels and ids."""
        digest = hashlib.sha256(f"{self.source.fingerprint}:{self.pad}:{self.vocabulary}".encode())
        for tensor in (self.tokens.lengths, self.tokens.values, self.kinds and self.kinds.values):
            digest.update(b"-" if tensor is None else tensor.numpy().data)
        return digest.hexdigest()

    def take(self, rows: Tensor | slice) -> TokenSet:
        """The rows asked for: row numbers, a boolean mask or a slice. Ids stay."""
        numbers = torch.arange(len(self))[rows]
        kinds = self.kinds and self.kinds.take(numbers)
        return replace(self, source=self.source.take(numbers), tokens=self.tokens.take(numbers), kinds=kinds)

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` [B, L], ``y`` and ``id`` [B]; pairs also have ``token_type_ids`` [B, L]
        where the tokenizer makes them."""
        ids, mask = self.tokens.padded(rows, self.pad)
        batch = {"input_ids": ids, "attention_mask": mask.long(), "y": self.labels[rows], "id": self.ids[rows]}
        if self.kinds is not None:
            batch["token_type_ids"], _ = self.kinds.padded(rows, 0)
        return batch


@dataclass(frozen=True)
class TextData:
    """A set's parts. Choose on ``validation``; ``test`` (None where its labels are not published) is for the end.

    Attributes:
        metric: what the set is scored by: ``accuracy``, ``f1``, ``mcc`` or ``pearson`` (see ``kd.metrics``).
    """

    train: TextSet
    validation: TextSet
    test: TextSet | None
    name: str
    metric: str

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the labels; empty for scores."""
        return self.train.classes


@dataclass(frozen=True)
class Glue:
    """One GLUE task: its local folder and files, its columns (local, then the hub's), classes and metric."""

    folder: str
    columns: tuple[str, ...]
    hub_columns: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metric: str
    rows: int
    words: int  # of a typical text, for a rehearsal
    parts: tuple[tuple[str, tuple[str, ...]], ...] = (("train", ("train.tsv",)), ("validation", ("dev.tsv",)))


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")
_SPLIT_COLA = (
    ("train", ("in_domain_train.tsv",)),
    ("validation", ("in_domain_dev.tsv", "out_of_domain_dev.tsv")),
)
GLUE = {
    "sst2": Glue("SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive"), "accuracy", 67_349, 10),
    "cola": Glue("CoLA", ("3",), ("sentence",), "1", ("unacceptable", "acceptable"), "mcc", 8_551, 8),
    "mrpc": Glue(
        "MRPC", ("#1 String", "#2 String"), _SENTENCES, "Quality", ("not_equivalent", "equivalent"), "f1", 3_668, 44
    ),
    "rte": Glue("RTE", _SENTENCES, _SENTENCES, "label", _ENTAILMENT, "accuracy", 2_490, 55),
    "stsb": Glue("STS-B", _SENTENCES, _SENTENCES, "score", (), "pearson", 5_749, 24),
    "qnli": Glue("QNLI", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILMENT, "accuracy", 104_743, 38),
    "qqp": Glue(  # some rows of GLUE's own QQP files are broken; the hub's copy leaves them out
        "", ("question1", "question2"), ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"),
        "f1", 363_846, 22,
    ),
    "mnli": Glue(
        "MNLI", _SENTENCES, ("premise", "hypothesis"), "gold_label", ("entailment", "neutral", "contradiction"),
        "accuracy", 392_702, 30,
        (("train", ("train.tsv",)), ("validation", ("dev_matched.tsv",)), ("test", ("dev_mismatched.tsv",))),
    ),
}  # fmt: skip
_DEV = {"train": "train", "validation": "dev", "test": "test"}
LINES = {  # jsonl sets under textcls/: files of each part, examples, words, classes
    "trec": ({"train": "train", "test": "test"}, 5_452, 10, 6),
    "clinc150": ({"train": "train", "validation": "val", "test": "test"}, 15_000, 8, 150),
    "ag_news": ({"train": "train_10k", "test": "test"}, 9_977, 38, 4),
    "clinc_domains": ({"train": "train", "validation": "val", "test": "test"}, 15_000, 8, 10),
    **{f"amazon_{part}": (_DEV, 1_360, 120, 2) for part in ("books", "dvd", "electronics", "kitchen")},
    "airline_reviews": (_DEV, 1_398, 100, 2),
    "yelp_sentences": ({"train": "train", "test": "test"}, 3_854, 10, 2),
}
DOMAINS = {"clinc_domains": "clinc150", "toy_domains": "toy_requests"}  # the same rows with their domain as label
POLARITY = ("negative", "positive")  # of the labels 0 and 1


def text(name: str, *, root: str | Path | None = None) -> TextData:
    """A text classification set by name.

    ``toy_reviews``, ``toy_requests`` and ``toy_domains`` are embedded; the last two are the same requests with their
    intent and with their domain as label, as are ``clinc150`` and ``clinc_domains``: rows and ids agree. GLUE's ``sst2``, ``cola``, ``mrpc``, ``rte``, ``stsb``, ``qnli``, ``qqp`` and ``mnli``
    (its mismatched part is ``test``) are read from GLUE's own files in ``<root>/glue/<folder>/``, else (``qqp``
    always) from the hub (``nyu-mll/glue``); ``trec``, ``clinc150``, ``ag_news`` and the review sets (``amazon_books``,
    ``amazon_dvd``, ``amazon_electronics``, ``amazon_kitchen``, ``airline_reviews``, ``yelp_sentences``) from
    ``<root>/textcls/<name>/*.jsonl``, and where these have no validation part, a tenth of the training part is it.
    ``root`` is ``KDLIB_DATA`` by default.

    Raises:
        ValueError: no such set, or a line that cannot be read.
        FileNotFoundError: the set is not at hand; says what to put where.
    """
    if name == "toy_reviews":
        return _toy_reviews()
    if name in ("toy_requests", "toy_domains"):
        return _toy_requests(name)
    if name not in GLUE and name not in LINES:
        known = ", ".join(["toy_reviews", "toy_requests", "toy_domains", *GLUE, *LINES])
        raise ValueError(f"no text set is called {name!r}; there are {known}")
    if scale.rehearsing():
        return _stand_in(name)
    return _glue(name, root) if name in GLUE else _lines(name, root)


Part = tuple[list, list]  # texts and labels


def _text_data(name: str, parts: dict[str, Part], classes: Sequence[str], metric: str) -> TextData:
    sets = {}
    for part, (texts, labels) in parts.items():
        kind = torch.int64 if classes else torch.float32
        ids = torch.arange(len(texts)) + FIRST_ID[part]
        sets[part] = TextSet(texts, torch.tensor(labels, dtype=kind), ids, list(classes), f"{name}/{part}")
    return TextData(sets["train"], sets["validation"], sets.get("test"), name, metric)


# --- GLUE ----------------------------------------------------------------------------------------------------


def _glue(name: str, root: str | Path | None) -> TextData:
    task = GLUE[name]
    folder = sources.local(f"glue/{task.folder}", root) if task.folder else None
    parts = _glue_files(name, task, folder) if folder else _glue_hub(name, task, root)
    return _text_data(name, parts, task.classes, task.metric)


def _glue_files(name: str, task: Glue, folder: Path) -> dict[str, Part]:
    parts = dict(task.parts)
    if name == "cola" and not (folder / "train.tsv").exists():  # the linguists' own release has these names
        parts = dict(_SPLIT_COLA)
    found: dict[str, Part] = {}
    for part, files in parts.items():
        texts, labels = [], []
        for file in files:
            for number, row in _tsv(folder / file, header=name != "cola"):
                try:
                    columns = tuple(row[column] for column in task.columns)
                    labels.append(_label(row[task.label], task.classes))
                except (KeyError, ValueError) as error:
                    raise ValueError(
                        f"{folder / file}, line {number}: {error} in the columns {', '.join(task.columns)} "
                        f"and {task.label}; unpack that file again"
                    ) from error
                texts.append(columns if len(columns) > 1 else columns[0])
        found[part] = (texts, labels)
    return found


def _tsv(path: Path, header: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows by column name, or by column number where there is no header; quotes are plain text."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:  # MRPC begins with a byte-order mark
        rows = ([column.strip() for column in line.split("\t")] for line in file)
        names = next(rows) if header else None
        for number, row in enumerate(rows, 2 if header else 1):
            if names and len(row) != len(names):
                raise ValueError(
                    f"{path}, line {number} has {len(row)} columns, the header {len(names)}; unpack it again"
                )
            yield number, dict(zip(names or map(str, range(len(row))), row, strict=False))


def _label(text: str, classes: Sequence[str]) -> int | float:
    if not classes:
        return float(text)
    number = classes.index(text) if text in classes else int(text)
    if not 0 <= number < len(classes):
        raise ValueError(f"the label {text!r} is none of {', '.join(classes)} or 0 to {len(classes) - 1}")
    return number


def _glue_hub(name: str, task: Glue, root: str | Path | None) -> dict[str, Part]:
    try:
        splits = sources.from_hub("nyu-mll/glue", name)
    except OSError as error:
        files = ", ".join(file for _, part in task.parts for file in part)
        instead = f", or put GLUE's {files} there (gluebenchmark.com/tasks)" if task.folder else ""
        raise sources.missing(
            f"the text set {name!r}", f"glue/{task.folder}", f"Go online and run again{instead}.", root
        ) from error
    names = {"train": "train", "validation": "validation"}
    if name == "mnli":
        names = {"train": "train", "validation": "validation_matched", "test": "validation_mismatched"}
    found: dict[str, Part] = {}
    for part, split in names.items():
        columns = [list(splits[split][column]) for column in task.hub_columns]
        texts = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        found[part] = (texts, list(splits[split]["label"]))
    return found


# --- jsonl, embedded, stand-ins --------------------------------------------------------------------------------


def _lines(name: str, root: str | Path | None) -> TextData:
    parts, *_ = LINES[name]
    home = f"textcls/{DOMAINS.get(name, name)}"
    folder = sources.local(home, root)
    if folder is None:
        files = ", ".join(f"{file}.jsonl" for file in parts.values())
        raise sources.missing(
            f"the text set {name!r}",
            home,
            f'Put {files} there, lines of {{"text": ..., "label": ...}}.',
            root,
        )
    return _from_lines(name, {part: folder / f"{file}.jsonl" for part, file in parts.items()})


def _from_lines(name: str, paths: dict[str, Path]) -> TextData:
    rows = {part: _relabelled(name, _jsonl(path)) for part, path in paths.items()}
    classes = sorted({row["label"] for row in rows["train"]})
    parts = {}
    for part, found in rows.items():
        parts[part] = (
            [row["text"] for row in found],
            [_index(row["label"], classes, paths[part]) for row in found],
        )
    if "validation" in parts:
        return _text_data(name, parts, classes, "accuracy")
    whole = _text_data(name, {**parts, "validation": ([], [])}, classes, "accuracy")
    train, validation = whole.train.split(len(whole.train) // 10, seed=0)
    return replace(whole, train=train, validation=replace(validation, name=f"{name}/validation"))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return sources.json_lines(path, {"text": str, "label": (str, int)})


def _relabelled(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the label that ``name`` asks for: their domain, or words for 0 and 1."""
    if name in DOMAINS:
        return [{**row, "label": row["domain"]} for row in rows]
    return [{**row, "label": POLARITY[row["label"]]} if row["label"] in (0, 1) else row for row in rows]


def _index(label: str, classes: list[str], path: Path) -> int:
    if label not in classes:
        raise ValueError(
            f"{path} has the label {label!r}, which the training part has not; the files must be of one set"
        )
    return classes.index(label)


def _toy_reviews() -> TextData:
    rows = _jsonl(sources.embedded("toy_reviews.jsonl"))
    parts: dict[str, Part] = {}
    for part in FIRST_ID:
        found = [row for row in rows if row["part"] == part]
        parts[part] = ([row["text"] for row in found], [row["label"] - 1 for row in found])
    stars = ["1 star", *(f"{n} stars" for n in range(2, 6))]
    return _text_data("toy_reviews", parts, stars, "accuracy")


def _toy_requests(name: str) -> TextData:
    rows = _relabelled(name, _jsonl(sources.embedded("toy_requests.jsonl")))
    classes = list(dict.fromkeys(row["label"] for row in rows))
    parts: dict[str, Part] = {}
    for part in FIRST_ID:
        found = [row for row in rows if row["part"] == part]
        parts[part] = ([row["text"] for row in found], [classes.index(row["label"]) for row in found])
    return _text_data(name, parts, classes, "accuracy")


def _stand_in(name: str) -> TextData:
    """Embedded sentences, joined to the length that the set's texts have, for a rehearsal."""
    if name in GLUE:
        task = GLUE[name]
        planned, words, pair, metric, has = (
            task.rows,
            task.words,
            len(task.columns) > 1,
            task.metric,
            dict(task.parts),
        )
        classes = list(task.classes)
    else:
        has, planned, words, count = LINES[name]
        pair, metric, classes = False, "accuracy", [f"class {c}" for c in range(count)]
    pool = " ".join(_toy_reviews().train.texts[: STAND_IN * 20]).split()
    texts: list[Any] = [" ".join(pool[row * words : (row + 1) * words]) for row in range(STAND_IN)]
    if pair:
        texts = [(" ".join(t.split()[: words // 2]), " ".join(t.split()[words // 2 :])) for t in texts]
    labels = [row % len(classes) if classes else row % 6 for row in range(STAND_IN)]
    parts = {part: (texts, labels) for part in {"train": 0, "validation": 0, **has}}
    data = _text_data(name, parts, classes, metric)
    whole = replace(data, train=replace(data.train, stands_for=planned))
    others = {
        part: replace(getattr(data, part), stands_for=planned // 10) for part in ("validation", "test") if part in parts
    }
    return replace(whole, **others)


# --- a tokenizer for students from scratch ---------------------------------------------------------------------


def train_tokenizer(texts: Sequence[Any], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer of the ``vocab_size`` most frequent words of ``texts`` (sentences or pairs).

    Punctuation stands alone, rarer words become ``[UNK]``; a text ends in ``[SEP]``, which also parts a pair.
    Train it on the training part only.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[SEP]"]
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size is {vocab_size}; it must leave room for words beside {', '.join(special)}")
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    flat = (part for text in texts for part in ([text] if isinstance(text, str) else text))
    words.train_from_iterator(flat, trainer)
    words.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", words.token_to_id("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )
