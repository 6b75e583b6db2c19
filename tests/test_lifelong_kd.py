"""Chapter 04: which tokens a loss counts, whose words a student hears, dreams that are none, and a stream that was killed."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlib as kd

LESSON = kd.lesson("04")
WORDS = ["inform", "name", "xname", "is", "a", "nice", "place", "in", "xarea", "area", "ans", "eos", "gen"]


class Words:
    """A tokenizer of whole words."""

    def __len__(self):
        return len(WORDS)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


V = LESSON.Vocabulary(Words(), 3)
ids = st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=6)


def some(n=12, task=1, replayed=False, longest=20):
    """Acts and texts of one to five words."""
    g = torch.Generator().manual_seed(n + task)
    lengths = torch.randint(1, 6, (n, 2), generator=g).tolist()
    pairs = [[torch.randint(0, len(WORDS), (k,), generator=g).tolist() for k in row] for row in lengths]
    return LESSON.examples_of(pairs, task, V, "toy", replayed=replayed, longest=longest)


def small(seed=0):
    torch.manual_seed(seed)
    return LESSON.fresh(V, 24, width=32, layers=1).eval()


def batch_of(data):
    return data.batch(torch.arange(len(data)))


def test_no_text_can_hold_a_special_token():
    assert len({V.eos, V.ans, *map(V.gen, range(3))}) == 5 and min(V.eos, V.ans, V.gen(0)) == len(WORDS)
    assert len(V) == len(WORDS) + 5 and V.encode("ans eos gen") == [10, 11, 12]
    assert V.decode([0, V.eos, V.gen(1)]) == "inform"


@given(act=ids, text=ids, task=st.integers(0, 2))
@settings(deadline=None)
def test_what_is_read_and_what_is_asked(act, text, task):
    batch = batch_of(LESSON.examples_of([(act, text)], task, V, "x", longest=99))
    assert batch["qa_input"][0].tolist() == [*act, V.ans, *text]
    assert batch["qa_target"][0].tolist() == [-100] * len(act) + [*text, V.eos]  # the first word stands at ANS
    assert batch["lm_input"][0].tolist() == [V.gen(task), *act, V.ans, *text]
    assert batch["lm_target"][0].tolist() == [*act, V.ans, *text, V.eos]
    assert V.eos not in batch["qa_input"][0].tolist()  # a target, never an input


@given(act=ids, text=ids)
@settings(deadline=None)
def test_a_row_is_parsed_to_what_it_was_made_of(act, text):
    assert LESSON.parse([*act, V.ans, *text, V.eos], V) == (act, text)


@pytest.mark.parametrize(
    "row, why",
    [
        ([1, 2, V.eos], "no ANS"),
        ([1, V.ans, 2, V.ans, 3, V.eos], "two ANS"),
        ([1, V.ans, 2], "no EOS"),
        ([V.ans, 2, V.eos], "empty or special"),
        ([1, V.ans, V.eos], "empty or special"),
        ([1, V.gen(2), V.ans, 3, V.eos], "empty or special"),
    ],
)
def test_what_is_no_dream_is_told(row, why):
    assert LESSON.parse(row, V) == why


def test_rows_that_are_too_long_are_cut_and_never_end():
    batch = batch_of(LESSON.examples_of([([0, 1], [2, 3, 4, 5])], 0, V, "x", longest=5))
    assert batch["lm_target"][0].tolist() == [0, 1, V.ans, 2, 3]


def test_the_mean_is_over_tokens_and_padding_is_none():
    data, model, batch = some(8), small(), batch_of(some(8))
    loss = LESSON.stream_loss(model, batch).item()
    totals = {}
    for row in range(8):  # each row alone has no padding
        alone = data.batch(torch.tensor([row]))
        for role in ("qa", "lm"):
            logits, targets = model(alone[f"{role}_input"]).logits[0], alone[f"{role}_target"][0]
            asked = targets != -100
            nll = -logits.double().log_softmax(-1)[asked, targets[asked]].detach()
            totals[role] = [*totals.get(role, []), *nll.tolist()]
    assert len(totals["lm"]) == int(data.lengths.sum()) and len(totals["qa"]) == int(
        (data.lengths - data.asked - 1).sum()
    )
    assert loss == pytest.approx(np.mean(totals["qa"]) + 0.25 * np.mean(totals["lm"]), rel=1e-5)


def mixed(data, share=0.25):
    return {**batch_of(data), "replayed": torch.arange(len(data)) < share * len(data)}


def test_equal_weights_are_the_sum_of_two_means():
    model, batch = small(), mixed(some(12))
    rows = batch["replayed"]
    by_hand = sum(
        weight * LESSON.token_mean(model(batch[f"{role}_input"]).logits, batch[f"{role}_target"], part)
        for role, weight in (("qa", 1.0), ("lm", 0.25))
        for part in (rows, ~rows)
    )
    assert torch.allclose(LESSON.stream_loss(model, batch, equal=True), by_hand)


def test_the_teacher_is_heard_on_new_examples_alone():
    model, batch = small(), mixed(some(12))
    one, other = (kd.Teacher(small(seed), name="t") for seed in (1, 2))
    replayed = {**batch, "replayed": torch.ones(12).bool()}
    new = {**batch, "replayed": torch.zeros(12).bool()}
    loss = partial(LESSON.stream_loss, model, equal=True)
    assert loss(replayed, teacher=one) == loss(replayed, teacher=other) == loss(replayed)
    assert loss(new, teacher=one) != loss(new, teacher=other)
    itself = kd.Teacher(copy.deepcopy(model), name="itself")
    assert loss(new, teacher=itself).item() == pytest.approx(0, abs=1e-6)


def test_a_sharp_teacher_at_temperature_one_is_its_own_words():
    """Where the three losses must agree: a teacher that is sure of the data's words, at T = 1."""

    class Sure(torch.nn.Module):
        def __init__(self, batch):
            super().__init__()
            self.answers = {
                role: 80.0 * torch.nn.functional.one_hot(batch[f"{role}_target"].clamp(min=0), len(V))
                for role in ("qa", "lm")
            }
            self.inputs = {role: batch[f"{role}_input"] for role in ("qa", "lm")}

        def forward(self, input_ids):
            return self.answers["qa" if input_ids.shape == self.inputs["qa"].shape else "lm"].float()

    model, batch = small(), mixed(some(12), share=0)
    plain = LESSON.stream_loss(model, batch, equal=True)
    soft = LESSON.stream_loss(model, batch, equal=True, teacher=kd.Teacher(Sure(batch), name="sure"), temperature=1.0)
    assert torch.allclose(plain, soft, rtol=1e-4) and torch.allclose(plain, LESSON.stream_loss(model, batch), rtol=1e-5)


@pytest.mark.parametrize("everything_replayed", [True, False])
@pytest.mark.parametrize("taught", [True, False])
def test_a_batch_of_one_kind_has_finite_gradients(everything_replayed, taught):
    model = small()
    batch = {**batch_of(some(6)), "replayed": torch.full((6,), everything_replayed)}
    LESSON.stream_loss(model, batch, equal=True, teacher=kd.Teacher(small(1), name="t") if taught else None).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_another_vocabulary_is_told():
    other = LESSON.fresh(LESSON.Vocabulary(Words(), 5), 24, width=32, layers=1)
    with pytest.raises(ValueError, match=r"20|18"):
        LESSON.stream_loss(small(), batch_of(some(4)), equal=True, teacher=kd.Teacher(other, name="t"))


def test_the_share_of_replay_is_the_formulas():
    """The gradient's split between new and replayed examples, on logits that are parameters."""
    z = torch.zeros(6, 5, 9, requires_grad=True)
    targets, rows = torch.ones(6, 5, dtype=torch.int64), torch.arange(6) < 1
    for equal, share in ((False, 1 / 6), (True, 1 / 2)):
        parts = (rows, ~rows) if equal else (torch.ones(6).bool(),)
        (grad,) = torch.autograd.grad(sum(LESSON.token_mean(z, targets, part) for part in parts), z)
        weight = grad.abs().sum((1, 2))
        assert float(weight[rows].sum() / weight.sum()) == pytest.approx(share, rel=1e-5)


def test_what_cannot_be_read_stops_the_stream(monkeypatch):
    monkeypatch.setattr(LESSON, "write", lambda *given, **more: [[1, 2]] * 5)
    with pytest.raises(ValueError, match="not one of 5 dreams of task 2 can be read"):
        LESSON.imagine(small(), 1, 5, V, 20, seed=0)


def test_dreams_are_a_function_of_model_and_seed_and_start_with_their_task(monkeypatch):
    model, asked = small(), []
    whole = LESSON.write
    monkeypatch.setattr(
        LESSON, "write", lambda m, prompts, *a, **k: asked.append(prompts) or whole(m, prompts, *a, **k)
    )
    monkeypatch.setattr(LESSON, "parse", lambda row, v: (row[:1], row[1:]))
    one, two, other = (LESSON.imagine(model, 2, 6, V, 8, seed=seed)[0] for seed in (3, 3, 4))
    assert one == two != other and asked[0] == [[V.gen(2)]] * 6


def test_prompts_of_unequal_length_get_the_answers_they_get_alone():
    model, prompts = small(), [[1, 2, 3, V.ans], [4, V.ans], [5, 6, V.ans]]
    assert LESSON.write(model, prompts, V, 8) == [LESSON.write(model, [p], V, 8)[0] for p in prompts]


@pytest.mark.parametrize(
    "act, text, expected",
    [
        (
            "inform(name='Blue Bar';area=north)",
            "Blue Bar is in the north .",
            ("inform area xarea name xname", "xname is in the xarea ."),
        ),
        ("request(near)", "where ?", ("request near", "where ?")),
        ("?select(a=yes;b=yes please)", "yes please or yes", ("select a xa b xb", "xb or xa")),
        ("inform(type=tv;usb=false)", "a tv without", ("inform type xtype usb false", "a xtype without")),
        ("goodbye()", "bye", ("goodbye", "bye")),
    ],
)
def test_values_leave_act_and_text_alike(act, text, expected):
    assert LESSON.delexicalise(act, text) == expected


def test_the_matrix_is_read_as_defined():
    read = LESSON.read([[0.4, 0.1, 0.0], [0.5, 0.6, 0.2], [0.3, 0.5, 0.7]])
    expected = {
        "average": 0.5,
        "forgetting": 0.15,
        "backward": -0.1,
        "forward": 0.15,
        "old tasks": 0.4,
        "new task": 0.7,
    }
    assert {name: pytest.approx(value) for name, value in expected.items()} == read


# --- the stream ---------------------------------------------------------------------------------------------------


def stream(longest=12):
    tasks = []
    for number in range(2):
        judged = ([[0, number + 1]], [["xname is nice", "nice"]])
        data = some(16, task=number, longest=longest)
        tasks.append({"train": data, "validation": judged, "test": judged, "score": LESSON.bleu})
    return {"tasks": tasks, "longest": longest, "epochs": 2, "batch_size": 4}


def learn(folder, **arm):
    models = [small(seed) for seed in range(2)]
    return LESSON.learn_stream(seed=0, folder=folder, models=models, rate=0.01, **stream(), **arm)


@pytest.fixture
def readable(monkeypatch):
    """Dreams of a model that has learnt nothing, made readable."""
    monkeypatch.setattr(LESSON, "parse", lambda row, v: ([i for i in row if i < v.eos][:3] or [0], [1, 2]))


def weights(outcome):
    return torch.cat([p.detach().flatten() for p in outcome.model.parameters()])


def test_without_dreams_it_is_fine_tuning_bit_for_bit(tmp_path, readable):
    plain, equal = learn(tmp_path / "a", gamma=0.0), learn(tmp_path / "b")
    by_hand = small(0)
    how = {"epochs": 2, "rate": 0.01, "batch_size": 4}
    LESSON.train(by_hand, stream()["tasks"][1]["train"], LESSON.stream_loss, seed=0, folder=tmp_path / "c", **how)
    assert torch.equal(weights(plain), weights(equal))
    assert all(map(torch.equal, plain.model.state_dict().values(), by_hand.state_dict().values()))


def test_what_is_rehearsed_is_gamma_of_the_new_task_and_marked(tmp_path, readable, monkeypatch):
    seen = []
    train = LESSON.train
    monkeypatch.setattr(LESSON, "train", lambda model, data, *a, **k: seen.append(data) or train(model, data, *a, **k))
    found = learn(tmp_path, gamma=0.5, equal=True, soft=True)
    (data,) = seen
    assert len(data) == 24 and int(data.replayed.sum()) == 8 and set(data.task[data.replayed].tolist()) == {0}
    assert found.metrics["dreams, kept"] == 8 and {"R11", "R12", "R21", "R22"} <= set(found.metrics)


def test_a_stream_in_another_order_dreams_of_its_own_tasks(tmp_path, readable, monkeypatch):
    asked, imagine = [], LESSON.imagine
    monkeypatch.setattr(
        LESSON, "imagine", lambda model, task, *a, **k: asked.append(task) or imagine(model, task, *a, **k)
    )
    backwards = {**stream(), "tasks": stream()["tasks"][::-1]}
    LESSON.learn_stream(seed=0, folder=tmp_path, models=[small(1), small(0)], rate=0.01, gamma=0.5, **backwards)
    assert asked == [1]  # the first of this stream is task number 1


def test_seq_kd_keeps_the_acts_and_takes_the_teachers_answers():
    data, teacher = some(6), small(5)
    new = LESSON.rewritten(teacher, data, 20)
    for row in range(6):
        asked = int(data.asked[row])
        w, _ = new.tokens.padded(torch.tensor([row]), V.eos)
        old, _ = data.tokens.padded(torch.tensor([row]), V.eos)
        assert w[0, : asked + 1].tolist() == old[0, : asked + 1].tolist()
        (answer,) = LESSON.write(teacher, [old[0, : asked + 1].tolist()], V, 20)
        assert (
            w[0, asked + 1 : asked + 1 + len(answer)].tolist()[:5] == [i for i in answer if i < V.eos][:5]
            or V.eos in answer
        )


def test_sets_are_joined_and_counted():
    one, two = some(5, task=0), some(3, task=1, replayed=True)
    both = LESSON.joined([one, two])
    assert len(both) == 8 and both.replayed.tolist() == [False] * 5 + [True] * 3 and both.ids.tolist() == list(range(8))
    assert both.fingerprint != LESSON.joined([two, one]).fingerprint
    assert replace(both, replayed=~both.replayed).fingerprint != both.fingerprint


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_lifelong_kd as t
t.LESSON.parse = lambda row, v: ([i for i in row if i < v.eos][:3] or [0], [1, 2])
fit = t.kd.fit
t.LESSON.kd.fit = lambda *a, **k: fit(*a, **{{**k, "checkpoint_every": 1}})
if {slow!r}:
    loss, calls = t.LESSON.stream_loss, []
    def slow(*a, **k):
        calls.append(1)
        if len(calls) == 5:
            print("in the second task", flush=True)
            import time; time.sleep(60)
        return loss(*a, **k)
    t.LESSON.stream_loss = slow
out = t.learn(Path({folder!r}), gamma=0.5, equal=True)
torch.save(t.weights(out), {folder!r} + "/weights.pt")
"""


def test_a_stream_that_was_killed_goes_on_with_the_same_dreams(tmp_path):
    def start(folder, slow):
        folder.mkdir(exist_ok=True)
        code = KILLED.format(tests=os.path.dirname(__file__), folder=str(folder), slow=slow)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, False).wait() == 0
    program = start(cut, True)
    assert "second task" in program.stdout.readline()
    time.sleep(0.1)
    program.send_signal(signal.SIGKILL)
    program.wait()
    dreams = next(cut.glob("dreams*.json"))
    before = dreams.read_bytes()
    assert not (cut / "weights.pt").exists()
    assert start(cut, False).wait() == 0
    assert dreams.read_bytes() == before
    one, other = (torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, cut))
    assert torch.equal(one, other)


def test_a_rivals_own_loss_is_asked_for_once_a_later_task_with_the_model_as_it_was(tmp_path, readable):
    seen = []

    def also(loss, *, model, tasks, t, folder):
        seen.append((t, torch.cat([p.detach().flatten() for p in model.parameters()])))
        return lambda model, batch: 0.0 * loss(model, batch)  # nothing is learnt

    found = learn(tmp_path, gamma=0.5, also=also)
    before = torch.cat([p.flatten() for p in small(0).parameters()])
    assert [t for t, _ in seen] == [1] and torch.equal(seen[0][1], before)
    assert found.metrics["moved"] == pytest.approx(float((weights(found) - before).norm()), rel=1e-4)
    assert found.metrics["moved"] < learn(tmp_path / "b", gamma=0.5).metrics["moved"]
