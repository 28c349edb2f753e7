"""The teacher's side of the head: its most probable ids, exact and the same at every tensor-parallel size, without its logits.

Logits exist a tile at a time. Of the first tile the k blocks of columns with the largest maxima hold every one of its k largest:
what lies outside is at most its own block's maximum, hence at most that of each chosen block. Of later tiles only what beats the
k-th of those so far is taken: k / t of the ids of tile t, where the order of the logits does not follow that of the ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - candidates and statistics of a row are combined over tp
from torch import Tensor
from torch.nn.functional import pad

from megatron_distil.trainer.head.columns import VocabShard, wide_logits
from megatron_distil.trainer.head.kernels import block_stats

TILE_ROWS = 512
TILE_COLUMNS = 2048
"""Logits that a CPU holds at a time, which then lie in its cache. A GPU takes a rank's ids in one tile, ``VocabShard.chunk`` rows."""
LEAST_BLOCK = 32
_LAST_ID = 0x7FFFFFFF


class Voice(NamedTuple):
    """One model that speaks about a row; several are mixed in logit space."""

    rows: Tensor
    """[N, H] the same on every tensor rank."""
    weight: Tensor
    """[padded V/tp, H] of its output layer on this rank."""
    share: float


class Scores(NamedTuple):
    """What a teacher says of each row; constant, the same on every tensor rank.

    The entropy of a row with a logit that is NaN or +inf is NaN; its ids mean nothing.
    """

    ids: Tensor
    """[N, K] int64, global."""
    logprobs: Tensor
    """[N, K] nats, normalised over the whole vocabulary."""
    sampled: Tensor
    """[N] nats, at the sampled id, among ``ids`` or not."""
    entropy: Tensor
    """[N] nats, over the whole vocabulary."""


@torch.no_grad()
def top_k(voices: Sequence[Voice], k: int, sampled_ids: Tensor, shard: VocabShard, *, temperature: float) -> Scores:
    """The ``k`` largest logits of each row: ``log p = z - logsumexp z``, ``z = sum of share * rows @ weight.T / temperature``.

    Specification: ``algo.top_k``; ids in its order, by falling logit and among equals rising. Collective over tp.

    Args:
        voices: at least one, all about the same rows.
        k: 1 to the size of the vocabulary.
        sampled_ids: [N] int64, global.
        shard: what this rank holds.
        temperature: divides the logits.

    Raises:
        ValueError: ``k`` is out of range, or a voice is float16.
    """
    if not 1 <= k <= shard.vocab_size:
        raise ValueError(f"k = {k} of {shard.vocab_size} ids; give 1 to {shard.vocab_size}")
    found = _heard(voices, sampled_ids[:, None], k, shard, temperature)
    return Scores(ids=found.ids, logprobs=found.values, sampled=found.wanted[:, 0], entropy=found.entropy)


@torch.no_grad()
def at_ids(
    voices: Sequence[Voice], ids: Tensor, sampled_ids: Tensor, shard: VocabShard, *, temperature: float
) -> Scores:
    """Log-probabilities of given ids and of the sampled one: ``log p = z - logsumexp z``, z as in ``top_k``.

    Specification: ``log_softmax`` of whole logits. Collective over tp.

    Args:
        voices: as in ``top_k``.
        ids: [N, K] int64, global; no unused slots. K = 0: only the sampled id and the entropy.
        sampled_ids: [N] int64, global.
        shard: what this rank holds.
        temperature: divides the logits.

    Raises:
        ValueError: a voice is float16.
    """
    found = _heard(voices, torch.cat([ids, sampled_ids[:, None]], 1), 0, shard, temperature)
    return Scores(ids=ids, logprobs=found.wanted[:, :-1], sampled=found.wanted[:, -1], entropy=found.entropy)


class _Heard(NamedTuple):
    """Of some rows, the same on every tensor rank."""

    ids: Tensor
    """[n, k]"""
    values: Tensor
    """[n, k] log-probabilities at ``ids``."""
    wanted: Tensor
    """[n, J] log-probabilities at the ids that were asked for."""
    entropy: Tensor


class _Tiles(NamedTuple):
    """What is kept of a rank's logits."""

    values: Tensor
    """[n, min(k, ids of this rank)] the largest, in order."""
    ids: Tensor
    wanted: Tensor
    """[n, J] logits; 0 where this rank does not hold the id."""
    peak: Tensor
    """[n] the largest logit; -inf without ids."""
    sums: Tensor
    """[2, n] of exp(z - peak), and of (z - peak) exp(z - peak)."""


def _heard(voices: Sequence[Voice], wanted: Tensor, k: int, shard: VocabShard, temperature: float) -> _Heard:
    for voice in voices:
        if torch.float16 in (voice.rows.dtype, voice.weight.dtype):
            raise ValueError("a teacher in float16 rounds logits of size 16 by 0.008; give it in bfloat16 or float32")
    dtype = torch.promote_types(voices[0].rows.dtype, torch.float32)
    if not len(wanted):
        none = wanted.new_empty(0, k)
        return _Heard(ids=none, values=none.to(dtype), wanted=wanted.to(dtype), entropy=none.new_empty(0, dtype=dtype))
    num_rows, num_columns = _tile(k, shard, wanted.device)
    parts = []
    for at in range(0, len(wanted), num_rows):
        part = [voice._replace(rows=voice.rows[at : at + num_rows]) for voice in voices]
        tiles = _read(part, wanted[at : at + num_rows], k, shard, num_columns, temperature)
        parts.append(_over_tp(tiles, k, shard))
    return _Heard(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _tile(k: int, shard: VocabShard, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile; the same on every rank."""
    if device.type != "cpu":
        return shard.chunk, shard.rows
    num_columns = min(shard.rows, max(TILE_COLUMNS, 8 * k))
    return TILE_ROWS * max(1, TILE_COLUMNS // num_columns), num_columns


def _block(k: int, num_columns: int) -> int:
    """Columns of a block: so many that a tile has about as many blocks as k of them have columns."""
    return max(LEAST_BLOCK, 1 << round(math.log2(max(1.0, num_columns / max(1, k))) / 2))


def _read(
    voices: Sequence[Voice], wanted: Tensor, k: int, shard: VocabShard, num_columns: int, temperature: float
) -> _Tiles:
    block = _block(k, num_columns)
    dtype = torch.promote_types(voices[0].rows.dtype, torch.float32)
    leaders = _Leaders(k, wanted.new_empty(len(wanted), 0, dtype=dtype), wanted.new_empty(len(wanted), 0))
    picked = torch.zeros_like(wanted, dtype=dtype)
    peaks, sums = [], []
    for first in range(0, shard.size, num_columns):
        logits = _mixed(voices, slice(first, min(first + num_columns, shard.size)), temperature)
        picked += _picked(logits, wanted - (shard.first + first))
        stats = block_stats(logits, logits.shape[1], block)
        peaks.append(stats.peak)
        sums.append(torch.stack([stats.total, stats.moment]))
        if k:
            leaders.see(logits, stats.maxima, block, shard.first + first)
    if leaders.values.shape[1] > k:
        leaders.settle()
    if not peaks:
        peaks, sums = [picked.new_full((len(wanted),), -torch.inf)], [picked.new_zeros(2, len(wanted))]
    peak = torch.stack(peaks).amax(0)
    whole = torch.stack([_rebased(part, own, peak) for part, own in zip(sums, peaks, strict=True)]).sum(0)
    return _Tiles(leaders.values, leaders.ids, picked, peak, whole)


def _mixed(voices: Sequence[Voice], columns: slice, temperature: float) -> Tensor:
    """[n, c] logits of some of this rank's ids."""
    logits = [wide_logits(voice.rows, voice.weight[columns], temperature) for voice in voices]
    if len(voices) == 1 and voices[0].share == 1.0:
        return logits[0]
    return torch.stack([voice.share * one for voice, one in zip(voices, logits, strict=True)]).sum(0)


def _picked(logits: Tensor, columns: Tensor) -> Tensor:
    """[n, J] the logits at ``columns``, 0 where these lie outside."""
    is_here = (columns >= 0) & (columns < logits.shape[1])
    return logits.gather(1, torch.where(is_here, columns, 0)).masked_fill_(~is_here, 0.0)


class _Leaders:
    """The ``k`` largest of each row over tiles whose ids rise."""

    def __init__(self, k: int, values: Tensor, ids: Tensor) -> None:
        """Start from none: ``values`` and ``ids`` are [n, 0]."""
        self._k = k
        self.values, self.ids = values, ids
        self._fill = values.new_full((len(values),), k, dtype=torch.int64)
        """[n] how many columns of the row are taken; the first k are in order, the others as they came."""

    def see(self, logits: Tensor, maxima: Tensor, block: int, first: int) -> None:
        """Take what may be among the largest of a tile.

        Args:
            logits: [n, c] of the ids from ``first`` on, all larger than those seen.
            maxima: [n, ceil(c / block)] of its blocks.
            block: columns of a block.
            first: id of the first column.
        """
        if self.values.shape[1] < self._k:
            values, columns = self._of_largest_blocks(logits, maxima, block)
            self.values = torch.cat([self.values, values], 1)
            self.ids = torch.cat([self.ids, columns + first], 1)
            self.settle()
        else:
            self._take_better(logits, maxima, block, first)

    def settle(self) -> None:
        """Keep the ``k`` largest, in order."""
        self.values, self.ids = _largest(self.values, self.ids, self._k)
        self._fill.fill_(self._k)

    def _of_largest_blocks(self, logits: Tensor, maxima: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Logits and columns of every one that may be among the k largest of the tile; their number is fixed."""
        (num_rows, num_blocks), width = maxima.shape, logits.shape[1]
        if num_blocks <= self._k:
            return logits, torch.arange(width, device=logits.device).expand(num_rows, width)
        numbers = torch.arange(num_blocks, device=logits.device).expand_as(maxima)
        _, chosen = _largest(maxima, numbers, self._k)
        columns = (chosen[:, :, None] * block + torch.arange(block, device=logits.device)).view(num_rows, -1)
        values = logits.gather(1, columns.clamp(max=width - 1)).masked_fill_(columns >= width, -torch.inf)
        return values, columns

    def _take_better(self, logits: Tensor, maxima: Tensor, block: int, first: int) -> None:
        """Larger ids have to beat the k-th, not to equal it. Waits for the device: a GPU has one tile and is not here."""
        num_blocks, width = maxima.shape[1], logits.shape[1]
        floor = self.values[:, self._k - 1]
        at = (maxima > floor[:, None]).view(-1).nonzero()[:, 0]
        padded = pad(logits, (0, -width % block), value=-torch.inf) if width % block else logits
        found = padded.view(-1, block).index_select(0, at)
        hit, offset = (found > floor[at // num_blocks, None]).nonzero().unbind(1)
        row, number = at[hit] // num_blocks, at[hit] % num_blocks
        counts = row.bincount(minlength=len(floor))
        self._make_room(counts)
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts - self._fill)[row]
        self.values[row, place] = found[hit, offset]
        self.ids[row, place] = number * block + offset + first
        self._fill += counts

    def _make_room(self, counts: Tensor) -> None:
        """[n] more columns; those that nothing has filled lose."""
        if int((self._fill + counts).amax()) > self.values.shape[1]:
            self.settle()
            room = max(self._k, int(counts.amax()))
            self.values = pad(self.values, (0, room), value=-torch.inf)
            self.ids = pad(self.ids, (0, room), value=_LAST_ID)


def _largest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, among equals those of smaller id, in that order."""
    if values.dtype == torch.float32:
        order = _key(values, ids).topk(min(k, values.shape[1]), dim=-1).indices
    else:
        by_id = ids.argsort(dim=-1)
        order = by_id.gather(1, values.gather(1, by_id).sort(dim=-1, descending=True, stable=True).indices[:, :k])
    return values.gather(1, order), ids.gather(1, order)


def _key(values: Tensor, ids: Tensor) -> Tensor:
    """One unique int64 per candidate that orders by value falling, then by id rising."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    bits ^= (bits >> 31) & _LAST_ID
    return (bits.long() << 32).sub_(ids).add_(_LAST_ID)


def _over_tp(tiles: _Tiles, k: int, shard: VocabShard) -> _Heard:
    """What all ranks hold together."""
    values, ids, wanted, peak, sums = tiles
    if shard.num_shards > 1:
        peak = peak.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
        together = torch.cat([_rebased(sums, tiles.peak, peak), wanted.t()])
        dist.all_reduce(together, group=shard.group)
        sums, wanted = together[:2], together[2:].t()
        if k:
            values, ids = _largest(*_all_candidates(values, ids, k, shard), k)
    log_total = sums[0].log()
    whole = (peak + log_total)[:, None]
    return _Heard(ids=ids, values=values - whole, wanted=wanted - whole, entropy=log_total - sums[1] / sums[0])


def _rebased(sums: Tensor, peak: Tensor, onto: Tensor) -> Tensor:
    """[2, n] sums over exp(z - peak) and (z - peak) exp(z - peak) as those over z - onto; sums over no ids stay 0."""
    gap = torch.where(peak > -torch.inf, peak - onto, 0.0)
    return torch.stack([sums[0], sums[1] + gap * sums[0]]) * gap.exp()


def _all_candidates(values: Tensor, ids: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Those of every rank side by side; a rank with fewer than ``k`` fills up with candidates that lose."""
    missing = k - values.shape[1]
    if missing > 0:
        values = pad(values, (0, missing), value=-torch.inf)
        ids = pad(ids, (0, missing), value=_LAST_ID)
    everyone = []
    for mine in (values, ids):
        parts = [torch.empty_like(mine) for _ in range(shard.num_shards)]
        dist.all_gather(parts, mine.contiguous(), group=shard.group)
        everyone.append(torch.cat(parts, -1))
    return everyone[0], everyone[1]
