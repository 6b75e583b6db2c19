"""What a model costs: counts in closed form, latencies that a slow model cannot hide."""

import time

import pytest
import torch
from torch import nn

import kdlib as kd
from kdlib.data import images


class Slow(nn.Module):
    """A linear classifier that takes at least 4 ms a call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, torch.is_grad_enabled()))
        time.sleep(0.004)
        return self.head(self.norm(x).flatten(1))


@pytest.fixture
def digits():
    return images("digits").test


def test_counts_are_those_of_the_layers(digits):
    found = kd.lesson("00").footprint(Slow(), digits, calls=5)
    assert found["parameters"] == pytest.approx((2 + 650) / 1e6)
    assert found["megabytes"] == pytest.approx((4 * (2 + 650 + 2) + 8) / 1e6)  # buffers are stored as well
    assert found["latency_p95_ms"] >= found["latency_p50_ms"] >= 4
    assert found["per_second"] <= 128 / 0.004


def test_half_precision_halves_the_bytes(digits):
    whole = kd.lesson("00").footprint(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, calls=2)
    half = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half()
    half.register_forward_pre_hook(lambda module, inputs: (inputs[0].half(),))
    assert kd.lesson("00").footprint(half, digits, calls=2)["megabytes"] == whole["megabytes"] / 2


def test_it_is_measured_in_evaluation_mode_without_gradients_and_modes_are_kept(digits):
    model = Slow().train()
    model.norm.eval()
    kd.lesson("00").footprint(model, digits, calls=2, batch_size=32)
    assert {(training, grad) for _, training, grad in model.calls} == {(False, False)}
    assert {size for size, *_ in model.calls} == {1, 32}
    assert model.training and model.head.training and not model.norm.training
