"""Networks against their published sizes and shapes; pretrained ones from a folder, and random ones in a rehearsal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kdlib as kd


@pytest.mark.parametrize("depth, millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnets_have_the_papers_parameters(depth, millions):
    """He et al. (2015), table 6."""
    assert kd.models.parameters(kd.models.resnet(depth, 10)) / 1e6 == pytest.approx(millions, abs=0.031)


def test_resnet_layers_and_shapes():
    model = kd.models.resnet(14, 7, width=8, in_channels=1)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 14 and [m.out_channels for m in weighted[1:-1:4]] == [8, 16, 32]
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    for depth in (7, 2, 21):
        with pytest.raises(ValueError, match=f"depth is {depth}"):
            kd.models.resnet(depth, 10)


def test_the_option_a_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = kd.models.BasicBlock(4, 8, 2)
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    x = torch.rand(3, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2]) and out[:, :2].abs().sum() == out[:, 6:].abs().sum() == 0


@pytest.mark.parametrize("side, channels", [(8, 1), (16, 3), (32, 3)])
def test_small_cnn_takes_any_size(side, channels):
    model = kd.models.small_cnn(10, in_channels=channels)
    x = torch.randn(2, channels, side, side)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.eval()(x), model(last))
    assert kd.models.parameters(kd.models.small_cnn(10)) == 27 * 16 + 144 * 32 + 288 * 64 + 2 * (16 + 32 + 64) + 65 * 10


def test_published_weights_are_read_without_pickled_code(tmp_path, monkeypatch):
    model = kd.models.resnet(8, 10)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "best_prec1": 91.7}
    folder = tmp_path / "weights_resnet_cifar10"
    folder.mkdir()
    torch.save(wrapped, folder / "resnet8-12fca82f.th")
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    kd.models.resnet(8, 10).load_state_dict(kd.models.load_akamaster("resnet8"))
    with pytest.raises(FileNotFoundError, match=r"resnet56-\*\.th.*pretrained_models"):
        kd.models.load_akamaster("resnet56")
    torch.save({"state_dict": kd.models.BasicBlock(1, 1, 1)}, folder / "resnet20-0.th")
    with pytest.raises(Exception, match="[Ww]eights_only|[Ww]eights only"):
        kd.models.load_akamaster("resnet20")


# --- pretrained ------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    monkeypatch.setenv("KDLIB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    folder = tmp_path / "models" / "someone" / "tiny-bert"
    model.save_pretrained(folder)
    kd.data.train_tokenizer(["one two three"], 10).save_pretrained(folder)
    return model.eval(), folder


def test_a_local_folder_serves_by_the_hubs_name(encoder):
    model, folder = encoder
    ids = torch.randint(30, (2, 5))
    for name in ("someone/tiny-bert", folder):
        loaded = kd.models.pretrained(name).eval()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert kd.models.pretrained("someone/tiny-bert", num_hidden_layers=1).config.num_hidden_layers == 1
    assert len(kd.models.tokenizer("someone/tiny-bert")("three two")["input_ids"]) == 3


def test_a_model_out_of_reach_is_told_and_stands_in_at_rehearsals(encoder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*models/nobody/none.*hf download nobody/none"):
        kd.models.pretrained("nobody/none")
    with pytest.raises(FileNotFoundError, match="the pretrained bert-base-uncased"):
        kd.models.tokenizer("bert-base-uncased")
    monkeypatch.setenv("KDLIB_REHEARSE", "1")
    model = kd.models.pretrained("google/bert_uncased_L-4_H-512_A-8", num_labels=3)
    assert model.config.num_labels == 3
    # The published size: 28.8 M with the pooler; the head comes on top.
    assert kd.models.parameters(model.bert) / 1e6 == pytest.approx(28.8, abs=0.05)
    assert len(kd.models.tokenizer("roberta-large")) < model.config.vocab_size
    with pytest.raises(FileNotFoundError, match="nobody/none"):
        kd.models.pretrained("nobody/none")
