"""Text sets: sentences or pairs with labels, and sequences to read and to write; tokens, batches of like length."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib import scale
from kdlib.data import sources
from kdlib.data.rows import FIRST_ID, STAND_IN, Ragged, Rows, TokenRows
from kdlib.data.sources import PARTS, Corpus

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
                "the tokenizer has no padding token: tokenizer.pad_token = tokenizer.eos_token gives it one"
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
    classes = property(
        attrgetter("source.classes"), doc="The class names, in the order of the labels; none for scores."
    )

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
        texts = (self.sources, self.targets)
        read, write = (tokenizer(side, add_special_tokens=False)["input_ids"] if side else [] for side in texts)
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
    target_lengths = property(attrgetter("outputs.lengths"), doc="int64 [N], tokens of each target with its EOS.")

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` [B, Lx]; ``labels`` [B, Ly] (-100 at padding), ``decoder_input_ids``
        [B, Ly] (BOS, then the labels without their last; PAD after); ``id`` [B]."""
        read, real = self.inputs.padded(rows, self.pad)
        labels, written = self.outputs.padded(rows, IGNORED)
        prefix = F.pad(labels[:, :-1], (1, 0), value=self.bos).masked_fill(~written, self.pad)
        sides = {"input_ids": read, "attention_mask": real.long(), "labels": labels, "decoder_input_ids": prefix}
        return {**sides, "id": self.ids[rows]}


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
    classes = property(attrgetter("train.classes"), doc="The class names, in the order of the labels; none for scores.")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The ids of PAD, BOS (which starts the decoder) and EOS.

    Raises:
        ValueError: they are not three different ones (a mask of padding would hide a word).
    """
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if None in ids or len(set(ids)) < 3:
        remedy = "kd.data.train_subwords makes them; add_special_tokens({'bos_token': '[BOS]'}) adds what is missing"
        raise ValueError(f"PAD, BOS and EOS are the tokens {ids}; all three must be there and differ. {remedy}")
    return ids


def _check_texts(name: str, sides: Iterable[Sequence[Any]]) -> None:
    for side in sides:
        for row, given in enumerate(side):
            if not isinstance(given, str):
                raise ValueError(f"{name}, row {row}: {given!r} is no text; leave the row out, or make it a string")


def _hash(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- the sets -------------------------------------------------------------------------------------------------------

_PAIR, _ENTAILED, _POLAR = ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("negative", "positive")
_GLUE, _THREE, _REVIEWS = "nyu-mll/glue", "train dev test", "amazon_books amazon_dvd amazon_electronics amazon_kitchen"
CORPORA = {
    "sst2": Corpus("glue/SST-2/{}.tsv", "train dev", ("sentence", "label"), "accuracy", 67_349, (10,), _POLAR, (_GLUE, "sst2")),
    "cola": Corpus("glue/CoLA/{}.tsv", "in_domain_train in_domain_dev+out_of_domain_dev", (3, 1), "mcc", 8_551, (8,),
                   ("unacceptable", "acceptable"), (_GLUE, "cola"), hub_columns=("sentence", "label")),
    "mrpc": Corpus("glue/MRPC/{}.tsv", "train dev", ("#1 String", "#2 String", "Quality"), "f1", 3_668, (22, 22),
                   ("not_equivalent", "equivalent"), (_GLUE, "mrpc"), hub_columns=(*_PAIR, "label")),
    "rte": Corpus("glue/RTE/{}.tsv", "train dev", (*_PAIR, "label"), "accuracy", 2_490, (27, 28), _ENTAILED, (_GLUE, "rte")),
    "stsb": Corpus("glue/STS-B/{}.tsv", "train dev", (*_PAIR, "score"), "pearson", 5_749, (12, 12), (), (_GLUE, "stsb"),
                   hub_columns=(*_PAIR, "label")),
    "qnli": Corpus("glue/QNLI/{}.tsv", "train dev", ("question", "sentence", "label"), "accuracy", 104_743, (19, 19), _ENTAILED, (_GLUE, "qnli")),
    "qqp": Corpus("glue/QQP/{}.tsv", "train dev", ("question1", "question2", "is_duplicate"), "f1", 363_846, (11, 11),
                  ("not_duplicate", "duplicate"), (_GLUE, "qqp"), hub_columns=("question1", "question2", "label")),
    "mnli": Corpus("glue/MNLI/{}.tsv", "train dev_matched dev_mismatched", (*_PAIR, "gold_label"), "accuracy", 392_702, (15, 15),
                   ("entailment", "neutral", "contradiction"), (_GLUE, "mnli"), "train validation_matched validation_mismatched",
                   ("premise", "hypothesis", "label")),
    "trec": Corpus("textcls/trec/{}.jsonl", "train - test", ("text", "label"), "accuracy", 5_452, (10,), 6),
    "clinc150": Corpus("textcls/clinc150/{}.jsonl", "train val test", ("text", "label"), "accuracy", 15_000, (8,), 150),
    "clinc_domains": Corpus("textcls/clinc150/{}.jsonl", "train val test", ("text", "domain"), "accuracy", 15_000, (8,), 10),
    "ag_news": Corpus("textcls/ag_news/{}.jsonl", "train_10k - test", ("text", "label"), "accuracy", 9_977, (38,), 4),
    **{name: Corpus(f"textcls/{name}/{{}}.jsonl", _THREE, ("text", "label"), "accuracy", 1_360, (120,), 2) for name in _REVIEWS.split()},
    "airline_reviews": Corpus("textcls/airline_reviews/{}.jsonl", _THREE, ("text", "label"), "accuracy", 1_398, (100,), 2),
    "yelp_sentences": Corpus("textcls/yelp_sentences/{}.jsonl", "train - test", ("text", "label"), "accuracy", 3_854, (10,), 2),
    "multi30k": Corpus("multi30k/{}", "train val test_2016_flickr", ("de", "en"), "bleu", 29_000, (11, 12), hub=("bentrevett/multi30k",)),
    "iwslt14": Corpus("iwslt14/{}", "train valid test", ("de", "en"), "bleu", 171_721, (18, 19),
                      hub=("bbaaaa/iwslt14-de-en", None, "refs/convert/parquet"), hub_columns=("translation.de", "translation.en")),
    "wmt16": Corpus("wmt16/{}", "train valid test", ("en", "de"), "bleu", 4_548_885, (23, 22), hub=("wmt/wmt16", "de-en"),
                    hub_columns=("translation.en", "translation.de")),
    **{f"rnnlg_{name}": Corpus(f"nlg/rnnlg/{name}/{{}}.jsonl", "train valid test", ("da", "ref"), "bleu", rows, (12, 15))
       for name, rows in (("restaurant", 3_114), ("hotel", 3_223), ("tv", 4_221), ("laptop", 7_944))},
    "aeslc": Corpus("summarisation/aeslc/{}.jsonl", _THREE, ("email", "subject"), "rouge1", 14_436, (117, 4), hub=("Yale-LILY/aeslc",),
                    hub_columns=("email_body", "subject_line")),
    "cnn_dm": Corpus("summarisation/cnn_dm/{}.jsonl", "train validation test", ("article", "highlights"), "rouge1", 287_113, (690, 50),
                     hub=("abisee/cnn_dailymail", "3.0.0")),
}  # fmt: skip
WRITTEN = ("bleu", "rouge1")  # the metrics of sequences
TOYS = {  # file, columns, metric
    "toy_reviews": ("toy_reviews", ("text", "label"), "accuracy"),
    "toy_requests": ("toy_requests", ("text", "label"), "accuracy"),
    "toy_domains": ("toy_requests", ("text", "domain"), "accuracy"),
    "toy_translation": ("toy_translation", ("source", "target"), "bleu"),
    "toy_headlines": ("toy_headlines", ("source", "target"), "rouge1"),
    **{f"toy_{name}": (f"toy_{name}", ("source", "target"), "bleu") for name in ("cinema", "trains", "weather")},
}


def text(name: str) -> TextData:
    """A text set by name: sentences or pairs with labels (:class:`TextSet`), or a :class:`SequenceSet`.

    Embedded: ``toy_reviews``; ``toy_requests`` and ``toy_domains``, the same requests with their intent and with their
    domain as label, as are ``clinc150`` and ``clinc_domains``: rows and ids agree; ``toy_translation`` and
    ``toy_headlines``, sequences; ``toy_cinema``, ``toy_trains``, ``toy_weather``, dialogue acts and sentences.

    From ``KDLIB_DATA``, in the layout that ``data/README.md`` gives: GLUE's ``sst2``, ``cola``, ``mrpc``, ``rte``,
    ``stsb``, ``qnli``, ``qqp`` and ``mnli`` (its mismatched part is ``test``); ``trec``, ``clinc150``, ``ag_news`` and
    reviews (``amazon_books``, ``_dvd``, ``_electronics``, ``_kitchen``, ``airline_reviews``, ``yelp_sentences``);
    translation ``multi30k``, ``iwslt14`` and ``wmt16``, summaries ``aeslc`` and ``cnn_dm``, data-to-text
    ``rnnlg_restaurant``, ``_hotel``, ``_tv`` and ``_laptop``. GLUE and the sequences but RNNLG else come from the hub.
    Where there is no validation part, a tenth of the training part is it.

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
        classes = list(dict.fromkeys(row[columns[1]] for row in rows))
        if name == "toy_reviews":
            classes = ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
            parts = {part: [(text, classes[stars - 1]) for text, stars in rows] for part, rows in parts.items()}
        return _data(name, parts, metric, classes)
    if name not in CORPORA:
        raise ValueError(f"no text set is called {name!r}; there are {', '.join([*TOYS, *CORPORA])}")
    corpus = CORPORA[name]
    if scale.rehearsing():
        return _stand_in(name, corpus)
    parts, classes = corpus.read(name), corpus.classes
    if isinstance(classes, int):  # 0 and 1 are polarities
        found = sorted({label for _, label in parts["train"]})
        classes = _POLAR if set(found) <= {0, 1} else tuple(map(str, found))
    return _data(name, parts, corpus.metric, classes)


def _data(name: str, parts: dict[str, list[tuple]], metric: str, classes: Sequence[str]) -> TextData:
    sets: dict[str, Any] = {}
    for part, rows in parts.items():
        place, ids = f"{name}/{part}", torch.arange(len(rows)) + FIRST_ID[part]
        sets[part] = _pairs(rows, ids, place) if metric in WRITTEN else _labelled(rows, ids, list(classes), place)
    if "validation" not in sets:
        sets["train"], held = sets["train"].split(len(sets["train"]) // 10, seed=0)
        sets["validation"] = replace(held, name=f"{name}/validation")
    return TextData(sets["train"], sets["validation"], sets.get("test"), name, metric)


def _pairs(rows: list[tuple], ids: Tensor, place: str) -> SequenceSet:
    """White space counts as one space; pairs with an empty side, and mails in their transfer encoding, are left out."""
    clean = [[" ".join(side.split()) for side in row] for row in rows]
    kept = [row for row, (source, target) in enumerate(clean) if source and target and not _left_out(place, source)]
    if not kept:
        raise ValueError(f"{place} has no usable pair; unpack that file again")
    read, write = ([clean[row][side] for row in kept] for side in (0, 1))
    return SequenceSet(read, write, ids[kept], place)


def _left_out(place: str, source: str) -> bool:
    """Whether a mail is left in its transfer encoding: one word in ten or more holds ``=20``, ``=3D`` or the like."""
    words = source.split() if place.startswith("aeslc/") else []
    return sum(bool(re.search("=[0-9A-F]{2}", word)) for word in words) * 10 >= len(words) > 0


def _labelled(rows: list[tuple], ids: Tensor, classes: list[str], place: str) -> TextSet:
    """Labels are names, or numbers as such or as text; without classes, scores."""
    texts, given = [row[0] if len(row) == 2 else row[:-1] for row in rows], [row[-1] for row in rows]
    known = {key: number for number in range(len(classes)) for key in (number, str(number))}
    known |= {name: number for number, name in enumerate(classes)}
    labels = [known.get(str(label), known.get(label)) if classes else _number(label) for label in given]
    if None in labels:
        row, wanted = labels.index(None), f"none of {', '.join(classes)}" if classes else "no number"
        raise ValueError(f"{place}, row {row}: the label {given[row]!r} is {wanted}; unpack that file again")
    return TextSet(texts, labels, ids, classes, place)


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _stand_in(name: str, corpus: Corpus) -> TextData:
    """Embedded words, as many as a text of the set has, for a rehearsal."""
    pool, classes = itertools.cycle(" ".join(text("toy_reviews").train.texts).split()), corpus.classes
    rows = [tuple(" ".join(itertools.islice(pool, words)) for words in corpus.words) for _ in range(STAND_IN)]
    held = 1000
    if corpus.metric not in WRITTEN:
        held = corpus.rows // 10
        classes = [f"class {number}" for number in range(classes)] if isinstance(classes, int) else classes
        rows = [(*row, classes[number % len(classes)] if classes else number % 6) for number, row in enumerate(rows)]
    data = _data(name, dict.fromkeys(["train", "validation", *corpus.files], rows), corpus.metric, classes)
    planned = {"train": corpus.rows, "validation": held, "test": held}
    return replace(data, **{p: replace(getattr(data, p), stands_for=n) for p, n in planned.items() if getattr(data, p)})


# --- tokenizers from scratch ----------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[Any], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer of the ``vocab_size`` most frequent words of ``texts`` (sentences or pairs).

    Punctuation stands alone, rarer words become ``[UNK]``; a text ends in ``[SEP]``, which also parts a pair. Accents
    and vowel signs stay: they make other words. Train it on the training part only.

    Raises:
        ValueError: ``vocab_size`` leaves no room for words.
    """
    parts = sources.optional("tokenizers")
    words, normalizers = parts.Tokenizer(parts.models.WordLevel(unk_token="[UNK]")), parts.normalizers
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False)])
    words.pre_tokenizer = parts.pre_tokenizers.BertPreTokenizer()
    flat = (part for text in texts for part in ([text] if isinstance(text, str) else text))
    return _trained(words, parts.trainers.WordLevelTrainer, flat, vocab_size, "pad unk sep")


def train_subwords(texts: Iterable[str], vocab_size: int = 2000, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most ``vocab_size`` tokens over ``texts`` (Sennrich et al. 2016).

    Sources and targets together make a joint one. ``[PAD]``, ``[BOS]``, ``[EOS]`` and ``[UNK]`` are 0 to 3; a text
    ends in ``[EOS]``. Decoding gives back the text, where all its characters are known.

    Raises:
        ValueError: special tokens and characters alone are more than ``vocab_size``.
    """
    parts = sources.optional("tokenizers")
    words, normalizers = parts.Tokenizer(parts.models.BPE(unk_token="[UNK]")), parts.normalizers
    steps = [normalizers.NFC(), normalizers.Replace(parts.Regex(r"\s+"), " "), normalizers.Strip()]
    words.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lowercase else [])])
    cuts = [parts.pre_tokenizers.Metaspace(), parts.pre_tokenizers.Punctuation(behavior="isolated")]
    words.pre_tokenizer = parts.pre_tokenizers.Sequence(cuts)
    words.decoder = parts.decoders.Metaspace()
    return _trained(words, parts.trainers.BpeTrainer, texts, vocab_size, "pad bos eos unk")


def _trained(words: Any, trainer: Any, texts: Iterable[str], size: int, special: str) -> PreTrainedTokenizerFast:
    """For ``transformers``; EOS or else SEP closes a text and each half of a pair."""
    names = {f"{name}_token": f"[{name.upper()}]" for name in special.split()}
    tokens = list(names.values())
    words.train_from_iterator(texts, trainer(vocab_size=size, special_tokens=tokens, show_progress=False))
    if (found := words.get_vocab_size()) > size or size == len(tokens):
        raise ValueError(f"vocab_size is {size}; the special tokens and characters alone are {found}")
    if scale.rehearsing():  # the few texts have few words; models shall have the size that they will have
        words.add_tokens([f"[UNUSED{number}]" for number in range(found, size)])
    end = names.get("eos_token", "[SEP]")
    words.post_processor = sources.optional("tokenizers").processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, words.token_to_id(end))]
    )
    fast = sources.optional("transformers").PreTrainedTokenizerFast
    return fast(tokenizer_object=words, **names, clean_up_tokenization_spaces=False)
