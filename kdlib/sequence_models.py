"""Encoder-decoders from scratch, called alike: ``model(input_ids=, attention_mask=, decoder_input_ids=).logits``.

Both are ``transformers`` models, so that :mod:`kdlib.decoding` and ``model.generate`` work with either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    GenerationConfig,
    GenerationMixin,
    MarianConfig,
    MarianMTModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import ModelOutput

from kdlib.data.sequence_sets import special_tokens

Vocabulary = PreTrainedTokenizerBase | int  # an int: so many tokens, of which 0 to 2 are PAD, BOS and EOS


def forward_logits(model: nn.Module, batch: dict[str, Any], decoder_input_ids: Tensor | None = None) -> Tensor:
    """Logits [B, Ly, V] of a batch, on its own target prefixes or on ``decoder_input_ids`` [B, Ly].

    Position j answers what follows the prefix up to and with ``decoder_input_ids[:, j]``: nothing is to be shifted.
    """
    prefix = batch["decoder_input_ids"] if decoder_input_ids is None else decoder_input_ids
    # without a cache, which no training step needs
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=prefix, use_cache=False
    ).logits


def _vocabulary(tokenizer: Vocabulary) -> dict[str, int]:
    """The size and the special tokens, by the names of a configuration; BOS starts the decoder."""
    size, (pad, bos, eos) = (
        (tokenizer, (0, 1, 2)) if isinstance(tokenizer, int) else (len(tokenizer), special_tokens(tokenizer))
    )
    return dict(vocab_size=size, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, decoder_start_token_id=bos)


def _ready(model: Any, names: dict[str, int]) -> Any:
    """Let generation know the special tokens and nothing else: no word is forced, no length set."""
    ids = {name: value for name, value in names.items() if name.endswith("_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


# --- a Transformer ---------------------------------------------------------------------------------------------


def encoder_decoder(
    tokenizer: Vocabulary,
    *,
    d_model: int,
    layers: int | tuple[int, int],
    heads: int = 4,
    feed_forward: int | None = None,
    dropout: float = 0.1,
    max_positions: int = 512,
) -> MarianMTModel:
    """A Transformer for sequences (Vaswani et al. 2017), ``transformers``' Marian with random weights.

    One embedding matrix serves the encoder, the decoder and the output; positions are sinusoids.

    Args:
        tokenizer: with PAD, BOS (which starts the decoder) and EOS; or a vocabulary's size, and they are 0, 1, 2.
        d_model: width.
        layers: of encoder and decoder each, or ``(encoder, decoder)``.
        heads: of attention; they divide ``d_model``.
        feed_forward: hidden units of a layer, by default 4 ``d_model``.
        dropout: of every layer's outputs.
        max_positions: the longest source and target, in tokens.

    Raises:
        ValueError: ``heads`` do not divide ``d_model``, or special tokens are missing or the same.
    """
    if d_model % heads:
        raise ValueError(f"d_model is {d_model} and heads {heads}; the heads must divide the width")
    encoder, decoder = (layers, layers) if isinstance(layers, int) else layers
    names, width = _vocabulary(tokenizer), feed_forward or 4 * d_model
    config = MarianConfig(
        **names, d_model=d_model, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=width, decoder_ffn_dim=width, dropout=dropout,
        max_position_embeddings=max_positions, activation_function="relu", scale_embedding=True,
        init_std=d_model**-0.5, forced_eos_token_id=None,
    )  # fmt: skip
    return _ready(MarianMTModel(config), names)


# --- a recurrent network ---------------------------------------------------------------------------------------


def recurrent(
    tokenizer: Vocabulary,
    *,
    embedding: int,
    encoder_hidden: int,
    decoder_hidden: int,
    layers: int = 1,
    cell: str = "gru",
    dropout: float = 0.1,
) -> Recurrent:
    """A bidirectional encoder and a decoder with dot attention, called like :func:`encoder_decoder`'s model.

    The shape of ImitKD's students (Lin et al. 2020) with a GRU or LSTM in place of their SRU: the output matrix is the
    embedding, reached through a projection to its width. A step of decoding costs the same however long the prefix.

    Args:
        tokenizer: with PAD, BOS (which starts the decoder) and EOS; or a vocabulary's size, and they are 0, 1, 2.
        embedding: width of the embedding, which source, target and output share.
        encoder_hidden: units of each direction.
        decoder_hidden: units of the decoder, and width of the attention.
        layers: of encoder and decoder each.
        cell: ``"gru"`` or ``"lstm"``.
        dropout: of embeddings, of the outputs and between layers.

    Raises:
        ValueError: an unknown cell, or special tokens are missing or the same.
    """
    if cell not in CELLS:
        raise ValueError(f"cell is {cell!r}; there are {', '.join(CELLS)}")
    names = _vocabulary(tokenizer)
    config = RecurrentConfig(
        **names, embedding=embedding, encoder_hidden=encoder_hidden, decoder_hidden=decoder_hidden,
        num_hidden_layers=layers, cell=cell, dropout=dropout,
    )  # fmt: skip
    return _ready(Recurrent(config), names)


CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class RecurrentConfig(PreTrainedConfig):
    """The sizes of a :class:`Recurrent`; see :func:`recurrent`."""

    model_type = "kdlib_recurrent"
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    vocab_size: int = 0
    decoder_start_token_id: int = 1
    embedding: int = 64
    encoder_hidden: int = 64
    decoder_hidden: int = 128
    num_hidden_layers: int = 1
    cell: str = "gru"
    dropout: float = 0.1


@dataclass
class Encoded(ModelOutput):
    """What the encoder hands on: keys [B, Lx, D] of the attention, and the decoder's first state [B, S]."""

    last_hidden_state: Tensor | None = None
    state: Tensor | None = None


@dataclass
class Decoded(ModelOutput):
    """Logits [B, Ly, V], the decoder's state after them, and the encoder's answer for the next call."""

    logits: Tensor | None = None
    past_key_values: State | None = None
    encoder_last_hidden_state: Tensor | None = None


class State:
    """A decoder's state [B, S]: in generation, all that is remembered of the prefix, so beams need only be sorted."""

    is_compileable = False

    def __init__(self, values: Tensor, length: int) -> None:
        self.values, self.length = values, length

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens read so far."""
        return self.length

    def reorder_cache(self, beams: Tensor) -> None:
        """Go on from these rows."""
        self.values = self.values.index_select(0, beams.to(self.values.device))


class Encoder(nn.Module):
    """Embedded sources [B, Lx] -> :class:`Encoded`. Rows are packed, so that padding changes nothing."""

    main_input_name = "input_ids"

    def __init__(self, config: RecurrentConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.dropout = embedding, nn.Dropout(config.dropout)
        self.rnn = _rnn(config, config.embedding, config.encoder_hidden, bidirectional=True)
        self.keys = nn.Linear(2 * config.encoder_hidden, config.decoder_hidden, bias=False)
        self.bridge = nn.Linear(2 * config.encoder_hidden, _state_size(config))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Encoded:
        lengths = (
            torch.full_like(input_ids[:, 0], input_ids.shape[1]) if attention_mask is None else attention_mask.sum(1)
        )
        x = self.dropout(self.embedding(input_ids))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed, last = self.rnn(packed)
        out, _ = pad_packed_sequence(packed, batch_first=True, total_length=input_ids.shape[1])
        hidden = last[0] if isinstance(last, tuple) else last
        both = torch.cat([hidden[-2], hidden[-1]], -1)  # the last layer's two directions, each at its end
        return Encoded(self.keys(self.dropout(out)), self.bridge(both).tanh())


class Recurrent(PreTrainedModel, GenerationMixin):
    """See :func:`recurrent`."""

    config_class = RecurrentConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_default_dynamic_cache = classmethod(lambda cls: False)  # the state is its own cache

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding, padding_idx=config.pad_token_id)
        self.encoder = Encoder(config, self.embedding)
        self.decoder = _rnn(config, config.embedding, config.decoder_hidden)
        self.combine = nn.Linear(2 * config.decoder_hidden, config.decoder_hidden)
        self.project = nn.Linear(config.decoder_hidden, config.embedding, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own start for linear and recurrent layers; embeddings small enough to be output weights too."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embedding**-0.5)
            nn.init.zeros_(module.weight[module.padding_idx])

    def get_encoder(self, *_: Any) -> Encoder:
        return self.encoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Encoded | None = None,
        past_key_values: State | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Decoded:
        """Sources [B, Lx] and target prefixes [B, Ly] -> logits [B, Ly, V].

        With ``past_key_values``, ``decoder_input_ids`` are only what follows the prefix that it remembers.
        """
        encoded = encoder_outputs or self.encoder(input_ids, attention_mask)
        before = encoded.state if past_key_values is None else past_key_values.values
        hidden, after = self.decoder(self.dropout(self.embedding(decoder_input_ids)), _unfold(before, self.config))
        scores = hidden @ encoded.last_hidden_state.transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        context = scores.softmax(-1) @ encoded.last_hidden_state
        mixed = self.dropout(self.combine(torch.cat([hidden, context], -1)).tanh())
        logits = nn.functional.linear(self.project(mixed), self.embedding.weight, self.bias)
        read = decoder_input_ids.shape[1] + (past_key_values.length if past_key_values else 0)
        return Decoded(logits, State(_fold(after), read) if use_cache else None, encoded.last_hidden_state)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: State | None = None, **others: Any
    ) -> dict[str, Any]:
        """The words after those that the state remembers, and what stays the same from step to step."""
        read = past_key_values.length if past_key_values else 0
        kept = {name: others[name] for name in ("encoder_outputs", "attention_mask", "use_cache")}
        return {"decoder_input_ids": input_ids[:, read:], "past_key_values": past_key_values, **kept}


def _rnn(config: RecurrentConfig, inputs: int, hidden: int, **settings: Any) -> nn.Module:
    layers = config.num_hidden_layers
    between = config.dropout if layers > 1 else 0.0
    return CELLS[config.cell](inputs, hidden, layers, batch_first=True, dropout=between, **settings)


def _state_size(config: RecurrentConfig) -> int:
    return config.decoder_hidden * config.num_hidden_layers * (2 if config.cell == "lstm" else 1)


def _fold(state: Any) -> Tensor:
    """The state of torch's GRU or LSTM, one row an example: [B, S]."""
    whole = torch.cat(state) if isinstance(state, tuple) else state
    return whole.transpose(0, 1).flatten(1)


def _unfold(values: Tensor, config: RecurrentConfig) -> Any:
    """And back."""
    whole = values.unflatten(1, (-1, config.decoder_hidden)).transpose(0, 1).contiguous()
    return tuple(part.contiguous() for part in whole.chunk(2)) if config.cell == "lstm" else whole
