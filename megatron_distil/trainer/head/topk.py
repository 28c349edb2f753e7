"""The teacher's most probable ids, exact, and the same at every tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - candidates of a row are gathered over tp
from torch import Tensor

from megatron_distil.algo.topk import TopK
from megatron_distil.trainer.head.columns import VocabShard, wide_logits

_LAST_ID = 0x7FFFFFFF


class Voice(NamedTuple):
    """One model that speaks about a row; several are mixed in logit space."""

    rows: Tensor
    """[N, H] the same on every tensor rank."""
    weight: Tensor
    """[padded V/tp, H] of its output layer on this rank."""
    share: float


@torch.no_grad()
def top_k(voices: Sequence[Voice], k: int, shard: VocabShard, *, temperature: float) -> TopK:
    """``algo.top_k`` of ``sum of share * rows @ weight.T / temperature`` on a cut vocabulary. Collective over tp.

    Args:
        voices: at least one, all about the same rows.
        k: at most the size of the vocabulary.
        shard: what this rank holds.
        temperature: divides the logits.
    """
    parts = [_top_k(logits, k, shard) for _, logits in _chunks(voices, shard, temperature)]
    return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def at_ids(voices: Sequence[Voice], ids: Tensor, shard: VocabShard, *, temperature: float) -> TopK:
    """Log-probabilities at given ids, and the entropy, on a cut vocabulary. Collective over tp.

    Args:
        voices: as in ``top_k``.
        ids: [N, K] int64, global; no unused slots.
        shard: what this rank holds.
        temperature: divides the logits.
    """
    parts = []
    for at, logits in _chunks(voices, shard, temperature):
        wanted = ids[at : at + len(logits)]
        local = wanted - shard.first
        is_here = (local >= 0) & (local < shard.size)
        picked = torch.zeros_like(wanted, dtype=logits.dtype)
        if shard.size:
            picked = logits.gather(1, torch.where(is_here, local, 0)).masked_fill(~is_here, 0.0)
        if shard.group.size() > 1 and picked.numel():
            dist.all_reduce(picked, group=shard.group)
        whole, entropy = _statistics(logits, shard)
        parts.append(TopK(ids=wanted, logprobs=picked - whole[:, None], entropy=entropy))
    return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunks(voices: Sequence[Voice], shard: VocabShard, temperature: float) -> Iterator[tuple[int, Tensor]]:
    """Mixed logits of this rank, a bounded number of rows at a time; without rows one empty chunk."""
    step = shard.chunk
    for at in range(0, max(1, len(voices[0].rows)), step):
        mixed = [v.share * wide_logits(v.rows[at : at + step], v.weight[: shard.size], temperature) for v in voices]
        yield at, torch.stack(mixed).sum(0) if len(mixed) > 1 else mixed[0]


def _top_k(logits: Tensor, k: int, shard: VocabShard) -> TopK:
    values, ids = _largest(logits, torch.arange(shard.size, device=logits.device).expand_as(logits), k)
    ids = ids + shard.first
    whole, entropy = _statistics(logits, shard)
    if shard.group.size() > 1 and len(logits):
        values, ids = _all_candidates(values, ids, k, shard)
        values, ids = _largest(values, ids, k)
    return TopK(ids=ids, logprobs=values - whole[:, None], entropy=entropy)


def _all_candidates(values: Tensor, ids: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Those of every rank side by side; a rank with fewer than ``k`` fills up with candidates that lose."""
    missing = k - values.shape[1]
    if missing > 0:
        values = torch.cat([values, values.new_full((len(values), missing), -torch.inf)], -1)
        ids = torch.cat([ids, ids.new_full((len(ids), missing), _LAST_ID)], -1)
    everyone = []
    for mine in (values, ids):
        parts = [torch.empty_like(mine) for _ in range(shard.group.size())]
        dist.all_gather(parts, mine.contiguous(), group=shard.group)
        everyone.append(torch.cat(parts, -1))
    return everyone[0], everyone[1]


def _largest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, among equals those of smaller id, in that order."""
    order = _key(values, ids).topk(min(k, values.shape[1]), dim=-1).indices
    return values.gather(1, order), ids.gather(1, order)


def _key(values: Tensor, ids: Tensor) -> Tensor:
    """One unique int64 per candidate that orders by value falling, then by id rising."""
    bits = (values.float() + 0.0).view(torch.int32).long()  # + 0.0: the two zeros are equal
    bits = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (bits << 32) | (_LAST_ID - ids.long())


def _statistics(logits: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """[N] logsumexp and [N] entropy of whole rows."""
    peak = logits.amax(-1) if shard.size else logits.new_full((len(logits),), -torch.inf)
    is_cut = shard.group.size() > 1 and len(logits) > 0
    if is_cut:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
    centred = logits - peak[:, None]
    odds = centred.exp()
    sums = torch.stack([odds.sum(-1), (odds * centred).sum(-1)])
    if is_cut:
        dist.all_reduce(sums, group=shard.group)
    log_total = sums[0].log()
    return peak + log_total, log_total - sums[1] / sums[0]
