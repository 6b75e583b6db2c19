"""Letting a model write: rollouts for training, hypotheses for a score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdlib import scale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdlib.data.sequence_sets import SequenceTokens

REHEARSED = 4  # words of a hypothesis in a rehearsal: an untrained model would write on to the cap


@torch.no_grad()
def generate(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    max_length: int,
    num_beams: int = 1,
    top_k: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What ``model`` writes for the sources of ``batch``: int64 [B, L], L at most ``max_length``.

    The start token is not among them; EOS is, and PAD comes after it. A row without EOS reached the cap: no end is
    forced upon it. PAD and BOS are never written, so a row of n words and EOS has n + 1 entries that are not PAD. The
    model writes in evaluation mode; afterwards every module is in the mode it was in, also after an error.

    Args:
        model: a ``transformers`` encoder-decoder, such as those of :mod:`kdlib.sequence_models`, or a decoder-only
            language model, whose ``input_ids`` are prompts padded on the left.
        batch: with ``input_ids`` and ``attention_mask`` [B, Lx].
        max_length: most tokens to write, with EOS.
        num_beams: 1 is greedy search, or sampling with ``top_k``.
        top_k: draw each token from the ``top_k`` likeliest, in proportion to their probabilities.
        use_cache: keep what was computed of the prefix; without, every step computes it all again (slower, same words).
        generator: of the draws (on the CPU), so that the global random stream stays untouched; without one, that stream
            is used.

    Raises:
        ValueError: a limit below 1, or beams together with ``top_k``.
    """
    for name, value in (("max_length", max_length), ("num_beams", num_beams), ("top_k", 1 if top_k is None else top_k)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if top_k is not None and num_beams > 1:
        raise ValueError(f"top_k is {top_k} and num_beams {num_beams}; sample from one beam, or search without top_k")
    names, device = model.generation_config, next(model.parameters()).device
    read = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]  # columns that the model did not write
    start = names.bos_token_id if names.decoder_start_token_id is None else names.decoder_start_token_id
    settings: dict[str, Any] = (
        {"do_sample": True, "top_k": top_k, "temperature": 1.0, "top_p": 1.0} if top_k else {"do_sample": False}
    )
    # Under a training loop's autocast torch would keep low-precision copies of the weights that carry no gradient.
    with _evaluating(model), _drawing_from(generator, device), torch.autocast(device.type, enabled=False):
        written = model.generate(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=max_length, num_beams=num_beams, use_cache=use_cache, forced_eos_token_id=None,
            suppress_tokens=[names.pad_token_id, start], **settings,
        )  # fmt: skip
    written = written[:, read:]
    ends = torch.isin(written, torch.as_tensor(names.eos_token_id, device=device))
    # a beam that ended early is filled with EOS where PAD is token 0
    return written.masked_fill(ends.cumsum(1) - ends.long() > 0, names.pad_token_id)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """``transformers`` draws from the global stream: lend it one that starts where ``generator`` says."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def decode(
    model: nn.Module,
    data: SequenceTokens,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_beams: int = 1,
    batch_size: int = 128,
) -> list[str]:
    """What ``model`` writes for every source of ``data``, as text, in the set's order.

    Sources of like length are decoded together, which pads less. Special tokens are left out of the text. In a
    rehearsal at most four tokens are written.
    """
    if scale.rehearsing():
        max_length = min(max_length, REHEARSED)
    order = data.lengths.argsort(descending=True, stable=True)
    texts = [""] * len(data)
    for rows in order.split(batch_size):
        written = generate(model, data.batch(rows), max_length=max_length, num_beams=num_beams)
        for row, text in zip(rows.tolist(), tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[row] = " ".join(text.split())
    return texts
