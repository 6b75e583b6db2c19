"""Text sets: GLUE's files as they are, tokens, batches by length, the embedded corpus, errors that name the line."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path

import make_toy_requests
import make_toy_reviews
import numpy as np
import pytest
import torch
from corpora import write
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import kdlib as kd
from kdlib.data.rows import FIRST_ID
from kdlib.data.text import CORPORA, TextSet

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu".split()


def toy(n=60, pairs=False) -> TextSet:
    g = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, 12, (n, 2), generator=g).tolist()
    texts = [(" ".join(WORDS[:a]), " ".join(WORDS[-b:])) for a, b in lengths]
    return TextSet(
        texts if pairs else [a for a, _ in texts],
        torch.arange(n) % 3,
        torch.arange(n) + 7,
        ["a", "b", "c"],
        "toy",
    )


@pytest.fixture(scope="module")
def tokenizer():
    return kd.data.train_tokenizer(WORDS * 2, 40)


# --- GLUE's files ----------------------------------------------------------------------------------------------


def test_sst2_and_ids(root):
    write(root / "glue/SST-2/train.tsv", 'sentence\tlabel\nthe " best \t1\na \x85 odd\rline\t0\nbad " \t0\n')
    write(root / "glue/SST-2/dev.tsv", "sentence\tlabel\nfine\t1\n")
    data = kd.data.text("sst2")
    assert data.train.texts == ['the " best', "a \x85 odd\rline", 'bad "'] and data.train.labels.tolist() == [
        1,
        0,
        0,
    ]
    assert data.train.ids.tolist() == [0, 1, 2] and data.validation.ids.tolist() == [FIRST_ID["validation"]]
    assert data.test is None and data.metric == "accuracy" and data.classes == ["negative", "positive"]


def test_mrpc_has_a_byte_order_mark_and_lone_quotes(root):
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    write(root / "glue/MRPC/train.tsv", head + '1\t1\t2\t"He said\tHe "said".\r\n0\t3\t4\tx\t"y\r\n')
    write(root / "glue/MRPC/dev.tsv", head + "0\t5\t6\tu\tv\r\n")
    data = kd.data.text("mrpc")
    assert data.train.texts == [('"He said', 'He "said".'), ("x", '"y')] and data.train.pairs
    assert data.train.labels.tolist() == [1, 0] and data.metric == "f1"


@pytest.mark.parametrize(
    "names",
    [("in_domain_train.tsv", ("in_domain_dev.tsv", "out_of_domain_dev.tsv"))],
)
def test_cola_has_no_header(root, names):
    write(root / "glue/CoLA" / names[0], "gj04\t1\t\tHe won't.\ngj04\t0\t*\tHe not.\n")
    for number, name in enumerate(names[1]):
        write(root / "glue/CoLA" / name, f"cj99\t{number}\t\tSentence {number}.\n")
    data = kd.data.text("cola")
    assert data.train.texts == ["He won't.", "He not."] and data.train.labels.tolist() == [1, 0]
    assert data.validation.texts == [f"Sentence {n}." for n in range(len(names[1]))] and data.metric == "mcc"


def test_rte_labels_are_names_in_the_hubs_order(root):
    head = "index\tsentence1\tsentence2\tlabel\n"
    write(root / "glue/RTE/train.tsv", head + "0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n")
    write(root / "glue/RTE/dev.tsv", head + "0\ta\tb\tentailment\n")
    assert kd.data.text("rte").train.labels.tolist() == [1, 0]


def test_stsb_scores_and_stratified_draws(root):
    rows = "".join(f"{n % 6}.{n % 2}00\tfirst {n}\tsecond {n}\n" for n in range(60))
    for part in ("train", "dev"):
        write(root / f"glue/STS-B/{part}.tsv", "score\tsentence1\tsentence2\n" + rows)
    data = kd.data.text("stsb")
    assert data.train.labels.dtype == torch.float32 and data.classes == [] and data.metric == "pearson"
    assert Counter(data.train.sample(12, 0).labels.round().tolist()) == dict.fromkeys(map(float, range(6)), 2)


@pytest.mark.parametrize(
    "line, told",
    [
        ("only one column\n", r"SST-2/train\.tsv, line 3 lacks one of sentence, label"),
        ("text\t2\n", "sst2/train, row 1: the label '2' is none of negative, positive"),
        ("text\tgood\n", "sst2/train, row 1: the label 'good'"),
    ],
)
def test_a_broken_line_is_named(root, line, told):
    write(root / "glue/SST-2/train.tsv", "sentence\tlabel\nfine\t1\n" + line)
    write(root / "glue/SST-2/dev.tsv", "sentence\tlabel\nfine\t1\n")
    with pytest.raises(ValueError, match=told):
        kd.data.text("sst2")


# --- jsonl -----------------------------------------------------------------------------------------------------


def test_jsonl_sets_get_a_validation_part_from_the_training_part(root):
    rows = [json.dumps({"label": "ABC"[n % 3], "text": f"question {n}"}) for n in range(60)]
    write(root / "textcls/trec/train.jsonl", "\n".join(rows) + "\n")
    write(root / "textcls/trec/test.jsonl", "\n".join(rows[:5]) + "\n")
    data = kd.data.text("trec")
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 5) and data.classes == [
        "A",
        "B",
        "C",
    ]
    assert not set(data.train.ids.tolist()) & set(data.validation.ids.tolist())
    assert all(
        text == f"question {i}" for text, i in zip(data.validation.texts, data.validation.ids.tolist(), strict=True)
    )
    write(root / "textcls/trec/test.jsonl", '{"label": "Z", "text": "x"}\n')
    with pytest.raises(ValueError, match="trec/test, row 0: the label 'Z' is none of A, B, C"):
        kd.data.text("trec")
    write(root / "textcls/trec/train.jsonl", rows[0] + '\n{"text": "no label"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2"):
        kd.data.text("trec")


# --- the hub ---------------------------------------------------------------------------------------------------


def test_the_hubs_columns_and_labels(root, monkeypatch):
    import datasets

    splits = {
        "train": {"premise": ["p"], "hypothesis": ["h"], "label": [2]},
        "validation_matched": {"premise": ["q"], "hypothesis": ["i"], "label": [0]},
        "validation_mismatched": {"premise": ["r"], "hypothesis": ["j"], "label": [1]},
    }
    splits = datasets.DatasetDict({part: datasets.Dataset.from_dict(columns) for part, columns in splits.items()})
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names, revision: asked.append(names) or splits)
    data = kd.data.text("mnli")
    assert data.train.texts == [("p", "h")] and data.train.labels.tolist() == [2] and data.test.texts == [("r", "j")]
    assert data.classes == ["entailment", "neutral", "contradiction"] and asked == [("nyu-mll/glue", "mnli")]


@pytest.mark.parametrize("name", ["qnli", "qqp", "sst2"])
def test_without_a_network_the_error_has_a_remedy(root, monkeypatch, name):
    def load(*names, **settings):
        raise ConnectionError("not in the cache")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(FileNotFoundError, match="Go online") as error:
        kd.data.text(name)
    assert "KDLIB_SCALE=smoke" in str(error.value) and str(root) in str(error.value)


def test_an_unknown_set_is_told():
    with pytest.raises(ValueError, match="no text set is called 'sst3'"):
        kd.data.text("sst3")


def test_a_missing_jsonl_set_is_told(root):
    with pytest.raises(FileNotFoundError, match=r"clinc150/val\.jsonl.*Put the files there"):
        kd.data.text("clinc150")


@pytest.mark.parametrize(
    "labels, classes",
    [([0, 1, 2], ["0", "1", "2"]), ([1, 2, 3, 4], ["1", "2", "3", "4"]), ([0, 1], ["negative", "positive"]),
     ([2, 10, 1], ["1", "2", "10"]), ([True, False], ["negative", "positive"])],
)  # fmt: skip
def test_labels_may_be_numbers(root, labels, classes):
    rows = [{"label": labels[n % len(labels)], "text": f"question {n}"} for n in range(30)]
    for part in ("train", "test"):
        write(root / f"textcls/trec/{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = kd.data.text("trec")
    assert data.classes == classes
    named = [classes.index(str(row["label"])) if str(row["label"]) in classes else int(row["label"]) for row in rows]
    assert data.test.labels.tolist() == named


def test_a_score_that_is_not_finite_and_a_missing_text_are_named(root):
    write(root / "glue/STS-B/train.tsv", "score\tsentence1\tsentence2\n1.0\ta\tb\nnan\tc\td\n")
    write(root / "glue/STS-B/dev.tsv", "score\tsentence1\tsentence2\n1.0\ta\tb\n")
    with pytest.raises(ValueError, match="stsb/train, row 1: the label is nan; it must be finite"):
        kd.data.text("stsb")
    write(root / "textcls/trec/train.jsonl", '{"label": "A", "text": "x"}\n{"label": "A", "text": null}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2 lacks one of text, label"):
        kd.data.text("trec")


# --- your own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, labels, told",
    [
        (["a", "b", None], [0, 1, 0], "own, row 2: None is no text"),
        (["a", ("b", "c"), "d"], [0, 1, 0], r"own, row 1: \('b', 'c'\) is no text"),
        ([("a", "b"), ("c", 5), ("d", "e")], [0, 1, 0], "own, row 1: 5 is no text"),
        ([("a", "b"), "c", ("d", "e")], [0, 1, 0], "own, row 1: 'c' is no pair"),
        (["a", "b"], [0, 1, 0], "own has 2 texts, 3 labels, 2 ids"),
        (["a", "b", "c"], [0, 1], "own has 3 texts, 2 labels, 3 ids"),
        (["a", "b", "c"], [0, 1, 2], "own, row 2: the label is 2; it must be 0 to 1"),
        (["a", "b", "c"], ["x", "y", "x"], r"labels must be numbers.*classes\.index"),
        (["a", "b", "c"], [True, False, True], "labels must be numbers"),
        (["a", "b", "c"], [0, None, 1], "labels must be numbers"),
    ],
)
def test_a_set_that_is_none_is_refused(texts, labels, told):
    with pytest.raises(ValueError, match=told):
        TextSet(texts, labels, torch.arange(len(texts)), ["x", "y"], "own")


def test_labels_as_lists_and_arrays_are_taken():
    for labels in (
        [0, 1, 0],
        np.array([0, 1, 0]),
        np.array([0, 1, 0], dtype=np.int32),
        torch.tensor([0, 1, 0]).short(),
    ):
        data = TextSet(["a", "b", "c"], labels, [3, 4, 5], ["x", "y"], "own")
        assert data.labels.dtype == data.ids.dtype == torch.int64 and data.labels.tolist() == [0, 1, 0]
        assert data.take(torch.tensor([2])).ids.tolist() == [5]
    scores = TextSet(["a", "b"], np.array([0.5, 4.0]), [0, 1], [], "own").labels
    assert scores.dtype == torch.float32 and scores.tolist() == [0.5, 4.0]
    with pytest.raises(ValueError, match="row 1: the label is nan"):
        TextSet(["a", "b"], [0.5, float("nan")], [0, 1], [], "own")


def test_changes_in_place_are_seen(tokenizer):
    data = toy()
    tokens = data.encode(tokenizer, 64)
    batches, prints = tokens.batches(8), set()
    for change in (
        lambda: None,
        lambda: data.labels.add_(1).remainder_(3),
        lambda: data.texts.__setitem__(0, "mended"),
    ):
        change()
        prints |= {data.fingerprint, tokens.fingerprint, batches.fingerprint}
    tokens.tokens.values[0] += 1
    assert len(prints | {tokens.fingerprint}) == 10


def test_a_tokenizer_without_padding_is_told_at_once(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer\.pad_token = "):
        toy().encode(bare)


def test_marks_make_other_words():
    """Vowel signs and accents: without them these pairs are the same string."""
    pairs = [("कल", "कुल"), ("schon", "schön"), ("все", "всё"), ("ano", "año"), ("සිත", "සැත")]
    words = kd.data.train_tokenizer([" ".join(pair) for pair in pairs], 40)
    for one, other in pairs:
        ids = words([one, other], add_special_tokens=False)["input_ids"]
        assert ids[0] != ids[1] and all(len(row) == 1 and row[0] != words.unk_token_id for row in ids), (one, other)
    assert words("schön")["input_ids"] == words("SCHÖN")["input_ids"], "one letter, however it is written"


# --- tokens and batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs, kinds", [(False, False), (True, False), (True, True)])
def test_a_batch_is_what_the_tokenizer_makes_of_its_texts(tokenizer, pairs, kinds):
    data, tokenizer = toy(pairs=pairs), copy.deepcopy(tokenizer)
    if kinds:
        tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    tokens = data.encode(tokenizer, 64)
    seen = []
    for batch in tokens.batches(8, seed=1).epoch(2):
        rows = (batch["id"] - 7).tolist()
        seen += rows
        texts = [data.texts[row] for row in rows]
        expected = tokenizer(*zip(*texts, strict=True), padding=True, return_tensors="pt") if pairs else tokenizer(
            texts, padding=True, return_tensors="pt")  # fmt: skip
        for key in ("input_ids", "attention_mask", *(["token_type_ids"] if kinds else [])):
            assert torch.equal(batch[key], expected[key]), key
        assert ("token_type_ids" in batch) == kinds
        assert torch.equal(batch["y"], data.labels[torch.tensor(rows)]) and batch["input_ids"].dtype == torch.int64
    assert sorted(seen) == list(range(60))


def test_text_that_is_too_long_is_cut(tokenizer):
    tokens = toy().encode(tokenizer, 5)
    assert tokens.lengths.max() == 5 and len(tokens.tokens.values) == tokens.lengths.sum()


def test_text_batches_are_a_function_of_seed_and_epoch_and_start_anywhere(tokenizer):
    batches = toy().encode(tokenizer, 64).batches(8, seed=3)
    whole = list(batches.epoch(4))
    for start in range(len(batches) + 1):
        torch.rand(3)
        rest = list(batches.epoch(4, start))
        assert [b["id"].tolist() for b in rest] == [b["id"].tolist() for b in whole[start:]]
    other = [b["id"].tolist() for b in batches.epoch(5)]
    assert other != [b["id"].tolist() for b in whole]
    assert batches.fingerprint != toy().encode(tokenizer, 64).batches(8, seed=4).fingerprint


def test_batches_by_length_pad_little_and_are_shuffled(tokenizer):
    tokens = toy(600).encode(tokenizer, 64)

    def padding(batches):
        return sum(int((1 - b["attention_mask"]).sum()) for b in batches.epoch(0))

    sorted_, plain = tokens.batches(20), tokens.batches(20, by_length=False)
    assert padding(sorted_) < padding(plain) / 5
    lengths = [b["input_ids"].shape[1] for b in sorted_.epoch(0)]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    assert [len(b["y"]) for b in tokens.batches(70, shuffle=False).epoch(0)] == [70] * 8 + [40]


def test_take_sample_split_and_views_keep_tokens_with_their_ids(tokenizer):
    tokens = toy().encode(tokenizer, 64)
    rest, held_out = tokens.split(12, seed=0)
    assert held_out.labels.bincount().tolist() == [4, 4, 4] and len(rest) == 48
    part = held_out.take(torch.tensor([5, 0]))
    (batch,) = part.view_batches(0)
    texts = [toy().texts[i - 7] for i in batch["id"].tolist()]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    assert part.fingerprint != held_out.fingerprint == tokens.split(12, seed=0)[1].fingerprint
    with pytest.raises(ValueError, match="view is 1"):
        next(part.view_batches(1))
    text_part = toy().split(12, seed=0)[1]
    assert torch.equal(text_part.ids, held_out.ids) and text_part.texts == held_out.source.texts


def test_fingerprints_see_text_and_order(tokenizer):
    data = toy()
    other = TextSet(["alpha beta", *data.texts[1:]], data.labels, data.ids, data.classes, "toy")
    assert len({data.fingerprint, other.fingerprint, data.take(torch.arange(60).flip(0)).fingerprint}) == 3
    assert data.encode(tokenizer, 4).fingerprint != data.encode(tokenizer, 64).fingerprint


def test_the_word_tokenizer(tokenizer):
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == len(WORDS) + 3
    assert tokenizer.convert_ids_to_tokens(tokenizer("Alpha unheard, mu")["input_ids"]) == [
        "alpha",
        "[UNK]",
        "[UNK]",
        "mu",
        "[SEP]",
    ]
    pair = tokenizer("alpha", "beta")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["alpha", "[SEP]", "beta", "[SEP]"]
    assert len(kd.data.train_tokenizer(["a b c d e", ("a", "b")], 5)) == 5
    with pytest.raises(ValueError, match="vocab_size is 3"):
        kd.data.train_tokenizer(["a"], 3)


# --- rehearsal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, c in CORPORA.items() if c.metric not in ("bleu", "rouge1")])
def test_every_set_has_a_stand_in_for_a_rehearsal(root, monkeypatch, tokenizer, name):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    data = kd.data.text(name)
    classes = {"stsb": 0, "mnli": 3, "trec": 6, "clinc150": 150, "clinc_domains": 10, "ag_news": 4}.get(name, 2)
    assert len(data.train) == 64 and len(data.classes) == classes and data.train.planned > 1_300
    assert data.train.pairs == (name in ("mrpc", "rte", "stsb", "qnli", "qqp", "mnli"))
    train, held_out = data.train.encode(tokenizer, 128).split(1_000, seed=0)
    assert held_out.planned == 1_000 and len(train) + len(held_out) == 64
    batches = train.batches(32)
    assert len(batches) == -(-train.planned // 32) and len(next(batches.epoch(0))["y"]) == 32


# --- the embedded corpus -------------------------------------------------------------------------------------------


def test_the_corpus_is_what_its_generator_makes():
    assert make_toy_reviews.FILE.read_text(encoding="utf-8") == make_toy_reviews.lines()
    assert (
        make_toy_reviews.FILE.stat().st_size <= 400_000 and make_toy_reviews.lines(seed=1) != make_toy_reviews.lines()
    )


def test_the_embedded_corpus_loads_without_a_network(root):
    data = kd.data.text("toy_reviews")
    assert [len(p) for p in (data.train, data.validation, data.test)] == [2300, 400, 700]
    assert data.classes == ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
    texts = data.train.texts + data.validation.texts + data.test.texts
    assert len(set(texts)) == len(texts), "a text of one part stands in another, or twice"
    assert data.test.ids[0] == FIRST_ID["test"]


def test_soft_labels_are_soft_where_reviews_are_mixed():
    rows = make_toy_reviews.reviews()
    assert all(sum(row["soft"]) == 100 and len(row["soft"]) == 5 for row in rows)
    mixed = [max(row["soft"]) for row in rows if " but " in row["text"] or "although" in row["text"]]
    plain = [max(row["soft"]) for row in rows if not any(w in row["text"] for w in (" but ", "although", " and "))]
    assert sum(mixed) / len(mixed) < sum(plain) / len(plain) - 8
    # The stars were really drawn from these probabilities: the most likely is right as often as they say.
    right = [row["label"] == 1 + row["soft"].index(max(row["soft"])) for row in rows]
    assert abs(sum(right) / len(rows) - sum(max(row["soft"]) for row in rows) / len(rows) / 100) < 0.025


def test_order_decides_where_the_words_are_the_same():
    (great, good), (awful, bad) = ("the wine was great", 2.0), ("the soup was awful", -2.0)
    for join, first, second, _ in make_toy_reviews.JOINS[1:]:
        one, two = join.format(one=great, two=awful), join.format(one=awful, two=great)
        assert sorted(one.split()) == sorted(two.split())
        stars = [soft.index(max(soft)) for soft in (
            make_toy_reviews.soft_stars(first * good + second * bad, 0.4), make_toy_reviews.soft_stars(first * bad + second * good, 0.4)
        )]  # fmt: skip
        assert abs(stars[0] - stars[1]) >= 2, join


def test_a_bag_of_words_does_not_solve_the_corpus(root):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    data = kd.data.text("toy_reviews")
    best = sum(max(r["soft"]) for r in make_toy_reviews.reviews() if r["part"] == "test") / 70_000
    scores = {}
    for words in (1, 3):
        vectors = CountVectorizer(ngram_range=(1, words))
        model = LogisticRegression(C=0.3, max_iter=1000).fit(vectors.fit_transform(data.train.texts), data.train.labels)
        scores[words] = model.score(vectors.transform(data.test.texts), data.test.labels)
    assert 0.3 < scores[1] < 0.45 and scores[1] < scores[3] < 0.55 and best > 0.7


# --- the embedded requests, and sets of domains ------------------------------------------------------------------------


def test_the_requests_are_what_their_generator_makes():
    assert make_toy_requests.FILE.read_text(encoding="utf-8") == make_toy_requests.lines()
    assert make_toy_requests.lines(seed=1) != make_toy_requests.lines()


def test_intents_and_domains_of_the_requests_share_rows_and_ids():
    intents, domains = kd.data.text("toy_requests"), kd.data.text("toy_domains")
    assert [len(p) for p in (intents.train, intents.validation, intents.test)] == [2160, 360, 540]
    assert len(intents.classes) == 18 and domains.classes == ["bank", "travel", "kitchen", "home", "work", "music"]
    for part in ("train", "validation", "test"):
        one, other = getattr(intents, part), getattr(domains, part)
        assert one.texts == other.texts and torch.equal(one.ids, other.ids)
        names = [intents.classes[y].split(":")[0] for y in one.labels.tolist()]
        assert names == [domains.classes[y] for y in other.labels.tolist()]
    texts = intents.train.texts + intents.validation.texts + intents.test.texts
    assert len(set(texts)) == len(texts), "a text of one part stands in another, or twice"


def test_clinc_by_domain_and_reviews_are_read_from_their_folders(root):
    rows = [{"text": "book a flight", "label": "book_flight", "domain": "travel"}, {"text": "my balance", "label": "balance", "domain": "banking"}]  # fmt: skip
    folder = root / "textcls" / "clinc150"
    folder.mkdir(parents=True)
    for part in ("train", "val", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domains, intents = (kd.data.text(name) for name in ("clinc_domains", "clinc150"))
    assert domains.classes == ["banking", "travel"] and domains.train.labels.tolist() == [1, 0]
    assert intents.classes == ["balance", "book_flight"] and torch.equal(domains.train.ids, intents.train.ids)
    folder = root / "textcls" / "airline_reviews"
    folder.mkdir()
    for part in ("train", "dev", "test"):
        (folder / f"{part}.jsonl").write_text('{"label": 1, "text": "fine"}\n{"label": 0, "text": "late"}\n')
    data = kd.data.text("airline_reviews")
    assert data.classes == ["negative", "positive"] and data.train.labels.tolist() == [1, 0]


def test_the_data_card_says_how_easy_the_requests_are():
    card = (Path(__file__).parents[1] / "data" / "README.md").read_text(encoding="utf-8")
    said = int(re.search(r"logistic regression on words is right on (\d+) % of the test requests", card)[1])
    for name in ("toy_requests", "toy_domains"):
        data = kd.data.text(name)
        readers = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000))
        readers.fit(data.train.texts, data.train.labels.numpy())
        assert 100 * readers.score(data.test.texts, data.test.labels.numpy()) == pytest.approx(said, abs=1)
