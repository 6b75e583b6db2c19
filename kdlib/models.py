"""The few networks that more than one notebook needs; pretrained ones come through ``transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import scale
from kdlib.data import sources

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Encoders that a rehearsal can build without the hub: kind, layers, width, heads, vocabulary.
ENCODERS = {
    "bert-base-uncased": ("bert", 12, 768, 12, 30_522),
    "bert-large-uncased": ("bert", 24, 1024, 16, 30_522),
    "bert_uncased_L-4_H-512_A-8": ("bert", 4, 512, 8, 30_522),  # BERT-small
    "all-MiniLM-L6-v2": ("bert", 6, 384, 12, 30_522),
    "roberta-base": ("roberta", 12, 768, 12, 50_265),
    "roberta-large": ("roberta", 24, 1024, 16, 50_265),
    "distilroberta-base": ("roberta", 6, 768, 12, 50_265),
}
# Plain CNNs of the Annealing-KD code: convolutions of each stage (a pooling ends it), hidden linear layers.
PLANES = {
    2: (((16,), (16,)), ()),
    4: (((16, 16), (32, 32)), ()),
    10: (((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), (128,)),
}
PLANES_100 = {  # for CIFAR-100
    2: (((32,), (32,)), ()),
    4: (((32, 32), (64, 64)), ()),
    10: (PLANES[10][0], (512,)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut (subsample, pad with zero channels): no parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al. (2015), section 4.2: three stages of ``(depth - 2) / 6`` blocks, global mean, one linear layer."""

    def __init__(self, depth: int, classes: int, width: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, 32, 44, 56, 110, ...")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (
            _stage((depth - 2) // 6, max(width, width * 2**stage // 2), width * 2**stage) for stage in range(3)
        )
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(blocks: int, in_channels: int, channels: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, 1 if in_channels == channels else 2)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet(depth: int, classes: int, width: int = 16, in_channels: int = 3) -> CifarResNet:
    """A CIFAR ResNet of ``depth`` = 6n + 2 layers and ``width``, 2 ``width``, 4 ``width`` channels.

    Images [B, in_channels, H, W] -> logits [B, classes]; the shortcuts have no parameters (option A).
    """
    return CifarResNet(depth, classes, width, in_channels)


def plain_cnn(n: int, classes: int, *, side: int = 32, in_channels: int = 3, norm: bool = True) -> nn.Sequential:
    """The plain CNN of ``n`` = 2, 4 or 10 convolutions that the Annealing-KD code distils.

    Images [B, in_channels, side, side] -> logits [B, classes]. More than ten classes get the CIFAR-100 widths;
    ``norm=False`` leaves out the batch normalisation.
    Source: huawei-noah/Efficient-NLP, Annealing_KD/computer_vision_tasks/plain_cnn_cifar.py (after the TAKD code).
    """
    book = PLANES if classes <= 10 else PLANES_100
    if n not in book:
        raise ValueError(f"n is {n}; there are plain CNNs of {', '.join(map(str, book))} convolutions")
    stages, hidden = book[n]
    if side < 2 ** len(stages):
        raise ValueError(f"side is {side}; {len(stages)} poolings need images of {2 ** len(stages)} pixels or more")
    layers: list[nn.Module] = []
    for stage in stages:
        for channels in stage:
            layers += _convolution(in_channels, channels, norm)
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    side //= 2 ** len(stages)
    return nn.Sequential(*layers, *mlp(in_channels * side * side, classes, hidden))


def _convolution(in_channels: int, channels: int, norm: bool) -> list[nn.Module]:
    middle = [nn.BatchNorm2d(channels)] if norm else []
    return [nn.Conv2d(in_channels, channels, 3, 1, 1), *middle, nn.ReLU()]


def small_cnn(classes: int, channels: Sequence[int] = (16, 32, 64), in_channels: int = 3) -> nn.Sequential:
    """Conv-BN-ReLU stages with pooling between them, global mean, one linear layer.

    Images [B, in_channels, H, W] -> logits [B, classes]; H and W of 2^(stages - 1) or more.
    """
    layers: list[nn.Module] = []
    for index, out in enumerate(channels):
        layers += [nn.MaxPool2d(2)] if index else []
        layers += [nn.Conv2d(in_channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        in_channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, classes))


def mlp(inputs: int, classes: int, hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """A multi-layer perceptron with ReLU: [B, ...] of ``inputs`` values a row -> logits [B, classes]."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_akamaster(name: str | Path, root: str | Path | None = None) -> dict[str, Tensor]:
    """State dict of a published CIFAR-10 ResNet of github.com/akamaster/pytorch_resnet_cifar10 (BSD-2).

    Args:
        name: ``"resnet20"``, ``32``, ``44``, ``56``, ...: the file ``<root>/weights_resnet_cifar10/<name>-*.th``;
            or the path of a ``.th`` file.
        root: ``KDLIB_DATA`` by default.

    Raises:
        FileNotFoundError: the file is not there; says where to put it.
    """
    path = Path(name)
    if not path.is_file():
        found = sorted((sources.root(root) / "weights_resnet_cifar10").glob(f"{name}-*.th"))
        if not found:
            raise sources.missing(
                f"the published {name}", f"weights_resnet_cifar10/{name}-*.th",
                "Put the file from the folder pretrained_models of github.com/akamaster/pytorch_resnet_cifar10 there.",
                root,
            )  # fmt: skip
        path = found[0]
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}


# --- pretrained ----------------------------------------------------------------------------------------------


def pretrained(name: str | Path, *, auto: str = "AutoModelForSequenceClassification", **settings: Any) -> nn.Module:
    """A pretrained model: from ``KDLIB_DATA/models/<name>`` or a folder, else from the hub or its local cache.

    In a rehearsal nothing is downloaded: weights that are not in a folder are random, of the same configuration.

    Args:
        name: the hub's name (``"roberta-large"``), or a folder of ``save_pretrained``.
        auto: the ``transformers`` class that loads it, such as ``AutoModel``.
        settings: for ``from_pretrained``, such as ``num_labels`` or ``num_hidden_layers``.

    Raises:
        FileNotFoundError: not in a folder and not to be downloaded; says where to put it.
    """
    import transformers

    maker = getattr(transformers, auto)
    if scale.rehearsing() and _folder(name) is None:
        return maker.from_config(_config(str(name), settings))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the report of unused and new weights names a path of this machine
    try:
        return _from_pretrained(maker, name, settings)
    finally:
        transformers.logging.set_verbosity(verbosity)


def tokenizer(name: str | Path, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of :func:`pretrained`; in a rehearsal without it, a small one trained on the embedded texts."""
    import transformers

    try:
        return _from_pretrained(transformers.AutoTokenizer, name, settings)
    except FileNotFoundError:
        if not scale.rehearsing():
            raise
        from kdlib import data

        return data.train_tokenizer(data.text("toy_reviews").train.texts, 2000)


def _folder(name: str | Path) -> Path | None:
    return Path(name) if Path(name).is_dir() else sources.local(f"models/{name}")


def _from_pretrained(maker: Any, name: str | Path, settings: dict[str, Any]) -> Any:
    folder = _folder(name)
    stay = folder is not None or not sources.reachable(sources.hub())  # a copy in the hub's cache still serves
    try:
        return maker.from_pretrained(str(folder or name), local_files_only=stay, trust_remote_code=False, **settings)
    except OSError as error:
        if folder is not None or not stay:
            raise
        raise sources.missing(
            f"the pretrained {name}", f"models/{name}",
            f"Go online and run again, or run `hf download {name} --local-dir {sources.root() / 'models' / str(name)}` "
            "on a machine that is.",
        ) from error  # fmt: skip


def _config(name: str, settings: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    known = ENCODERS.get(name.rsplit("/", 1)[-1])
    if known is None:
        return _from_pretrained(AutoConfig, name, settings)
    kind, layers, width, heads, vocabulary = known
    roberta = {"max_position_embeddings": 514, "type_vocab_size": 1} if kind == "roberta" else {}
    sizes = dict(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
        vocab_size=vocabulary, **roberta,
    )  # fmt: skip
    return AutoConfig.for_model(kind, **{**sizes, **settings})
