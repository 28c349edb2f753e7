"""All chunks of a set of rows: the columns of every chunk first, then the gradients, the last chunk first.

Buffers are used in turn, so the chunks that came last still have their exponentials when the gradients start; the others compute
them again. Three products a chunk where every chunk has a buffer, never more than four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head.chunk import Chunk, Layer, Stats, add_gradients, local_exps, statistics
from megatron_distil.trainer.head.columns import HeadInputs, VocabShard

BUFFER_BYTES = 2**27
"""Of one chunk's exponentials on a CPU: small enough for its caches to matter."""
LEAST_CHUNK = 4096
"""Rows of a chunk on a GPU, at least: each chunk reads and writes the whole gradient of the output layer."""


def chunk_rows(weight: Tensor, shard: VocabShard) -> int:
    """Rows whose exponentials share a buffer; the same on every tensor rank."""
    if weight.is_cuda:
        return max(LEAST_CHUNK, BUFFER_BYTES // (shard.width * weight.element_size()) // 256 * 256)
    num_bytes = max(4, weight.element_size())  # a CPU multiplies float32 at least
    return max(1, BUFFER_BYTES // (shard.width * num_bytes))


class Passes:
    """The columns of some rows, and then their gradients."""

    def __init__(self, layer: Layer, inputs: HeadInputs, chunks: Sequence[Tensor], buffers: list[Tensor]) -> None:
        """Keep the problem.

        Args:
            layer: of the inputs.
            inputs: N rows.
            chunks: int64 indices into N, in the order of the rows that ``columns`` returns.
            buffers: used in turn; at least one, each for the longest chunk.
        """
        self._layer, self._inputs = layer, inputs
        self._chunks, self._buffers = chunks, buffers
        self._stats: list[Stats] = []

    def columns(self) -> Columns:
        """Of all chunks, one after the other. Collective over tp."""
        for number, chunk in enumerate(self._chunks):
            buffer = self._buffers[number % len(self._buffers)]
            self._stats.append(statistics(self._layer, self._of(chunk), buffer))
        if not self._stats:
            none = self._inputs.rows.new_zeros(0, dtype=self._layer.dtype)
            return Columns(support=none.view(0, self._inputs.support_ids.shape[1]), tail=none, sampled=none)
        return Columns(*(torch.cat(parts) for parts in zip(*(s.columns for s in self._stats), strict=True)))

    def forget(self) -> None:
        """Give the buffers back; ``add_gradients`` computes everything again."""
        self._buffers = []

    def add_gradients(self, upstream: Columns, rows_grad: Tensor, weight_grad: Tensor) -> None:
        """Fill ``rows_grad`` at the rows of the chunks, and add to ``weight_grad``. Once, and without communication.

        Args:
            upstream: gradients of what ``columns`` returned.
            rows_grad: [N, H].
            weight_grad: [padded v, H].
        """
        first_kept = len(self._chunks) - len(self._buffers)
        spare = self._buffers[0] if self._buffers else None
        parts = list(zip(*(column.split([len(c) for c in self._chunks]) for column in upstream), strict=True))
        for number in reversed(range(len(self._chunks))):
            chunk = self._of(self._chunks[number])
            if number >= first_kept:
                spare = self._buffers[number % len(self._buffers)]
            else:
                if spare is None:
                    spare = self._layer.buffer(max(len(c) for c in self._chunks))
                local_exps(self._layer, chunk, spare)
            exps, stats, given = spare[: len(chunk.rows)], self._stats.pop(), Columns(*parts[number])
            found = add_gradients(self._layer, chunk, exps, stats, given, weight_grad)
            rows_grad.index_copy_(0, self._chunks[number], found.to(rows_grad.dtype))

    def _of(self, chunk: Tensor) -> Chunk:
        inputs = self._inputs
        rows = self._layer.scaled(inputs.rows.index_select(0, chunk))
        return Chunk(rows, inputs.support_ids.index_select(0, chunk), inputs.sampled_ids.index_select(0, chunk))


def make_buffers(layer: Layer, longest: int, wanted: int, keep_bytes: int) -> list[Tensor]:
    """One buffer, and more for ``wanted`` chunks as far as ``keep_bytes`` goes.

    Args:
        layer: of this rank.
        longest: rows of the longest chunk.
        wanted: chunks.
        keep_bytes: for all of them but the first.
    """
    each = max(1, longest * layer.shard.width * layer.weight.element_size())
    return [layer.buffer(longest) for _ in range(min(max(1, wanted), 1 + keep_bytes // each))]


class WeightGradient:
    """Where the gradient of the output layer goes: into Megatron's ``main_grad`` at once, or back to autograd.

    Source of the protocol: megatron/core/tensor_parallel/layers.py, LinearWithGradAccumulationAndAsyncCommunication.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Take ``main_grad`` where it has the precision of the sums; a narrower one would round once per chunk."""
        self._weight: Any = weight
        main: Tensor | None = getattr(weight, "main_grad", None)
        self.is_in_place = main is not None and main.dtype == dtype
        if main is None or main.dtype != dtype:
            main = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.sum = main

    def returned(self, factor: Tensor) -> Tensor:
        """What a backward gives to autograd for the weight; DDP's hook sees it, and skips it where it was added already."""
        if not self.is_in_place:
            return (self.sum * factor).to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(self._weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self._weight)
