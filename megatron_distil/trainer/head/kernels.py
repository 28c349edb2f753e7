"""The passes over a chunk of logits that no matrix product does: one function each, for a CPU in PyTorch.

Every function works on one rank's rows of the output layer and gives local results; sums over tp are the caller's. Each is
deterministic (no atomics), never waits for the device, and is as precise as its operands: float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CACHE_BYTES = 2**22
"""Logits that a CPU treats at a time, so that every sweep after the first one reads its cache."""

_LINE = 64


class LocalIds(NamedTuple):
    """Ids of each row as columns of this rank's shard."""

    size: int
    """Real ids that this rank holds."""
    support: Tensor
    """[n, K] int64, unique in each row; -1 where the slot is unused or another rank holds the id."""
    sampled: Tensor
    """[n] int64; -1 where another rank holds the id."""

    @classmethod
    def of(cls, support_ids: Tensor, sampled_ids: Tensor, *, first: int, size: int) -> LocalIds:
        """Global ids as columns of the shard that holds ``first`` to ``first + size``.

        Args:
            support_ids: [n, K] int64, global, unique in each row; -1 in unused slots.
            sampled_ids: [n] int64, global.
            first: smallest id of the shard.
            size: real ids of the shard; 0 is allowed.
        """
        support, sampled = (
            torch.where((ids >= first) & (ids < first + size), ids - first, -1) for ids in (support_ids, sampled_ids)
        )
        return cls(size=size, support=support, sampled=sampled)


class ExpStats(NamedTuple):
    """What is kept of a chunk of logits; local to this rank."""

    reference: Tensor
    """[n] the largest logit outside the support; 0 where there is none."""
    total: Tensor
    """[n] sum of exp(z - reference) outside the support."""
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


def buffer_width(size: int) -> int:
    """Columns of a buffer for ``size`` logits a row: at least one spare, and every row starts on a cache line."""
    return _LINE * (size // _LINE + 1)


def exp_stats(logits: Tensor, ids: LocalIds, out: Tensor) -> ExpStats:
    """The one elementwise pass of the fused head: logits -> exponentials, 0 at the support.

        r = max of z_v outside S,    E_v = exp(z_v - r) outside S, 0 in S,    s = sum_v E_v

    The tail is summed over its own ids, so that it keeps its digits however small it is.

    Args:
        logits: [n, W] float, W > ids.size. Scratch: lost afterwards. Columns from ``ids.size`` on may hold anything.
        ids: columns of this rank.
        out: [n, W] takes E; ``logits`` itself, or a buffer of a narrower type. Columns from ``ids.size`` on become 0.

    Returns:
        ExpStats of the dtype of ``logits``.

    Raises:
        ValueError: no spare column, or ``out`` has another shape.

    Source: the logits' share of ``algo.columns``.
    """
    _check_buffer(logits, ids.size)
    if out.shape != logits.shape:
        raise ValueError(f"out is {tuple(out.shape)}, logits are {tuple(logits.shape)}; they need one shape")
    return _exp_stats_torch(logits, ids, out)


def _exp_stats_torch(logits: Tensor, ids: LocalIds, out: Tensor) -> ExpStats:
    is_support, is_sampled = ids.support >= 0, ids.sampled >= 0
    columns = torch.where(is_support, ids.support, ids.size)
    support = logits.gather(1, columns).masked_fill_(~is_support, 0.0)
    sampled = logits.gather(1, ids.sampled.clamp(min=0)[:, None])[:, 0].masked_fill_(~is_sampled, 0.0)
    logits[:, ids.size :] = -torch.inf
    logits.scatter_(1, columns, -torch.inf)
    reference, total = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    for part in _cached(logits):
        block = logits[part]
        peak = block.amax(-1)
        reference[part] = peak.masked_fill_(peak == -torch.inf, 0.0)
        block.sub_(peak[:, None]).exp_()
        total[part] = block.sum(-1)
        if out is not logits:
            out[part] = block
    return ExpStats(reference=reference, total=total, support=support, sampled=sampled)


def patch(e: Tensor, ids: LocalIds, stats: ExpStats, at_support: Tensor, at_sampled: Tensor, inv_beta: Tensor) -> None:
    """Writes the few entries of E that the vocabulary-wide factor does not describe; then dz = beta E.

        E_k <- at_support_k / beta  at k in S,    E_a <- (E_a or, outside S, exp(z_a - r)) + at_sampled / beta

    Args:
        e: [n, W] as ``exp_stats`` left it; changed in place.
        ids: columns of this rank.
        stats: what ``exp_stats`` gave: E_a is taken from there, not from a narrow ``e``.
        at_support: [n, K] dz at the support, without what the sampled id adds; anything in unused slots.
        at_sampled: [n] what the sampled id adds to dz.
        inv_beta: [n] 1 / beta; 0 where beta is 0.
    """
    _patch_torch(e, ids, stats, at_support, at_sampled, inv_beta)


def _patch_torch(
    e: Tensor, ids: LocalIds, stats: ExpStats, at_support: Tensor, at_sampled: Tensor, inv_beta: Tensor
) -> None:
    is_support, is_sampled = ids.support >= 0, ids.sampled >= 0
    is_both = is_support & (ids.support == ids.sampled[:, None])
    extra = at_sampled * inv_beta
    entries = torch.where(is_support, at_support * inv_beta[:, None], 0.0) + torch.where(is_both, extra[:, None], 0.0)
    e.scatter_(1, torch.where(is_support, ids.support, ids.size), entries.to(e.dtype))
    alone = (stats.sampled - stats.reference).exp() + extra
    is_alone = is_sampled & ~is_both.any(-1)
    columns = torch.where(is_alone, ids.sampled, ids.size)[:, None]
    e.scatter_(1, columns, torch.where(is_alone, alone, 0.0).to(e.dtype)[:, None])


def block_stats(logits: Tensor, size: int, block: int) -> BlockStats:
    """Block maxima, logsumexp and entropy of each row in one read.

    The K blocks of the largest maxima hold a valid top-K, ties among blocks aside.

    Args:
        logits: [n, W] float, W >= size; only read.
        size: columns that count.
        block: columns of a block, a power of two.

    Returns:
        BlockStats of the dtype of ``logits``. An id of logit -inf adds nothing to any of them.
    """
    return _block_stats_torch(logits, size, block)


def _block_stats_torch(logits: Tensor, size: int, block: int) -> BlockStats:
    num_rows, whole = len(logits), size - size % block
    maxima = logits.new_empty(num_rows, -(-size // block))
    peak, total, moment = (logits.new_empty(num_rows) for _ in range(3))
    for part in _cached(logits):
        row = logits[part, :size]
        maxima[part, : whole // block] = row[:, :whole].unflatten(1, (-1, block)).amax(-1)
        if whole < size:
            maxima[part, -1] = row[:, whole:].amax(-1)
        top = maxima[part].amax(-1) if size else row.new_full((len(row),), -torch.inf)
        gap = row - top.masked_fill(top == -torch.inf, 0.0)[:, None]
        odds = gap.exp()
        peak[part], total[part] = top, odds.sum(-1)
        moment[part] = gap.masked_fill_(gap == -torch.inf, 0.0).mul_(odds).sum(-1)
    return BlockStats(maxima=maxima, peak=peak, total=total, moment=moment)


def suffix_scan(values: Tensor, segments: Tensor, carry: Tensor, *, discount: float) -> tuple[Tensor, Tensor]:
    """Discounted sum over the strictly later rows of each segment, chunk by chunk from the end.

        c_t = v_(t+1) + discount c_(t+1) inside a segment,    c_t = carry at its last row here

    Args:
        values: [n] float, nats; taken as float64.
        segments: [n] int64 below S; equal for rows of one segment, which are contiguous.
        carry: [S] float64, for each segment the sum over its rows in the later chunks, seen from the row before them.
        discount: weight of the next row, in [0, 1].

    Returns:
        c [n] float64, and the carry for the next earlier chunk, [S] float64. Segments without a row here keep theirs.
    """
    return _suffix_scan_torch(values, segments, carry, discount)


def _suffix_scan_torch(values: Tensor, segments: Tensor, carry: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    values, carry = values.double(), carry.clone()
    if not len(values):
        return values, carry
    goes_on = torch.zeros_like(segments, dtype=torch.bool)
    goes_on[:-1] = segments[1:] == segments[:-1]
    # an affine map per row, c_t = shift_t + slope_t c_(t+1); maps are composed over a reach that doubles
    shift, slope = torch.where(goes_on, values.roll(-1), carry[segments]), discount * goes_on.double()
    reach = 1
    while reach < len(values):
        shift[:-reach] += slope[:-reach] * shift[reach:]
        slope = torch.cat([slope[:-reach] * slope[reach:], slope[-reach:]])
        reach *= 2
    is_first = torch.ones_like(goes_on)
    is_first[1:] = ~goes_on[:-1]
    # rows that are no first go to a spare slot: an index of varying length would wait for the device
    spare = torch.cat([carry, carry.new_zeros(1)])
    spare.scatter_(0, torch.where(is_first, segments, len(carry)), values + discount * shift)
    return shift, spare[:-1]


def _cached(logits: Tensor) -> Iterator[slice]:
    """Rows of a size that stays in the cache; all rows at once on a device."""
    row_bytes = logits.shape[1] * logits.element_size()
    step = max(1, CACHE_BYTES // max(1, row_bytes)) if logits.device.type == "cpu" else max(1, len(logits))
    return (slice(at, at + step) for at in range(0, len(logits), step))


def _check_buffer(logits: Tensor, size: int) -> None:
    width = logits.shape[1]
    if width <= size:
        raise ValueError(
            f"a buffer of {width} columns has no spare one beyond {size} ids; {buffer_width(size)} would do"
        )
