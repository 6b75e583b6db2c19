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
        self.labels, self.ids = self.y, torch.arange(n) + 50 if ids is None else ids
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
def test_neither_reading_order_nor_ids_nor_order_of_views_matters(order, ids, views):
    teacher, data = wrap(), Rows(order=torch.tensor(order), ids=torch.tensor(ids))
    cached = kd.cache_teacher(teacher, data, views=views)
    for view in (0, 1):
        assert error(cached, teacher, data, view) < 1e-6
    batch = next(data.view_batches(0))
    del batch["view"]  # no view is view 0, wherever view 0 stands in the pack
    assert torch.allclose(cached(batch), teacher(batch), atol=1e-6)


def test_without_a_view_a_pack_of_mirror_images_is_refused():
    cached = kd.cache_teacher(wrap(), Rows(), views=(1,))
    with pytest.raises(ValueError, match="in view 0"):
        cached({"id": torch.tensor([50])})


@pytest.mark.parametrize("view", [-1, -2, 2, 9])
def test_a_view_out_of_range_is_never_another_one(view):
    cached = kd.cache_teacher(wrap(), Rows(), views=(0, 1))
    with pytest.raises(ValueError, match=f"id 51 in view {view}:"):
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
    for what in ("accuracy", "confidence"):
        assert first.card[what] == pytest.approx(second.card[what], abs=1e-4)


# --- data whose answers cannot be kept ---


def test_random_augmentation_is_refused():
    with pytest.raises(ValueError, match="another one each time.*pass the data set itself"):
        kd.cache_teacher(wrap(), Rows(noise=0.1))


def test_data_that_ignore_the_view_are_refused():
    data = Rows()
    read = data.view_batches
    data.view_batches = lambda view=0: read(0)
    with pytest.raises(ValueError, match="view 1 of the data"):
        kd.cache_teacher(wrap(), data, views=(0, 1))


def test_data_that_stop_early_are_refused():
    data = Rows()
    read = data.view_batches
    data.view_batches = lambda view=0: iter([next(read(view))])
    with pytest.raises(ValueError, match="gave 5 examples, not each of its 12 ids once"):
        kd.cache_teacher(wrap(), data)


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
    assert error(kd.cache_teacher(teacher, data), teacher, data) < 1e-6  # the changed teacher was asked


@pytest.mark.parametrize("content", ['{"teacher": "t", ', "[]", "null", "{}", "\xff\xfe"])
def test_a_card_that_is_none_is_refused_or_made_again(content, capsys):
    teacher, data = wrap(), Rows()
    folder = kd.cache_teacher(teacher, data).folder
    (folder / "card.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError):
        kd.CachedTeacher.load(folder, data)
    assert error(kd.cache_teacher(teacher, data), teacher, data) < 1e-6
    assert "asked again" in capsys.readouterr().out


@pytest.mark.parametrize("where", [0, 8, 40, -1])
def test_one_flipped_bit_anywhere_is_refused(where):
    data = Rows()
    folder = kd.cache_teacher(wrap(), data).folder
    content = bytearray((folder / "pack.safetensors").read_bytes())
    content[where] ^= 1
    (folder / "pack.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        kd.CachedTeacher.load(folder, data)


def test_answers_about_rows_numbered_anew_are_refused():
    data = Rows()
    folder = kd.cache_teacher(wrap(), data).folder
    part = Rows(ids=torch.arange(12))
    with pytest.raises(ValueError, match="holds answers about .* not about these 12 examples"):
        kd.CachedTeacher.load(folder, part)
    assert len(kd.CachedTeacher.load(folder, data).ids) == 12


class Listed(nn.Module):
    """Its members are in a list, a dictionary and a plain attribute, where torch does not look."""

    def __init__(self, seed):
        super().__init__()
        self.kept, self.more = [net(seed)], {"shift": torch.ones(4)}
        self.factor = torch.full((4,), 2.0)

    def forward(self, x):
        return self.factor * self.kept[0](x) + self.more["shift"]


def test_what_torch_overlooks_is_frozen_counted_and_watched():
    first, second = kd.Teacher(Listed(0), name="t"), kd.Teacher(Listed(1), name="t")
    assert not any(m.training for m in first.model.kept[0].modules()) and first.fingerprint != second.fingerprint
    batch = next(Rows().view_batches(0))
    assert torch.equal(first(batch), first(batch))
    before = first.fingerprint
    first.model.factor.mul_(3)
    with pytest.raises(RuntimeError, match="were changed"):
        first(batch)
    assert first.fingerprint != before
    second.model.kept[0].train()
    with pytest.raises(RuntimeError, match="training mode"):
        second(batch)


def test_half_precision_and_functions():
    data, half = Rows(), wrap(net().bfloat16())
    assert half(next(data.view_batches(0))).dtype == torch.float32
    with pytest.raises(TypeError, match="'f' is a function; wrap it as an nn.Module"):
        kd.Teacher(lambda x: x, name="f")


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


def test_infinity_is_refused_but_a_masked_class_is_kept():
    model = net()
    model[4].bias[0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        kd.cache_teacher(wrap(model), Rows())
    model[4].bias[0] = -float("inf")
    cached = kd.cache_teacher(wrap(model), Rows())
    assert (cached({"id": torch.tensor([50])})[0, 0] == -float("inf")).item()


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

    with pytest.raises(TypeError, match="answers a tuple; wrap its model"):
        wrap(Pair())(next(Rows().view_batches(0)))
