"""Image sets: what a batch holds, what `view` promises, draws, class folders, and errors that name the file."""

from __future__ import annotations

import shutil
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from PIL import Image
from torchvision.io import decode_image, decode_jpeg, read_file, write_jpeg, write_png

import kdlib as kd
from kdlib.data.images import SETS, ImageSet
from kdlib.data.rows import FIRST_ID, stratified


def toy(n=40, classes=4, side=6, channels=3) -> ImageSet:
    g = torch.Generator().manual_seed(n)
    return ImageSet(
        images=torch.randint(256, (n, channels, side, side), generator=g, dtype=torch.uint8),
        labels=torch.arange(n) % classes,
        ids=torch.arange(n) + 500,
        classes=[f"c{c}" for c in range(classes)],
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.3, 0.25)[:channels],
        name="toy",
    )


def normalised(data):
    return torch.cat([batch["x"] for batch in data.view_batches(0)])


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def in_id_order(batches):
    whole = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    order = whole["id"].argsort()
    return {key: value[order] for key, value in whole.items()}


# --- batches -------------------------------------------------------------------------------------------------


def test_a_batch_is_the_normalised_pixels_channels_last():
    data = toy()
    batch = next(data.batches(8, shuffle=False).epoch(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    torch.testing.assert_close(batch["x"], (data.images[:8] / 255 - mean) / std)
    assert batch["x"].dtype == torch.float32 and batch["x"].is_contiguous(memory_format=torch.channels_last)
    assert batch["id"].tolist() == list(range(500, 508)) and batch["y"].tolist() == data.labels[:8].tolist()
    assert batch["view"].tolist() == [0] * 8


def test_normalising_does_not_depend_on_the_memory_format_of_the_pixels():
    data = toy()
    last = replace(data, images=data.images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(normalised(last), normalised(data)) and last.fingerprint == data.fingerprint


@pytest.mark.parametrize("crop", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_a_function_of_seed_epoch_and_number_alone(flip, crop):
    batches = toy().batches(16, seed=3, flip=flip, crop=crop)
    whole = list(batches.epoch(5))
    torch.manual_seed(1234)
    torch.rand(99)
    state = torch.get_rng_state()
    for start in range(len(batches) + 1):
        assert all(same(a, b) for a, b in zip(batches.epoch(5, start), whole[start:], strict=True))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert [len(b["y"]) for b in whole] == [16, 16, 8] and len(batches) == 3
    other_epoch, other_seed = (
        list(batches.epoch(6)),
        list(toy().batches(16, seed=4, flip=flip, crop=crop).epoch(5)),
    )
    assert not torch.equal(whole[0]["id"], other_epoch[0]["id"])
    assert not torch.equal(whole[0]["id"], other_seed[0]["id"])


def test_every_image_comes_once_an_epoch_with_its_label():
    data = toy(37)
    seen = in_id_order(list(data.batches(8, seed=1, flip=True).epoch(0)))
    assert torch.equal(seen["id"], data.ids) and torch.equal(seen["y"], data.labels)
    assert [len(b["y"]) for b in data.batches(8).epoch(0)] == [8, 8, 8, 8, 5]


@examples(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 500))
def test_view_1_is_exactly_the_mirrored_image(seed, epoch):
    data = toy()
    seen = in_id_order(list(data.batches(16, seed=seed, flip=True).epoch(epoch)))
    plain, mirrored = (torch.cat([b["x"] for b in data.view_batches(view, 16)]) for view in (0, 1))
    assert torch.equal(mirrored, plain.flip(-1))
    expected = torch.where(seen["view"].view(-1, 1, 1, 1) == 1, mirrored, plain)
    assert torch.equal(seen["x"], expected)


def test_flips_are_as_frequent_as_not_and_differ_between_epochs():
    batches = toy(400).batches(100, flip=True)
    views = torch.stack([in_id_order(list(batches.epoch(e)))["view"] for e in range(10)])
    assert abs(views.float().mean() - 0.5) < 0.04
    assert (views.sum(0) > 0).float().mean() > 0.98 and (views.sum(0) < 10).float().mean() > 0.98


def test_a_crop_is_the_image_moved_with_black_from_outside():
    data = toy(300, side=5)
    batches = data.batches(300, crop=2)
    seen = in_id_order(list(batches.epoch(0)))
    black = -torch.tensor(data.mean) / torch.tensor(data.std)
    padded = black.view(1, 3, 1, 1).expand(300, 3, 9, 9).clone()
    padded[:, :, 2:7, 2:7] = normalised(data)
    windows = torch.stack([padded[:, :, t : t + 5, left : left + 5] for t in range(5) for left in range(5)])
    hits = (windows - seen["x"]).abs().amax((2, 3, 4)) < 1e-5
    assert hits.any(0).all(), "some image is no window of itself"
    assert hits.any(1).all(), "some of the 25 positions never came"
    assert next(batches.epoch(0))["x"].is_contiguous(memory_format=torch.channels_last)


def test_a_mirrored_and_cropped_image_is_a_crop_of_the_mirrored_one():
    data = toy(60, side=5)
    both = in_id_order(list(data.batches(60, seed=2, flip=True, crop=1).epoch(0)))
    assert (both["view"] == -1).all(), "no stored answer is about a cropped picture"
    padded = [torch.nn.functional.pad(images, (1,) * 4) for images in (data.images, data.images.flip(-1))]
    windows = [p[:, :, t : t + 5, left : left + 5] for p in padded for t in range(3) for left in range(3)]
    moved = [normalised(replace(data, images=window)) for window in windows]
    assert torch.stack([(m == both["x"]).flatten(1).all(1) for m in moved]).any(0).all()


def test_wrong_sizes_and_views_are_named():
    data = toy()
    with pytest.raises(ValueError, match="batch_size is 0"):
        data.batches(0)
    with pytest.raises(ValueError, match="toy is empty; no batch"):
        data.take(slice(0, 0)).batches(64)
    with pytest.raises(ValueError, match="view is 2"):
        next(data.view_batches(2))
    with pytest.raises(ValueError, match="41 examples asked for, 40 are there"):
        data.sample(41, 0)
    with pytest.raises(ValueError, match="side is 0"):
        data.resize(0)


def test_fit_takes_the_batches():
    data = toy(24, side=8)
    model = kd.models.small_cnn(4, channels=(4,))
    loss = lambda m, b: (torch.nn.functional.cross_entropy(m(b["x"]), b["y"]), {})  # noqa: E731
    fit = kd.fit(
        model,
        loss,
        data.batches(10, flip=True),
        epochs=2,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        progress=False,
    )
    assert fit.steps == 6
    assert kd.metrics.predict(model, data).shape == (24, 4)


# --- draws ---------------------------------------------------------------------------------------------------


@examples(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_draws_are_stratified_and_exact(counts, share, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = int(share * len(labels))
    rows = stratified(labels, n, seed)
    assert len(rows) == n == len(rows.unique())
    for c, count in enumerate(counts):
        if len(labels):
            assert abs(int((labels[rows] == c).sum()) - n * count / len(labels)) < 1
    assert torch.equal(rows, stratified(labels, n, seed))


def test_split_and_sample_are_disjoint_deterministic_and_keep_the_ids():
    data = toy(200)
    rest, held_out = data.split(60, seed=1)
    again = data.split(60, seed=1)[1]
    assert again.fingerprint == held_out.fingerprint != data.split(60, seed=2)[1].fingerprint
    assert not set(rest.ids.tolist()) & set(held_out.ids.tolist())
    assert sorted(rest.ids.tolist() + held_out.ids.tolist()) == data.ids.tolist()
    assert held_out.labels.bincount().tolist() == [15] * 4
    few = rest.sample(20, seed=0)
    assert few.labels.bincount().tolist() == [5] * 4 and set(few.ids.tolist()) <= set(rest.ids.tolist())
    for part in (held_out, few, few.resize(3)):
        rows = part.ids - 500
        assert torch.equal(part.labels, data.labels[rows])
    assert torch.equal(few.images, data.images[few.ids - 500])
    assert torch.equal(data.take(data.ids > 690).ids, data.ids[data.ids > 690])


def test_the_fingerprint_sees_pixels_labels_ids_names_and_normalisation():
    data = toy()
    pixels = data.images.clone()
    pixels[3, 0, 0, 0] ^= 1
    changed = [
        replace(data, images=pixels), replace(data, labels=data.labels.flip(0)), replace(data, ids=data.ids + 1),
        replace(data, classes=data.classes[::-1]), replace(data, mean=(0.4, 0.5, 0.61)),
    ]  # fmt: skip
    assert len({d.fingerprint for d in (data, *changed)}) == 6
    prints = {
        data.batches(8, **kw).fingerprint for kw in ({}, {"seed": 1}, {"flip": True}, {"crop": 1}, {"shuffle": False})
    }
    assert len(prints) == 5


def test_changes_in_place_are_seen_and_twins_are_told_apart():
    data = toy()
    before, batches = data.fingerprint, data.batches(8)
    prints = {before, batches.fingerprint}
    data.labels[0] = 3
    prints |= {data.fingerprint, batches.fingerprint}
    data.images[5, 0, 0, 0] ^= 255
    prints |= {data.fingerprint, batches.fingerprint}
    assert len(prints) == 6
    assert next(data.batches(40, shuffle=False).epoch(0))["y"][0] == 3
    data.images[5, 0, 0, 0] ^= 255
    data.labels[0] = 0
    assert data.fingerprint == before


@pytest.mark.parametrize(
    "given", [[0, 1, 2, 3], np.arange(4), np.arange(4, dtype=np.int32), torch.arange(4).to(torch.uint8)]
)
def test_labels_of_any_whole_numbers_are_taken(given):
    data = replace(toy(4), labels=given, ids=[7, 8, 9, 10], images=toy(4).images.numpy())
    assert data.labels.dtype == data.ids.dtype == torch.int64 and data.labels.tolist() == [0, 1, 2, 3]
    assert data.take(torch.tensor([2])).ids.tolist() == [9]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"labels": [0, 1, 2]}, "toy has 4 images, 3 labels, 4 ids"),
        ({"images": toy(6).images}, "toy has 6 images, 4 labels, 4 ids"),
        ({"labels": [0, 1, 2, 4]}, "toy, row 3: the label is 4; it must be 0 to 3"),
        ({"labels": [0, -1, 2, 3]}, "row 1: the label is -1"),
        ({"labels": ["a", "b", "c", "d"]}, "labels must be numbers"),
        ({"labels": np.array(["a", "b", "c", "d"])}, "labels must be numbers"),
        ({"labels": [True, False, True, False]}, "labels must be numbers"),
        ({"labels": [0.0, 1.0, 2.0, 3.0]}, "labels must be numbers"),
        ({"labels": torch.eye(4)}, "labels must be numbers"),
        ({"images": toy(4).images / 255}, r"images are torch.float32 \[4, 3, 6, 6\]; they must be uint8"),
        ({"images": toy(4).images[:, :1]}, r"\[4, 1, 6, 6\]; they must be uint8 \[N, 3, H, W\]"),
        ({"images": toy(4).images[:, 0]}, "must be uint8"),
    ],
)
def test_a_set_that_is_none_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        replace(toy(4), **change)
    assert replace(toy(4), labels=[-100, 1, 2, -100]).labels.tolist() == [-100, 1, 2, -100], "unlabelled examples"


def test_resize_is_the_mean_over_areas():
    data = toy(side=8)
    small = data.resize(4)
    blocks = data.images.float().view(40, 3, 4, 2, 4, 2).mean((3, 5))
    assert (small.images.float() - blocks).abs().max() <= 0.5 and small.images.dtype == torch.uint8
    assert data.resize(8) is data and data.resize(12).images.shape == (40, 3, 12, 12)
    # Twins: resizing the mirror image is mirroring the resized one, so a twin's cached answers apply at every size.
    mirrored = replace(data, images=data.images.flip(-1))
    assert torch.equal(small.images.flip(-1), mirrored.resize(4).images)


# --- named sets ----------------------------------------------------------------------------------------------


def test_digits_are_embedded_and_split_for_good(monkeypatch):
    monkeypatch.setenv("KDLIB_OFFLINE", "1")
    data = kd.data.images("digits")
    assert (len(data.train), len(data.test)) == (1197, 600) and data.classes == [str(n) for n in range(10)]
    assert sorted(data.train.ids.tolist() + data.test.ids.tolist()) == list(range(1797))
    assert abs(normalised(data.train).mean()) < 0.02 and abs(normalised(data.train).std() - 1) < 0.02
    assert data.test.labels.bincount().max() - data.test.labels.bincount().min() <= 3
    from sklearn.datasets import load_digits

    whole = load_digits()
    row = int(data.test.ids[7])
    assert data.test.labels[7] == whole.target[row]
    torch.testing.assert_close(
        data.test.images[7, 0].float() / 255 * 16, torch.tensor(whole.images[row]).float(), atol=0.04, rtol=0
    )


def write_images(root, part, counts, side=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, count in counts.items():
        (root / part / name).mkdir(parents=True)
        for n in range(count):
            write_png(
                torch.randint(256, (3, side, side), generator=g, dtype=torch.uint8),
                str(root / part / name / f"{n:03}.png"),
            )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("KDLIB_OFFLINE", "1")
    root = tmp_path / "data" / "cifar10"
    write_images(root, "train", {"cat": 4, "airplane": 3})
    write_images(root, "test", {"cat": 2, "airplane": 1}, seed=1)
    return root


def test_class_folders_are_read_in_the_order_of_their_names(folder):
    data = kd.data.images("cifar10")
    assert data.classes == ["airplane", "cat"] and data.train.labels.tolist() == [0] * 3 + [1] * 4
    assert torch.equal(data.train.images[3], decode_image(str(folder / "train" / "cat" / "000.png")))
    assert data.train.ids.tolist() == list(range(7))
    assert data.test.ids.tolist() == [FIRST_ID["test"] + n for n in range(3)]
    assert data.train.mean == SETS["cifar10"][1] and data.train.name == "cifar10/train"
    assert data.train.images.permute(0, 2, 3, 1).is_contiguous()
    write_png(torch.zeros(3, 5, 5, dtype=torch.uint8), str(folder / "train" / "cat" / "000.png"))
    changed = kd.data.images("cifar10").train
    assert changed.images[3].sum() == 0 and changed.fingerprint != data.train.fingerprint


def test_jpegs_are_read_as_by_torchvision(folder):
    """The published numbers rest on these pixels."""
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 2, 2, generator=g) * 255, (5, 5), mode="bilinear")[0]
    write_jpeg(smooth.to(torch.uint8), str(folder / "train" / "airplane" / "000.jpg"), quality=90)
    read = kd.data.images("cifar10").train.images[0]
    assert torch.equal(read, decode_jpeg(read_file(str(folder / "train" / "airplane" / "000.jpg"))))


def test_a_broken_image_and_a_file_that_is_none_are_named(folder):
    path = folder / "train" / "cat" / "001.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cat/001\.png cannot be read as an image.*mend it or take it away"):
        kd.data.images("cifar10")
    path.unlink()
    (folder / "train" / "cat" / "001.heic").write_bytes(b"some other format")
    with pytest.raises(ValueError, match=r"cat/001\.heic cannot be read"):
        kd.data.images("cifar10")


@pytest.mark.parametrize("ending", ["bmp", "gif", "webp", "tif", "ppm"])
def test_other_formats_are_read(folder, ending):
    pixels = np.zeros((5, 5, 3), np.uint8) + np.uint8(85)
    Image.fromarray(pixels).save(
        folder / "train" / "cat" / f"zzz.{ending}", **{"webp": {"lossless": True}}.get(ending, {})
    )
    train = kd.data.images("cifar10").train
    assert len(train) == 8 and train.images[-1].unique().tolist() == [85]


def test_sixteen_bits_are_brought_to_eight(folder):
    ramp = np.linspace(0, 65535, 25).astype(np.uint16)
    Image.fromarray(ramp.reshape(5, 5)).save(folder / "train" / "airplane" / "000.png")
    image = kd.data.images("cifar10").train.images[0]
    assert image[0].flatten().tolist() == (ramp // 256).tolist() and torch.equal(image[0], image[2])
    Image.fromarray(np.zeros((5, 5), np.float32)).save(folder / "train" / "airplane" / "000.tif")
    with pytest.raises(ValueError, match=r"000\.tif cannot be read.*type F"):
        kd.data.images("cifar10")


def test_hidden_files_count_for_nothing_and_links_are_followed(folder, tmp_path):
    plain = kd.data.images("cifar10").train
    shutil.copytree(folder / "train" / "cat", folder / "train" / ".ipynb_checkpoints")
    shutil.copytree(folder / "train" / "cat", folder / "train" / "cat" / ".ipynb_checkpoints")
    (folder / "train" / "cat" / "._000.png").write_bytes(b"a resource fork")
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"no image")
    assert kd.data.images("cifar10").train.fingerprint == plain.fingerprint
    for part in ("train", "test"):
        shutil.move(folder / part / "cat", tmp_path / f"{part}-cats")
        (folder / part / "cat").symlink_to(tmp_path / f"{part}-cats")
    assert kd.data.images("cifar10").train.fingerprint == plain.fingerprint


def test_a_class_without_images_is_named(folder):
    for part in ("train", "test"):
        (folder / part / "dog").mkdir()
    (folder / "train" / "dog" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"no images in .*train/dog"):
        kd.data.images("cifar10")


def test_an_image_of_another_size_and_an_unknown_class_are_named(folder):
    write_images(folder, "test", {"zebra": 1})
    with pytest.raises(ValueError, match="same class folders; only one has zebra"):
        kd.data.images("cifar10")
    shutil.rmtree(folder / "test" / "zebra")
    write_png(torch.zeros(3, 5, 7, dtype=torch.uint8), str(folder / "train" / "cat" / "003.png"))
    with pytest.raises(ValueError, match=r"003\.png has 7x5 pixels, the first image 5x5"):
        kd.data.images("cifar10")


def test_your_own_folder_brings_its_own_statistics(folder):
    data = kd.data.images(folder)
    assert data.train.name == "cifar10/train" and len(data.train) == 7
    x = normalised(data.train).double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_a_val_folder_with_an_images_folder_and_a_grey_image(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "tiny" / part / "n01" / "images").mkdir(parents=True)
        write_png(
            torch.full((1, 6, 6), 7, dtype=torch.uint8), str(tmp_path / "tiny" / part / "n01" / "images" / "a.png")
        )
        (tmp_path / "tiny" / part / "n01" / "n01_boxes.txt").write_text("a.png 0 0 1 1")
    data = kd.data.images(tmp_path / "tiny")
    assert data.classes == ["n01"] and data.train.images.unique().tolist() == [7]
    assert data.test.images.shape == (1, 3, 6, 6)


def test_what_is_missing_is_told_with_folder_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_OFFLINE", "1")
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        kd.data.images("cifar100")
    for part in (str(tmp_path / "cifar100"), "KDLIB_SCALE=smoke", "Go online"):
        assert part in str(error.value)
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"cifar10/val is missing"):
        kd.data.images("cifar10")
    with pytest.raises(ValueError, match="no image set is called 'cifar1O'"):
        kd.data.images("cifar1O")


def test_torchvisions_own_files_are_read(tmp_path, monkeypatch):
    """The official archive's layout, with two batches of the right form in place of the real ones."""
    import pickle

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (6, 3072), generator=g, dtype=torch.uint8)
    lists = {"train_list": [["data_batch_1", None]], "test_list": [["test_batch", None]]}
    for name, part in (("data_batch_1", rows[:4]), ("test_batch", rows[4:])):
        (base / name).write_bytes(pickle.dumps({"data": part.numpy(), "labels": list(range(len(part)))}))
    names = "airplane automobile bird cat".split()
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for name, value in lists.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    data = kd.data.images("cifar10")
    assert torch.equal(data.train.images.flatten(1), rows[:4]) and data.train.labels.tolist() == [0, 1, 2, 3]
    assert data.classes == names and len(data.test) == 2


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_a_rehearsal_plans_the_real_size_with_a_few_images(monkeypatch, tmp_path, name, classes):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    data = kd.data.images(name)
    assert data.train.images.shape == (64, 3, 32, 32) and len(data.classes) == classes
    pool, validation = data.train.split(5_000, seed=0)
    student = pool.sample(2_000, seed=0)
    assert (pool.planned, validation.planned, student.planned) == (45_000, 5_000, 2_000)
    assert not set(pool.ids.tolist()) & set(validation.ids.tolist()) and len(pool) + len(validation) == 64
    others = pool.take(~torch.isin(pool.ids, student.ids))
    assert 0 < len(others) < len(pool)
    batches = student.resize(16).batches(128, flip=True)
    assert len(batches) == 16 and next(batches.epoch(0))["x"].shape == (128, 3, 16, 16)


def test_loading_a_class_first_does_not_hide_the_function():
    assert isinstance(kd.data.ImageSet, type)
    import kdlib.data.images  # noqa: F401
    import kdlib.data.text  # noqa: F401

    assert callable(kd.data.images) and callable(kd.data.text)
