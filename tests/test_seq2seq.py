"""Encoder-decoders, kdlib's and the recurrent one of notebook 02: step by step as in one go, indifferent to padding.

They are resumed exactly, and write the same with and without a cache.
"""

from __future__ import annotations

import copy
import itertools

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import kdlib as kd
from kdlib import rehearsal
from kdlib.data import SequenceSet
from kdlib.fingerprint import fingerprint
from kdlib.seq2seq import encoder_decoder, generate

CACHE, recurrent = (getattr(kd.lesson("02"), name) for name in ("CACHE", "recurrent_model"))
V, PAD, BOS, EOS = 40, 0, 1, 2
KINDS = {
    "transformer": lambda v=V: encoder_decoder(v, d_model=16, layers=(2, 1), heads=2),
    "gru": lambda v=V: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16),
    "two layers": lambda v=V: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16, layers=2),
}


def forward_logits(model, b, prefix=None):
    given = {name: b[name] for name in ("input_ids", "attention_mask")}
    return model(
        **given, decoder_input_ids=b["decoder_input_ids"] if prefix is None else prefix, use_cache=False
    ).logits


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
            decoder_input_ids=b["decoder_input_ids"][:, position : position + 1], use_cache=True, **{CACHE: past},
        )  # fmt: skip
        past = out[CACHE]
        if encoded is None:
            encoded = model.get_encoder()(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
        assert torch.allclose(out.logits[:, 0], whole[:, position], atol=1e-5), position


@pytest.mark.parametrize("kind", ["gru", "two layers"])
def test_a_state_does_not_grow(kind):
    model, b = KINDS[kind]().eval(), batch(write=30)
    sizes = [model(**{**b, "decoder_input_ids": b["decoder_input_ids"][:, :n]}, use_cache=True)[CACHE] for n in (1, 30)]
    assert sizes[0].values.shape == sizes[1].values.shape == (3, {"gru": 16, "two layers": 32}[kind])
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
        (
            lambda: recurrent(kd.data.train_tokenizer(["a"], 9), embedding=8, encoder_hidden=8, decoder_hidden=8),
            "PAD, BOS",
        ),
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
    assert result.steps == 2 and line["planned steps"] == 300 and line["batch"] == 8
    output = 2 * V * {"transformer": 16}.get(kind, 12)  # the output layer's product of one word
    least = 3 * output * 8 * 2  # forward and backward, 8 rows of at least 2 words
    assert 1e12 * line["TFLOP a step"] > 2 * least


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_a_toy_is_learnt(kind):
    losses = [row["loss"] for row in fit(kind, epochs=12).history]
    assert losses[-1] < losses[0] - 0.5


# --- writing ----------------------------------------------------------------------------------------------------

W = 12  # a vocabulary small enough for all sentences
WRITERS = {
    "transformer": lambda v=W: encoder_decoder(v, d_model=16, layers=1, heads=2, dropout=0.3),
    "gru": lambda v=W: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16, dropout=0.3),
    "two layers": lambda v=W: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16, layers=2, dropout=0.3),
}


def lively(model):
    """Random weights that are large enough to say many things."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=2.0 * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(params=WRITERS)
def writer(request):
    torch.manual_seed(0)
    return lively(WRITERS[request.param]())


def sentences(rows=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (rows, 1), generator=g)
    mask = (torch.arange(8) < lengths).long()
    return {"input_ids": torch.randint(3, W, (rows, 8), generator=g) * mask, "attention_mask": mask}


@torch.no_grad()
def by_hand(model, b, max_length):
    """Greedy search without any of it: whole prefixes, argmax, PAD and BOS never."""
    model.eval()
    prefix = torch.full((len(b["input_ids"]), 1), BOS)
    for _ in range(max_length):
        z = forward_logits(model, b, prefix)[:, -1]
        z[:, [PAD, BOS]] = -torch.inf
        done = (prefix == EOS).any(1)
        prefix = torch.cat([prefix, torch.where(done, PAD, z.argmax(-1))[:, None]], 1)
    return prefix[:, 1:]


def pad_to(written, length):
    return torch.nn.functional.pad(written, (0, length - written.shape[1]), value=PAD)


def test_greedy_search_is_argmax_after_argmax(writer):
    b = sentences()
    expected = by_hand(writer, b, 10)
    assert len(set(map(tuple, expected.tolist()))) > 5, "all rows alike: this test would see little"
    for use_cache in (True, False):
        written = generate(writer, b, max_length=10, use_cache=use_cache)
        assert written.dtype == torch.int64 and torch.equal(pad_to(written, 10), expected)


def test_beams_with_and_without_a_cache(writer):
    b = sentences()
    cached, not_cached = (generate(writer, b, max_length=8, num_beams=4, use_cache=use) for use in (True, False))
    assert torch.equal(cached, not_cached)
    greedy = generate(writer, b, max_length=8)
    assert not torch.equal(pad_to(cached, 8), pad_to(greedy, 8))


@torch.no_grad()
def test_a_wide_beam_finds_the_likeliest_sentence(writer):
    """Against all sentences of up to three tokens; beams are compared by mean log-probability, as transformers does."""
    b = {name: value[:4] for name, value in sentences().items()}
    writer.eval()
    words = [token for token in range(W) if token not in (PAD, BOS)]
    best = [(-float("inf"), None)] * 4
    for length in (1, 2, 3):
        last = [EOS] if length < 3 else words
        ids = torch.tensor(list(itertools.product(*[[w for w in words if w != EOS]] * (length - 1), last)))
        prefix = torch.cat([torch.full((len(ids), 1), BOS), ids[:, :-1]], 1)
        for row in range(4):
            source = {name: value[row : row + 1].expand(len(ids), -1) for name, value in b.items()}
            z = forward_logits(writer, source, prefix).log_softmax(-1)
            score, found = (z.gather(-1, ids[..., None]).sum((1, 2)) / length).max(0)
            best[row] = max(best[row], (float(score), tuple(ids[found].tolist())))
    written = generate(writer, b, max_length=3, num_beams=100)
    assert [tuple(t for t in row if t != PAD) for row in written.tolist()] == [sentence for _, sentence in best]


@pytest.mark.parametrize("settings", [{"top_k": W}, {"num_beams": 8}])
def test_a_rollout_of_n_words_and_an_end_has_n_plus_1_tokens(writer, settings):
    """Beams too, which transformers fills up with EOS where PAD is token 0."""
    shift_end(writer, 1.5 if "num_beams" in settings else 0.0)
    written = generate(writer, sentences(60), max_length=12, **settings)
    ended = (written == EOS).any(1)
    assert 0 < ended.sum() < 60 and BOS not in written
    for row in written.tolist():
        n = row.index(EOS) if EOS in row else len(row)
        assert PAD not in row[:n] and set(row[n + 1 :]) <= {PAD}
    assert not (written[~ended] == PAD).any() and written.shape[1] <= 12


def test_no_end_is_forced_at_the_cap(writer):
    lengths = (generate(writer, sentences(60), max_length=2, top_k=W) != PAD).sum(1)
    assert (lengths == 2).any() and EOS not in generate(never_ends(writer), sentences(), max_length=5)


def never_ends(model):
    """A forced end in the model's own settings, as pretrained translators have, is not heeded."""
    model.generation_config.forced_eos_token_id = EOS
    shift_end(model, -1e4)
    return model


def shift_end(model, logit):
    bias = model.final_logits_bias if hasattr(model, "final_logits_bias") else model.bias
    with torch.no_grad():
        bias.view(-1)[EOS] += logit


def test_every_mode_is_restored_also_after_an_error(writer):
    writer.train()
    next(iter(writer.children())).eval()
    modes = [module.training for module in writer.modules()]
    generate(writer, sentences(), max_length=3)
    assert [module.training for module in writer.modules()] == modes
    with pytest.raises(KeyError):
        generate(writer, {"input_ids": sentences()["input_ids"]}, max_length=3)
    writer.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(writer, sentences(), max_length=3)
    assert [module.training for module in writer.modules()] == modes


def test_dropout_is_off_and_no_graph_is_kept(writer):
    writer.train()
    assert torch.equal(*(generate(writer, sentences(), max_length=6) for _ in range(2)))
    assert all(parameter.grad is None for parameter in writer.parameters())


def test_sampling_is_a_function_of_its_generator_and_leaves_the_global_stream_alone(writer):
    b, before = sentences(), torch.get_rng_state()

    def draw(seed, times=1):
        g = torch.Generator().manual_seed(seed)
        return [generate(writer, b, max_length=6, top_k=5, generator=g) for _ in range(times)]

    first, second = draw(3, times=2)
    torch.rand(5)
    again, _ = draw(3, times=2)
    assert torch.equal(first, again) and not torch.equal(pad_to(first, 6), pad_to(second, 6))
    assert not torch.equal(pad_to(first, 6), pad_to(draw(4)[0], 6))
    torch.set_rng_state(before)
    draw(3), generate(writer, b, max_length=6), generate(writer, b, max_length=6, num_beams=3)
    assert torch.equal(torch.get_rng_state(), before)
    generate(writer, b, max_length=6, top_k=5)
    assert not torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_words_are_drawn_from_the_top_k_in_their_proportions(writer):
    one = {name: value[:1].expand(4000, -1) for name, value in sentences().items()}
    g = torch.Generator().manual_seed(0)
    first = generate(writer, one, max_length=1, top_k=3, generator=g)[:, 0]
    z = forward_logits(writer.eval(), {name: value[:1] for name, value in one.items()}, torch.tensor([[BOS]]))[0, 0]
    z[[PAD, BOS]] = -torch.inf
    top = z.topk(3)
    counts = torch.stack([(first == token).sum() for token in top.indices])
    assert torch.allclose(counts / 4000, top.values.softmax(0), atol=0.04) and counts.sum() == 4000
    assert torch.equal(
        generate(writer, sentences(), max_length=6, top_k=1), generate(writer, sentences(), max_length=6)
    )


def test_a_teacher_may_write(writer):
    teacher = kd.Teacher(
        writer, name="t", inputs=lambda b: {k: b[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")}
    )
    mark = teacher.fingerprint
    written = generate(teacher.model, sentences(), max_length=5)
    assert teacher.fingerprint == mark
    prefix = torch.cat([torch.full((24, 1), BOS), written[:, :-1]], 1)
    assert teacher({**sentences(), "decoder_input_ids": prefix}).shape == (*prefix.shape, W)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 3, "num_beams": 0}, "num_beams is 0"),
        ({"max_length": 3, "top_k": 0}, "top_k is 0"),
        ({"max_length": 3, "top_k": 2, "num_beams": 2}, "top_k is 2 and num_beams 2"),
    ],
)
def test_wrong_limits_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        generate(WRITERS["gru"](), sentences(), **given)


def test_what_is_written_does_not_depend_on_the_batch(writer):
    b = sentences()
    whole = pad_to(generate(writer, b, max_length=6), 6)
    assert len({tuple(row) for row in whole.tolist()}) > 5
    for size in (1, 5):
        parts = [{name: value[at : at + size] for name, value in b.items()} for at in range(0, 24, size)]
        written = torch.cat([pad_to(generate(writer, part, max_length=6), 6) for part in parts])
        assert torch.equal(written, whole)


def language_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=W, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3)
    return lively(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)))


@torch.no_grad()
def test_a_language_model_goes_on_from_prompts_padded_on_the_left():
    model, right = language_model().train(), sentences(rows=12)
    order = right["attention_mask"].argsort(dim=1, stable=True)
    left = {name: value.gather(1, order) for name, value in right.items()}
    written = generate(model, left, max_length=6)
    assert model.training and (written[:, 0] != PAD).all()
    model.eval()
    for row, (tokens, mask) in enumerate(zip(right["input_ids"], right["attention_mask"], strict=True)):
        text = tokens[mask.bool()][None]  # alone, without padding
        for _ in range(6):
            z = model(input_ids=text).logits[:, -1]
            z[:, [PAD, BOS]] = -torch.inf
            text = torch.cat([text, z.argmax(-1, keepdim=True)], 1)
            if text[0, -1] == EOS:
                break
        wanted = text[0, int(mask.sum()) :]
        assert written[row, : len(wanted)].tolist() == wanted.tolist() and (written[row, len(wanted) :] == PAD).all()


def test_inside_a_training_loops_autocast_words_are_those_of_full_precision(writer):
    with torch.autocast("cpu", torch.bfloat16):
        inside = generate(writer, sentences(), max_length=6)
    assert torch.equal(inside, generate(writer, sentences(), max_length=6))
