"""Image sets that fit in memory: one uint8 tensor, batches by index, augmentation a whole batch at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib import files, scale
from kdlib.data import sources
from kdlib.data.rows import FIRST_ID, STAND_IN, Batches, Rows, generator

STATISTICS = {  # mean and standard deviation per channel of the training pixels in [0, 1]
    "digits": ((0.305,), (0.376,)),
    "cifar10": (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),  # ImageNet's: what the published ResNets were given
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "tiny_imagenet_100": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
}
SHAPES = {"cifar10": (10, 32, 50_000), "cifar100": (100, 32, 50_000), "tiny_imagenet_100": (100, 64, 50_000)}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True, repr=False)
class ImageSet(Rows):
    """Images with labels and ids.

    Attributes:
        images: uint8 [N, C, H, W]; quickest when channels last in memory.
        labels: int64 [N].
        ids: int64 [N], the row in the original set; ``take``, ``sample``, ``split`` and ``resize`` keep it.
        classes: the class names, in the order of the labels.
        mean, std: per channel, of pixels in [0, 1].
        name: of the set.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    stands_for: int | None = None

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        return f"ImageSet({self.name}: {self.planned:,} images of {size}, {len(self.classes)} classes)"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of pixels, labels, ids, class names and normalisation."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std, tuple(self.images.shape))).encode())
        for tensor in (self._pixels.contiguous(), self.labels, self.ids):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def take(self, rows: Tensor | slice) -> ImageSet:
        """The images of ``rows``: row numbers, a boolean mask or a slice. Ids stay."""
        images, ids = self._pixels[rows].permute(0, 3, 1, 2), self.ids[rows]
        return replace(self, images=images, labels=self.labels[rows], ids=ids, stands_for=self._scaled(ids))

    def resize(self, side: int) -> ImageSet:
        """All images at ``side`` x ``side`` pixels: means over areas when smaller, bilinear when larger."""
        if side < 1:
            raise ValueError(f"side is {side}; it must be at least 1 pixel")
        if tuple(self.images.shape[-2:]) == (side, side):
            return self
        mode = "area" if side <= min(self.images.shape[-2:]) else "bilinear"
        parts = [
            torch.nn.functional.interpolate(part.float(), (side, side), mode=mode).round().to(torch.uint8)
            for part in self.images.split(4096)
        ]
        return replace(self, images=torch.cat(parts).contiguous(memory_format=torch.channels_last))

    def normalised(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """float32 [n, C, H, W] of ``rows``: (pixel / 255 - mean) / std, channels last in memory."""
        return self._normalise(self._pixels[rows])

    def batches(
        self, batch_size: int, *, seed: int = 0, flip: bool = False, crop: int = 0, shuffle: bool = True,
        drop_last: bool = False,
    ) -> ImageBatches:  # fmt: skip
        """Batches ``{"x", "y", "id", "view"}`` for ``kd.fit``.

        Args:
            batch_size: images in a batch.
            seed: of order and augmentation; both are functions of seed, epoch and batch number alone.
            flip: mirror each image with probability 1/2; the batch's ``view`` says which are (1).
            crop: pad by so many black pixels and cut out at random. A teacher's answers for cropped images
                cannot be cached (``cacheable`` is False).
            shuffle: a new order every epoch.
            drop_last: leave out an incomplete last batch.
        """
        return ImageBatches(self, batch_size, seed, shuffle, drop_last, flip, crop)

    def view_batches(self, view: int = 0, batch_size: int = 256) -> Iterator[dict[str, Any]]:
        """All images in order, as they are (``view`` 0) or mirrored (1)."""
        if view not in (0, 1):
            raise ValueError(f"view is {view}; images have views 0 (as they are) and 1 (mirrored)")
        for rows in torch.arange(len(self)).split(batch_size):
            pixels = self._pixels[rows]
            yield self._batch(rows, pixels.flip(2) if view else pixels, torch.full_like(rows, view))

    @cached_property
    def _pixels(self) -> Tensor:
        return self.images.permute(0, 2, 3, 1)  # [N, H, W, C]: a row is contiguous when channels are last

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift for each of a flattened image's H * W * C values: no broadcasting in a batch."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        area = self.images.shape[-2] * self.images.shape[-1]
        return (1 / (255 * std)).repeat(area), (-mean / std).repeat(area)

    def _normalise(self, pixels: Tensor) -> Tensor:
        factor, shift = self._affine
        x = torch.addcmul(shift, pixels.flatten(1).float(), factor)
        return x.view(pixels.shape).permute(0, 3, 1, 2)

    def _batch(self, rows: Tensor, pixels: Tensor, view: Tensor) -> dict[str, Any]:
        return {"x": self._normalise(pixels), "y": self.labels[rows], "id": self.ids[rows], "view": view}


@dataclass(frozen=True)
class ImageBatches(Batches):
    """An epoch of batches at a time; see :meth:`ImageSet.batches`."""

    flip: bool
    crop: int

    @property
    def cacheable(self) -> bool:
        return not self.crop

    def batch(self, rows: Tensor, random: torch.Generator) -> dict[str, Any]:
        pixels = self.data._pixels[rows]
        view = torch.zeros_like(rows)
        if self.flip:
            view = torch.randint(2, (len(rows),), generator=random)
            mirrored = view.bool()
            pixels[mirrored] = pixels[mirrored].flip(2)
        if self.crop:
            pixels = _random_crop(pixels, self.crop, random)
            view = torch.full_like(view, -1)  # no stored answer is about this picture
        return self.data._batch(rows, pixels, view)


def _random_crop(pixels: Tensor, padding: int, random: torch.Generator) -> Tensor:
    """Each of [B, H, W, C] moved by up to ``padding`` pixels either way; what comes in from outside is black."""
    count, height, width, channels = pixels.shape
    padded = torch.nn.functional.pad(pixels, (0, 0) + (padding,) * 4)
    # All windows as a view, [B, 2p + 1, 2p + 1, H, W * C], of which one an image is copied.
    windows = padded.flatten(2).unfold(1, height, 1).unfold(2, width * channels, channels)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=random)
    return windows[torch.arange(count), top, left].reshape(pixels.shape)


@dataclass(frozen=True)
class ImageData:
    """A set's two parts. ``test`` is for the end: choose everything on a split of ``train``."""

    train: ImageSet
    test: ImageSet
    name: str

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the labels."""
        return self.train.classes


def images(name: str | Path, *, root: str | Path | None = None) -> ImageData:
    """An image set by name, or your own from a folder.

    ``digits`` is embedded. ``cifar10``, ``cifar100`` and ``tiny_imagenet_100`` are read from class folders
    ``<root>/<name>/{train,test or val}/<class>/*.png`` (or JPEG), where ``root`` is ``KDLIB_DATA`` by default; the
    CIFARs else from torchvision's files in ``<root>``, which are downloaded (and checked) where there is a network.
    Your own folder has the same layout; its pixels give mean and standard deviation.

    Raises:
        ValueError: no such set, or an image that cannot be decoded.
        FileNotFoundError: the set is not at hand; says what to put where.
    """
    if str(name) in STATISTICS:
        return _named(str(name), root)
    if Path(name).is_dir():
        train, test, classes = _class_folders(Path(name))
        return _image_data(Path(name).resolve().name, train, test, classes, _statistics(train[0]))
    raise ValueError(f"no image set is called {str(name)!r}: it is none of {', '.join(STATISTICS)} and no folder")


def _named(name: str, root: str | Path | None) -> ImageData:
    if name == "digits":
        return _digits()
    if scale.rehearsing():
        return _stand_in(name)
    if folder := sources.local(name, root):
        return _image_data(name, *_class_folders(folder))
    if name in ("cifar10", "cifar100"):
        return _image_data(name, *_torchvision(name, root))
    raise sources.missing(
        f"the image set {name!r}", f"{name}/{{train,val}}/<class>/*.JPEG",
        "Download http://cs231n.stanford.edu/tiny-imagenet-200.zip and sort it into class folders there.", root,
    )  # fmt: skip


Part = tuple[Tensor, Tensor]  # uint8 [N, C, H, W] and int64 [N]


Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def _image_data(
    name: str, train: Part, test: Part, classes: list[str], statistics: Statistics | None = None
) -> ImageData:
    mean, std = statistics or STATISTICS[name]
    parts = []
    for part, (images, labels) in (("train", train), ("test", test)):
        ids = torch.arange(len(labels)) + FIRST_ID[part]
        images = images.contiguous(memory_format=torch.channels_last)
        parts.append(ImageSet(images, labels, ids, classes, mean, std, f"{name}/{part}"))
    return ImageData(*parts, name)


def _statistics(images: Tensor) -> Statistics:
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
    mean = share @ level.double()
    std = (share @ level.double().square() - mean.square()).clamp(min=1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _digits() -> ImageData:
    """scikit-learn's 1,797 digits of 8x8 pixels, 1,197 for training; ids are rows of the one original set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    mean, std = STATISTICS["digits"]
    whole = ImageSet(
        pixels, labels, torch.arange(len(labels)), [str(n) for n in range(10)], mean, std, "digits/train"
    )  # fmt: skip
    train, test = whole.split(600, seed=0)
    return ImageData(train, replace(test, name="digits/test"), "digits")


def _stand_in(name: str) -> ImageData:
    """Noise in the shape of the set, for a rehearsal."""
    classes, side, planned = SHAPES[name]
    random = generator("stand-in", name)
    train, test = (
        (
            torch.randint(256, (STAND_IN, 3, side, side), generator=random, dtype=torch.uint8),
            torch.arange(STAND_IN) % classes,
        )
        for _ in range(2)
    )
    data = _image_data(name, train, test, [f"class {c}" for c in range(classes)])
    return ImageData(replace(data.train, stands_for=planned), replace(data.test, stands_for=planned // 5), name)


def _torchvision(name: str, root: str | Path | None) -> tuple[Part, Part, list[str]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    maker = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    where = sources.root(root)
    try:
        sets = [maker(where, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # absent, or not whole: torchvision compares the published checksums
        if not sources.reachable(maker.url):
            raise sources.missing(
                f"the image set {name!r}", f"{name}/{{train,test}}/<class>/*.png",
                f"Go online and run again, or download {maker.url} (MD5 {maker.tgz_md5}) and unpack it in {where}.",
                root,
            ) from error  # fmt: skip
        sets = [maker(where, train=train, download=True) for train in (True, False)]
    train, test = ((torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets)
    return train, test, list(sets[0].classes)


# --- class folders -------------------------------------------------------------------------------------------


def _class_folders(folder: Path) -> tuple[Part, Part, list[str]]:
    """Decode ``folder``/{train,test or val}/<class>/*, once: the tensors are kept in the store."""
    parts = ("train", "test" if (folder / "test").is_dir() else "val")
    listing = {part: _listing(folder / part) for part in parts}
    classes = sorted({path.parts[0] for path, _ in listing["train"]})
    for path, _ in listing[parts[1]]:
        if path.parts[0] not in classes:
            raise ValueError(
                f"{folder / parts[1] / path.parts[0]} is no class of {folder / 'train'}; both parts must have the "
                f"layout <part>/<class>/<image>, with the same classes"
            )
    stamp = hashlib.sha256(repr((str(folder.resolve()), listing)).encode()).hexdigest()
    store = files.home() / "data" / f"{folder.name}-{stamp[:12]}.safetensors"
    with files.lock(store):
        tensors = _stored(store)
        if tensors is None:
            tensors = {}
            for part in parts:
                tensors[f"{part}_x"] = _decode(folder / part, [path for path, _ in listing[part]])
                tensors[f"{part}_y"] = torch.tensor([classes.index(path.parts[0]) for path, _ in listing[part]])
            files.write_tensors(store, tensors)
    train, test = ((tensors[f"{part}_x"], tensors[f"{part}_y"]) for part in parts)
    return train, test, classes


def _listing(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """The images below the class folders, sorted, each with its size and time of change."""
    found = []
    for where, _, names in os.walk(folder):
        for path in (Path(where, name) for name in names):
            if path.suffix.lower() in SUFFIXES and path.parent != folder:
                stat = path.stat()
                found.append((path.relative_to(folder), (stat.st_size, stat.st_mtime_ns)))
    if not found:
        raise FileNotFoundError(f"no images at {folder}/<class>/; put JPEG or PNG files there, a folder for each class")
    return sorted(found)


def _stored(store: Path) -> dict[str, Tensor] | None:
    if not store.exists():
        return None
    try:
        return files.read_tensors(store)[0]
    except ValueError:  # damaged; the images are there to make it again
        return None


def _decode(folder: Path, paths: list[Path]) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image
    from tqdm.auto import tqdm

    pixels = None
    for row, path in enumerate(tqdm(paths, desc=f"decoding {folder.parent.name}/{folder.name}", leave=False)):
        try:
            image = decode_image(str(folder / path), ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(
                f"{folder / path} cannot be decoded ({str(error).splitlines()[0]}); unpack that file again from the "
                "archive, or remove it"
            ) from error
        if pixels is None:
            pixels = torch.empty(len(paths), *image.shape, dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            raise ValueError(
                f"{folder / path} has {_size(image)} pixels, the images before it {_size(pixels)}; make them one size"
            )
        pixels[row] = image
    return pixels


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
