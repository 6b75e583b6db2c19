"""Cached answers under attack: data that misbehave, cards that lie, copies, a full disk. Right, or refused by name."""

import copy
import errno
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import kdlib as kd
from kdlib import files


class Rows:
    """The least that a data set must offer; read in any ``order``."""

    name = "rows"

    def __init__(self, n=12, order=None, noise=0.0, ids=None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(n, 3, generator=generator), torch.arange(n) % 4
        self.ids = torch.arange(n) + 50 if ids is None else ids
        self.order = torch.arange(n) if order is None else order
        self.noise, self.fingerprint = noise, f"rows {n} {self.order.tolist()} {noise} {self.ids.tolist()}"

    def view_batches(self, view=0, batch_size=5):
        for rows in self.order.split(batch_size):
            x = self.x[rows].flip(1) if view else self.x[rows]
            x = x + self.noise * torch.randn_like(x)
            yield {"x": x, "y": self.y[rows], "id": self.ids[rows], "view": torch.full_like(rows, view)}


def net(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, classes)
    ).requires_grad_(False)


def wrap(model=None, **more):
    return kd.Teacher(model or net(), name="t", **more)


def error(cached, teacher, data, view=0):
    return max((cached(batch) - teacher(batch)).abs().max().item() for batch in data.view_batches(view))


# --- the right answer for the right example ---


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), ids=st.permutations(range(100, 112)), views=st.permutations([0, 1]))
def test_neither_reading_order_nor_ids_nor_order_of_views_matters(order, ids, views, tmp_path_factory):
    teacher, data = wrap(), Rows(order=torch.tensor(order), ids=torch.tensor(ids))
    cached = kd.cache_teacher(teacher, data, views=views, folder=tmp_path_factory.mktemp("pack") / "p")
    for view in (0, 1):
        assert error(cached, teacher, data, view) < 1e-6
    batch = next(data.view_batches(0))
    del batch["view"]  # no view is view 0, wherever view 0 stands in the pack
    assert torch.allclose(cached(batch), teacher(batch), atol=1e-6)


def test_without_a_view_a_pack_of_mirror_images_is_refused():
    cached = kd.cache_teacher(wrap(), Rows(), views=(1,))
    with pytest.raises(ValueError, match="asks for view 0"):
        cached({"id": torch.tensor([50])})


@pytest.mark.parametrize("view", [-1, -2, 2, 9])
def test_a_view_out_of_range_is_never_another_one(view):
    cached = kd.cache_teacher(wrap(), Rows(), views=(0, 1))
    with pytest.raises(ValueError, match=f"asks for view {view};"):
        cached({"id": torch.tensor([50, 51]), "view": torch.tensor([0, view])})


def test_ids_with_gaps_are_known_and_the_gaps_are_not():
    data = Rows(ids=torch.arange(12) * 3)
    teacher = wrap()
    cached = kd.cache_teacher(teacher, data)
    assert error(cached, teacher, data) < 1e-6
    with pytest.raises(ValueError, match="id 4 "):
        cached({"id": torch.tensor([3, 4])})


def test_the_card_describes_the_answers_whatever_the_reading_order():
    teacher, here = wrap(), Rows()
    there = Rows(order=torch.tensor([7, 2, 9, 0, 11, 4, 1, 10, 3, 8, 5, 6]))
    first, second = kd.cache_teacher(teacher, here), kd.cache_teacher(teacher, there)
    for what in ("accuracy", "ece", "confidence"):
        assert first.card[what] == pytest.approx(second.card[what], abs=1e-4)


# --- data whose answers cannot be kept ---


@pytest.mark.parametrize(
    "data", [Rows(noise=0.1), type("Cropped", (Rows,), {"augment": True})()], ids=["noise", "augment"]
)
def test_random_augmentation_is_refused(data):
    with pytest.raises(ValueError, match="augment.*pass the data set itself"):
        kd.cache_teacher(wrap(), data)


def test_data_that_ignore_the_view_are_refused():
    data = Rows()
    read = data.view_batches
    data.view_batches = lambda view=0: read(0)
    with pytest.raises(ValueError, match="asked for view 1"):
        kd.cache_teacher(wrap(), data, views=(0, 1))


def test_data_that_stop_early_are_refused():
    data = Rows()
    read = data.view_batches
    data.view_batches = lambda view=0: iter([next(read(view))])
    with pytest.raises(ValueError, match="gave 5 examples, not each of its 12 ids once"):
        kd.cache_teacher(wrap(), data)


def test_ids_too_far_apart_are_refused_before_the_teacher_is_asked(monkeypatch):
    monkeypatch.setattr(kd.Teacher, "__call__", lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(ValueError, match="spread over 1,099,511,627,777 numbers"):
        kd.cache_teacher(wrap(), Rows(2, ids=torch.tensor([0, 2**40])))


def test_data_need_no_name():
    class Nameless(Rows):
        @property
        def name(self):
            raise AttributeError

    assert kd.cache_teacher(wrap(), Nameless()).card["data"] == "Nameless"


# --- a stale pack is not served ---


def test_other_inputs_are_another_pack():
    data = Rows()
    plain, scaled = wrap(), wrap(inputs=lambda batch: (2 * batch["x"],))
    first, second = kd.cache_teacher(plain, data), kd.cache_teacher(scaled, data)
    assert first.fingerprint != second.fingerprint and error(second, scaled, data) < 1e-6


def test_weights_written_past_torchs_counters_are_noticed_before_a_pack_is_served():
    teacher, data = wrap(), Rows()
    kd.cache_teacher(teacher, data)
    teacher.model[0].weight.data.mul_(2)  # as many moving averages of weights do
    with pytest.raises(RuntimeError, match="were changed"):
        kd.cache_teacher(teacher, data)


@pytest.mark.parametrize("content", ['{"teacher": "t", ', "[]", "null", "{}", "\xff\xfe"])
def test_a_card_that_is_none_is_refused_or_made_again(content, capsys):
    teacher, data = wrap(), Rows()
    folder = kd.cache_teacher(teacher, data).folder
    (folder / "card.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="damaged or was edited"):
        kd.CachedTeacher.load(folder)
    assert error(kd.cache_teacher(teacher, data), teacher, data) < 1e-6
    assert "asked again" in capsys.readouterr().out


@pytest.mark.parametrize("claim", [{"views": [1, 0]}, {"vocabulary": 5}, {"accuracy": 0.99}, {"licence": "CC0"}])
def test_a_card_that_was_edited_is_refused(claim):
    folder = kd.cache_teacher(wrap(), Rows(), views=(0, 1)).folder
    files.write_json(folder / "card.json", files.read_json(folder / "card.json") | claim)
    with pytest.raises(ValueError, match="damaged or was edited"):
        kd.CachedTeacher.load(folder)


@pytest.mark.parametrize("where", [0, 8, 40, -1])
def test_one_flipped_bit_anywhere_is_refused(where):
    folder = kd.cache_teacher(wrap(), Rows()).folder
    content = bytearray((folder / "pack.safetensors").read_bytes())
    content[where] ^= 1
    (folder / "pack.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        kd.CachedTeacher.load(folder)


# --- a full disk ---


@pytest.mark.parametrize("target", ["pack.safetensors", "card.json"])
def test_a_disk_that_fills_up_leaves_neither_pack_nor_part(target, monkeypatch):
    replace = os.replace

    def full(source, to):
        if str(to).endswith(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, to)

    teacher, data = wrap(), Rows()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            kd.cache_teacher(teacher, data)
    left = [path.name for path in files.home().rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    assert error(kd.cache_teacher(teacher, data), teacher, data) < 1e-6


# --- what is stored ---


def test_logits_too_large_for_half_precision_are_refused():
    model = net()
    model[4].weight.mul_(1e6)
    with pytest.raises(ValueError, match="do not fit into torch.float16"):
        kd.cache_teacher(wrap(model), Rows(), dtype=torch.float16)


def test_infinity_is_refused_but_a_masked_class_is_kept():
    model = net()
    model[4].bias[0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        kd.cache_teacher(wrap(model), Rows())
    model[4].bias[0] = -float("inf")
    cached = kd.cache_teacher(wrap(model), Rows())
    assert (cached({"id": torch.tensor([50])})[0, 0] == -float("inf")).item()


@pytest.mark.parametrize("k", [0, -1])
def test_keeping_no_logits_is_refused(k):
    with pytest.raises(ValueError, match=f"top_k is {k}"):
        kd.cache_teacher(wrap(), Rows(), top_k=k)


def test_top_k_is_the_teachers_head_and_an_even_tail():
    teacher, data = wrap(net(classes=9)), Rows()
    sparse = kd.cache_teacher(teacher, data, top_k=3)
    for batch in data.view_batches(0):
        p, q = teacher(batch).softmax(-1), sparse(batch).softmax(-1)
        head, where = p.topk(3)
        tail = torch.ones_like(q, dtype=torch.bool).scatter(-1, where, False)
        assert torch.allclose(q.gather(-1, where), head, atol=1e-5)
        assert torch.allclose(q[tail].view(-1, 6), ((1 - head.sum(-1)) / 6)[:, None].expand(-1, 6), atol=1e-5)


def test_a_top_k_pack_is_small_in_memory_too():
    class Vocabulary(Rows):
        pass

    data, classes = Vocabulary(200), 5_000
    cached = kd.cache_teacher(wrap(net(classes=classes)), data, top_k=4)
    held = sum(t.numel() * t.element_size() for t in _tensors(cached))
    assert held < 0.05 * 200 * classes * 4  # of the dense table
    assert cached(next(data.view_batches(0))).shape == (5, classes)


def _tensors(cached):
    for value in vars(cached).values():
        yield from (v for v in (value.values() if isinstance(value, dict) else [value]) if isinstance(v, torch.Tensor))


# --- copies, as they go to other processes ---


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_a_copied_teacher_answers_and_still_guards_itself(copied):
    model = net()
    model.load_state_dict(net(3).state_dict())  # counters of changes above zero, which a copy does not have
    teacher, batch = wrap(model), next(Rows().view_batches(0))
    twin = copied(teacher)
    assert torch.equal(twin(batch), teacher(batch)) and twin.fingerprint == teacher.fingerprint
    twin.model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="were changed"):
        twin(batch)


def test_a_copy_does_not_launder_a_changed_teacher():
    teacher = wrap()
    teacher.model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="were changed"):
        pickle.dumps(teacher)


def test_a_layer_put_in_place_of_another_is_noticed():
    teacher = wrap()
    teacher.model[4] = nn.Linear(8, 4).requires_grad_(False).eval()
    with pytest.raises(RuntimeError, match="were changed"):
        teacher(next(Rows().view_batches(0)))


def test_answers_that_are_no_logits_are_named():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="answers a tuple, not logits"):
        wrap(Pair())(next(Rows().view_batches(0)))
