"""Chapter 06: sound that is refused, spans, the frozen encoder, the two teachers, the size of stage 2's term."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlib as kd
from kdlib.data.rows import Ragged

LESSON = kd.lesson("06")
PAD, CLS, MASK, FIRST, RATE = LESSON.PAD, LESSON.CLS, LESSON.MASK, LESSON.FIRST, 8000
WORDS, SIZES = 9, (4,)


def fresh(make, *given, seed=0, **more):
    return LESSON.fresh(seed, make, *given, **more)


def encoder(seed=0, vocabulary=20, **more):
    return fresh(LESSON.Encoder, vocabulary, width=16, layers=1, longest=40, seed=seed, **more)


def some(n=24, name="some", pool=False):
    """Utterances of 5 to 20 tokens and 1 to 4 words."""
    g = torch.Generator().manual_seed(n)
    rows = [
        [CLS, *torch.randint(FIRST, 20, (int(k),), generator=g).tolist()]
        for k in torch.randint(5, 21, (n,), generator=g)
    ]
    texts = [
        [CLS, *torch.randint(FIRST, WORDS, (int(k),), generator=g).tolist()]
        for k in torch.randint(1, 5, (n,), generator=g)
    ]
    slots = torch.full((n, 1), -100) if pool else torch.randint(0, SIZES[0], (n, 1), generator=g)
    return LESSON.Utterances(Ragged.of(rows), Ragged.of(texts), slots, ["a"] * n, torch.arange(n), name)


def batch_of(data):
    return data.batch(torch.arange(len(data)))


def run_of(**more):
    size = dict(width=16, layers=1, longest=40)
    pieces = dict.fromkeys(("speech", "text", "match", "teacher", "recogniser", "student"), 2)
    given = dict(units=16, words=WORDS, sizes=SIZES, speech=size, text=size, hidden=8, share_hidden=0.3, span=3,
                 updates=pieces, batch_size=8, rate_first=0.01)  # fmt: skip
    return kd.scale.Settings(**{**given, **more})


DATA = {"pool": some(20, "pool", pool=True), "train": some(24), "validation": some(10), "test": some(11)}


# --- sound -----------------------------------------------------------------------------------------------------------


def tone(seconds=0.5, rate=RATE, loud=0.5):
    return (loud * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype("float32")


def test_stereo_is_averaged_and_a_higher_rate_brought_down(tmp_path):
    path = tmp_path / "two.wav"
    left = tone(rate=16_000)
    soundfile.write(path, np.stack([left, 0 * left], 1), 16_000)
    wave = LESSON.read_audio(path, RATE)
    assert wave.shape == (4000,) and wave.dtype == torch.float32 and wave.ndim == 1
    assert float(wave[500:-500].abs().max()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    "wave, rate, why",
    [
        (0 * tone(), RATE, "silent"),
        (np.sign(tone()), RATE, "clipped"),
        (tone(0.05), RATE, "shorter than 0.1 s"),
        (tone(rate=4000), 4000, "of 4000 Hz, below the 8000"),
        (np.full(4000, np.nan, "float32"), RATE, "not all finite"),
    ],
)
def test_bad_sound_is_refused_by_name(tmp_path, wave, rate, why):
    path = tmp_path / "bad one.wav"
    soundfile.write(path, wave, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match=why) as told:
        LESSON.read_audio(path, RATE)
    assert "bad one.wav" in str(told.value)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path, ending):
    path = tmp_path / f"half.{ending}"
    noise = 0.3 * np.random.default_rng(0).standard_normal(2 * RATE).clip(-1, 1)
    soundfile.write(path, noise, RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"half.{ending}"):
        LESSON.read_audio(path, RATE)


def test_what_is_no_sound_and_what_is_not_there_is_told(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    for name in ("text.wav", "missing.wav"):
        with pytest.raises(ValueError, match=name):
            LESSON.read_audio(tmp_path / name, RATE)


def test_the_toy_commands_are_those_of_their_generator():
    import make_toy_commands as toy

    index = Path(toy.FOLDER, "toy_commands.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in index.splitlines()]
    assert index == toy.index([row["samples"] for row in rows])
    parts = LESSON.toy_commands(RATE)
    assert {part: len(clips) for part, clips in parts.items()} == toy.COUNTS
    assert Path(toy.FOLDER, "toy_commands.ogg").stat().st_size < 2_000_000
    assert all(clip.intent is None for clip in parts["pool"])
    meaning = {}
    for clip in parts["train"] + parts["test"]:
        assert meaning.setdefault(clip.text, clip.intent) == clip.intent


def test_composed_commands_share_no_recording_between_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for digit in range(10):
        for speaker in ("ann", "bob"):
            for number in range(4):
                soundfile.write(folder / f"{digit}_{speaker}_{number}.wav", tone(0.2), RATE)
    monkeypatch.setattr(LESSON, "COUNTS", dict.fromkeys(LESSON.COUNTS, 6))
    parts = {"pool": range(1), "train": range(1, 2), "validation": range(2, 3), "test": range(3, 4)}
    found = LESSON.spoken_digits(RATE, parts, {"test": ["bob"]})
    assert {len(clips) for clips in found.values()} == {6} and {c.speaker for c in found["test"]} == {"bob"}
    assert {c.speaker for c in found["train"]} == {"ann", "bob"} and found["pool"][0].intent is None
    again = LESSON.spoken_digits(RATE, parts, {"test": ["bob"]})
    assert all(torch.equal(a.sound, b.sound) for a, b in zip(found["train"], again["train"], strict=True))
    assert not set(LESSON.RECORDINGS["test"]) & set(LESSON.RECORDINGS["train"]) and len(
        set().union(*LESSON.RECORDINGS.values())
    ) == sum(map(len, LESSON.RECORDINGS.values()))


def test_a_set_that_is_not_there_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    for name, remedy in (("spoken_digits", "git clone"), ("fluent_speech_commands", "fluent.ai")):
        with pytest.raises(FileNotFoundError, match=remedy):
            LESSON.clips_of(name, RATE)


# --- tokens and masks ------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0.05, 0.9), span=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_spans_keep_to_what_is_free(lengths, share, span):
    ids = torch.zeros(len(lengths), max(lengths) + 1, dtype=torch.int64)
    for row, n in zip(ids, lengths, strict=True):
        row[0], row[1 : n + 1] = CLS, FIRST
    hidden = LESSON.spans(ids >= FIRST, share, span)
    assert not hidden[:, 0].any() and not hidden[ids == PAD].any()
    starts = (hidden & ~F.pad(hidden, (1, 0))[:, :-1]).sum(1)
    for n, count, runs in zip(lengths, hidden.sum(1).tolist(), starts.tolist(), strict=True):
        wanted = math.ceil(n * share / span - 1e-6)
        assert 1 <= count <= wanted * span and runs <= wanted


def test_spans_of_one_hide_their_share_and_longer_ones_a_little_less():
    free = torch.ones(200, 100, dtype=torch.bool)
    assert float(LESSON.spans(free, 0.2, 1).float().mean()) == pytest.approx(0.2)
    # 0.2 * 100 / 5 = 4 spans of 5: overlaps and the end take a part of 20
    assert 0.16 < float(LESSON.spans(free, 0.2, 5).float().mean()) < 0.2


def test_what_is_hidden_gets_the_masks_id(monkeypatch):
    model, seen = encoder(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = batch_of(some())["x"]
    LESSON.masked_loss(model, ids, 0.5, 3)
    (shown,) = seen
    changed = shown != ids
    assert changed.any() and (shown[changed] == MASK).all() and (ids[changed] >= FIRST).all()
    assert torch.equal(shown == PAD, ids == PAD) and (shown[:, 0] == CLS).all()


@pytest.mark.parametrize("near", [0, 5])
def test_an_encoder_is_blind_to_padding(near):
    model, ids = encoder(near=near).eval(), torch.tensor([[CLS, 5, 6, 7, 8]])
    alone, beside = model(ids), model(F.pad(ids, (0, 9)))
    assert torch.allclose(alone, beside[:, :5], atol=1e-5)


def test_texts_become_ids_and_strangers_are_unknown():
    words = LESSON.Words(["turn On", "turn off"])
    assert words.known == ["off", "on", "turn"] and len(words) == FIRST + 3
    assert words.encode("turn the on") == [CLS, FIRST + 2, LESSON.UNKNOWN, FIRST + 1]


def test_clips_that_are_too_long_are_told_and_not_cut():
    words, clip = LESSON.Words(["hello"]), LESSON.Clip(None, "hello", "x", "ann")
    with pytest.raises(ValueError, match="part, clip 1 has 9 tokens"):
        LESSON.utterances([clip, clip], [[0] * 3, [0] * 9], words, ["x"], "part", longest=9)


# --- the student -----------------------------------------------------------------------------------------------------


def test_the_encoder_is_frozen_and_stays_in_evaluation_mode():
    student = fresh(LESSON.Student, encoder(), 8, SIZES).train()
    assert not student.encoder.training and student.listener.training
    before = [p.clone() for p in student.encoder.parameters()]
    LESSON.train(student, some(), LESSON.task_loss, updates=3, rate=0.1, batch_size=8, seed=0, folder=None)
    assert all(p.grad is None for p in student.encoder.parameters())
    assert all(map(torch.equal, before, student.encoder.parameters()))
    free = fresh(LESSON.Student, encoder(), 8, SIZES, frozen=False).train()
    LESSON.task_loss(free, batch_of(some())).backward()
    assert free.encoder.training and free.encoder.token.weight.grad.abs().sum() > 0


def test_a_student_is_blind_to_padding_also_where_all_is_negative():
    student = fresh(LESSON.Student, encoder(), 8, SIZES).eval()
    with torch.no_grad():
        for lstm in (student.listener.ahead, student.listener.back):
            for bias in (lstm.bias_ih_l0, lstm.bias_hh_l0):
                bias[16:24] = -5  # the cells' candidates: all outputs are below zero
        student.head.weight.copy_(torch.eye(4, 8))
    for length in (4, 5, 8):
        ids = torch.tensor([[CLS, *range(5, 4 + length)]])
        alone = student(ids)
        assert (alone < student.head.bias).all()
        assert torch.allclose(alone, student(F.pad(ids, (0, 7))), atol=1e-5)


def test_augmentation_is_for_training_alone():
    hide = dict(tokens=(0.5, 2), time=(0.5, 2), channels=(0.5, 2))
    student, ids = fresh(LESSON.Student, encoder(), 8, SIZES, hide), batch_of(some())["x"]
    assert torch.equal(student.eval()(ids), student(ids))
    assert not torch.allclose(student.train()(ids), student(ids))


def test_all_slots_must_be_right():
    class Fixed(torch.nn.Linear):
        sizes = (2, 3)

        def forward(self, ids):
            return torch.tensor([[1.0, 0, 0, 9, 0], [0, 1, 9, 0, 0], [1, 0, 0, 0, 9]])

    data = some(3)
    both = LESSON.replace(data, slots=torch.tensor([[0, 1], [0, 0], [0, 2]]))
    assert LESSON.right(Fixed(1, 1), both).tolist() == [True, False, True]


# --- the two stages --------------------------------------------------------------------------------------------------


def test_stage_2_is_a_sum_over_classes_and_a_mean_over_the_batch():
    student, batch = fresh(LESSON.Student, encoder(), 8, SIZES).eval(), batch_of(some())
    teacher = kd.Teacher(fresh(LESSON.Student, encoder(3), 8, SIZES, seed=3), name="t", inputs=lambda b: (b["x"],))
    z, wanted = student(batch["x"]).detach(), teacher(batch)
    by_hand = sum(abs(float(z[i, c] - wanted[i, c])) for i in range(len(z)) for c in range(4)) / len(z)
    loss, parts = LESSON.task_loss(student, batch, teacher=teacher)
    assert float(parts["imitation"]) == pytest.approx(by_hand, rel=1e-4)
    assert float(loss) == pytest.approx(by_hand + float(F.cross_entropy(z, batch["slots"][:, 0])), rel=1e-4)
    assert float(loss) != pytest.approx(float(parts["labels"] + F.l1_loss(z, wanted)), rel=1e-3)  # the mutant
    itself = kd.Teacher(fresh(LESSON.Student, encoder(), 8, SIZES), name="itself", inputs=lambda b: (b["x"],))
    assert float(LESSON.task_loss(student, batch, teacher=itself)[1]["imitation"]) == pytest.approx(0, abs=1e-6)


def test_stage_1_adds_the_distance_and_without_weight_it_is_masked_tokens():
    model, batch = encoder(), batch_of(some(pool=True))
    teacher = LESSON.from_text(LESSON.Summary(encoder(5, WORDS)), "text")
    how = dict(teacher=teacher, share=0.3, span=3)
    values = {}
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        values[weight], parts = LESSON.stage_1_loss(model, batch, weight=weight, **how)
    torch.manual_seed(0)
    plain = LESSON.speech_loss(model, batch, share=0.3, span=3)
    assert torch.equal(values[0.0], plain)
    assert float(values[2.0] - plain) == pytest.approx(2 * float(parts["distance"]), rel=1e-4)
    values[2.0].backward()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_which_teacher_serves_which_stage(home, tmp_path, monkeypatch):
    """Stage 1 hears the generic text encoder's vector, stage 2 the fine-tuned reader's logits; both frozen."""
    run, heard, whole = run_of(), {}, LESSON.from_text

    def watch(model, name):
        heard[name] = whole(model, name)
        return heard[name]

    monkeypatch.setattr(LESSON, "from_text", watch)
    LESSON.two_stages(seed=0, folder=tmp_path, data=DATA, run=run, rate=0.01, share=0.5, match=1.0, imitate=True)
    generic, tuned = heard["generic text encoder"].model, heard["fine-tuned reader"].model
    text = LESSON.generic_text(0, DATA, run)
    assert isinstance(generic, LESSON.Summary) and same(generic.encoder, text)
    assert isinstance(tuned, LESSON.Reader) and not same(tuned.encoder, text)
    commands = LESSON.labelled(DATA["train"], 0.5, 0)
    assert same(tuned, LESSON.reader(0, DATA, run, commands))
    for teacher in heard.values():
        assert not any(m.training for m in teacher.model.modules())
        assert not any(p.requires_grad for p in teacher.model.parameters())


def test_rows_without_a_stage_ask_no_teacher(home, tmp_path, monkeypatch):
    monkeypatch.setattr(LESSON, "from_text", lambda *given: pytest.fail("a teacher was asked"))
    found = LESSON.two_stages(seed=0, folder=tmp_path, data=DATA, run=run_of(), rate=0.01)
    assert set(found.metrics) == {"validation", "test"} and "imitation" not in found.history[-1]


def test_the_control_and_stage_1_start_from_one_checkpoint_and_get_as_many_updates(home):
    run = run_of()
    (control, a), (matched, b) = (LESSON.stage_1(0, DATA, run, weight) for weight in (0.0, 1.0))
    start = LESSON.masked_tokens(0, DATA, run)
    assert not same(control, start) and not same(control, matched)
    assert a[0].history[-1]["step"] == b[0].history[-1]["step"]


def test_a_share_is_random_fixed_by_its_seed_and_not_the_first_rows():
    data = some(200)
    one, again, other = (LESSON.labelled(data, 0.1, seed).ids.tolist() for seed in (0, 0, 1))
    assert one == again != other and len(set(one)) == 20 and one != list(range(20)) and one == sorted(one)
    assert max(one) > 100 and LESSON.labelled(data, 1.0, 3).ids.tolist() == list(range(200))


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_what_is_heard_has_no_blanks_and_no_repeats():
    class Says(torch.nn.Module):
        def __init__(self, best):
            super().__init__()
            self.best, self.weight = torch.tensor(best), torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            real = torch.arange(self.best.shape[1]) < torch.tensor([[8], [4]])
            return F.one_hot(self.best, WORDS).float(), real

    model = Says([[0, 5, 5, 0, 5, 6, 6, 0], [7, 7, 1, 8, 6, 6, 6, 6]])
    assert LESSON.heard(model, some(2)) == [[CLS, 5, 5, 6], [CLS, 7, 8]]


def test_ctc_asks_for_the_words_after_cls():
    batch = batch_of(some(4))

    class Sure(torch.nn.Module):
        """Says each word of the texts once, with blanks between them."""

        def forward(self, ids):
            best = torch.zeros(4, 10, dtype=torch.int64)
            words = batch["text"][:, 1:]
            best[:, 1 : 2 * words.shape[1] : 2] = words
            return (50.0 * F.one_hot(best, WORDS)).log_softmax(2), torch.ones(4, 10, dtype=torch.bool)

    assert float(LESSON.ctc_loss(Sure(), batch)) == pytest.approx(0, abs=1e-3)


def test_the_pipeline_uses_the_teacher_of_stage_2(home, tmp_path):
    found = LESSON.pipeline(seed=0, folder=tmp_path, data=DATA, run=run_of(), share=0.5).metrics
    assert {"validation", "test", "texts right", "on true texts"} == set(found)
    commands = LESSON.labelled(DATA["train"], 0.5, 0)
    mind = LESSON.reader(0, DATA, run_of(), commands)
    assert found["on true texts"] == float(LESSON.right(mind, DATA["test"], key="text").double().mean())


def test_joined_sets_keep_their_rows():
    both = LESSON.joined(DATA["pool"], DATA["train"])
    assert len(both) == 44 and both.audio.lengths.tolist() == [
        *DATA["pool"].audio.lengths.tolist(),
        *DATA["train"].audio.lengths.tolist(),
    ]
    assert (both.slots[:20] == -100).all() and both.ids.tolist() == list(range(44))
