"""The compiled kernels of the head on a GPU: the specification on small problems, their PyTorch forms on real sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_distil.trainer.head import kernels
from tests import kernel_checks as checks

pytestmark = pytest.mark.gpu

SIZE = 151_936
WIDTH = (SIZE // 64 + 1) * 64


@pytest.fixture(autouse=True)
def _compiled() -> None:
    """Every test here is about the kernels: none may pass with their PyTorch forms."""
    if kernels._triton_kernels() is None:
        pytest.skip("needs triton: it is not installed")


@pytest.mark.parametrize(("num_shards", "num_slots"), [(1, 0), (1, 6), (2, 1), (4, 290)])
@pytest.mark.parametrize(("exps", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_gradients_are_those_of_the_specification(
    num_shards: int, num_slots: int, exps: torch.dtype, tolerance: float
) -> None:
    checks.check_gradients(
        "cuda",
        dtype=torch.float32,
        exps_dtype=exps,
        num_shards=num_shards,
        num_slots=num_slots,
        tolerance=tolerance,
    )


def test_float64_has_its_pytorch_form() -> None:
    checks.check_gradients(
        "cuda", dtype=torch.float64, exps_dtype=torch.float64, num_shards=2, num_slots=6, tolerance=1e-12
    )


@pytest.mark.parametrize("check", [checks.check_small_tail, checks.check_odd_rows, checks.check_no_rows])
def test_rows_at_the_edge(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.parametrize(("size", "block"), [(300, 16), (300, 64), (256, 32), (5, 16)])
def test_block_statistics_equal_those_of_whole_rows(size: int, block: int) -> None:
    checks.check_block_stats("cuda", size=size, block=block)


def _chunk(num_rows: int = 264, num_slots: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(num_rows, WIDTH, generator=draw, device="cuda") * 4
    support = torch.rand(num_rows, SIZE, generator=draw, device="cuda").topk(num_slots).indices
    support[::7, num_slots // 2 :] = -1
    sampled = torch.where(torch.arange(num_rows, device="cuda") % 2 == 0, support[:, 0], 5)
    return logits, support, sampled


@pytest.mark.parametrize("exps", [torch.float32, torch.bfloat16])
def test_a_chunk_of_a_real_vocabulary_equals_its_pytorch_form(exps: torch.dtype) -> None:
    logits, support, sampled = _chunk()
    other, out = logits.clone(), torch.empty_like(logits, dtype=exps)
    got = kernels.exp_stats(logits, support, sampled, out, SIZE)
    want = kernels._exp_stats_torch(other, support, sampled, other, SIZE)
    assert torch.equal(got.peak, want.peak)
    assert torch.equal(got.support, want.support)
    assert torch.equal(got.sampled, want.sampled)
    torch.testing.assert_close(got.total, want.total, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.float(), other, rtol=2.0**-8 if exps == torch.bfloat16 else 5e-6, atol=1e-30)

    draw = torch.Generator("cuda").manual_seed(1)
    at_support = torch.randn(support.shape, generator=draw, device="cuda")
    at_sampled = torch.rand(len(support), generator=draw, device="cuda")
    twin = out.clone()
    kernels.patch(out, support, sampled, at_support, at_sampled, SIZE)
    kernels._patch_torch(twin, support, sampled, at_support, at_sampled, SIZE)
    assert torch.equal(out[:, :SIZE], twin[:, :SIZE])


def test_the_same_chunk_gives_the_same_bits() -> None:
    logits, support, sampled = _chunk()
    first, second = ((z := logits.clone(), kernels.exp_stats(z, support, sampled, z, SIZE)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("block", [32, 64])
def test_block_statistics_of_a_real_vocabulary_equal_their_pytorch_form(block: int) -> None:
    logits = _chunk()[0][:, :SIZE]
    got, want = kernels.block_stats(logits, SIZE, block), kernels._block_stats_torch(logits, SIZE, block)
    assert torch.equal(got.maxima, want.maxima)
    assert torch.equal(got.peak, want.peak)
    torch.testing.assert_close(got.total, want.total, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.moment, want.moment, rtol=5e-6, atol=0)


def test_rows_beyond_the_range_of_int32_are_reached() -> None:
    num_rows = 2**31 // WIDTH + 2
    if torch.cuda.mem_get_info()[0] < 5 * num_rows * WIDTH:
        pytest.skip("needs memory: a buffer of more than 2**31 logits")
    logits = torch.zeros(num_rows, WIDTH, device="cuda")
    logits[-1, 3] = 2.0
    ids = torch.full((num_rows, 1), 3, device="cuda")
    stats = kernels.exp_stats(logits, ids, ids[:, 0], logits, SIZE)
    assert stats.support[-1].item() == 2.0
    assert logits[-1, 3].item() == 0.0
    assert stats.total[-1].item() == SIZE - 1


def test_nothing_waits_for_the_device() -> None:
    logits, support, sampled = _chunk()
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            stats = kernels.exp_stats(logits, support, sampled, logits, SIZE)
            kernels.patch(logits, support, sampled, stats.support, stats.sampled, SIZE)
            kernels.block_stats(logits, SIZE, 64)
        finally:
            torch.cuda.set_sync_debug_mode("default")
