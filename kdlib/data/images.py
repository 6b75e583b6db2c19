"""Image sets that fit in memory: one uint8 tensor, batches by index, augmentation a whole batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib import scale
from kdlib.data import sources
from kdlib.data.rows import FIRST_ID, STAND_IN, Batches, Rows, generator

SETS = {  # classes, mean and standard deviation per channel of pixels in [0, 1]
    "cifar10": (10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's, as the published ResNets were given
    "cifar100": (100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}
NO_IMAGES = {".csv", ".db", ".ini", ".json", ".md", ".npy", ".txt", ".xml"}  # what may lie beside images


@dataclass(frozen=True, repr=False)
class ImageSet(Rows):
    """Images with labels and ids.

    Attributes:
        images: uint8 [N, C, H, W] of 0 to 255 (a numpy array is taken too).
        labels: int64 [N].
        ids: int64 [N].
        classes: names, in the order of the labels.
        mean, std: per channel, of pixels in [0, 1].
        name: for messages.
        stands_for: see :class:`~kdlib.data.rows.Rows`.

    Raises:
        ValueError: images of another type or shape, lengths that differ, labels that are no class.
    """

    COLUMNS = ("images", "labels", "ids")
    images: Tensor
    labels: Tensor
    ids: Tensor
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    stands_for: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        images = torch.as_tensor(self.images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            wanted = f"uint8 [N, {len(self.mean)}, H, W], (255 * x).round().to(torch.uint8) of pixels x from 0 to 1"
            raise ValueError(f"{self.name}: the images are {images.dtype} {list(images.shape)}; they must be {wanted}")
        object.__setattr__(self, "images", images.contiguous(memory_format=torch.channels_last))

    @property
    def fingerprint(self) -> str:
        """A hash of pixels, labels, ids, class names and normalisation, as they are now."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std, tuple(self.images.shape))).encode())
        for tensor in (self._pixels, self.labels, self.ids):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def resize(self, side: int) -> ImageSet:
        """All images at ``side`` x ``side`` pixels: means over areas when smaller, bilinear when larger."""
        if side < 1:
            raise ValueError(f"side is {side}; it must be at least 1")
        if tuple(self.images.shape[-2:]) == (side, side):
            return self
        mode = "area" if side <= min(self.images.shape[-2:]) else "bilinear"
        parts = [F.interpolate(part.float(), (side, side), mode=mode).round() for part in self.images.split(4096)]
        return replace(self, images=torch.cat([part.to(torch.uint8) for part in parts]))

    def batches(
        self, batch_size: int, *, seed: int = 0, flip: bool = False, crop: int = 0, shuffle: bool = True
    ) -> ImageBatches:
        """Batches ``{"x", "y", "id", "view"}`` for ``kd.fit``; order and augmentation depend on seed, epoch and number.

        Args:
            batch_size: images in a batch.
            seed: of order and augmentation.
            flip: mirror each image with probability 1/2 (view 1).
            crop: pad by so many black pixels and cut out at random (view -1: no answer about it can be cached).
            shuffle: a new order every epoch.
        """
        return ImageBatches(self, batch_size, seed, shuffle, flip, crop)

    def view_batches(self, view: int = 0, batch_size: int = 256) -> Iterator[dict[str, Any]]:
        """All images in order, as they are (``view`` 0) or mirrored (1)."""
        if view not in (0, 1):
            raise ValueError(f"view is {view}; images have views 0 (as they are) and 1 (mirrored)")
        for rows in torch.arange(len(self)).split(batch_size):
            pixels = self._pixels[rows]
            yield self._batch(rows, pixels.flip(2) if view else pixels, torch.full_like(rows, view))

    @property
    def _pixels(self) -> Tensor:
        return self.images.permute(0, 2, 3, 1)  # [N, H, W, C]: contiguous, as channels are last in memory

    def _batch(self, rows: Tensor, pixels: Tensor, view: Tensor) -> dict[str, Any]:
        # Scale and shift for each of a flattened image's H * W * C values: no broadcasting in a batch.
        mean, std = (torch.tensor(values).repeat(pixels.shape[1:3].numel()) for values in (self.mean, self.std))
        x = torch.addcmul(-mean / std, pixels.flatten(1).float(), 1 / (255 * std)).view(pixels.shape)
        return {"x": x.permute(0, 3, 1, 2), "y": self.labels[rows], "id": self.ids[rows], "view": view}


@dataclass(frozen=True)
class ImageBatches(Batches):
    """An epoch of batches at a time; see :meth:`ImageSet.batches`."""

    flip: bool
    crop: int

    def batch(self, rows: Tensor, random: torch.Generator) -> dict[str, Any]:
        pixels, view = self.data._pixels[rows], torch.zeros_like(rows)
        if self.flip:
            view = torch.randint(2, (len(rows),), generator=random)
            pixels[view.bool()] = pixels[view.bool()].flip(2)
        if self.crop:  # moved by up to so many pixels either way; what comes in from outside is black
            count, height, width, channels = pixels.shape
            # All windows as a view, [B, 2p + 1, 2p + 1, H, W * C], of which one an image is copied.
            padded = F.pad(pixels, (0, 0) + (self.crop,) * 4).flatten(2)
            windows = padded.unfold(1, height, 1).unfold(2, width * channels, channels)
            top, left = torch.randint(2 * self.crop + 1, (2, count), generator=random)
            pixels, view = windows[torch.arange(count), top, left].reshape(pixels.shape), torch.full_like(view, -1)
        return self.data._batch(rows, pixels, view)


@dataclass(frozen=True)
class ImageData:
    """A set's two parts. ``test`` is for the end: choose everything on a split of ``train``."""

    train: ImageSet
    test: ImageSet
    classes = property(attrgetter("train.classes"), doc="The class names, in the order of the labels.")


# --- the sets -------------------------------------------------------------------------------------------------------


def images(name: str | Path) -> ImageData:
    """An image set by name, or your own from a folder ``{train,test or val}/<class>/*.png``.

    ``digits`` is embedded. ``cifar10`` and ``cifar100`` are read from such class folders in ``KDLIB_DATA``, else from
    torchvision's files there, which are downloaded (and checked) where there is a network. Whatever Pillow can open
    is an image; hidden files and folders are none, links are followed. Of your own folder the training pixels give
    mean and standard deviation.

    Raises:
        ValueError: no such set, classes that differ between the parts, or a file that is no image of the others' size.
        FileNotFoundError: the set is not at hand; says what to put where.
    """
    if name == "digits":
        return _digits()
    if str(name) not in SETS and not Path(name).is_dir():
        raise ValueError(f"no image set is called {str(name)!r}: it is none of digits, {', '.join(SETS)} and no folder")
    count, mean, std = SETS.get(str(name), (0, (), ()))
    if count and scale.rehearsing():  # noise in the shape of the set
        noise = torch.randint(256, (STAND_IN, 3, 32, 32), generator=generator("stand-in", name), dtype=torch.uint8)
        parts, classes = [(noise, torch.arange(STAND_IN) % count)] * 2, [f"class {c}" for c in range(count)]
    elif folder := next((folder for folder in (sources.root() / name, Path(name)) if folder.is_dir()), None):
        parts, classes = _class_folders(folder)
    else:
        parts, classes = _torchvision(str(name))
    if not mean:
        pixels = parts[0][0].double() / 255
        mean = tuple(pixels.mean((0, 2, 3)).tolist())
        std = tuple(pixels.std((0, 2, 3), unbiased=False).clamp(min=1e-6).tolist())
    sets, planned = [], (50_000, 10_000) if count and scale.rehearsing() else (None, None)
    for part, (pixels, labels), stands_for in zip(("train", "test"), parts, planned, strict=True):
        ids = torch.arange(len(labels)) + FIRST_ID[part]
        sets.append(ImageSet(pixels, labels, ids, classes, mean, std, f"{Path(name).name}/{part}", stands_for))
    return ImageData(*sets)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels, ids, classes = torch.tensor(digits.target), torch.arange(len(pixels)), [*map(str, range(10))]
    train, test = ImageSet(pixels, labels, ids, classes, (0.305,), (0.376,), "digits/train").split(600, seed=0)
    return ImageData(train, replace(test, name="digits/test"))


def _class_folders(folder: Path) -> tuple[list[Any], list[str]]:
    parts = [folder / "train", folder / ("test" if (folder / "test").is_dir() else "val")]
    if absent := [part for part in parts if not part.is_dir()]:
        raise FileNotFoundError(f"{absent[0]} is missing: {folder} needs {{train,test}}/<class>/*.png")
    classes, others = (sorted(c.name for c in part.iterdir() if c.is_dir() and c.name[0] != ".") for part in parts)
    if odd := sorted({*classes} ^ {*others}):
        raise ValueError(f"both parts of {folder} must have the same class folders; only one has {', '.join(odd)}")
    return [_images_of(part, classes) for part in parts], classes


def _images_of(part: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """The part's pixels, uint8 [N, 3, H, W], and labels."""
    from torchvision.datasets.folder import make_dataset

    def is_image(path: str) -> bool:
        hidden = any(name[0] == "." for name in Path(path).relative_to(part).parts)
        return not hidden and Path(path).suffix.lower() not in NO_IMAGES

    numbers = dict(zip(classes, range(len(classes)), strict=True))
    files = make_dataset(part, numbers, is_valid_file=is_image, allow_empty=True)
    if empty := {*numbers.values()} - {label for _, label in files}:
        raise ValueError(f"no images in {part / classes[min(empty)]}: put some there, or take the class away")
    pixels = [_decode(path) for path, _ in files]
    for (path, _), image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            sizes = [f"{i.shape[1]}x{i.shape[0]}" for i in (image, pixels[0])]
            raise ValueError(f"{path} has {sizes[0]} pixels, the first image {sizes[1]}; bring all to one size")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor([label for _, label in files])


def _decode(path: str) -> np.ndarray:
    """uint8 [H, W, 3]. Of 16-bit grey, which Pillow would cut off at 255, the upper 8 bits count."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of Pillow's type {image.mode}, without a fixed range")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise
        raise ValueError(f"{path} cannot be read as an image ({error}); mend it or take it away") from error


def _torchvision(name: str) -> tuple[list[Any], list[str]]:
    from torchvision import datasets

    load = getattr(datasets, name.upper())
    try:
        sets = [load(sources.root(), train=train, download=not sources.offline()) for train in (True, False)]
    except (RuntimeError, OSError) as error:  # absent, or not whole: torchvision compares the published checksums
        raise sources.missing(f"the image set {name!r}", f"{name}/{{train,test}}/<class>/*.png") from error
    return [(torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in sets], sets[0].classes
