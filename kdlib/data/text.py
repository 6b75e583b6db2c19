"""Text sets: sentences or pairs with labels, and sequences to read and to write; tokens, batches of like length."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlib import scale
from kdlib.data import sources
from kdlib.data.rows import FIRST_ID, STAND_IN, Ragged, Rows, TokenRows
from kdlib.data.sources import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IGNORED = -100  # the label of padding


@dataclass(frozen=True, repr=False)
class TextSet(Rows):
    """N sentences, or N pairs, with labels.

    Attributes:
        texts: strings, or tuples ``(first, second)``.
        labels: int64 [N] where there are ``classes``, else scores, float32 [N].
        ids: int64 [N].
        classes: names, in the order of the labels.
        name: for messages.
        stands_for: see :class:`~kdlib.data.rows.Rows`.

    Raises:
        ValueError: lengths that differ, a text that is none, labels that are no class or not finite.
    """

    COLUMNS = ("texts", "labels", "ids")
    texts: list
    labels: Tensor
    ids: Tensor
    classes: list[str]
    name: str
    stands_for: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for row, pair in enumerate(self.texts if self.pairs else []):
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{self.name}, row {row}: {pair!r} is no pair, as the first text is")
        _check_texts(self.name, zip(*self.texts, strict=True) if self.pairs else [self.texts])

    @property
    def pairs(self) -> bool:
        """Whether each text is a pair."""
        return bool(self.texts) and isinstance(self.texts[0], (tuple, list))

    @property
    def fingerprint(self) -> str:
        """A hash of texts, labels, ids and class names, as they are now."""
        return _hash([self.texts, self.labels.tolist(), self.ids.tolist(), self.classes])

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> TokenSet:
        """Tokenise, cutting off what is longer than ``max_length`` tokens (of a pair, from the longer text).

        Raises:
            ValueError: the tokenizer has no token for padding.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token; give it one: tokenizer.pad_token = tokenizer.eos_token"
            )
        columns = [list(column) for column in zip(*self.texts, strict=True)] if self.pairs else [self.texts]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        kinds = Ragged.of(encoded["token_type_ids"]) if self.pairs and "token_type_ids" in encoded else None
        return TokenSet(self, Ragged.of(encoded["input_ids"]), kinds, tokenizer.pad_token_id, len(tokenizer))


@dataclass(frozen=True, repr=False)
class TokenSet(TokenRows):
    """A text set in tokens.

    Attributes:
        source: the texts.
        tokens: of each row.
        kinds: the tokens' types (0 in a pair's first text, 1 in its second), where the tokenizer has them.
        pad: the token that fills shorter rows.
        vocabulary: number of tokens known to the tokenizer.
    """

    COLUMNS = ("source", "tokens", "kinds")
    source: TextSet
    tokens: Ragged
    kinds: Ragged | None
    pad: int
    vocabulary: int

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each row."""
        return self.tokens.lengths

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the labels; empty for scores."""
        return self.source.classes

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` [B, L], ``y`` and ``id`` [B]; of pairs ``token_type_ids``, if any."""
        ids, mask = self.tokens.padded(rows, self.pad)
        kinds = {} if self.kinds is None else {"token_type_ids": self.kinds.padded(rows, 0)[0]}
        return {"input_ids": ids, "attention_mask": mask.long(), "y": self.labels[rows], "id": self.ids[rows], **kinds}


@dataclass(frozen=True, repr=False)
class SequenceSet(Rows):
    """N texts to read and N texts to write, with ids (int64 [N]).

    Raises:
        ValueError: lengths that differ, or a text that is none.
    """

    COLUMNS = ("sources", "targets", "ids")
    sources: list[str]
    targets: list[str]
    ids: Tensor
    name: str
    stands_for: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_texts(self.name, (self.sources, self.targets))

    @property
    def labels(self) -> Tensor:
        """int64 [N], all 0: sequences have no classes, and every draw is a plain one."""
        return torch.zeros(len(self.ids), dtype=torch.int64)

    @property
    def fingerprint(self) -> str:
        """A hash of sources, targets and ids, as they are now."""
        return _hash([self.sources, self.targets, self.ids.tolist()])

    def with_targets(self, targets: Sequence[str]) -> SequenceSet:
        """The same sources and ids with other targets, such as a teacher's outputs (sequence-level distillation)."""
        if len(targets) != len(self):
            raise ValueError(f"{len(targets):,} targets for {len(self):,} sources; give one each, in the set's order")
        return replace(self, targets=list(targets), name=f"{self.name}-rewritten")

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, max_source: int, max_target: int) -> SequenceTokens:
        """Tokenise both sides, cutting off what is longer than the limits (tokens, with EOS).

        Every source ends in EOS, also one that was cut. A target ends in EOS only if it was not cut: a model that
        learnt to stop at the cap would stop there in the middle of a sentence.

        Raises:
            ValueError: a limit below 1, or PAD, BOS and EOS are missing or the same.
        """
        pad, bos, eos = special_tokens(tokenizer)
        if min(max_source, max_target) < 1:
            raise ValueError(f"max_source is {max_source}, max_target is {max_target}; both must be at least 1 token")
        read, write = (
            tokenizer(side, add_special_tokens=False)["input_ids"] if side else []
            for side in (self.sources, self.targets)
        )
        inputs = Ragged.of([[*row[: max_source - 1], eos] for row in read])
        outputs = Ragged.of([[*row, eos][:max_target] for row in write])
        return SequenceTokens(self, inputs, outputs, pad, bos, eos, len(tokenizer))


@dataclass(frozen=True, repr=False)
class SequenceTokens(TokenRows):
    """A sequence set in tokens; sources end in ``eos``, targets unless they were cut; ``bos`` starts the decoder."""

    COLUMNS = ("source", "inputs", "outputs")
    source: SequenceSet
    inputs: Ragged
    outputs: Ragged
    pad: int
    bos: int
    eos: int
    vocabulary: int

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each source with its EOS."""
        return self.inputs.lengths

    @property
    def target_lengths(self) -> Tensor:
        """int64 [N], tokens of each target with its EOS."""
        return self.outputs.lengths

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` [B, Lx]; ``labels`` [B, Ly] (-100 at padding), ``decoder_input_ids``
        [B, Ly] (BOS, then the labels without their last; PAD after); ``id`` [B]."""
        read, real = self.inputs.padded(rows, self.pad)
        labels, written = self.outputs.padded(rows, IGNORED)
        shifted = torch.where(written, labels, self.pad).roll(1, dims=1)
        shifted[:, 0] = self.bos
        prefix = torch.where(written, shifted, self.pad)
        return {
            "input_ids": read, "attention_mask": real.long(), "labels": labels, "decoder_input_ids": prefix,
            "id": self.ids[rows],
        }  # fmt: skip


@dataclass(frozen=True)
class TextData:
    """A set's parts. Choose on ``validation``; ``test`` (None where its labels are not published) is for the end.

    ``metric`` is the set's own: a function of :mod:`kdlib.metrics`, or ``rouge1``.
    """

    train: TextSet | SequenceSet
    validation: TextSet | SequenceSet
    test: TextSet | SequenceSet | None
    name: str
    metric: str

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the labels; empty for scores."""
        return self.train.classes


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The ids of PAD, BOS (which starts the decoder) and EOS.

    Raises:
        ValueError: they are not three different ones (a mask of padding would hide a word).
    """
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if None in ids or len(set(ids)) < 3:
        raise ValueError(
            f"PAD, BOS and EOS are the tokens {ids}; all three must be there and differ. kd.data.train_subwords makes "
            "such a tokenizer; to another, add_special_tokens({'bos_token': '[BOS]'}) adds what is missing"
        )
    return ids


def _check_texts(name: str, sides: Iterable[Sequence[Any]]) -> None:
    for side in sides:
        for row, given in enumerate(side):
            if not isinstance(given, str):
                raise ValueError(f"{name}, row {row}: {given!r} is no text; leave the row out, or make it a string")


def _hash(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- the sets -------------------------------------------------------------------------------------------------------

_PAIR, _ENTAILED = ("sentence1", "sentence2"), ("entailment", "not_entailment")


def _glue(folder: str, columns: tuple, classes: tuple, metric: str, rows: int, words: int, **more: Any) -> Corpus:
    """Texts and the label are the columns; the hub calls the texts ``hub``, and the label always ``label``."""
    names = more.pop("files", {"train": "train", "validation": "dev"})
    files = {
        part: " + ".join(f"glue/{folder}/{name}.tsv" for name in given.split(" + ")) for part, given in names.items()
    }
    hub = ("nyu-mll/glue", folder.lower().replace("-", ""))
    hub_columns = (*more.pop("hub", columns[:-1]), "label")
    return Corpus(files, columns, metric, rows, words, classes, hub, hub_columns=hub_columns, **more)


def _lines(folder: str, files: str, rows: int, words: int, classes: int, label: str = "label") -> Corpus:
    parts = dict(zip(PARTS if files.count(" ") == 2 else ("train", "test"), files.split(), strict=True))
    paths = {part: f"textcls/{folder}/{file}.jsonl" for part, file in parts.items()}
    return Corpus(paths, ("text", label), "accuracy", rows, words, classes)


def _sequences(
    files: str, columns: tuple[str, str], metric: str, rows: int, words: tuple[int, int], *hub: str | None, **more: Any
) -> Corpus:
    parts = {part: files.format(file) for part, file in zip(PARTS, more.pop("names", PARTS), strict=True)}
    return Corpus(parts, columns, metric, rows, words, hub=hub, **more)


PARTS = ("train", "validation", "test")
_DEV, _VALID = ("train", "dev", "test"), ("train", "valid", "test")
_COLA = {"train": "in_domain_train", "validation": "in_domain_dev + out_of_domain_dev"}
_MNLI = {"train": "train", "validation": "dev_matched", "test": "dev_mismatched"}
_REVIEWS = ("amazon_books", "amazon_dvd", "amazon_electronics", "amazon_kitchen")
CORPORA = {
    "sst2": _glue("SST-2", ("sentence", "label"), ("negative", "positive"), "accuracy", 67_349, 10),
    "cola": _glue("CoLA", (3, 1), ("unacceptable", "acceptable"), "mcc", 8_551, 8, files=_COLA, hub=("sentence",)),
    "mrpc": _glue("MRPC", ("#1 String", "#2 String", "Quality"), ("not_equivalent", "equivalent"), "f1", 3_668, 44, hub=_PAIR),
    "rte": _glue("RTE", (*_PAIR, "label"), _ENTAILED, "accuracy", 2_490, 55),
    "stsb": _glue("STS-B", (*_PAIR, "score"), (), "pearson", 5_749, 24),
    "qnli": _glue("QNLI", ("question", "sentence", "label"), _ENTAILED, "accuracy", 104_743, 38),
    "qqp": _glue("QQP", ("question1", "question2", "is_duplicate"), ("not_duplicate", "duplicate"), "f1", 363_846, 22),
    "mnli": _glue("MNLI", (*_PAIR, "gold_label"), ("entailment", "neutral", "contradiction"), "accuracy", 392_702, 30, files=_MNLI,
                  hub=("premise", "hypothesis"), hub_parts={"validation": "validation_matched", "test": "validation_mismatched"}),
    "trec": _lines("trec", "train test", 5_452, 10, 6),
    "clinc150": _lines("clinc150", "train val test", 15_000, 8, 150),
    "clinc_domains": _lines("clinc150", "train val test", 15_000, 8, 10, label="domain"),
    "ag_news": _lines("ag_news", "train_10k test", 9_977, 38, 4),
    **{name: _lines(name, "train dev test", 1_360, 120, 2) for name in _REVIEWS},
    "airline_reviews": _lines("airline_reviews", "train dev test", 1_398, 100, 2),
    "yelp_sentences": _lines("yelp_sentences", "train test", 3_854, 10, 2),
    "multi30k": _sequences("multi30k/{}", ("de", "en"), "bleu", 29_000, (11, 12), "bentrevett/multi30k", names=("train", "val", "test_2016_flickr")),
    "iwslt14": _sequences("iwslt14/{}", ("de", "en"), "bleu", 171_721, (18, 19), "bbaaaa/iwslt14-de-en", None, "refs/convert/parquet", names=_VALID),
    "wmt16": _sequences("wmt16/{}", ("en", "de"), "bleu", 4_548_885, (23, 22), "wmt/wmt16", "de-en", names=_VALID),
    "aeslc": _sequences("summarisation/aeslc/{}.jsonl", ("email", "subject"), "rouge1", 14_436, (117, 4), "Yale-LILY/aeslc", names=_DEV,
                        hub_columns=("email_body", "subject_line")),
    "cnn_dm": _sequences("summarisation/cnn_dm/{}.jsonl", ("article", "highlights"), "rouge1", 287_113, (690, 50), "abisee/cnn_dailymail", "3.0.0"),
}  # fmt: skip
_STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
TOYS = {  # file, columns, metric
    "toy_reviews": ("toy_reviews", ("text", "label"), "accuracy"),
    "toy_requests": ("toy_requests", ("text", "label"), "accuracy"),
    "toy_domains": ("toy_requests", ("text", "domain"), "accuracy"),
    "toy_translation": ("toy_translation", ("source", "target"), "bleu"),
    "toy_headlines": ("toy_headlines", ("source", "target"), "rouge1"),
}


def text(name: str) -> TextData:
    """A text set by name: sentences or pairs with labels (:class:`TextSet`), or a :class:`SequenceSet`.

    Embedded: ``toy_reviews``; ``toy_requests`` and ``toy_domains``, the same requests with their intent and with their
    domain as label, as are ``clinc150`` and ``clinc_domains``: rows and ids agree; ``toy_translation`` and
    ``toy_headlines``, sequences.

    From ``KDLIB_DATA``, in the layout that ``data/README.md`` gives: GLUE's ``sst2``, ``cola``, ``mrpc``, ``rte``,
    ``stsb``, ``qnli``, ``qqp`` and ``mnli`` (its mismatched part is ``test``); ``trec``, ``clinc150``, ``ag_news`` and
    reviews (``amazon_books``, ``_dvd``, ``_electronics``, ``_kitchen``, ``airline_reviews``, ``yelp_sentences``);
    translation ``multi30k``, ``iwslt14`` and ``wmt16``, summaries ``aeslc`` and ``cnn_dm``. GLUE and the sequences else
    come from the hub. Where there is no validation part, a tenth of the training part is it.

    Of sequences, white space counts as one space. A pair with an empty side is left out, and of ``aeslc`` one whose
    e-mail is quoted-printable code; ids go on counting, so that they name the row of the original.

    Raises:
        ValueError: no such set, or a line that cannot be read.
        FileNotFoundError: the set is not at hand; says what to put where.
    """
    if name in TOYS:
        file, columns, metric = TOYS[name]
        rows = sources.json_lines(sources.embedded(f"{file}.jsonl"))
        parts = {p: [tuple(row[c] for c in columns) for row in rows if row["part"] == p] for p in PARTS}
        if columns[0] == "source":
            return _sequence_data(name, parts, metric)
        if name == "toy_reviews":
            parts = {part: [(text, _STARS[stars - 1]) for text, stars in rows] for part, rows in parts.items()}
            return _text_data(name, parts, _STARS, metric)
        return _text_data(name, parts, dict.fromkeys(row[columns[1]] for row in rows), metric)
    if name not in CORPORA:
        raise ValueError(f"no text set is called {name!r}; there are {', '.join([*TOYS, *CORPORA])}")
    corpus = CORPORA[name]
    if scale.rehearsing():
        return _stand_in(name, corpus)
    parts = corpus.read(name)
    if corpus.metric in ("bleu", "rouge1"):
        return _sequence_data(name, parts, corpus.metric)
    classes = corpus.classes if isinstance(corpus.classes, tuple) else _names(label for _, label in parts["train"])
    return _text_data(name, parts, classes, corpus.metric)


def _names(labels: Iterable[Any]) -> list[str]:
    """Class names of the labels of a training part; 0 and 1 are polarities."""
    found = set(labels)
    if found <= {0, 1}:
        return ["negative", "positive"]
    return [str(label) for label in sorted(found, key=lambda label: (isinstance(label, str), label))]


def _text_data(name: str, parts: dict[str, list[tuple]], classes: Iterable[str], metric: str) -> TextData:
    classes, sets = list(classes), {}
    for part, rows in parts.items():
        texts = [row[0] if len(row) == 2 else row[:-1] for row in rows]
        labels = [_label(row[-1], classes, f"{name}/{part}, row {number}") for number, row in enumerate(rows)]
        ids = torch.arange(len(rows)) + FIRST_ID[part]
        sets[part] = TextSet(texts, torch.tensor(labels), ids, classes, f"{name}/{part}")
    if "validation" not in sets:
        sets["train"], held = sets["train"].split(len(sets["train"]) // 10, seed=0)
        sets["validation"] = replace(held, name=f"{name}/validation")
    return TextData(sets["train"], sets["validation"], sets.get("test"), name, metric)


def _label(given: Any, classes: list[str], where: str) -> int | float:
    if str(given) in classes:
        return classes.index(str(given))
    try:
        label = int(given) if classes else float(given)
    except ValueError:
        label = -1
    if classes and not 0 <= label < len(classes):
        raise ValueError(f"{where}: the label {given!r} is none of {', '.join(classes)}; unpack that file again")
    return label


def _sequence_data(name: str, parts: dict[str, list[tuple]], metric: str) -> TextData:
    sets = []
    for part in PARTS:
        clean = [[" ".join(side.split()) for side in row] for row in parts[part]]
        kept = [row for row, (source, _) in enumerate(clean) if all(clean[row]) and not _left_out(name, source)]
        if not kept:
            raise ValueError(f"{name} has no usable pair in its {part} part; unpack that file again")
        columns = [[clean[row][side] for row in kept] for side in (0, 1)]
        sets.append(SequenceSet(*columns, torch.tensor(kept) + FIRST_ID[part], f"{name}/{part}"))
    return TextData(*sets, name, metric)


def _left_out(name: str, source: str) -> bool:
    """Whether a mail is left in its transfer encoding: one word in ten or more holds ``=20``, ``=3D`` or the like."""
    words = source.split() if name == "aeslc" else []
    return sum(bool(re.search("=[0-9A-F]{2}", word)) for word in words) * 10 >= len(words) > 0


def _stand_in(name: str, corpus: Corpus) -> TextData:
    """Embedded words, as many as a text of the set has, for a rehearsal."""
    planned = {"train": corpus.rows, "validation": corpus.rows // 10, "test": corpus.rows // 10}
    parts = dict.fromkeys({"train": 0, "validation": 0, **corpus.files})
    if isinstance(corpus.words, tuple):
        toy = text("toy_translation").train
        sides = [_runs(side, words) for side, words in zip((toy.sources, toy.targets), corpus.words, strict=True)]
        data = _sequence_data(name, dict.fromkeys(parts, list(zip(*sides, strict=True))), corpus.metric)
        planned |= {"validation": 1000, "test": 1000}
    else:
        count, sides = corpus.classes, len(corpus.columns) - 1
        classes = [f"class {number}" for number in range(count)] if isinstance(count, int) else list(count)
        runs = [run.split() for run in _runs(text("toy_reviews").train.texts[: STAND_IN * 20], corpus.words)]
        bounds = [(side * corpus.words // sides, (side + 1) * corpus.words // sides) for side in range(sides)]
        cuts = [[" ".join(run[start:stop]) for start, stop in bounds] for run in runs]
        rows = [(*cut, classes[row % len(classes)] if classes else row % 6) for row, cut in enumerate(cuts)]
        data = _text_data(name, dict.fromkeys(parts, rows), classes, corpus.metric)
    return replace(data, **{p: replace(getattr(data, p), stands_for=n) for p, n in planned.items() if getattr(data, p)})


def _runs(texts: list[str], words: int) -> list[str]:
    pool = " ".join(texts).split()
    return [" ".join(pool[(row * words + k) % len(pool)] for k in range(words)) for row in range(STAND_IN)]


# --- tokenizers from scratch ----------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[Any], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer of the ``vocab_size`` most frequent words of ``texts`` (sentences or pairs).

    Punctuation stands alone, rarer words become ``[UNK]``; a text ends in ``[SEP]``, which also parts a pair. Accents
    and vowel signs stay: they make other words. Train it on the training part only.

    Raises:
        ValueError: ``vocab_size`` leaves no room for words.
    """
    parts = sources.optional("tokenizers")
    special = ["[PAD]", "[UNK]", "[SEP]"]
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size is {vocab_size}; it must leave room for words beside {', '.join(special)}")
    words = parts.Tokenizer(parts.models.WordLevel(unk_token="[UNK]"))
    normalizers = parts.normalizers
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False)])
    words.pre_tokenizer = parts.pre_tokenizers.BertPreTokenizer()
    flat = (part for text in texts for part in ([text] if isinstance(text, str) else text))
    trainer = parts.trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    words.train_from_iterator(flat, trainer)
    return _finished(words, "[SEP]", pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]")


def train_subwords(texts: Iterable[str], vocab_size: int = 2000, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most ``vocab_size`` tokens over ``texts`` (Sennrich et al. 2016).

    Sources and targets together make a joint one. ``[PAD]``, ``[BOS]``, ``[EOS]`` and ``[UNK]`` are 0 to 3; a text
    ends in ``[EOS]``. Decoding gives back the text, where all its characters are known.

    Raises:
        ValueError: special tokens and characters alone are more than ``vocab_size``.
    """
    parts = sources.optional("tokenizers")
    normalizers, pre_tokenizers = parts.normalizers, parts.pre_tokenizers
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    words = parts.Tokenizer(parts.models.BPE(unk_token="[UNK]"))
    steps = [normalizers.NFC(), normalizers.Replace(parts.Regex(r"\s+"), " "), normalizers.Strip()]
    words.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lowercase else [])])
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    words.decoder = parts.decoders.Metaspace()
    trainer = parts.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    words.train_from_iterator(texts, trainer)
    if words.get_vocab_size() > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; the special tokens and characters alone are {words.get_vocab_size()}"
        )
    if scale.rehearsing():  # the few texts have few words; models shall have the size that they will have
        words.add_tokens([f"[UNUSED{number}]" for number in range(words.get_vocab_size(), vocab_size)])
    return _finished(words, "[EOS]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]")


def _finished(words: Any, end: str, **names: str) -> PreTrainedTokenizerFast:
    """For ``transformers``; ``end`` closes a text and each half of a pair."""
    words.post_processor = sources.optional("tokenizers").processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, words.token_to_id(end))]
    )
    fast = sources.optional("transformers").PreTrainedTokenizerFast
    return fast(tokenizer_object=words, **names, clean_up_tokenization_spaces=False)
