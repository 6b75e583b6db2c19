"""Teachers stay as they are; cached answers are the live ones, found by id, or refused."""

import errno
import multiprocessing
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdlib as kd
from kdlib import files
from kdlib.data.images import ImageSet


def image_set(n=40, side=8, seed=0, first_id=100):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 4
    return ImageSet(
        images, labels, torch.randperm(n, generator=generator) + first_id, tuple("abcd"), (0.5,) * 3, (0.25,) * 3, "toy"
    )


def net(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
    )  # fmt: skip


@pytest.fixture
def teacher():
    return kd.Teacher(net(), name="toy teacher", classes="abcd")


@pytest.fixture
def data():
    return image_set()


# --- live ---


def test_it_stays_in_evaluation_mode_and_its_buffers_stand_still(teacher, data):
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    teacher.train()
    student = net(1).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for batch in data.batches(8, flip=True).epoch(0):
        loss = kd.losses.kd_loss(student(batch["x"]), teacher(batch), temperature=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters())
    assert student.training


def test_two_answers_to_one_question_are_equal(teacher, data):
    batch = next(iter(data.view_batches(0, 8)))
    assert torch.equal(teacher(batch), teacher(batch)) and not teacher(batch).requires_grad


def test_putting_its_model_in_training_mode_is_noticed(teacher, data):
    teacher.model[1].train()
    with pytest.raises(RuntimeError, match="'toy teacher' was put in training mode"):
        teacher(next(iter(data.view_batches(0))))


def test_changing_its_weights_is_noticed(teacher, data):
    with torch.no_grad():
        teacher.model[0].weight += 1
    with pytest.raises(RuntimeError, match="changed"):
        teacher(next(iter(data.view_batches(0))))


def test_letting_it_take_gradients_is_noticed(teacher, data):
    teacher.model[0].weight.requires_grad_()
    with pytest.raises(RuntimeError, match="take gradients"):
        teacher(next(iter(data.view_batches(0))))


def test_a_student_that_holds_it_does_not_own_its_weights(teacher):
    student = net(1)
    own = {name for name, _ in student.named_parameters()}
    student.teacher = teacher
    assert {name for name, _ in student.named_parameters()} == own and set(student.state_dict()) == set(
        net(1).state_dict()
    )
    student.train()
    assert not teacher.model.training


def test_outputs_of_transformers_are_unwrapped():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": self.head(input_ids.float() * attention_mask).half()})()

    inputs = lambda b: {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}  # noqa: E731
    teacher = kd.Teacher(Wrapped(), name="t", inputs=inputs)
    logits = teacher({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)})
    assert logits.dtype == torch.float32 and logits.shape == (2, 2)


def test_fingerprint_follows_the_weights(teacher):
    assert teacher.fingerprint == kd.Teacher(net(), name="another name").fingerprint
    assert teacher.fingerprint != kd.Teacher(net(1), name="toy teacher").fingerprint


# --- cached ---


def test_cached_answers_are_the_live_ones_after_any_shuffle(teacher, data):
    cached = kd.cache_teacher(teacher, data, views=(0, 1))
    seen = set()
    for seed in (1, 2):
        for epoch in (0, 1):
            for batch in data.batches(7, seed=seed, flip=True).epoch(epoch):
                assert torch.allclose(cached(batch), teacher(batch), atol=1e-5)
                seen |= set(batch["view"].tolist())
    assert seen == {0, 1}


def test_a_mirrored_image_has_another_answer(teacher, data):
    cached = kd.cache_teacher(teacher, data, views=(0, 1))
    here, there = (next(iter(data.view_batches(view, 8))) for view in (0, 1))
    assert (cached(here) - cached(there)).abs().max() > 1e-3


def test_the_second_time_the_teacher_is_not_asked(teacher, data, monkeypatch):
    first = kd.cache_teacher(teacher, data)
    monkeypatch.setattr(kd.Teacher, "__call__", lambda *_: pytest.fail("the teacher was asked again"))
    again = kd.cache_teacher(teacher, data)
    assert again.fingerprint == first.fingerprint


def test_a_part_of_the_data_in_another_order_finds_its_answers(teacher, data):
    cached = kd.cache_teacher(teacher, data)
    part = data.take(torch.tensor([17, 3, 30]))
    batch = next(iter(part.view_batches(0)))
    assert torch.allclose(cached(batch), teacher(batch), atol=1e-5)


@pytest.mark.parametrize("what", ["weights", "data", "labels", "size", "views"])
def test_other_circumstances_are_another_pack(teacher, data, what):
    key = kd.cache_teacher(teacher, data).fingerprint
    other = {
        "weights": lambda: kd.cache_teacher(kd.Teacher(net(5), name="toy teacher"), data),
        "data": lambda: kd.cache_teacher(teacher, image_set(seed=9)),
        "size": lambda: kd.cache_teacher(teacher, data.resize(6)),
        "views": lambda: kd.cache_teacher(teacher, data, views=(0, 1)),
        "labels": lambda: data.labels[:3].add_(1) is None or kd.cache_teacher(teacher, data),  # changed in place
    }[what]()
    assert other.fingerprint != key


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_pack_is_said_and_made_again(teacher, data, damage, capsys):
    cached = kd.cache_teacher(teacher, data)
    pack = cached.folder / "pack.safetensors"
    content = bytearray(pack.read_bytes())
    if damage == "cut":
        pack.write_bytes(content[:-50])
    elif damage == "flip":
        content[-5] ^= 1
        pack.write_bytes(content)
    else:
        pack.unlink()
    again = kd.cache_teacher(teacher, data)
    assert "asked again" in capsys.readouterr().out
    batch = next(iter(data.view_batches(0)))
    assert torch.allclose(again(batch), teacher(batch), atol=1e-5)


def test_a_damaged_pack_that_was_handed_on_is_refused(teacher, data):
    cached = kd.cache_teacher(teacher, data)
    pack = cached.folder / "pack.safetensors"
    content = bytearray(pack.read_bytes())
    content[-5] ^= 1
    pack.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        kd.CachedTeacher.load(cached.folder, data)


def test_a_pack_for_other_data_is_refused(teacher, data):
    cached = kd.cache_teacher(teacher, data)
    assert kd.CachedTeacher.load(cached.folder, data).classes == tuple("abcd")
    with pytest.raises(ValueError, match="answers about 'toy'"):
        kd.CachedTeacher.load(cached.folder, image_set(seed=9))


def test_no_pack_there(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="no pack"):
        kd.CachedTeacher.load(tmp_path, data)


def test_an_unknown_id_is_named(teacher, data):
    cached = kd.cache_teacher(teacher, data)
    for stranger in (3, 10_000, -7):
        with pytest.raises(ValueError, match=f"id {stranger} "):
            cached({"id": torch.tensor([100, stranger])})


def test_an_unknown_view_is_named(teacher, data):
    cached = kd.cache_teacher(teacher, data)
    with pytest.raises(ValueError, match="view 1.*views="):
        cached({"id": torch.tensor([100]), "view": torch.tensor([1])})


def test_batches_are_refused_in_place_of_the_data(teacher, data):
    with pytest.raises(ValueError, match="pass the data set itself"):
        kd.cache_teacher(teacher, data.batches(8, flip=True))


def test_repeated_ids_are_refused(teacher, data):
    with pytest.raises(ValueError, match="an id of its own"):
        kd.cache_teacher(teacher, data.take(torch.tensor([1, 1])))


def test_nan_answers_are_refused_and_leave_nothing(data):
    model = net()
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        kd.cache_teacher(kd.Teacher(model, name="sick"), data)
    assert not list((files.home() / "teachers").glob("sick*/card.json"))


def test_a_full_disk_leaves_nothing_half_written(teacher, data, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(OSError, match="MB are free"):
            kd.cache_teacher(teacher, data)
    left = [p.name for p in (files.home() / "teachers").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []
    batch = next(iter(data.view_batches(0)))
    assert torch.allclose(kd.cache_teacher(teacher, data)(batch), teacher(batch), atol=1e-5)


def test_the_card_says_what_it_is(teacher, data):
    card = kd.cache_teacher(teacher, data).card
    logits = kd.metrics.predict(teacher.model, data)
    assert card["accuracy"] == pytest.approx(kd.metrics.accuracy(logits, data.labels), abs=1e-4)
    assert (card["teacher"], card["data"], card["examples"], card["views"]) == ("toy teacher", "toy", 40, [0])


class Counting(nn.Module):
    """Answers like its inner model, and writes a line to a file each time it is asked."""

    def __init__(self, path):
        super().__init__()
        self.inner, self.path = net(), path

    def forward(self, x):
        with open(self.path, "a") as file:
            file.write("asked\n")
        return self.inner(x)


def _cache_in_process(path, home, out):
    os.environ["KDLIB_HOME"] = home
    torch.set_num_threads(1)
    data = image_set(64)
    cached = kd.cache_teacher(kd.Teacher(Counting(path), name="both", inputs=_slowly), data)
    files.write_tensors(out, {"logits": cached(next(iter(data.view_batches(0))))})


def _slowly(batch):
    import time

    time.sleep(0.5)
    return (batch["x"],)


def test_two_processes_at_once_ask_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    outs = [tmp_path / f"{i}.safetensors" for i in range(2)]
    workers = [
        spawn.Process(target=_cache_in_process, args=(str(tmp_path / "log"), str(tmp_path), out)) for out in outs
    ]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    first, second = (files.read_tensors(out)["logits"] for out in outs)
    assert (tmp_path / "log").read_text().count("asked") == 1
    live = kd.Teacher(net(), name="x")(next(iter(image_set(64).view_batches(0))))
    assert torch.equal(first, second) and torch.allclose(first, live, atol=1e-5)


def test_a_student_cannot_tell_which_teacher_it_has(teacher, data):
    results = []
    for source in (teacher, kd.cache_teacher(teacher, data, views=(0, 1))):
        student = net(2)
        student[3].p = 0.0
        loss_fn = lambda m, b, source=source: (F.mse_loss(m(b["x"]), source(b)), {})  # noqa: E731
        kd.fit(
            student,
            loss_fn,
            data.batches(8, flip=True),
            epochs=2,
            optimizer=lambda p: torch.optim.SGD(p, 0.05),
            progress=False,
        )
        results.append(kd.metrics.predict(student, data))
    assert torch.allclose(*results, atol=1e-4)
