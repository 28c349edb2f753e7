"""The passes of ``kernels.py`` on a GPU, in Triton. Imported by it alone, where Triton is installed.

One program per row, which takes its row in blocks of columns; statistics in float32. A row is
read twice by ``exp_stats``, the second time from its end: what was read last is what the cache still has.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false
# launch options are parameters of no kernel, and reductions are typed as tuples

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_WARPS = 32
_MOST_SLOTS = 128
_TILE = 4096


@triton.jit
def exp_stats_kernel(  # noqa: PLR0913 - a kernel has no records
    logits,
    exps,
    support,
    sampled,
    peaks,
    totals,
    at_support,
    at_sampled,
    size,
    width,
    num_slots,
    logits_stride,
    exps_stride,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``exps`` may be ``logits``."""
    row = tl.program_id(0).to(tl.int64)
    z, e, slots = logits + row * logits_stride, exps + row * exps_stride, row * num_slots
    column = tl.load(sampled + row)
    tl.store(at_sampled + row, tl.load(z + column, column >= 0, 0.0))
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        columns = tl.load(support + slots + slot, slot < num_slots, -1)
        tl.store(at_support + slots + slot, tl.load(z + columns, columns >= 0, 0.0), slot < num_slots)
    # threads share a row: all have read before one of them writes, and the sweeps see what was written
    tl.debug_barrier()
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        columns = tl.load(support + slots + slot, slot < num_slots, -1)
        tl.store(z + columns, tl.full((SLOTS,), -float("inf"), tl.float32), columns >= 0)
    tl.debug_barrier()
    # loads are masked by the width, whose divisibility is known, so that they stay wide; the size is applied to values
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(z + columns, columns < width, -float("inf"), eviction_policy="evict_last")
        peak = tl.maximum(peak, tl.where(columns < size, x, -float("inf")))
    top = tl.max(peak, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK,), tl.float32)
    steps = tl.cdiv(width, BLOCK)
    for step in range(steps):
        columns = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(z + columns, columns < width, -float("inf"), eviction_policy="evict_first")
        y = tl.exp(tl.where(columns < size, x, -float("inf")) - top)
        total += y
        tl.store(e + columns, y.to(exps.dtype.element_ty), columns < width)
    tl.store(peaks + row, top)
    tl.store(totals + row, tl.sum(total, 0))


def exp_stats(
    logits: Tensor, support: Tensor, sampled: Tensor, out: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``kernels.exp_stats`` of float32 logits."""
    num_rows, num_slots = support.shape
    peaks, totals, at_sampled = (logits.new_empty(num_rows) for _ in range(3))
    at_support = logits.new_empty(num_rows, num_slots)
    if num_rows:
        exp_stats_kernel[(num_rows,)](
            logits,
            out,
            support.contiguous(),
            sampled.contiguous(),
            peaks,
            totals,
            at_support,
            at_sampled,
            size,
            logits.shape[1],
            num_slots,
            logits.stride(0),
            out.stride(0),
            SLOTS=_slots(num_slots),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return peaks, totals, at_support, at_sampled


@triton.jit
def patch_kernel(  # noqa: PLR0913 - a kernel has no records
    exps,
    support,
    sampled,
    at_support,
    at_sampled,
    num_slots,
    exps_stride,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e, slots = exps + row * exps_stride, row * num_slots
    own = tl.load(sampled + row)
    num_hits = 0
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        columns = tl.load(support + slots + slot, slot < num_slots, -1)
        is_both = (columns >= 0) & (columns == own)
        entry = tl.load(at_support + slots + slot, columns >= 0, 0.0)
        tl.store(e + columns, entry.to(exps.dtype.element_ty), columns >= 0)
        num_hits += tl.sum(is_both.to(tl.int32), 0)
    entry = tl.load(at_sampled + row)
    tl.store(e + own, entry.to(exps.dtype.element_ty), (own >= 0) & (num_hits == 0))


def patch(exps: Tensor, support: Tensor, sampled: Tensor, at_support: Tensor, at_sampled: Tensor) -> None:
    """``kernels.patch`` of float32 or bfloat16 exponentials."""
    num_rows, num_slots = support.shape
    if num_rows:
        patch_kernel[(num_rows,)](
            exps,
            support.contiguous(),
            sampled.contiguous(),
            at_support.contiguous(),
            at_sampled.contiguous(),
            num_slots,
            exps.stride(0),
            SLOTS=_slots(num_slots),
            num_warps=1,
            enable_fp_fusion=True,
        )


@triton.jit
def block_stats_kernel(  # noqa: PLR0913 - a kernel has no records
    logits,
    maxima,
    peaks,
    totals,
    moments,
    size,
    width,
    stride,
    num_blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Each of COUNT lanes of blocks has a running maximum of its own; they meet at the end of the row."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full((COUNT,), -float("inf"), tl.float32)
    total = tl.zeros((COUNT, BLOCK), tl.float32)
    moment = tl.zeros((COUNT, BLOCK), tl.float32)
    for first in range(0, num_blocks, COUNT):
        blocks = first + tl.arange(0, COUNT)
        columns = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits + row * stride + columns, columns < width, -float("inf"))
        x = tl.where(columns < size, x, -float("inf"))
        largest = tl.max(x, 1)
        tl.store(maxima + row * num_blocks + blocks, largest, blocks < num_blocks)
        peak, total, moment = _rebased(peak, total, moment, tl.maximum(peak, largest))
        gap = tl.where(x == -float("inf"), 0.0, x - _finite(peak)[:, None])
        odds = tl.where(x == -float("inf"), 0.0, tl.exp(gap))
        total += odds
        moment += odds * gap
    top = tl.max(peak, 0)
    _, total, moment = _rebased(peak, total, moment, tl.zeros((COUNT,), tl.float32) + top)
    tl.store(peaks + row, top)
    tl.store(totals + row, tl.sum(tl.sum(total, 1), 0))
    tl.store(moments + row, tl.sum(tl.sum(moment, 1), 0))


@triton.jit
def _finite(peak):
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _rebased(peak, total, moment, above):
    """Sums of exp(z - peak) and (z - peak) exp(z - peak) under a larger peak."""
    shift = tl.where(peak == -float("inf"), 0.0, peak - _finite(above))
    factor = tl.exp(shift)[:, None]
    return above, total * factor, (moment + shift[:, None] * total) * factor


def block_stats(logits: Tensor, size: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``kernels.block_stats`` of float32 logits."""
    num_rows, num_blocks = len(logits), -(-size // block)
    peaks, totals, moments = (logits.new_empty(num_rows) for _ in range(3))
    maxima = logits.new_empty(num_rows, num_blocks)
    if num_rows:
        block_stats_kernel[(num_rows,)](
            logits,
            maxima,
            peaks,
            totals,
            moments,
            size,
            logits.shape[1],
            logits.stride(0),
            num_blocks,
            BLOCK=block,
            COUNT=max(1, _TILE // block),
            num_warps=8,
            enable_fp_fusion=True,
        )
    return maxima, peaks, totals, moments


def _slots(num_slots: int) -> int:
    """Slots of a support that a program takes at a time."""
    return min(_MOST_SLOTS, 1 << max(0, num_slots - 1).bit_length())
