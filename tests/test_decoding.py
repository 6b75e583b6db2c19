"""Decoding: cached as uncached, beams, sampling from a generator of one's own, modes restored, order kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kdlib as kd
from kdlib.data.sequence_sets import SequenceSet
from kdlib.decoding import decode, generate
from kdlib.sequence_models import encoder_decoder, forward_logits, recurrent

V, PAD, BOS, EOS = 12, 0, 1, 2
KINDS = {
    "transformer": lambda v=V: encoder_decoder(v, d_model=16, layers=1, heads=2, dropout=0.3),
    "gru": lambda v=V: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16, dropout=0.3),
    "lstm": lambda v=V: recurrent(v, embedding=12, encoder_hidden=8, decoder_hidden=16, cell="lstm", layers=2),
}


def lively(model):
    """Random weights that are large enough to say many things."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=2.0 * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    return lively(KINDS[request.param]())


def batch(rows=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (rows, 1), generator=g)
    mask = (torch.arange(8) < lengths).long()
    return {"input_ids": torch.randint(3, V, (rows, 8), generator=g) * mask, "attention_mask": mask}


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


def test_greedy_search_is_argmax_after_argmax(model):
    b = batch()
    expected = by_hand(model, b, 10)
    assert len(set(map(tuple, expected.tolist()))) > 5, "all rows alike: this test would see little"
    for use_cache in (True, False):
        written = generate(model, b, max_length=10, use_cache=use_cache)
        assert written.dtype == torch.int64 and torch.equal(pad_to(written, 10), expected)


def test_beams_with_and_without_a_cache(model):
    b = batch()
    cached, not_cached = (generate(model, b, max_length=8, num_beams=4, use_cache=use) for use in (True, False))
    assert torch.equal(cached, not_cached)
    greedy = generate(model, b, max_length=8)
    assert not torch.equal(pad_to(cached, 8), pad_to(greedy, 8))


@torch.no_grad()
def test_a_wide_beam_finds_the_likeliest_sentence(model):
    """Against all sentences of up to three tokens; beams are compared by mean log-probability, as transformers does."""
    b = {name: value[:4] for name, value in batch().items()}
    model.eval()
    words = [token for token in range(V) if token not in (PAD, BOS)]
    best = [(-float("inf"), None)] * 4
    for sentence in itertools.chain(*(itertools.product(words, repeat=n) for n in (1, 2, 3))):
        if EOS in sentence[:-1] or (sentence[-1] != EOS and len(sentence) < 3):
            continue
        ids = torch.tensor([sentence]).expand(4, -1)
        prefix = torch.cat([torch.full((4, 1), BOS), ids[:, :-1]], 1)
        z = forward_logits(model, b, prefix).log_softmax(-1)
        score = z.gather(-1, ids[..., None]).sum((1, 2)) / len(sentence)
        best = [max(old, (float(s), sentence)) for old, s in zip(best, score, strict=True)]
    written = generate(model, b, max_length=3, num_beams=100)
    assert [tuple(t for t in row if t != PAD) for row in written.tolist()] == [sentence for _, sentence in best]


@pytest.mark.parametrize("settings", [{"top_k": V}, {"num_beams": 8}])
def test_a_rollout_of_n_words_and_an_end_has_n_plus_1_tokens(model, settings):
    """Beams too, which transformers fills up with EOS where PAD is token 0."""
    shift_end(model, 1.5 if "num_beams" in settings else 0.0)
    written = generate(model, batch(60), max_length=12, **settings)
    ended = (written == EOS).any(1)
    assert 0 < ended.sum() < 60 and BOS not in written
    for row in written.tolist():
        n = row.index(EOS) if EOS in row else len(row)
        assert PAD not in row[:n] and set(row[n + 1 :]) <= {PAD}
    assert not (written[~ended] == PAD).any() and written.shape[1] <= 12


def test_no_end_is_forced_at_the_cap(model):
    lengths = (generate(model, batch(60), max_length=2, top_k=V) != PAD).sum(1)
    assert (lengths == 2).any() and EOS not in generate(never_ends(model), batch(), max_length=5)


def never_ends(model):
    """A forced end in the model's own settings, as pretrained translators have, is not heeded."""
    model.generation_config.forced_eos_token_id = EOS
    shift_end(model, -1e4)
    return model


def shift_end(model, logit):
    bias = model.final_logits_bias if hasattr(model, "final_logits_bias") else model.bias
    with torch.no_grad():
        bias.view(-1)[EOS] += logit


def test_every_mode_is_restored_also_after_an_error(model):
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    generate(model, batch(), max_length=3)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError):
        generate(model, {"input_ids": batch()["input_ids"]}, max_length=3)
    model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(model, batch(), max_length=3)
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_and_no_graph_is_kept(model):
    model.train()
    assert torch.equal(*(generate(model, batch(), max_length=6) for _ in range(2)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sampling_is_a_function_of_its_generator_and_leaves_the_global_stream_alone(model):
    b, before = batch(), torch.get_rng_state()

    def draw(seed, times=1):
        g = torch.Generator().manual_seed(seed)
        return [generate(model, b, max_length=6, top_k=5, generator=g) for _ in range(times)]

    first, second = draw(3, times=2)
    torch.rand(5)
    again, _ = draw(3, times=2)
    assert torch.equal(first, again) and not torch.equal(pad_to(first, 6), pad_to(second, 6))
    assert not torch.equal(pad_to(first, 6), pad_to(draw(4)[0], 6))
    torch.set_rng_state(before)
    draw(3), generate(model, b, max_length=6), generate(model, b, max_length=6, num_beams=3)
    assert torch.equal(torch.get_rng_state(), before)
    generate(model, b, max_length=6, top_k=5)
    assert not torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_words_are_drawn_from_the_top_k_in_their_proportions(model):
    one = {name: value[:1].expand(4000, -1) for name, value in batch().items()}
    g = torch.Generator().manual_seed(0)
    first = generate(model, one, max_length=1, top_k=3, generator=g)[:, 0]
    z = forward_logits(model.eval(), {name: value[:1] for name, value in one.items()}, torch.tensor([[BOS]]))[0, 0]
    z[[PAD, BOS]] = -torch.inf
    top = z.topk(3)
    counts = torch.stack([(first == token).sum() for token in top.indices])
    assert torch.allclose(counts / 4000, top.values.softmax(0), atol=0.04) and counts.sum() == 4000
    assert torch.equal(generate(model, batch(), max_length=6, top_k=1), generate(model, batch(), max_length=6))


def test_a_teacher_may_write(model):
    teacher = kd.Teacher(
        model, name="t", inputs=lambda b: {k: b[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")}
    )
    mark = teacher.fingerprint
    written = generate(teacher.model, batch(), max_length=5)
    teacher.check()
    assert teacher.fingerprint == mark
    prefix = torch.cat([torch.full((24, 1), BOS), written[:, :-1]], 1)
    assert teacher({**batch(), "decoder_input_ids": prefix}).shape == (*prefix.shape, V)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 3, "num_beams": 0}, "num_beams is 0"),
        ({"max_length": 3, "top_k": 0}, "top_k is 0"),
        ({"max_length": 3, "top_k": 2, "num_beams": 2}, "top_k is 2 and num_beams 2"),
    ],
)
def test_wrong_arguments_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        generate(KINDS["gru"](), batch(), **given)


# --- whole sets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return kd.data.train_subwords(["a b c d e f g h"] * 3, 40)


def sources(n=30):
    g = torch.Generator().manual_seed(0)
    return [" ".join("abcdefgh"[i] for i in torch.randint(0, 8, (1 + row % 7,), generator=g)) for row in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_keeps_the_order_whatever_the_batches(tokenizer, kind):
    data = SequenceSet(sources(), ["a"] * 30, torch.arange(30) + 5, "toy")
    tokens = data.encode(tokenizer, max_source=12, max_target=5)
    model = lively(KINDS[kind](tokenizer))
    whole = decode(model, tokens, tokenizer, max_length=6, batch_size=30)
    assert len(set(whole)) > 5 and not any("[" in text for text in whole)
    assert decode(model, tokens, tokenizer, max_length=6, batch_size=4) == whole
    single = [decode(model, tokens.take(slice(r, r + 1)), tokenizer, max_length=6)[0] for r in range(30)]
    assert single == whole
    assert decode(model, tokens.take(torch.tensor([7, 2])), tokenizer, max_length=6) == [whole[7], whole[2]]


def test_a_rehearsal_writes_four_tokens_for_each_of_its_rows(tokenizer, monkeypatch):
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    tokens = kd.data.sequences("multi30k").test.encode(tokenizer, max_source=30, max_target=30)
    texts = decode(KINDS["gru"](tokenizer), tokens, tokenizer, max_length=50)
    assert len(texts) == 64 == len(tokens) and all(len(text.split()) <= 4 for text in texts)
    assert 0 <= kd.metrics.bleu(texts, tokens.source.targets) <= 100


def language_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3)
    return lively(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)))


@torch.no_grad()
def test_a_language_model_goes_on_from_prompts_padded_on_the_left():
    model, right = language_model().train(), batch(rows=12)
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


def test_inside_a_training_loops_autocast_words_are_those_of_full_precision(model):
    with torch.autocast("cpu", torch.bfloat16):
        inside = generate(model, batch(), max_length=6)
    assert torch.equal(inside, generate(model, batch(), max_length=6))
