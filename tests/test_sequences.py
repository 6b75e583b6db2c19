"""Sequence sets: files as they are, labels and prefixes in closed form, batches, subwords, the embedded corpora."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import make_toy_acts
import make_toy_sequences
import pytest
import torch
from corpora import write

import kdlib as kd
from kdlib.data.rows import FIRST_ID, Ragged
from kdlib.data.text import CORPORA, PARTS, SequenceSet, _left_out

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu".split()
PAD, BOS, EOS, UNK = range(4)


def toy(n=60) -> SequenceSet:
    g = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, 12, (n, 2), generator=g).tolist()
    return SequenceSet(
        [" ".join(WORDS[:a]) for a, _ in lengths],
        [" ".join(WORDS[-b:]) for _, b in lengths],
        torch.arange(n) + 7,
        "toy",
    )


@pytest.fixture(scope="module")
def tokenizer():
    """Every word is one token."""
    return kd.data.train_subwords([" ".join(WORDS)] * 9, 200)


SEQUENCES = {name: corpus for name, corpus in CORPORA.items() if corpus.metric in ("bleu", "rouge1")}


def write_parts(root: Path, name: str, sides: dict[str, str] | str) -> None:
    """The same content for every part: of parallel files by ending, or of JSON lines."""
    for (file,) in CORPORA[name].files.values():
        for ending, content in (sides if isinstance(sides, dict) else {"": sides}).items():
            write(root / (f"{file}.{ending}" if ending else file), content)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, source", [("multi30k", "de"), ("iwslt14", "de"), ("wmt16", "en")])
def test_parallel_lines(root, name, source):
    target = "en" if source == "de" else "de"
    write_parts(root, name, {source: "\ufeffein  Haus\nzwei\u2028drei\x85 \n", target: "a house\nb\n"})
    data = kd.data.text(name)
    assert data.train.sources == ["ein Haus", "zwei drei"] and data.train.targets == ["a house", "b"]
    assert data.metric == "bleu" and data.name == name and data.test.name == f"{name}/test"
    assert data.train.ids.tolist() == [0, 1] and data.test.ids[0] == FIRST_ID["test"]


def test_a_pair_with_an_empty_side_is_left_out_and_ids_count_on(root):
    write_parts(root, "multi30k", {"de": "eins\n\ndrei\n \n", "en": "one\ntwo\nthree\nfour\n"})
    train = kd.data.text("multi30k").train
    assert train.sources == ["eins", "drei"] and train.targets == ["one", "three"] and train.ids.tolist() == [0, 2]


def test_files_that_are_not_parallel_are_told(root):
    write_parts(root, "multi30k", {"de": "eins\nzwei\n", "en": "one\n"})
    with pytest.raises(ValueError, match=r"multi30k/train\.\{de,en\} are not parallel: 2 and 1 lines"):
        kd.data.text("multi30k")
    (root / "multi30k/train.en").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.en is missing"):
        kd.data.text("multi30k")


@pytest.mark.parametrize("name", ["aeslc", "cnn_dm"])
def test_json_lines(root, name):
    source, target = CORPORA[name].columns
    rows = [{source: "a long\n\ntext", target: "short", "more": 1}, {source: "b", target: "c"}]
    write_parts(root, name, "".join(json.dumps(row) + "\n" for row in rows))
    data = kd.data.text(name)
    assert data.train.sources == ["a long text", "b"] and data.test.targets == ["short", "c"]
    assert data.metric == "rouge1"


@pytest.mark.parametrize("line", ['{"email": "x"}', "not json", '["x", "y"]', '{"email": "x", "subject": null}'])
def test_a_line_that_cannot_be_read_is_named(root, line):
    write_parts(root, "aeslc", '{"email": "x", "subject": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2 (is not a JSON object|lacks one of email, subject)"):
        kd.data.text("aeslc")


def test_mails_in_their_transfer_encoding_are_left_out(root):
    junk = "FERC Proposes New Rules=20 Dow=20 Jones =09=09 Energy"
    clean = "a table of x=10 and " + "many plain words " * 5
    assert [_left_out("aeslc/train", mail) for mail in (junk, clean, "", "x = 20, y =a0")] == [
        True,
        False,
        False,
        False,
    ]
    assert not _left_out("cnn_dm/train", junk), "another set's texts are what they are"
    rows = "".join(json.dumps({"email": mail, "subject": "s"}) + "\n" for mail in ("hello", junk, "bye"))
    write_parts(root, "aeslc", rows)
    assert kd.data.text("aeslc").train.ids.tolist() == [0, 2]
    write_parts(root, "aeslc", json.dumps({"email": junk, "subject": "s"}))
    with pytest.raises(ValueError, match="aeslc/train has no usable pair"):
        kd.data.text("aeslc")


def test_an_unknown_set_is_told():
    with pytest.raises(ValueError, match="no text set is called 'wmt14'; there are toy_reviews"):
        kd.data.text("wmt14")


# --- the hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, corpus in SEQUENCES.items() if corpus.hub])
def test_the_hubs_columns(root, monkeypatch, name):
    """A real ``datasets`` object of the hub's columns, given for the hub's answer."""
    import datasets

    corpus = CORPORA[name]
    names = {"multi30k": ("de", "en"), "aeslc": ("email_body", "subject_line"), "cnn_dm": ("article", "highlights")}
    row = dict(zip(names.get(name, corpus.columns), ("read this", "write"), strict=True))
    rows = [{"translation": row} if name in ("iwslt14", "wmt16") else {**row, "id": "x"}] * 2
    asked = []

    def load(*given, **settings):
        asked.append((given, settings))
        return datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part in PARTS})

    monkeypatch.setattr("datasets.load_dataset", load)
    data = kd.data.text(name)
    assert data.train.sources == ["read this"] * 2 and data.validation.targets == ["write"] * 2
    hub = {
        "multi30k": ("bentrevett/multi30k", None, None),
        "iwslt14": ("bbaaaa/iwslt14-de-en", None, "refs/convert/parquet"),
        "wmt16": ("wmt/wmt16", "de-en", None),
        "aeslc": ("Yale-LILY/aeslc", None, None),
        "cnn_dm": ("abisee/cnn_dailymail", "3.0.0", None),
    }
    assert [(*given, settings["revision"]) for given, settings in asked] == [hub[name]]


@pytest.mark.parametrize("name", ["multi30k", "aeslc"])
def test_what_is_not_at_hand_has_a_remedy(root, monkeypatch, name):
    def load(*names, **settings):
        raise ConnectionError("not in the cache")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(FileNotFoundError, match="Go online and run again, or put the files there") as error:
        kd.data.text(name)
    for part in (str(root), *sum(CORPORA[name].files.values(), []), *CORPORA[name].columns, "KDLIB_SCALE=smoke"):
        assert part in str(error.value)


# --- sets ----------------------------------------------------------------------------------------------------------


def test_draws_keep_pairs_together():
    data = toy()
    rest, held_out = data.split(12, seed=3)
    assert len(held_out) == 12 and sorted([*rest.ids.tolist(), *held_out.ids.tolist()]) == data.ids.tolist()
    for part in (held_out, data.sample(20, seed=1), data.take(torch.tensor([5, 0]))):
        for number, source, target in zip(part.ids.tolist(), part.sources, part.targets, strict=True):
            assert (source, target) == (data.sources[number - 7], data.targets[number - 7])
    with pytest.raises(ValueError, match="61 examples asked for"):
        data.sample(61, seed=0)


def test_texts_that_are_none_and_lengths_that_differ_are_told():
    for sources, targets, told in [
        (["a", "b"], ["c", None], "toy, row 1: None is no text"),
        (["a", 3.5], ["c", "d"], "toy, row 1: 3.5 is no text"),
        (["a"], ["c", "d"], "toy has 1 sources, 2 targets, 2 ids"),
    ]:
        with pytest.raises(ValueError, match=told):
            SequenceSet(sources, targets, torch.arange(2), "toy")


def test_a_text_changed_in_place_is_seen():
    data = toy()
    before = data.fingerprint
    data.targets[3] = "mended"
    assert data.fingerprint != before


def test_other_targets_for_the_same_sources():
    data = toy()
    other = data.with_targets(["", *data.targets[1:]])
    assert other.sources == data.sources and torch.equal(other.ids, data.ids) and other.targets[0] == ""
    assert other.name == "toy-rewritten" and other.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match="60 sources, 3 targets"):
        data.with_targets(["a"] * 3)


def test_fingerprints_see_each_side_the_order_and_the_cut(tokenizer):
    data = toy()
    turned = SequenceSet(data.targets, data.sources, data.ids, "toy")
    assert len({d.fingerprint for d in (data, turned, data.take(torch.arange(60).flip(0)))}) == 3
    wide = data.encode(tokenizer, max_source=20, max_target=20)
    other = [data.encode(tokenizer, max_source=4, max_target=20), data.encode(tokenizer, max_source=20, max_target=4)]
    assert len({t.fingerprint for t in (wide, *other)}) == 3
    assert wide.fingerprint == toy().encode(tokenizer, max_source=20, max_target=20).fingerprint


# --- tokens and batches --------------------------------------------------------------------------------------------


def test_labels_and_prefixes_in_closed_form(tokenizer):
    a, b, c = tokenizer.convert_tokens_to_ids(["▁alpha", "▁beta", "▁gamma"])
    data = SequenceSet(["alpha beta gamma", "beta"], ["gamma", "alpha beta"], torch.tensor([3, 4]), "two")
    (batch,) = data.encode(tokenizer, max_source=9, max_target=9).view_batches()
    assert batch["input_ids"].tolist() == [[a, b, c, EOS], [b, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[c, EOS, -100], [a, b, EOS]]
    assert batch["decoder_input_ids"].tolist() == [[BOS, c, PAD], [BOS, a, b]]
    assert batch["id"].tolist() == [3, 4] and all(value.dtype == torch.int64 for value in batch.values())


def test_a_cut_target_has_no_end_and_a_cut_source_has(tokenizer):
    a, b, c = tokenizer.convert_tokens_to_ids(["▁alpha", "▁beta", "▁gamma"])
    data = SequenceSet(["alpha beta gamma"] * 2, ["alpha beta gamma", "alpha beta"], torch.arange(2), "two")
    (batch,) = data.encode(tokenizer, max_source=3, max_target=3).view_batches()
    assert batch["input_ids"].tolist() == [[a, b, EOS]] * 2
    assert batch["labels"].tolist() == [[a, b, c], [a, b, EOS]]
    assert batch["decoder_input_ids"].tolist() == [[BOS, a, b]] * 2
    with pytest.raises(ValueError, match="max_target is 0"):
        data.encode(tokenizer, max_source=3, max_target=0)


def test_an_empty_target_is_an_end(tokenizer):
    data = toy().with_targets([""] * 60).encode(tokenizer, max_source=9, max_target=9)
    batch = next(data.view_batches(0, 4))
    assert batch["labels"].tolist() == [[EOS]] * 4 and batch["decoder_input_ids"].tolist() == [[BOS]] * 4


@pytest.mark.parametrize("by_length", [True, False])
def test_every_row_comes_once_an_epoch_with_its_own_target(tokenizer, by_length):
    data = toy()
    tokens, seen = data.encode(tokenizer, max_source=20, max_target=20), []
    for batch in tokens.batches(8, seed=1, by_length=by_length).epoch(2):
        rows = (batch["id"] - 7).tolist()
        seen += rows
        sources = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        targets = tokenizer.batch_decode(batch["labels"].clamp(min=0), skip_special_tokens=True)
        assert sources == [data.sources[r] for r in rows] and targets == [data.targets[r] for r in rows]
        real = batch["labels"] >= 0
        assert torch.equal(batch["decoder_input_ids"][:, 1:][real[:, 1:]], batch["labels"][:, :-1][real[:, 1:]])
        assert (batch["decoder_input_ids"][:, 0] == BOS).all() and (batch["decoder_input_ids"][~real] == PAD).all()
    assert sorted(seen) == list(range(60))


def test_batches_are_a_function_of_seed_and_epoch_and_start_anywhere(tokenizer):
    tokens = toy().encode(tokenizer, max_source=20, max_target=20)
    batches = tokens.batches(8, seed=3)
    whole = [b["id"].tolist() for b in batches.epoch(4)]
    for start in range(len(batches) + 1):
        torch.rand(3)
        assert [b["id"].tolist() for b in batches.epoch(4, start)] == whole[start:]
    assert [b["id"].tolist() for b in batches.epoch(5)] != whole
    assert len(tokens.batches(7)) == 9
    in_order = [i for b in tokens.batches(8, shuffle=False, by_length=False).epoch(0) for i in b["id"].tolist()]
    assert in_order == tokens.ids.tolist()


def test_batches_by_length_pad_little(tokenizer):
    tokens = toy(600).encode(tokenizer, max_source=20, max_target=20)

    def padding(batches):
        return sum(int((1 - b["attention_mask"]).sum()) for b in batches.epoch(0))

    assert padding(tokens.batches(20)) < padding(tokens.batches(20, by_length=False)) / 5


def test_draws_of_tokens_are_the_tokens_of_draws(tokenizer):
    limits = {"max_source": 6, "max_target": 5}
    tokens = toy().encode(tokenizer, **limits)
    assert tokens.lengths.max() == 6 and tokens.target_lengths.max() == 5
    rest, held_out = tokens.split(12, seed=0)
    same_rest, same = (part.encode(tokenizer, **limits) for part in toy().split(12, seed=0))
    assert held_out.fingerprint == same.fingerprint and rest.fingerprint == same_rest.fingerprint
    assert tokens.sample(9, 2).fingerprint == toy().sample(9, 2).encode(tokenizer, **limits).fingerprint
    with pytest.raises(ValueError, match="view is 1"):
        next(tokens.view_batches(1))


def test_a_tokenizer_needs_three_special_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"PAD, BOS and EOS are the tokens \(0, None, None\)"):
        toy().encode(kd.data.train_tokenizer(WORDS, 40), max_source=9, max_target=9)
    words = kd.data.train_tokenizer(WORDS, 40)
    words.bos_token = words.eos_token = "[SEP]"
    with pytest.raises(ValueError, match="all three must be there and differ"):
        toy().encode(words, max_source=9, max_target=9)


def test_ragged_rows():
    rows = Ragged.of([[1, 2, 3], [], [4]])
    assert rows.take(torch.tensor([2, 0])).values.tolist() == [4, 1, 2, 3]
    padded, real = rows.padded(torch.tensor([0, 1, 2]), -1)
    assert padded.tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]] and real.sum(1).tolist() == [3, 0, 1]
    assert rows.take(torch.tensor([], dtype=torch.int64)).values.tolist() == [] == Ragged.of([]).lengths.tolist()


# --- subwords ------------------------------------------------------------------------------------------------------


def test_subwords_come_back_as_clean_text():
    texts = ["Ein Mann, der (laut) lacht.", "Zwei Männer: \u201eHallo!\u201c", "it's a dog's ball - no?"]
    for lowercase in (True, False):
        tokenizer = kd.data.train_subwords(texts * 3, 90, lowercase=lowercase)
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert ids[-1] == EOS and UNK not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == (text.lower() if lowercase else text)
    assert tokenizer.decode(tokenizer("  Zwei \n Männer ")["input_ids"], skip_special_tokens=True) == "Zwei Männer"


def test_special_tokens_of_subwords(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (PAD, BOS, EOS, UNK)
    assert tokenizer("alpha 7")["input_ids"][-2:] == [UNK, EOS]


def test_a_vocabulary_has_at_most_the_size_asked_for(monkeypatch):
    texts = ["abc abd ab", "abc abc"]
    assert len(kd.data.train_subwords(texts, 12)) <= 12
    with pytest.raises(ValueError, match="vocab_size is 8; the special tokens and characters alone are 9"):
        kd.data.train_subwords(texts, 8)
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    tokenizer = kd.data.train_subwords(texts, 300)
    assert len(tokenizer) == 300 and tokenizer.decode(tokenizer("abd")["input_ids"], skip_special_tokens=True) == "abd"


# --- rehearsal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_set_has_a_stand_in_for_a_rehearsal(root, monkeypatch, tokenizer, name):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    data = kd.data.text(name)
    assert [len(getattr(data, part)) for part in PARTS] == [64] * 3 and len(set(data.train.sources)) == 64
    assert (data.train.planned, data.validation.planned, data.test.planned) == (CORPORA[name].rows, 1000, 1000)
    assert len(data.test.sources[0].split()) == CORPORA[name].words[0] and data.metric in ("bleu", "rouge1")
    train, held_out = data.train.encode(tokenizer, max_source=60, max_target=60).split(1_000, seed=0)
    assert held_out.planned == 1_000 and len(train) + len(held_out) == 64
    if name != "wmt16":  # an epoch's order of millions takes its time
        batches = train.batches(32)
        assert len(batches) == -(-train.planned // 32) and len(next(batches.epoch(0))["id"]) == 32


# --- the embedded corpora ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rows", [("toy_translation", [2000, 200, 300]), ("toy_headlines", [800, 100, 150])])
def test_the_corpora_are_what_their_generator_makes(root, name, rows):
    file = make_toy_sequences.FOLDER / f"{name}.jsonl"
    assert file.read_text(encoding="utf-8") == make_toy_sequences.lines(name) != make_toy_sequences.lines(name, seed=1)
    assert file.stat().st_size <= 400_000
    data = kd.data.text(name)
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == rows and data.test.ids[0] == FIRST_ID["test"]
    sources = [source for part in parts for source in part.sources]
    assert len(set(sources)) == len(sources), "a source of one part stands in another, or twice"


def test_the_language_is_long_enough_for_errors_to_compound(root):
    lengths = [len(source.split()) for source in kd.data.text("toy_translation").train.sources]
    assert min(lengths) >= 4 and max(lengths) == 25 and sum(lengths) / len(lengths) > 12


def test_one_source_word_has_several_translations_and_one_sense_in_each_context():
    """``pelo`` is a letter when read and a leaf when dropped: its verb decides."""
    rows = make_toy_sequences.pairs("toy_translation")
    senses = defaultdict(Counter)
    for row in rows:
        for of, verbs in make_toy_sequences.VERBS.items():
            for verb in verbs:
                if re.search(rf"\bpelo\b[a-z ]* wo {verb}\b", row["source"]) and row["source"].count(" wo ") == 1:
                    senses[of] += Counter(re.findall(r"\b(letters?|leaf|leaves)\b", row["target"]))
    assert senses["mind"] and set(senses["mind"]) <= {"letter", "letters"}
    assert senses["hand"] and set(senses["hand"]) <= {"leaf", "leaves"}
    houses = Counter(word for row in rows if "kasa" in row["source"] for word in row["target"].split())
    assert houses["house"] + houses["houses"] > houses["home"] + houses["homes"] > 50


def test_verbs_stand_last_in_the_source_and_agree_at_a_distance_in_the_target():
    """In front of a fronted subject too: ``today sees the dog ...``, ``today see the dogs ...``."""
    plain = [row for row in make_toy_sequences.pairs("toy_translation") if row["source"].count(" ga ") == 1]
    assert all(re.search(r" wo [a-z]+( ri| so)?\.$", row["source"]) for row in plain)
    verbs = "|".join(
        word for of in make_toy_sequences.VERBS.values() for words in of.values() for word in words.split()
    )
    present = [row for row in plain if row["source"].split()[0] in make_toy_sequences.TIMES["present"]]
    inverted = 0
    for row in present:
        subject, _ = row["source"].split(" ga ")
        plural = "mu" in subject.split(" ke ")[-1].split("apu ")[-1].split("kon ")[-1].split("subi ")[-1].split()
        if match := re.match(rf"(now|today|always|ever) ({verbs}|carries|chase)(s?) ", row["target"]):
            inverted += 1
            assert (not match[3] and match[2] != "carries") == plural, row
    assert 0.4 < inverted / len(present) < 0.8, "word order is a choice of the translator"


def test_a_headline_tells_the_one_past_sentence():
    past = set(make_toy_sequences.PAST.values()) | {"noticed"}
    for row in make_toy_sequences.pairs("toy_headlines"):
        assert 3 <= len(row["target"].split()) <= 4
        sentences = [s for s in row["source"].split(". ") if row["target"].split()[-1] in s.rstrip(".")]
        assert sentences, row
        assert not past - {"read", "found"} & set(row["target"].split())


@pytest.mark.parametrize("domain", ["cinema", "trains", "weather"])
def test_the_toy_acts_are_what_their_generator_writes(domain):
    file = make_toy_acts.FOLDER / f"toy_{domain}.jsonl"
    assert file.read_text(encoding="utf-8") == make_toy_acts.lines(domain) != make_toy_acts.lines(domain, seed=1)
    data = kd.data.text(f"toy_{domain}")
    kinds = [
        {source.split("(")[0] + str(re.findall(r"(\w+)=", source)) for source in part.sources}
        for part in (data.train, data.validation, data.test)
    ]
    assert [len(acts) for acts in kinds] == [50, 10, 15] and len(set.union(*kinds)) == 75


@pytest.mark.parametrize("domain", ["restaurant", "hotel", "tv", "laptop"])
def test_rnnlg_is_read_from_its_folder(domain, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"rnnlg_{domain}"):
        kd.data.text(f"rnnlg_{domain}")
    folder = tmp_path / "nlg" / "rnnlg" / domain
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        row = {"da": "inform(name='a b')", "ref": f"a b  is {part}", "baseline": "no"}
        (folder / f"{part}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = kd.data.text(f"rnnlg_{domain}")
    assert (data.train.sources, data.validation.targets) == (["inform(name='a b')"], ["a b is valid"])
