"""The moving average of weights: its value after many steps, and what it refuses."""

import pytest
import torch

from megatron_distil import algo


def test_after_many_steps_it_is_the_weighted_sum():
    draw = torch.Generator().manual_seed(0)
    start, values = torch.randn(3, 4, generator=draw), torch.randn(200, 3, 4, generator=draw)
    average = start.clone()
    for value in values:
        algo.ema_step([average], [value], rate=0.01)
    weights = 0.01 * 0.99 ** torch.arange(199, -1, -1, dtype=torch.float64)
    want = 0.99**200 * start.double() + (weights[:, None, None] * values.double()).sum(0)
    torch.testing.assert_close(average.double(), want, rtol=1e-5, atol=1e-6)


def test_narrow_values_are_followed_in_float32_and_left_alone():
    value = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    average = torch.full((1000,), 0.996)
    for _ in range(10):
        algo.ema_step([average], [value], rate=0.01)
    want = 1 - 0.004 * 0.99**10
    assert average.tolist() == pytest.approx([want] * 1000, abs=1e-6)
    assert not average.requires_grad
    assert value.detach().eq(1.0).all()
    assert value.dtype == torch.bfloat16


@pytest.mark.parametrize(("rate", "want"), [(0.0, 1.0), (1.0, 3.0)])
def test_the_ends_are_exact(rate, want):
    average = torch.tensor([1.0])
    algo.ema_step([average], [torch.tensor([3.0])], rate=rate)
    assert average.item() == want


def test_what_is_refused_is_named():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 loses steps of rate 0\.01; keep it in torch\.float32"):
        algo.ema_step([one.bfloat16()], [one], rate=0.01)
    with pytest.raises(ValueError, match=r"rate = 1\.5.*give 0\.01"):
        algo.ema_step([one], [one], rate=1.5)
    with pytest.raises(ValueError, match="shorter"):
        algo.ema_step([one, one], [one], rate=0.5)
