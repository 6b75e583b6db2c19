"""Sequence sets: a source and a target text a row (translation, summarisation), in tokens, in batches of like length."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
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

IGNORED = -100  # the label of padding


@dataclass(frozen=True, repr=False)
class SequenceSet(Rows):
    """Pairs of a source and a target text, with ids.

    Attributes:
        sources: N texts to read.
        targets: N texts to write.
        ids: int64 [N], the row in the original set; ``take``, ``sample`` and ``split`` keep it.
        name: of the set.
    """

    sources: list[str]
    targets: list[str]
    ids: Tensor
    name: str
    stands_for: int | None = None

    def __repr__(self) -> str:
        return f"SequenceSet({self.name}: {self.planned:,} pairs)"

    @property
    def labels(self) -> Tensor:
        """int64 [N], all 0: sequences have no classes, and every draw is a plain one."""
        return torch.zeros(len(self.ids), dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of sources, targets and ids."""
        content = json.dumps([self.sources, self.targets, self.ids.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def take(self, rows: Tensor | slice) -> SequenceSet:
        """The pairs of ``rows``: row numbers, a boolean mask or a slice. Ids stay."""
        numbers = torch.arange(len(self))[rows]
        return replace(
            self, sources=[self.sources[row] for row in numbers.tolist()],
            targets=[self.targets[row] for row in numbers.tolist()],
            ids=self.ids[numbers], stands_for=self._scaled(numbers),
        )  # fmt: skip

    def with_targets(self, targets: Sequence[str]) -> SequenceSet:
        """The same sources and ids with other targets, such as a teacher's outputs (sequence-level distillation).

        Raises:
            ValueError: not one target a row.
        """
        if len(targets) != len(self):
            raise ValueError(f"{len(targets):,} targets for {len(self):,} sources; give one each, in the set's order")
        return replace(self, targets=list(targets), name=f"{self.name}-rewritten")

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, max_source: int, max_target: int) -> SequenceTokens:
        """Tokenise both sides; what is longer than the limits (tokens, with EOS) is cut off.

        Every source ends in EOS, also one that was cut. A target ends in EOS only if it was not cut: a model that
        learnt to stop at the cap would stop there in the middle of a sentence.

        Raises:
            ValueError: the tokenizer has no PAD, BOS or EOS, or two of them are the same token.
        """
        pad, bos, eos = special_tokens(tokenizer)
        for name, limit in (("max_source", max_source), ("max_target", max_target)):
            if limit < 1:
                raise ValueError(f"{name} is {limit}; it must be at least 1 token")
        read = tokenizer(self.sources, add_special_tokens=False)["input_ids"] if self.sources else []
        write = tokenizer(text_target=self.targets, add_special_tokens=False)["input_ids"] if self.targets else []
        return SequenceTokens(
            source=self,
            inputs=Ragged.of([[*row[: max_source - 1], eos] for row in read]),
            outputs=Ragged.of([[*row, eos][:max_target] for row in write]),
            pad=pad, bos=bos, eos=eos, vocabulary=len(tokenizer),
        )  # fmt: skip


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The ids of PAD, BOS (which starts the decoder) and EOS.

    Raises:
        ValueError: one is missing, or two are the same: a mask of padding would then hide the first or the last word.
    """
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if None in ids or len(set(ids)) < 3:
        raise ValueError(
            f"PAD, BOS and EOS are the tokens {ids}; all three must be there and differ. kd.data.train_subwords makes "
            "such a tokenizer; to another, add_special_tokens({'bos_token': '[BOS]'}) adds what is missing"
        )
    return ids


@dataclass(frozen=True, repr=False)
class SequenceTokens(TokenRows):
    """A sequence set in tokens.

    Attributes:
        source: the texts.
        inputs: the sources' tokens, each row ending in ``eos``.
        outputs: the targets' tokens, each row ending in ``eos`` unless it was cut.
        pad: the token that fills shorter rows.
        bos: the token that starts the decoder.
        eos: the token that ends a text.
        vocabulary: number of tokens known to the tokenizer.
    """

    source: SequenceSet
    inputs: Ragged
    outputs: Ragged
    pad: int
    bos: int
    eos: int
    vocabulary: int

    def __repr__(self) -> str:
        read, write = (side.lengths.float().mean() for side in (self.inputs, self.outputs))
        return f"SequenceTokens({self.name}: {self.planned:,} rows, {read:.1f} tokens to read, {write:.1f} to write)"

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each source with its EOS."""
        return self.inputs.lengths

    @property
    def target_lengths(self) -> Tensor:
        """int64 [N], tokens of each target with its EOS."""
        return self.outputs.lengths

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tokens and ids."""
        settings = f"{self.source.fingerprint}:{self.pad}:{self.bos}:{self.eos}:{self.vocabulary}"
        digest = hashlib.sha256(settings.encode())
        for tensor in (self.inputs.lengths, self.inputs.values, self.outputs.lengths, self.outputs.values):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def take(self, rows: Tensor | slice) -> SequenceTokens:
        """The rows asked for: row numbers, a boolean mask or a slice. Ids stay."""
        numbers = torch.arange(len(self))[rows]
        return replace(
            self, source=self.source.take(numbers), inputs=self.inputs.take(numbers), outputs=self.outputs.take(numbers)
        )

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """The rows of these numbers, padded to their longest.

        ``input_ids`` and ``attention_mask`` [B, Lx], ``labels`` [B, Ly] (-100 at padding), ``decoder_input_ids``
        [B, Ly] (BOS, then the labels without their last; PAD after) and ``id`` [B].
        """
        read, real = self.inputs.padded(rows, self.pad)
        labels, written = self.outputs.padded(rows, IGNORED)
        shifted = torch.where(written, labels, self.pad).roll(1, dims=1)
        shifted[:, 0] = self.bos
        return {
            "input_ids": read, "attention_mask": real.long(), "labels": labels,
            "decoder_input_ids": torch.where(written, shifted, self.pad), "id": self.ids[rows],
        }  # fmt: skip


@dataclass(frozen=True)
class SequenceData:
    """A set's parts. Choose on ``validation``; ``test`` is for the end.

    Attributes:
        metric: what the set is scored by, ``bleu`` or ``rouge1`` (see ``kd.metrics``).
    """

    train: SequenceSet
    validation: SequenceSet
    test: SequenceSet
    name: str
    metric: str


# --- the sets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """What a set consists of, and where it is.

    Attributes:
        folder: below the folder of real data.
        files: of training, validation and test part, without their endings.
        fields: of source and target: the endings of parallel lines, or the fields of JSON objects.
        metric: what the set is scored by.
        rows: of each part, for a rehearsal.
        words: of a typical source and target, for a rehearsal.
        lines: whether the files are parallel lines; else they are ``.jsonl``.
        hub: name, configuration and revision on the hub; empty where it is not there.
        columns: the hub's, where they are not called as the fields.
        within: the hub's column that holds both, where there is one.
    """

    folder: str
    files: tuple[str, str, str]
    fields: tuple[str, str]
    metric: str
    rows: tuple[int, int, int]
    words: tuple[int, int]
    lines: bool = False
    hub: tuple[str | None, ...] = ()
    columns: tuple[str, str] | None = None
    within: str | None = None


PARTS = ("train", "validation", "test")
CORPORA = {
    "multi30k": Corpus(
        "multi30k", ("train", "val", "test_2016_flickr"), ("de", "en"), "bleu", (29_000, 1_014, 1_000), (11, 12),
        lines=True, hub=("bentrevett/multi30k",),
    ),
    "iwslt14": Corpus(
        "iwslt14", ("train", "valid", "test"), ("de", "en"), "bleu", (171_721, 887, 4_698), (18, 19),
        lines=True, hub=("bbaaaa/iwslt14-de-en", None, "refs/convert/parquet"), within="translation",
    ),
    "wmt16": Corpus(
        "wmt16", ("train", "valid", "test"), ("en", "de"), "bleu", (4_548_885, 2_169, 2_999), (23, 22),
        lines=True, hub=("wmt/wmt16", "de-en"), within="translation",
    ),
    "aeslc": Corpus(
        "summarisation/aeslc", ("train", "dev", "test"), ("email", "subject"), "rouge1", (14_436, 1_960, 1_906),
        (117, 4), hub=("Yale-LILY/aeslc",), columns=("email_body", "subject_line"),
    ),
    "agnews_headline": Corpus(
        "summarisation/agnews_headline", ("train", "dev", "test"), ("document", "summary"), "rouge1",
        (6_438, 375, 787), (31, 7),
    ),
    "cnn_dm": Corpus(
        "summarisation/cnn_dm", ("train", "validation", "test"), ("article", "highlights"), "rouge1",
        (287_113, 13_368, 11_490), (690, 50), hub=("abisee/cnn_dailymail", "3.0.0"),
    ),
}  # fmt: skip
TOYS = {"toy_translation": "bleu", "toy_headlines": "rouge1"}


def sequences(name: str, *, root: str | Path | None = None) -> SequenceData:
    """A sequence set by name.

    ``toy_translation`` and ``toy_headlines`` are embedded. ``multi30k`` and ``iwslt14`` (German to English) and
    ``wmt16`` (English to German) are read from parallel lines ``<root>/<name>/<part>.<language>``; ``aeslc`` (e-mail
    to subject), ``agnews_headline`` and ``cnn_dm`` from ``<root>/summarisation/<name>/<part>.jsonl``; all but
    ``agnews_headline`` else from the hub. ``root`` is ``KDLIB_DATA`` by default.

    White space within a text counts as one space. A pair with an empty side is left out, and of ``aeslc`` also
    one whose e-mail is quoted-printable code (see :func:`encoded_mail`); ids go on counting, so that they name the
    row of the original.

    Raises:
        ValueError: no such set, files of unequal length, or a line that cannot be read.
        FileNotFoundError: the set is not at hand; says what to put where.
    """
    if name in TOYS:
        return _toy(name)
    if name not in CORPORA:
        raise ValueError(f"no sequence set is called {name!r}; there are {', '.join([*TOYS, *CORPORA])}")
    if scale.rehearsing():
        return _stand_in(name)
    corpus = CORPORA[name]
    folder = sources.local(corpus.folder, root)
    if folder is None:
        return _data(name, _hub(name, corpus, root), corpus.metric)
    read = _parallel if corpus.lines else _jsonl
    parts = zip(PARTS, corpus.files, strict=True)
    return _data(name, {part: read(folder / file, *corpus.fields) for part, file in parts}, corpus.metric)


Pairs = list[tuple[str, str]]  # source and target of each row


def _data(name: str, parts: dict[str, Pairs], metric: str) -> SequenceData:
    return SequenceData(*(_set(name, part, parts[part]) for part in PARTS), name, metric)


def _set(name: str, part: str, pairs: Pairs) -> SequenceSet:
    """The usable pairs of a part, each with the number of its row."""
    clean = [(" ".join(source.split()), " ".join(target.split())) for source, target in pairs]
    kept = [
        row for row, (source, target) in enumerate(clean)
        if source and target and not (name == "aeslc" and encoded_mail(source))
    ]  # fmt: skip
    if not kept:
        raise ValueError(f"{name} has no usable pair in its {part} part; unpack it again")
    return SequenceSet(
        [clean[row][0] for row in kept], [clean[row][1] for row in kept],
        torch.tensor(kept) + FIRST_ID[part], f"{name}/{part}",
    )  # fmt: skip


def encoded_mail(text: str) -> bool:
    """Whether a mail is left in its transfer encoding: one word in ten or more holds ``=20``, ``=3D`` or the like."""
    words = text.split()
    return sum(bool(re.search("=[0-9A-F]{2}", word)) for word in words) * 10 >= len(words) > 0


def _parallel(path: Path, source: str, target: str) -> Pairs:
    """The pairs of two files of lines, ``<path>.<source>`` and ``<path>.<target>``."""
    paths = [path.with_name(f"{path.name}.{language}") for language in (source, target)]
    lines = [sources.lines(path) for path in paths]
    if len(lines[0]) != len(lines[1]):
        raise ValueError(
            f"{paths[0]} has {len(lines[0]):,} lines and {paths[1].name} {len(lines[1]):,}, so they are no parallel "
            "text; unpack both again"
        )
    return list(zip(*lines, strict=True))


def _jsonl(path: Path, source: str, target: str, **only: str) -> Pairs:
    """The pairs of ``<path>.jsonl``, of those lines whose fields are those of ``only``."""
    rows = sources.json_lines(path.with_name(f"{path.name}.jsonl"), {source: str, target: str})
    return [(row[source], row[target]) for row in rows if all(row.get(name) == value for name, value in only.items())]


def _hub(name: str, corpus: Corpus, root: str | Path | None) -> dict[str, Pairs]:
    try:
        if not corpus.hub:
            raise OSError(f"{name} is not on the hub")
        splits = sources.from_hub(*corpus.hub)
    except OSError as error:
        raise sources.missing(f"the sequence set {name!r}", corpus.folder, _remedy(corpus), root) from error
    if corpus.within:
        source, target = corpus.fields
        return {part: [(row[source], row[target]) for row in splits[part][corpus.within]] for part in PARTS}
    columns = corpus.columns or corpus.fields
    return {part: list(zip(*(list(splits[part][name]) for name in columns), strict=True)) for part in PARTS}


def _remedy(corpus: Corpus) -> str:
    source, target = corpus.fields
    endings = [f".{source}", f".{target}"] if corpus.lines else [".jsonl"]
    files = ", ".join(file + ending for file in corpus.files for ending in endings)
    content = "" if corpus.lines else f', lines of {{"{source}": ..., "{target}": ...}}'
    return f"{'Go online and run again, or put' if corpus.hub else 'Put'} {files} there{content}."


def _toy(name: str) -> SequenceData:
    path = sources.embedded(f"{name}.jsonl").with_suffix("")
    return _data(name, {part: _jsonl(path, "source", "target", part=part) for part in PARTS}, TOYS[name])


def _stand_in(name: str) -> SequenceData:
    """Embedded sentences, joined to the length that the set's texts have, for a rehearsal."""
    corpus, toy = CORPORA[name], _toy("toy_translation").train
    pools = (" ".join(toy.sources).split(), " ".join(toy.targets).split())
    sides = zip(pools, corpus.words, strict=True)
    columns = [[_window(pool, row, words) for row in range(STAND_IN)] for pool, words in sides]
    data = _data(name, dict.fromkeys(PARTS, list(zip(*columns, strict=True))), corpus.metric)
    planned = zip(PARTS, corpus.rows, strict=True)
    return replace(data, **{part: replace(getattr(data, part), stands_for=rows) for part, rows in planned})


def _window(pool: list[str], row: int, words: int) -> str:
    """``words`` words from another place for every row; the pool comes round again."""
    return " ".join(pool[(row * words + k) % len(pool)] for k in range(words))


# --- a tokenizer for models from scratch -----------------------------------------------------------------------


def train_subwords(texts: Sequence[str], vocab_size: int = 2000, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most ``vocab_size`` tokens over ``texts``: give sources and targets for a joint vocabulary.

    ``[PAD]``, ``[BOS]``, ``[EOS]`` and ``[UNK]`` are 0 to 3. Punctuation stands alone, a text ends in ``[EOS]``, and
    decoding gives back the text (lower-cased unless ``lowercase=False``), where all its characters are known. Train it on
    the training part only. Source: Sennrich et al. (2016), *Neural Machine Translation of Rare Words with Subword Units*.

    Raises:
        ValueError: ``vocab_size`` leaves no room beside the special tokens and the single characters.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    words = Tokenizer(models.BPE(unk_token="[UNK]"))
    spaces = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    words.normalizer = normalizers.Sequence([*spaces, *([normalizers.Lowercase()] if lowercase else [])])
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    words.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    words.train_from_iterator(texts, trainer)
    if words.get_vocab_size() > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; the special tokens and characters alone are {words.get_vocab_size()}"
        )
    if scale.rehearsing():  # the few texts have few words; models shall have the size that they will have
        words.add_tokens([f"[UNUSED{number}]" for number in range(words.get_vocab_size(), vocab_size)])
    words.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", words.token_to_id("[EOS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )
