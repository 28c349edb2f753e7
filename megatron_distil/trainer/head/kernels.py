"""The passes over a chunk of logits that no matrix product does: Triton on a GPU, PyTorch elsewhere.

Every function works on one rank's rows of the output layer and gives local results; sums over tp are the caller's. Each is
deterministic (no atomics) and never waits for the device. The PyTorch form of each, ``_NAME_torch``, is what its kernel in
``triton_kernels.py`` is compared with; float64 has no other form.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE_BYTES = 2**22
"""Logits that a CPU treats at a time, so that every sweep after the first one reads its cache."""
_LEAST_GAP = -1000.0
"""exp of it is 0 in float64 too, and so is its product with it; that of -inf would be NaN."""


class ExpStats(NamedTuple):
    """What is kept of a chunk of logits; local to this rank."""

    peak: Tensor
    """[n] the largest logit outside the support; 0 where there is none."""
    total: Tensor
    """[n] sum of exp(z - peak) outside the support."""
    support: Tensor
    """[n, K] logits at the support; 0 where this rank has none."""
    sampled: Tensor
    """[n] logits at the sampled id; 0 where this rank has none."""


class BlockStats(NamedTuple):
    """A row of logits in few numbers; local to this rank. Log of the sum: peak + log total; entropy: that - peak - moment / total."""

    maxima: Tensor
    """[n, ceil(size / block)] the largest logit of each block of columns."""
    peak: Tensor
    """[n] the largest logit; -inf where there is none."""
    total: Tensor
    """[n] sum of exp(z - peak)."""
    moment: Tensor
    """[n] sum of (z - peak) exp(z - peak)."""


def exp_stats(logits: Tensor, support: Tensor, sampled: Tensor, out: Tensor, size: int) -> ExpStats:
    """The one elementwise pass of the fused head: logits -> exponentials, 0 at the support.

        r = max of z_v outside S,    E_v = exp(z_v - r) outside S, 0 in S,    s = sum_v E_v

    The tail is summed over its own ids, so that it keeps its digits however small it is.

    Args:
        logits: [n, W] float, W > size. Scratch: lost afterwards. Columns from ``size`` on may hold anything.
        support: [n, K] int64 columns, unique in each row; -1 in unused slots and for ids of other ranks.
        sampled: [n] int64 column; -1 for an id of another rank.
        out: [n, W] takes E; ``logits`` itself, or a buffer of a narrower type. Columns from ``size`` on become 0.
        size: columns that count; 0 is allowed.

    Returns:
        ExpStats of the dtype of ``logits``.

    Raises:
        ValueError: there is no spare column, or ``out`` has another shape.

    Source: the part of ``algo.columns`` that reads every logit.
    """
    _check_buffer(logits, size)
    if out.shape != logits.shape:
        raise ValueError(f"out is {tuple(out.shape)} and logits are {tuple(logits.shape)}; they need one shape")
    compiled = _compiled(logits)
    if compiled is not None and logits.dtype == torch.float32:
        return ExpStats(*compiled.exp_stats(logits, support, sampled, out, size))
    return _exp_stats_torch(logits, support, sampled, out, size)


def _exp_stats_torch(logits: Tensor, support: Tensor, sampled: Tensor, out: Tensor, size: int) -> ExpStats:
    is_support, is_sampled = support >= 0, sampled >= 0
    columns = torch.where(is_support, support, size)
    at_support = logits.gather(1, columns).masked_fill_(~is_support, 0.0)
    at_sampled = logits.gather(1, sampled.clamp(min=0)[:, None])[:, 0].masked_fill_(~is_sampled, 0.0)
    logits[:, size:] = -torch.inf
    logits.scatter_(1, columns, -torch.inf)
    peaks, totals = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    is_elsewhere = out.data_ptr() != logits.data_ptr()
    for part in _cached(logits, CACHE_BYTES):
        block = logits[part]
        peak = block.amax(-1)
        peaks[part] = peak.masked_fill_(peak == -torch.inf, 0.0)
        block.sub_(peak[:, None]).exp_()
        totals[part] = block.sum(-1)
        if is_elsewhere:
            out[part] = block
    return ExpStats(peak=peaks, total=totals, support=at_support, sampled=at_sampled)


def patch(exps: Tensor, support: Tensor, sampled: Tensor, at_support: Tensor, at_sampled: Tensor, size: int) -> None:
    """Writes the K + 1 entries of a row of E that a factor of the row does not describe.

        E_k <- at_support_k  at k in S,      E_a <- at_sampled  where a is outside S

    Args:
        exps: [n, W] as ``exp_stats`` left it; changed in place.
        support: [n, K] int64 columns, as in ``exp_stats``.
        sampled: [n] int64 column, as in ``exp_stats``.
        at_support: [n, K] the whole entry, with what the sampled id adds where it is in S; anything where ``support`` is -1.
        at_sampled: [n] the whole entry; anything where ``sampled`` is -1 or in S.
        size: columns that count.

    Raises:
        ValueError: there is no spare column.

    Source: gradient of ``algo.columns``, divided by the factor of the row.
    """
    _check_buffer(exps, size)
    compiled = _compiled(exps)
    if compiled is not None and exps.dtype != torch.float64:
        compiled.patch(exps, support, sampled, at_support, at_sampled)
        return
    _patch_torch(exps, support, sampled, at_support, at_sampled, size)


def _patch_torch(
    exps: Tensor, support: Tensor, sampled: Tensor, at_support: Tensor, at_sampled: Tensor, size: int
) -> None:
    is_alone = (sampled >= 0) & ~((support >= 0) & (support == sampled[:, None])).any(1)
    columns = torch.cat([support, torch.where(is_alone, sampled, -1)[:, None]], 1)
    entries = torch.cat([at_support, at_sampled[:, None]], 1)
    exps.scatter_(1, torch.where(columns >= 0, columns, size), entries.to(exps.dtype))


def block_stats(logits: Tensor, size: int, block: int) -> BlockStats:
    """Block maxima, logsumexp and entropy of each row in one read.

    The K blocks of the largest maxima hold a valid top-K, ties among blocks aside.

    Args:
        logits: [n, W] float, W >= size; only read. A GPU reads fastest where W is a multiple of 16.
        size: columns that count.
        block: columns of a block, a power of two.

    Returns:
        BlockStats of the dtype of ``logits``. An id of logit -inf adds nothing to any of them.
    """
    compiled = _compiled(logits)
    if compiled is not None and logits.dtype == torch.float32:
        return BlockStats(*compiled.block_stats(logits, size, block))
    return _block_stats_torch(logits, size, block)


def _block_stats_torch(logits: Tensor, size: int, block: int) -> BlockStats:
    num_rows, whole = len(logits), size - size % block
    maxima = logits.new_empty(num_rows, -(-size // block))
    peak, total, moment = (logits.new_empty(num_rows) for _ in range(3))
    for part in _cached(logits, CACHE_BYTES // 8):  # small enough that its copies cost no fresh pages
        row = logits[part, :size]
        maxima[part, : whole // block] = row[:, :whole].unflatten(1, (-1, block)).amax(-1)
        if whole < size:
            maxima[part, -1] = row[:, whole:].amax(-1)
        top = maxima[part].amax(-1) if size else row.new_full((len(row),), -torch.inf)
        gap = (row - top.masked_fill(top == -torch.inf, 0.0)[:, None]).clamp_(min=_LEAST_GAP)
        odds = gap.exp()
        peak[part], total[part] = top, odds.sum(-1)
        moment[part] = gap.mul_(odds).sum(-1)
    return BlockStats(maxima=maxima, peak=peak, total=total, moment=moment)


def _cached(logits: Tensor, num_bytes: int) -> Iterator[slice]:
    """Rows of a size that stays in the cache; all rows at once on a device."""
    row_bytes = logits.shape[1] * logits.element_size()
    step = max(1, num_bytes // max(1, row_bytes)) if logits.device.type == "cpu" else max(1, len(logits))
    return (slice(at, at + step) for at in range(0, len(logits), step))


def _check_buffer(buffer: Tensor, size: int) -> None:
    width = buffer.shape[1]
    if width <= size:
        raise ValueError(
            f"a buffer of {width} columns has no spare one beyond {size} ids; make it {size + 1} wide or more"
        )
    if buffer.stride(1) != 1:
        raise ValueError(
            f"the columns of a buffer lie {buffer.stride(1)} apart; they must be neighbours, as after .contiguous()"
        )


def _compiled(tensor: Tensor) -> Any | None:
    """The kernels for where ``tensor`` lies; None on a CPU and where Triton is not installed."""
    return _triton_kernels() if tensor.is_cuda else None


@cache
def _triton_kernels() -> Any | None:
    try:
        return import_module("megatron_distil.trainer.head.triton_kernels")
    except ImportError:
        return None
