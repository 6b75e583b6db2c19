"""Encoder-decoders: called alike, step by step as in one go, indifferent to padding, trained and resumed exactly."""

from __future__ import annotations

import copy

import cloudpickle
import pytest
import torch
import torch.nn.functional as F

import kdlib as kd
from kdlib import rehearsal
from kdlib.data.sequence_sets import SequenceSet
from kdlib.fingerprint import fingerprint
from kdlib.sequence_models import encoder_decoder, forward_logits, recurrent

V, PAD, BOS, EOS = 40, 0, 1, 2
KINDS = {
    "transformer": lambda v=V: encoder_decoder(v, d_model=16, layers=(2, 1), heads=2),
    "gru": lambda v=V: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16),
    "lstm": lambda v=V: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16, layers=2, cell="lstm"),
}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def batch(rows=3, read=7, write=5, seed=0):
    """Sources and prefixes of unequal length."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([read, 4, 1])[:rows]
    mask = (torch.arange(read) < lengths[:, None]).long()
    ids = torch.randint(4, V, (rows, read), generator=g) * mask
    prefix = torch.randint(4, V, (rows, write), generator=g)
    prefix[:, 0] = BOS
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": prefix}


def test_logits_of_every_position(model):
    b = batch()
    z = forward_logits(model, b)
    assert z.shape == (3, 5, V) and z.requires_grad
    other = b["decoder_input_ids"].roll(1, 0)
    assert torch.equal(forward_logits(model, b, other), forward_logits(model, {**b, "decoder_input_ids": other}))


def test_no_position_sees_the_words_after_it(model):
    b = batch()
    changed = b["decoder_input_ids"].clone()
    changed[:, 3:] = 7
    z, other = forward_logits(model, b), forward_logits(model, b, changed)
    assert torch.allclose(z[:, :3], other[:, :3], atol=1e-6) and not torch.allclose(z[:, 3:], other[:, 3:])


def test_padding_changes_nothing(model):
    """Neither of the source nor of the prefix; rows stand alone."""
    b = batch()
    z = forward_logits(model, b)
    wider = {name: F.pad(value, (0, 4)) for name, value in b.items()}
    assert torch.allclose(forward_logits(model, wider)[:, :5], z, atol=1e-5)
    for row, length in enumerate([7, 4, 1]):
        alone = {name: value[row : row + 1] for name, value in b.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        assert torch.allclose(forward_logits(model, alone)[0], z[row], atol=1e-5)


def test_the_source_matters_to_its_last_word(model):
    b = batch()
    changed = b["input_ids"].clone()
    changed[0, -1] = (changed[0, -1] - 3) % (V - 4) + 4
    difference = (forward_logits(model, b) - forward_logits(model, {**b, "input_ids": changed})).abs().amax((1, 2))
    assert difference[0] > 1e-4 and difference[1] == difference[2] == 0


@torch.no_grad()
def test_step_by_step_is_as_in_one_go(model):
    b = batch()
    whole, past, encoded = forward_logits(model, b), None, None
    for position in range(5):
        out = model(
            input_ids=b["input_ids"], attention_mask=b["attention_mask"], encoder_outputs=encoded,
            decoder_input_ids=b["decoder_input_ids"][:, position : position + 1], past_key_values=past, use_cache=True,
        )  # fmt: skip
        past = out.past_key_values
        if encoded is None:
            encoded = model.get_encoder()(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
        assert torch.allclose(out.logits[:, 0], whole[:, position], atol=1e-5), position


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_state_does_not_grow(kind):
    model, b = KINDS[kind]().eval(), batch(write=30)
    sizes = [
        model(**{**b, "decoder_input_ids": b["decoder_input_ids"][:, :n]}, use_cache=True).past_key_values
        for n in (1, 30)
    ]
    assert sizes[0].values.shape == sizes[1].values.shape == (3, {"gru": 16, "lstm": 64}[kind])
    assert [state.get_seq_length() for state in sizes] == [1, 30]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_reads_each_token_once(kind):
    """Whatever a version of transformers calls its cache: lost, it would cost only time, and nobody would see."""
    model, b, read = KINDS[kind]().eval(), batch(), []
    forward = model.forward

    def watched(*args, **given):
        read.append(given["decoder_input_ids"].shape[1])
        return forward(*args, **given)

    model.forward = watched
    arguments = dict(input_ids=b["input_ids"], attention_mask=b["attention_mask"], min_new_tokens=5, max_new_tokens=5)
    cached = model.generate(**arguments, do_sample=False)
    assert read == [1] * 5
    read.clear()
    assert torch.equal(model.generate(**arguments, do_sample=False, use_cache=False), cached) and read == [
        1,
        2,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_generation_settings(kind):
    tokenizer = kd.data.train_subwords(["a b c d e f"] * 4, 30)
    model = KINDS[kind](tokenizer)
    config = model.generation_config
    assert model.config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (PAD, BOS, EOS)
    assert config.decoder_start_token_id == model.config.decoder_start_token_id == BOS != config.pad_token_id
    forced = ("forced_eos_token_id", "forced_bos_token_id", "bad_words_ids", "num_beams", "max_length", "min_length")
    assert all(getattr(config, name) in (None, 0, 1) for name in forced)
    with pytest.raises(ValueError, match="PAD, BOS and EOS"):
        KINDS[kind](kd.data.train_tokenizer(["a b"], 9))


def test_embeddings_are_tied():
    marian = KINDS["transformer"]().model
    assert marian.encoder.embed_tokens.weight is marian.decoder.embed_tokens.weight is marian.shared.weight
    assert KINDS["transformer"]().lm_head.weight.shape == (V, 16)
    for kind, make in KINDS.items():
        model = make()
        matrices = {p.data_ptr() for p in model.parameters() if V in p.shape and p.ndim == 2}
        assert len(matrices) == 1, kind


def test_sizes_in_closed_form():
    d, f, v = 16, 64, V
    attention, norm, wide = 4 * (d * d + d), 2 * d, 2 * d * f + f + d
    count = v * d + 2 * (attention + wide + 2 * norm) + (2 * attention + wide + 3 * norm)
    assert sum(p.numel() for p in KINDS["transformer"]().parameters() if p.requires_grad) == count
    e, h, s = 12, 8, 16
    gru = lambda i, o: 3 * o * (i + o + 2)  # noqa: E731
    heads = 2 * h * s + (2 * h * s + s) + (2 * s * s + s) + s * e
    assert kd.models.parameters(KINDS["gru"]()) == v * e + v + 2 * gru(e, h) + gru(e, s) + heads


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_the_seed_and_models_travel(kind):
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(KINDS[kind]())
    assert fingerprint(made[0]) == fingerprint(made[1]) != fingerprint(made[2])
    b = batch()
    for other in (copy.deepcopy(made[0]), cloudpickle.loads(cloudpickle.dumps(made[0]))):
        assert torch.equal(forward_logits(other.eval(), b), forward_logits(made[0].eval(), b))


def test_a_start_is_near_the_uniform_distribution(model):
    b = batch(write=20)
    loss = F.cross_entropy(forward_logits(model, b).flatten(0, 1), torch.randint(4, V, (60,)))
    assert abs(loss - torch.tensor(V).log()) < 1.5


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: encoder_decoder(V, d_model=30, layers=1), "d_model is 30 and heads 4"),
        (lambda: recurrent(V, embedding=8, encoder_hidden=8, decoder_hidden=8, cell="sru"), "cell is 'sru'"),
    ],
)
def test_wrong_arguments_are_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# --- training ------------------------------------------------------------------------------------------------------


def word_loss(model, b):
    return F.cross_entropy(forward_logits(model, b).flatten(0, 1), b["labels"].flatten()), {}


def words(b):
    return (b["labels"] != -100).sum()


def tokens(n=48):
    letters = "abcdefghij"
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(letters[i] for i in torch.randint(0, 10, (1 + row % 6,), generator=g)) for row in range(n)]
    data = SequenceSet(texts, [text[::-1] for text in texts], torch.arange(n), "turned")
    return data.encode(kd.data.train_subwords([" ".join(letters)] * 3, V), max_source=9, max_target=9)


def fit(kind, epochs=2, **options):
    torch.manual_seed(0)
    return kd.fit(
        KINDS[kind](), word_loss, tokens().batches(8, seed=0), epochs=epochs, progress=False,
        optimizer=lambda p: torch.optim.Adam(p, 3e-3), **options,
    )  # fmt: skip


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_off_ends_as_the_whole_one(kind, tmp_path):
    """Dropout and all: the generators go on where they were."""
    whole = fit(kind)

    def cut_off(model, b):
        if b["step"] == 8:
            raise Killed
        return word_loss(model, b)

    torch.manual_seed(0)
    with pytest.raises(Killed):
        kd.fit(
            KINDS[kind](), cut_off, tokens().batches(8, seed=0), epochs=2, progress=False, folder=tmp_path,
            optimizer=lambda p: torch.optim.Adam(p, 3e-3), checkpoint_every=5,
        )  # fmt: skip
    resumed = fit(kind, folder=tmp_path, checkpoint_every=5)
    assert resumed.resumed and resumed.steps == whole.steps == 12
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = fit(kind, folder=tmp_path, checkpoint_every=5)  # the finished run, as it was stored
    assert all(torch.equal(again.model.state_dict()[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_weigh_by_words(kind):
    """Rows of unequal length: the mean over the batch's words, however it is split (no dropout here)."""

    def grads(accumulate):
        torch.manual_seed(0)
        model = KINDS[kind]()
        for module in model.modules():
            module.dropout = (
                0.0 if isinstance(getattr(module, "dropout", None), float) else getattr(module, "dropout", None)
            )
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        kd.fit(
            model, word_loss, [next(tokens().batches(8, by_length=False).epoch(0))], epochs=1, accumulate=accumulate,
            units=words, optimizer=lambda p: torch.optim.SGD(p, 0.0), progress=False,
        )  # fmt: skip
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads(1), grads(4), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_counts_the_work(kind, monkeypatch):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    monkeypatch.setattr(rehearsal, "_records", [])
    result = fit(kind, epochs=50)
    (line,) = rehearsal._records
    assert result.steps == 2 and line["planned_steps"] == 300 and line["rows"] == 8
    output = 2 * V * {"transformer": 16}.get(kind, 12)  # the output layer's product of one word
    least = 3 * output * 8 * 2  # forward and backward, 8 rows of at least 2 words
    assert line["step_flops"] > 2 * least


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_is_learnt(kind):
    losses = [row["loss"] for row in fit(kind, epochs=25).history]
    assert losses[-1] < losses[0] - 0.7
