"""Chapter 05: what a score may depend on, whose labels a student hears, and files that are not what they seem."""

import csv
from dataclasses import replace

import make_toy_quality
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlib as kd

LESSON = kd.lesson("05")
texts = st.text(alphabet="ab .,\"'නුවාक्ष机\u200d\n\t0", max_size=30)


def pairs_of(sources, targets, labels=None):
    words = [LESSON.vocabulary(side) for side in (sources, targets)]
    labels = torch.linspace(0, 1, len(sources)) if labels is None else torch.as_tensor(labels).float()
    rows = [LESSON.encode(side, known) for side, known in zip((sources, targets), words, strict=True)]
    return LESSON.Pairs(*rows, labels, torch.arange(len(sources)), "toy"), [len(known) + 2 for known in words]


SOURCES = ["a b c", "d", "e f g h a b", "c c a"]
TARGETS = ["x y", "z z z z z w", "q", "x q y z"]
DATA, SIZES = pairs_of(SOURCES, TARGETS)


def student(seed=0, **how):
    torch.manual_seed(seed)
    return LESSON.Student(*SIZES, **how).eval()


def batch_of(*rows):
    return LESSON.inputs(DATA.batch(torch.tensor(rows)))


# --- the student ---


def test_parameters_are_the_closed_form():
    for width, hidden in ((50, 50), (8, 6)):
        model = LESSON.Student(31_766, 15_670, width=width, hidden=hidden)
        right = kd.exercises.exercises("05")["05.3"].right(31_766, 15_670, width, hidden)
        assert kd.models.parameters(model) == right
    assert kd.exercises.exercises("05")["05.3"].right(31_766, 15_670, 50, 50) == 2_453_601


@pytest.mark.parametrize("extra", [1, 7, 60])
def test_padding_never_changes_a_score(extra):
    batch, fills = batch_of(0, 1, 2, 3), {"source": 0, "target": 0, "source_real": False, "target_real": False}
    longer = {name: F.pad(value, (0, extra), value=fills[name]) for name, value in batch.items()}
    assert torch.allclose(student()(**batch), student()(**longer), atol=1e-6)
    assert not torch.allclose(student(masked=False)(**batch), student(masked=False)(**longer), atol=1e-4)


def test_a_score_does_not_depend_on_the_batch():
    together = student()(**batch_of(0, 1, 2, 3))
    alone = torch.cat([student()(**batch_of(row)) for row in range(4)])
    assert alone.shape == (4,) and torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.flip(0), student()(**batch_of(3, 2, 1, 0)), atol=1e-6)
    assert torch.allclose(LESSON.scores_of(student(), DATA), together, atol=1e-6)


def test_scores_and_attention_are_in_their_range():
    model, batch = student(), batch_of(0, 1, 2, 3)
    assert ((model(**batch) > 0) & (model(**batch) < 1)).all()
    pooled, attention = model.target(batch["target"], batch["target_real"])
    assert pooled.shape == (4, 100) and torch.allclose(attention.sum(1), torch.ones(4))
    assert not attention[~batch["target_real"]].any()


def test_attention_is_the_formula():
    """Equation 2 by hand, a sentence at a time and without packing."""
    model, batch = student().source, batch_of(2)
    states = model.projection(model.gru(model.embedding(batch["source"]))[0])[0]
    weights = (states @ model.context[0]).softmax(0)
    pooled, attention = model(batch["source"], batch["source_real"])
    assert torch.allclose(attention[0], weights, atol=1e-6) and torch.allclose(pooled[0], weights @ states, atol=1e-5)


def test_the_sides_never_meet():
    straight, crossed = batch_of(0, 2), batch_of(0, 2)
    crossed |= {name: value.flip(0) for name, value in crossed.items() if name.startswith("target")}
    sums = [student().logits(**batch).sum() for batch in (straight, crossed)]
    assert torch.allclose(*sums, atol=1e-5)
    assert not torch.allclose(student().logits(**straight), student().logits(**crossed).flip(0), atol=1e-4)


@given(source=texts, target=texts)
@settings(deadline=None, max_examples=40)
def test_any_text_has_a_score(source, target):
    sides = [LESSON.encode([text], LESSON.vocabulary(some)) for text, some in ((source, SOURCES), (target, TARGETS))]
    data = LESSON.Pairs(*sides, torch.zeros(1), torch.arange(1), "one")
    (score,) = LESSON.scores_of(student(), data)
    assert 0 < float(score) < 1


def test_an_empty_and_a_very_long_sentence_have_one():
    many = ["", "x " * 3000]
    sides = [LESSON.encode(many, LESSON.vocabulary(some)) for some in (SOURCES, TARGETS)]
    said = LESSON.scores_of(student(), LESSON.Pairs(*sides, torch.zeros(2), torch.arange(2), "two"))
    assert said.isfinite().all() and len(set(said.tolist())) == 2


# --- words ---


@pytest.mark.parametrize(
    "text, words",
    [
        ("The “old” dog's 3.5 km.", ["The", "“", "old", "”", "dog", "'", "s", "3", ".", "5", "km", "."]),
        ("මැතිවරණය ශ්\u200dරී", ["මැතිවරණය", "ශ්\u200dරී"]),
        ("मन्त्री हो ।", ["मन्त्री", "हो", "।"]),
        ("机器 AI。", ["机", "器", "AI", "。"]),
        ("cafe\u0301\u00a0a\u2028b", ["cafe\u0301", "a", "b"]),
        ("", []),
    ],
)
def test_tokens(text, words):
    assert LESSON.tokenise(text) == words


@given(text=texts)
def test_no_visible_character_is_lost(text):
    assert "".join(LESSON.tokenise(text)) == "".join(text.split())


def test_new_words_are_unknown_and_numbers_start_at_two():
    known = LESSON.vocabulary(["b a", "a c"])
    assert sorted(known.values()) == [2, 3, 4] and known["b"] == 2
    assert LESSON.encode(["a new a", ""], known).values.tolist() == [3, 1, 3, 1]


# --- files ---

HEAD = "index\toriginal\ttranslation\tscores\tmean\tz_scores\tz_mean\tmodel_scores"


def written(folder, texts, teacher=None):
    """Three parts with these (original, translation), and perhaps the teacher's scores by index."""
    folder.mkdir(parents=True)
    rows = [f"{10 + n}\t{a}\t{b}\t[{n}, 50, 60]\t1\t[]\t{n / 10}\t-0.{n}" for n, (a, b) in enumerate(texts, 1)]
    for name in LESSON.FILES.values():
        (folder / f"{name}.tsv").write_text("\n".join([HEAD, *rows]) + "\n", encoding="utf-8")
        if teacher:
            scored = "".join(f"{index}\t{score}\n" for index, score in teacher.items())
            (folder / f"teacher_{name}.tsv").write_text(f"index\tteacher\n{scored}", encoding="utf-8")


ODD = [('He said "no', "NA"), ("null", '"'), ("a\u2028b", "c\x85d"), ("  x ", "nan")]


def test_quotation_marks_and_words_like_na_stay_text(tmp_path):
    written(tmp_path / "et", ODD)
    frame = LESSON.from_folder(tmp_path / "et")["train"]
    assert list(zip(frame["original"], frame["translation"], strict=True)) == ODD
    assert frame["scores"].tolist()[0] == [1, 50, 60] and frame["z_mean"].dtype == float
    with pytest.raises(Exception):  # noqa: B017  what the default would do: rows are swallowed
        assert len(pd.read_csv(tmp_path / "et" / "train.tsv", sep="\t", quoting=csv.QUOTE_MINIMAL)) == len(ODD)


def test_the_teachers_scores_are_joined_on_the_index(tmp_path):
    written(tmp_path / "et", ODD, teacher={14: 0.4, 11: 0.1, 13: 0.3})  # another order, and no score for 12
    frames = LESSON.squeezed(LESSON.from_folder(tmp_path / "et"))
    assert frames["train"]["teacher"].fillna(-1).tolist() == [0.1, -1, 0.3, 0.4]
    words = {side: LESSON.vocabulary(frames["train"][side]) for side in ("original", "translation")}
    pairs = LESSON.open_pairs(frames, words)
    assert len(pairs["train"]) == 3 and len(pairs["test"]) == 4  # test sentences are kept: gold judges them
    kept = frames["train"].dropna(subset=["teacher"])
    assert pairs["train"].labels.tolist() == pytest.approx(kept["gold"].tolist())


def test_a_score_given_twice_is_told(tmp_path):
    written(tmp_path / "et", ODD, teacher={11: 0.1})
    path = tmp_path / "et" / "teacher_train.tsv"
    path.write_text(path.read_text() + "11\t0.2\n")
    with pytest.raises(ValueError, match="one-to-one"):
        LESSON.from_folder(tmp_path / "et")


def test_a_file_without_its_header_is_told(tmp_path):
    written(tmp_path / "et", ODD)
    path = tmp_path / "et" / "dev.tsv"
    path.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match=r"dev.tsv lacks the column 'index'"):
        LESSON.from_folder(tmp_path / "et")


def test_what_is_not_at_hand_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))

    def unreachable(pair):
        raise OSError("no network")

    monkeypatch.setattr(LESSON, "from_hub", unreachable)
    with pytest.raises(FileNotFoundError, match=r"mlqe_pe/et-en"):
        LESSON.read_pair("et-en")


# --- labels ---


def frames_of(z, **more):
    return {part: pd.DataFrame({"z_mean": values, **more}) for part, values in z.items()}


def test_gold_is_squeezed_by_the_training_part_alone():
    found = LESSON.squeezed(frames_of({"train": [-2.0, 0.0, 2.0], "test": [4.0, -2.0, 0.0]}))
    assert found["train"]["gold"].tolist() == [0, 0.5, 1] and found["test"]["gold"].tolist() == [1.5, 0, 0.5]
    with pytest.raises(ValueError, match="all training scores are 1.0"):
        LESSON.squeezed(frames_of({"train": [1.0, 1.0]}))


def columns(n=400, seed=0):
    g = np.random.default_rng(3)
    frame = pd.DataFrame({"gold": g.random(n), "model_scores": g.normal(size=n)})
    return frame, LESSON.target_columns(frame.assign(teacher=0.3 * frame["gold"] + 0.1 * g.random(n)), seed=seed)


def test_every_control_changes_one_thing():
    frame, made = columns()
    gold, teacher = made["gold"], made["KD"]
    squeezed, noisy = made["gold, teacher's spread"], made["KD, noise put back"]
    assert squeezed.mean() == pytest.approx(teacher.mean()) and squeezed.std() == pytest.approx(teacher.std())
    assert np.corrcoef(squeezed, gold)[0, 1] == pytest.approx(1)
    assert sorted(noisy - teacher) == pytest.approx(sorted(gold - teacher)) and not np.allclose(noisy, gold)
    free = made["NMT score as teacher"]
    assert abs(np.corrcoef(free, frame["model_scores"])[0, 1]) == pytest.approx(1)
    assert ((gold - free) * frame["model_scores"]).mean() == pytest.approx(0, abs=1e-9)  # least squares
    assert not np.allclose(noisy, columns(seed=1)[1]["KD, noise put back"])


def test_a_mixture_of_losses_is_a_mixture_of_labels():
    model, alpha = student(), 0.3
    gold, teacher = torch.rand(4), torch.rand(4)
    grads = []
    for loss in (
        lambda s: alpha * F.mse_loss(s, teacher) + (1 - alpha) * F.mse_loss(s, gold),
        lambda s: F.mse_loss(s, alpha * teacher + (1 - alpha) * gold),
    ):
        grads.append(torch.autograd.grad(loss(model(**batch_of(0, 1, 2, 3))), model.output.weight)[0])
    assert torch.allclose(*grads, atol=1e-7)


def test_the_loss_hears_the_label_and_nothing_else():
    batch = DATA.batch(torch.arange(4))
    scores = student()(**LESSON.inputs(batch)).detach()
    with torch.no_grad():
        assert float(LESSON.score_loss(student(), {**batch, "label": scores})) == pytest.approx(0, abs=1e-12)
        assert float(LESSON.score_loss(student(), {**batch, "label": scores + 0.5})) == pytest.approx(0.25, rel=1e-5)


# --- judging ---


@pytest.mark.parametrize("predicted, who", [([0.5, 0.5, 0.5], "predictions"), ([0.1, 0.2, 0.3], "true scores")])
def test_a_correlation_with_a_constant_is_told(predicted, who):
    true = [0.1, 0.2, 0.3] if who == "predictions" else [0.4] * 3
    with pytest.raises(FloatingPointError, match=f"all 3 {who} are alike"):
        LESSON.correlation(predicted, true)


def test_rows_without_a_true_value_are_left_out():
    assert LESSON.correlation([1, 2, 9, 4], [2, 4, np.nan, 8]) == pytest.approx(1)


def test_reliability_of_halves_is_what_was_put_in():
    g = np.random.default_rng(0)
    quality, noise = g.normal(size=(20_000, 1)), g.normal(size=(20_000, 6))
    scores = quality + 1.5 * noise
    half = LESSON.split_halves(scores)
    assert half == pytest.approx(1 / (1 + 2.25 / 3), abs=0.02)
    ceiling = kd.exercises.exercises("05")["05.1"].right(half)
    assert np.corrcoef(quality[:, 0], scores.mean(1))[0, 1] == pytest.approx(ceiling, abs=0.01)


# --- the run ---


def test_learn_trains_on_its_column_and_judges_by_gold(tmp_path):
    gold = torch.tensor([0.1, 0.9, 0.2, 0.8])
    parts = {part: replace(DATA, labels=gold, name=part) for part in ("train", "validation", "test")}
    shared = dict(
        pairs=parts, columns={"gold": gold.numpy(), "turned round": 1 - gold.numpy()}, judges={}, sizes=SIZES, hidden=8,
        optimizer="Adam", rate=0.05, epochs=15, batch_size=4, dropout=0.0,
    )  # fmt: skip

    def learn(**arm):
        kd.seed_everything(0)  # as a grid does
        return LESSON.learn(seed=0, **shared, **arm)

    out = learn(folder=tmp_path / "a", target="gold")
    assert out.metrics["test"] > 0.9 and out.arrays["test"].shape == (4,)
    assert torch.allclose(LESSON.scores_of(out.model, parts["test"]), out.arrays["test"])
    other = learn(folder=tmp_path / "b", target="turned round")
    assert other.history[-1]["score"] < -0.5  # selection still asks gold
    assert learn(folder=tmp_path / "c", target="gold").metrics == out.metrics


def test_the_embedded_pairs_are_what_the_script_writes():
    path = kd.data.sources.embedded("toy_quality.jsonl")
    assert path.read_text(encoding="utf-8") == make_toy_quality.lines()


def test_the_toys_teacher_is_closer_to_the_truth_than_its_gold():
    frames = LESSON.read_pair("toy")
    assert [len(frame) for frame in frames.values()] == [600, 200, 300]
    train = frames["train"]
    assert train["teacher"].corr(train["truth"]) > train["z_mean"].corr(train["truth"]) + 0.1
