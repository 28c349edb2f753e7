"""A chunk of rows against this rank's part of the output layer: one product for the columns, two more for the gradients.

With z the logits of a row, S its support, a its sampled id, L the logsumexp over all ids and T that over ids outside S, every
loss of the columns has one form of gradient (g: upstream of the columns, G = sum_k g_k + g_tail + g_a):

    dz_v = -G exp(z_v - L) + g_tail exp(z_v - T)          v outside S
         = -G exp(z_v - L) + g_k                          v = k in S
         + g_a                                            added at v = a

so outside S it is a number of the row times E_v = exp(z_v - r), r the largest logit outside S on this rank. dz is never formed:
with beta = -G exp(r - L) + g_tail exp(r - T), and E' = E but for K + 1 entries of a row, dz = beta E', and

    dh = beta (E' W)            dW = E'^T (beta h)

The row's number moves to h and dh, which are V/H times smaller than the logits. r is not the maximum of the row, so the tail keeps
its digits however small it is, and E lies in [0, 1]. Source: the identity dz = softmax coefficient + K + 1 entries is derived in
``docs/head.md``; nothing of it is an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - statistics of a row are combined over tp
from torch import Tensor

from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head.columns import VocabShard
from megatron_distil.trainer.head.kernels import ExpStats, exp_stats, patch

_LEAST_BETA = {torch.float32: 1e-20, torch.float64: 1e-150}
"""Smallest |beta| relative to the row's gradient: what lies outside S is then below it as well, and nothing overflows."""


class Chunk(NamedTuple):
    """Some rows of a head's inputs."""

    rows: Tensor
    """[n, H] from ``Layer.scaled``."""
    support_ids: Tensor
    """[n, K] int64, global; -1 in unused slots."""
    sampled_ids: Tensor
    """[n] int64, global."""


class Stats(NamedTuple):
    """What is known of a chunk's rows after the first product; the buffer holds E."""

    peak: Tensor
    """[n] r of this rank. It and the next two are relative to the largest logit of the row."""
    whole: Tensor
    """[n] L, the same on every rank."""
    tail: Tensor
    """[n] T, the same on every rank; -inf where the support is the whole vocabulary."""
    columns: Columns
    """The same on every rank."""


@dataclass(frozen=True)
class Layer:
    """The output layer of this rank, in the precision in which it is multiplied."""

    weight: Tensor
    """[v, H] without padding."""
    shard: VocabShard
    scale: float
    """1 / temperature."""
    dtype: torch.dtype = field(init=False)
    """Of statistics, columns and accumulated gradients."""

    def __post_init__(self) -> None:
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        object.__setattr__(self, "dtype", wide)

    @property
    def is_narrow(self) -> bool:
        """Products of bfloat16 that are accumulated in float32; a CPU multiplies float32 instead."""
        return self.weight.dtype == torch.bfloat16

    @classmethod
    def of(cls, weight: Tensor, shard: VocabShard, *, temperature: float) -> Layer:
        """The layer of a parameter shard.

        Args:
            weight: [padded v, H].
            shard: what this rank holds.
            temperature: divides the logits.

        Raises:
            ValueError: float16, whose range is too small for E.
        """
        if weight.dtype == torch.float16:
            raise ValueError("the output layer is float16, in which exp(z) overflows; use bfloat16 or float32")
        real = weight.detach()[: shard.size]
        if real.dtype == torch.bfloat16 and not real.is_cuda:
            real = real.float()
        return cls(weight=real, shard=shard, scale=1.0 / temperature)

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows in the layer's precision, divided by the temperature."""
        rows = rows.detach().to(self.weight.dtype)
        return rows if self.scale == 1.0 else rows * self.scale

    def buffer(self, num_rows: int) -> Tensor:
        """[n, width] for E of a chunk; the columns from ``shard.size`` on are spare."""
        width = self.shard.width
        return torch.empty(num_rows, width, dtype=self.weight.dtype, device=self.weight.device)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """[n, width] ``rows @ weight.T`` in float32 at least; in ``out`` where that is wide enough."""
        size = self.shard.size
        if not self.is_narrow:
            torch.mm(rows, self.weight.t(), out=out[:, :size])
            return out
        wide = torch.empty(len(rows), self.shard.width, dtype=self.dtype, device=rows.device)
        torch.mm(rows, self.weight.t(), out_dtype=self.dtype, out=wide[:, :size])
        return wide

    def add_weight_gradient(self, exps: Tensor, rows: Tensor, out: Tensor) -> None:
        """``out[:v] += exps.T @ rows``, accumulated in the precision of ``out``."""
        into = out[: self.shard.size]
        if rows.dtype == into.dtype:
            into.addmm_(exps.t(), rows)
        else:  # a GPU; a CPU has made its operands wide
            torch.addmm(into, exps.t(), rows, out_dtype=into.dtype, out=into)


def statistics(layer: Layer, chunk: Chunk, buffer: Tensor) -> Stats:
    """``algo.columns`` of a chunk, and E in ``buffer``. Collective over tp.

    Args:
        layer: of this rank.
        chunk: its rows.
        buffer: from ``Layer.buffer``.
    """
    peak, total, at_support, at_sampled = local_exps(layer, chunk, buffer)
    shard = layer.shard
    if shard.num_shards > 1 and len(chunk.rows):
        mine = torch.stack([peak, total])
        flat = torch.empty(shard.num_shards * 2, len(peak), dtype=mine.dtype, device=mine.device)
        dist.all_gather_single(flat, mine, group=shard.group)
        peaks, totals = flat.view(shard.num_shards, 2, -1).unbind(1)
        found = torch.cat([at_support, at_sampled[:, None]], 1)
        dist.all_reduce(found, group=shard.group)
        at_support, at_sampled = found[:, :-1], found[:, -1]
    else:
        peaks, totals = peak[None], total[None]
    used = chunk.support_ids >= 0
    inside, outside = at_support.masked_fill(~used, -torch.inf), torch.where(totals > 0.0, peaks, -torch.inf)
    # Everything is relative to the largest logit of the row: a log-probability is a small difference of large numbers.
    top = torch.cat([inside, outside.t()], 1).amax(1)
    inside, at_sampled = inside - top[:, None], at_sampled - top
    tail = ((outside - top) + totals.log()).logsumexp(0)
    whole = torch.cat([inside, tail[:, None]], 1).logsumexp(1)
    # a rank without an id outside the support: its E is 0, and this keeps beta in range
    peak = torch.where(total > 0.0, peak - top, whole)
    support = torch.where(used, inside - whole[:, None], 0.0)
    return Stats(peak, whole, tail, Columns(support=support, tail=tail - whole, sampled=at_sampled - whole))


def local_exps(layer: Layer, chunk: Chunk, buffer: Tensor) -> ExpStats:
    """The first product and the only pass over the logits, without communication; again in a backward that kept nothing.

    Args:
        layer: of this rank.
        chunk: its rows.
        buffer: gets E.
    """
    out, shard = buffer[: len(chunk.rows)], layer.shard
    logits = layer.logits(chunk.rows, out)
    return exp_stats(logits, shard.local(chunk.support_ids), shard.local(chunk.sampled_ids), out, shard.size)


def add_gradients(
    layer: Layer, chunk: Chunk, exps: Tensor, stats: Stats, upstream: Columns, weight_grad: Tensor
) -> Tensor:
    """The other two products. Edits ``exps``; adds to ``weight_grad``.

    Args:
        layer: of this rank.
        chunk: its rows.
        exps: [n, width] E of these rows.
        stats: of these rows.
        upstream: gradients of the columns; 0 in unused slots.
        weight_grad: [padded v, H].

    Returns:
        [n, H] this rank's part of the gradient of the rows.
    """
    # float64 where nothing is wider than the support: a confident row leaves little of large sums, all of it from here
    inside, outside, at_sampled = (column.double() for column in upstream)
    peak, whole, tail = (stat.double() for stat in stats[:3])
    inside = torch.where(chunk.support_ids >= 0, inside, 0.0)
    scale = inside.abs().sum(1) + outside.abs() + at_sampled.abs()
    is_live = ~(scale <= torch.finfo(layer.dtype).tiny)  # a NaN is live: it has to reach the norm of the gradient
    unit = torch.where(is_live, 1.0 / scale, 0.0)  # everything relative to it: no entry leaves the range of the product
    inside, outside, at_sampled = inside * unit[:, None], outside * unit, at_sampled * unit
    total = -(inside.sum(1) + outside + at_sampled)
    has_tail = tail > -torch.inf
    beta = total * (peak - whole).exp() + torch.where(has_tail, outside * (peak - tail).exp(), 0.0)
    least = _LEAST_BETA[layer.dtype]
    beta = torch.where(beta.abs() < least, least, beta)

    is_sampled = (chunk.support_ids == chunk.sampled_ids[:, None]) & (chunk.support_ids >= 0)
    at_support = inside + total[:, None] * stats.columns.support.double().exp()
    at_support = at_support + torch.where(is_sampled, at_sampled[:, None], 0.0)
    log_a = stats.columns.sampled.double()
    to_tail = torch.where(has_tail, outside * (log_a - stats.columns.tail.double()).exp(), 0.0)
    alone = at_sampled + total * log_a.exp() + to_tail
    shard = layer.shard
    patch(
        exps,
        shard.local(chunk.support_ids),
        shard.local(chunk.sampled_ids),
        (at_support / beta[:, None]).to(layer.dtype),
        (alone / beta).to(layer.dtype),
        shard.size,
    )
    factor = torch.where(is_live, beta * scale, 0.0).to(layer.dtype)[:, None]
    exps = exps[:, : shard.size]
    layer.add_weight_gradient(exps, (chunk.rows * factor).to(chunk.rows.dtype), weight_grad)
    return (exps @ layer.weight).to(layer.dtype) * (factor * layer.scale)
