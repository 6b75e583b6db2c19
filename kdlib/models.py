"""The few networks that more than one notebook needs; pretrained ones come through ``transformers``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import scale
from kdlib.data import sources

# Encoders that a rehearsal can build without the hub: kind, layers, width, heads, vocabulary.
ENCODERS = {
    "bert-base-uncased": ("bert", 12, 768, 12, 30_522),
    "bert-large-uncased": ("bert", 24, 1024, 16, 30_522),
    "bert_uncased_L-4_H-512_A-8": ("bert", 4, 512, 8, 30_522),  # BERT-small
    "all-MiniLM-L6-v2": ("bert", 6, 384, 12, 30_522),
    "roberta-base": ("roberta", 12, 768, 12, 50_265),
    "roberta-large": ("roberta", 24, 1024, 16, 50_265),
    "distilroberta-base": ("roberta", 6, 768, 12, 50_265),
    "gpt2": ("gpt2", 12, 768, 12, 50_257),
}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module is in the mode it was in, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_akamaster(name: str) -> dict[str, Tensor]:
    """State dict of a published CIFAR-10 ResNet: ``"resnet20"``, 32, 44 or 56.

    Source: github.com/akamaster/pytorch_resnet_cifar10 (BSD-2).

    Raises:
        FileNotFoundError: it is not in ``KDLIB_DATA``; says what to put where.
    """
    found = sorted((sources.root() / "weights_resnet_cifar10").glob(f"{name}-*.th"))
    if not found:
        remedy = "Put the file from that repository's folder pretrained_models there."
        raise sources.missing(f"the published {name}", f"weights_resnet_cifar10/{name}-*.th", remedy)
    state = torch.load(found[0], map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}


# --- pretrained ----------------------------------------------------------------------------------------------


def pretrained(name: str, *, auto: str = "AutoModelForSequenceClassification", **settings: Any) -> nn.Module:
    """A pretrained model: from ``KDLIB_DATA/models/<name>``, else from the hub or its cache.

    In a rehearsal without the folder it has random weights and the same size.

    Args:
        name: the hub's.
        auto: the class of ``transformers`` that loads it.
        settings: handed to ``from_pretrained``, such as ``num_labels``.

    Raises:
        FileNotFoundError: it is not at hand; says what to put where.
    """
    transformers = sources.optional("transformers")
    if scale.rehearsing() and not (sources.root() / "models" / name).is_dir():
        return getattr(transformers, auto).from_config(_config(name, settings))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the report of unused and new weights names a path of this machine
    try:
        return _from_pretrained(auto, name, settings)
    finally:
        transformers.logging.set_verbosity(verbosity)


def tokenizer(name: str, **settings: Any) -> Any:
    """The tokenizer of :func:`pretrained`; in a rehearsal without it, a small one trained on the embedded texts."""
    try:
        return _from_pretrained("AutoTokenizer", name, settings)
    except FileNotFoundError:
        if not scale.rehearsing():
            raise
        from kdlib import data

        return data.train_tokenizer(data.text("toy_reviews").train.texts, 2000)


def _from_pretrained(auto: str, name: str, settings: dict[str, Any]) -> Any:
    folder = sources.root() / "models" / name
    place, offline = (str(folder), True) if folder.is_dir() else (name, sources.offline())
    load = getattr(sources.optional("transformers"), auto).from_pretrained
    try:
        return load(place, local_files_only=offline, **settings)
    except OSError as error:
        remedy = f"Go online and run again, or run `hf download {name} --local-dir {folder}`."
        raise sources.missing(f"the pretrained {name}", f"models/{name}", remedy) from error


def _config(name: str, settings: dict[str, Any]) -> Any:
    known = ENCODERS.get(name.rsplit("/", 1)[-1])
    if known is None:
        return _from_pretrained("AutoConfig", name, settings)
    kind, layers, width, heads, vocabulary = known
    roberta = {"max_position_embeddings": 514, "type_vocab_size": 1} if kind == "roberta" else {}
    sizes = dict(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
        vocab_size=vocabulary, **roberta,
    )  # fmt: skip
    return sources.optional("transformers").AutoConfig.for_model(kind, **{**sizes, **settings})
