"""The kernels of the head: in PyTorch, and in Triton's interpreter, in a process of its own that runs nothing else."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from megatron_distil.trainer.head import kernels
from tests import kernel_checks as checks

Run = Callable[..., None]


@pytest.fixture(scope="module", params=["torch", "triton"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Calls a check on the CPU with one form of the kernels."""
    if request.param == "torch":
        yield lambda check, **options: check("cpu", **options)
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: it is not installed")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_interpret) as process:
        yield lambda check, **options: process.submit(_call, check, options).result(timeout=60)


def _interpret() -> None:
    """Triton chooses when it is imported. Small blocks, so that rows have several of them."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from megatron_distil.trainer.head import triton_kernels

    triton_kernels._BLOCK, triton_kernels._TILE = 128, 128
    kernels._compiled = lambda tensor: triton_kernels


def _call(check: Callable[..., None], options: dict[str, Any]) -> None:
    check("cpu", **options)


@pytest.mark.parametrize(("num_shards", "num_slots"), [(1, 0), (1, 6), (2, 1), (4, 290)])
def test_gradients_are_those_of_the_specification(run: Run, num_shards: int, num_slots: int) -> None:
    run(
        checks.check_gradients,
        dtype=torch.float32,
        exps_dtype=torch.float32,
        num_shards=num_shards,
        num_slots=num_slots,
        tolerance=2e-6,
    )


def test_narrow_exponentials_cost_their_rounding_and_no_more(run: Run) -> None:
    run(
        checks.check_gradients,
        dtype=torch.float32,
        exps_dtype=torch.bfloat16,
        num_shards=2,
        num_slots=6,
        tolerance=1e-2,  # the interpreter cuts digits off where a GPU rounds
    )


@pytest.mark.parametrize("num_slots", [0, 6])
def test_gradients_are_exact_in_float64(num_slots: int) -> None:
    checks.check_gradients(
        "cpu",
        dtype=torch.float64,
        exps_dtype=torch.float64,
        num_shards=2,
        num_slots=num_slots,
        tolerance=1e-12,
    )


@pytest.mark.parametrize("check", [checks.check_small_tail, checks.check_odd_rows, checks.check_no_rows])
def test_rows_at_the_edge(run: Run, check: Callable[[str], None]) -> None:
    run(check)


@pytest.mark.parametrize(("size", "block"), [(300, 16), (300, 64), (256, 32), (5, 16)])
def test_block_statistics_equal_those_of_whole_rows(run: Run, size: int, block: int) -> None:
    run(checks.check_block_stats, size=size, block=block)


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CACHE_BYTES", 4 * 320 * 2)
    checks.check_gradients(
        "cpu", dtype=torch.float32, exps_dtype=torch.bfloat16, num_shards=1, num_slots=6, tolerance=4e-3
    )
    checks.check_block_stats("cpu", size=300, block=64)


def test_a_buffer_that_does_not_fit_is_refused_with_one_that_does() -> None:
    none = torch.zeros(2, dtype=torch.int64)
    buffer = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="64 columns has no spare one beyond 64 ids; make it 65 wide or more"):
        kernels.exp_stats(buffer, none[:, None], none, buffer, 64)
    with pytest.raises(ValueError, match=r"out is \(2, 65\) and logits are \(2, 64\)"):
        kernels.exp_stats(buffer, none[:, None], none, torch.zeros(2, 65), 60)
    with pytest.raises(ValueError, match="lie 2 apart"):
        kernels.exp_stats(torch.zeros(64, 2).t(), none[:, None], none, buffer, 60)
