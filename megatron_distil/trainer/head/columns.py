"""From hidden states to log-probabilities, on this rank's rows of the output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - statistics of a row are summed over tp
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup  # noqa: TID251 - the type of a group
from torch.utils.checkpoint import checkpoint

from megatron_distil.algo.vocabulary import Columns

CHUNK_BYTES = 2**30
"""Logits of one rank that exist at a time; rows beyond it are computed again in the backward."""


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that a rank holds: ids ``first`` to ``first + size``, padding cut off."""

    group: ProcessGroup | None
    """tp; None: one rank holds everything."""
    first: int
    size: int
    rows: int
    """Of the output layer, padding included; the same on every rank."""
    vocab_size: int
    """Real ids of the model."""

    @property
    def chunk(self) -> int:
        """Rows of hidden states whose logits exist at a time; the same on every rank."""
        return max(1, CHUNK_BYTES // (4 * self.rows))

    @property
    def num_shards(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    @property
    def width(self) -> int:
        """Columns of a buffer: those of this rank, at least one spare, in whole cache lines."""
        return (self.rows // 64 + 1) * 64

    def local(self, ids: Tensor) -> Tensor:
        """Global ids as columns of this rank; -1 where an id lies on another rank or is -1 itself."""
        local = ids - self.first
        return torch.where((ids >= 0) & (local >= 0) & (local < self.size), local, -1)

    @classmethod
    def of(cls, group: ProcessGroup | None, *, vocab_size: int, rows: int) -> VocabShard:
        """The shard of this rank.

        Args:
            group: tp; None: one rank.
            vocab_size: real ids of the model.
            rows: of the output layer on each rank, padding included.
        """
        first = 0 if group is None else group.rank() * rows
        size = max(0, min(rows, vocab_size - first))
        return cls(group=group, first=first, size=size, rows=rows, vocab_size=vocab_size)


def rows_of(hidden: Tensor, index: Tensor, group: ProcessGroup, *, is_sequence_parallel: bool) -> Tensor:
    """The rows that carry a loss, whole on every tensor rank. Collective over tp, in the backward too.

    Args:
        hidden: [T/cp, H], or [T/cp/tp, H] with sequence parallelism.
        index: [N] int64 into ``T/cp``.
        group: tp.
        is_sequence_parallel: whether ``hidden`` is cut over tp.

    Returns:
        [N, H]. Its gradient is a part on each rank; the sum over tp is the gradient of ``hidden``.
    """
    if group.size() > 1:
        if is_sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    return hidden.index_select(0, index)


@dataclass(frozen=True)
class HeadInputs:
    """What every head takes."""

    rows: Tensor
    """[N, H] the same on every tensor rank."""
    weight: Tensor
    """[padded V/tp, H] of this rank: the parameter itself, whose ``main_grad`` a head may add to."""
    support_ids: Tensor
    """[N, K] int64, global ids, unique in each row; -1 in unused slots."""
    sampled_ids: Tensor
    """[N] int64, global."""
    shard: VocabShard
    temperature: float = 1.0
    """Divides the logits."""


def columns(inputs: HeadInputs) -> Columns:
    """``algo.columns`` of ``rows @ weight.T / temperature`` on a vocabulary cut over ``shard.group``. Collective over tp.

    The plain head: logits exist, a bounded number of rows at a time. Statistics are float32 (float64 for float64 rows).
    Logits leave the product in that precision: one of size 16 to 32 in bfloat16 is off by up to 0.06.

    Args:
        inputs: of this rank.

    Returns:
        Columns, the same on every rank. Where all of them are used alike on every rank, gradients are exact; those of
        ``rows`` are this rank's part of a sum.
    """
    rows, support_ids, sampled_ids = inputs.rows, inputs.support_ids, inputs.sampled_ids
    shard, temperature = inputs.shard, inputs.temperature
    weight = inputs.weight[: shard.size]
    step = shard.chunk
    if len(rows) <= step:
        return _columns(rows, weight, support_ids, sampled_ids, shard, temperature)
    chunks = [
        checkpoint(_columns, *part, shard, temperature, use_reentrant=False)
        for part in (
            (rows[at : at + step], weight, support_ids[at : at + step], sampled_ids[at : at + step])
            for at in range(0, len(rows), step)
        )
    ]
    return Columns(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _columns(
    rows: Tensor, weight: Tensor, support_ids: Tensor, sampled_ids: Tensor, shard: VocabShard, temperature: float
) -> Columns:
    logits = wide_logits(rows, weight, temperature)
    return Columns(*_ShardedColumns.apply(logits, support_ids, sampled_ids, shard))


def wide_logits(rows: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """``rows @ weight.T / temperature`` in float32 at least, without rounding to a narrower type on the way."""
    if rows.dtype == torch.bfloat16 and rows.is_cuda:
        logits = _NarrowProduct.apply(rows, weight)
    elif rows.dtype == torch.bfloat16:
        logits = rows.float() @ weight.float().t()
    else:
        logits = rows @ weight.t()
    return logits if temperature == 1.0 else logits / temperature


class _NarrowProduct(torch.autograd.Function):
    """A product of bfloat16 matrices that is accumulated and returned in float32; its gradients are products of bfloat16."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].to(rows.dtype)
        return grad @ weight, grad.t() @ rows


class _ShardedColumns(torch.autograd.Function):
    """``algo.columns`` on ``[N, V/tp]``.

    With L the logsumexp of a row, L' that of its ids outside the support and g the gradient that comes in:

        dz_v = - (sum_k g_k + g_tail + g_sampled) exp(z_v - L) + [v outside] g_tail exp(z_v - L') + [v = k] g_k + [v = a] g_a

    The tail has a maximum of its own, so that it keeps its digits however small it is.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, support_ids: Tensor, sampled_ids: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, (support, is_support) = len(logits), _local(support_ids, shard)
        sampled, is_sampled = _local(sampled_ids[:, None], shard)
        outside = _without(logits, support, is_support)

        least = logits.new_full((num_rows,), -torch.inf)
        peaks = torch.stack([x.amax(-1) if shard.size else least for x in (logits, outside)])
        _reduce(peaks, dist.ReduceOp.MAX, shard.group)
        # where the support is the whole vocabulary, the tail is -inf and has no gradient
        peaks[1].masked_fill_(peaks[1] == -torch.inf, 0.0)
        sums = logits.new_zeros(num_rows, 3 + support.shape[1])
        sums[:, 0] = (logits - peaks[0, :, None]).exp_().sum(-1)
        sums[:, 1] = (outside - peaks[1, :, None]).exp_().sum(-1)
        if shard.size:
            sums[:, 2] = logits.gather(1, sampled)[:, 0].masked_fill(~is_sampled[:, 0], 0.0)
            sums[:, 3:] = logits.gather(1, support).masked_fill(~is_support, 0.0)
        _reduce(sums, dist.ReduceOp.SUM, shard.group)

        whole, tail = sums[:, 0].log() + peaks[0], sums[:, 1].log() + peaks[1]
        ctx.save_for_backward(logits, support_ids, sampled_ids, whole, tail)
        ctx.shard = shard
        at_support = torch.where(support_ids >= 0, sums[:, 3:] - whole[:, None], 0.0)
        return at_support, tail - whole, sums[:, 2] - whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, support_ids, sampled_ids, whole, tail = ctx.saved_tensors
        at_support, at_tail, at_sampled = grads
        at_support = torch.where(support_ids >= 0, at_support, 0.0)
        total = at_support.sum(-1) + at_tail + at_sampled
        grad = (logits - whole[:, None]).exp_().mul_(-total[:, None])
        if ctx.shard.size:
            support, is_support = _local(support_ids, ctx.shard)
            sampled, is_sampled = _local(sampled_ids[:, None], ctx.shard)
            safe_tail = tail.masked_fill(tail == -torch.inf, 0.0)[:, None]
            grad += (_without(logits, support, is_support) - safe_tail).exp_().mul_(at_tail[:, None])
            grad.scatter_add_(1, support, torch.where(is_support, at_support, 0.0))
            grad.scatter_add_(1, sampled, torch.where(is_sampled, at_sampled[:, None], 0.0))
        return grad, None, None, None


def _local(ids: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Ids as columns of this rank, clamped into range, and whether they lie here."""
    local = ids - shard.first
    is_here = (ids >= 0) & (local >= 0) & (local < shard.size)
    return torch.where(is_here, local, 0), is_here


def _without(logits: Tensor, support: Tensor, is_support: Tensor) -> Tensor:
    """The logits with -inf at the support."""
    num_rows, size = logits.shape
    spare = torch.zeros(num_rows, size + 1, dtype=torch.bool, device=logits.device)
    spare.scatter_(1, torch.where(is_support, support, size), True)
    return logits.masked_fill(spare[:, :size], -torch.inf)


def _reduce(tensor: Tensor, op: Any, group: ProcessGroup | None) -> None:
    if group is not None and group.size() > 1 and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
