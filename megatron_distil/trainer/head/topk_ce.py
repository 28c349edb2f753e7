"""The composable head: columns from hidden states without kept logits, under any loss.

One product in the forward; two in the backward where the exponentials were kept, three where they are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_distil import algo
from megatron_distil.algo.topk import Tail
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head.chunk import Layer
from megatron_distil.trainer.head.columns import HeadInputs
from megatron_distil.trainer.head.passes import Passes, WeightGradient, chunk_rows, make_buffers


def topk_logprobs(inputs: HeadInputs, *, keep_bytes: int = 0) -> Columns:
    """``algo.columns`` of ``rows @ weight.T / temperature`` on a vocabulary cut over ``shard.group``. Collective over tp.

    Args:
        inputs: of this rank; the ``main_grad`` of the weight is added to in the backward.
        keep_bytes: exponentials that may be kept until the backward.

    Returns:
        Columns in float32 (float64 for float64 weights), the same on every rank, whose gradients are exact; those of
        ``rows`` are this rank's part of a sum over tp.

    Raises:
        ValueError: the weights are float16.
    """
    layer = Layer.of(inputs.weight, inputs.shard, temperature=inputs.temperature)
    return Columns(*_Columns.apply(inputs.rows, inputs.weight, inputs, layer, keep_bytes))


def topk_ce(inputs: HeadInputs, teacher_logprobs: Tensor, *, tail: Tail, keep_bytes: int = 0) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the teacher and log-probability of the sampled id: ``algo.topk_cross_entropy`` of ``topk_logprobs``.

    Args:
        inputs: of this rank.
        teacher_logprobs: [N, K] nats, -inf in unused slots; constant.
        tail: what is said about ids outside the support.
        keep_bytes: exponentials that may be kept until the backward.

    Returns:
        [N] nats and [N] nats; both carry gradient.
    """
    columns = topk_logprobs(inputs, keep_bytes=keep_bytes)
    return algo.topk_cross_entropy(teacher_logprobs, columns, tail=tail), columns.sampled


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, inputs: HeadInputs, layer: Layer, keep_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        step = chunk_rows(weight, inputs.shard)
        chunks = torch.arange(len(rows), device=rows.device).split(step) if len(rows) else ()
        buffers = make_buffers(layer, min(step, len(rows)), len(chunks), keep_bytes)
        passes = Passes(layer, inputs, chunks, buffers)
        columns = passes.columns()
        if not keep_bytes:
            passes.forget()
        ctx.save_for_backward(rows, weight)  # for the check that nobody has changed them
        ctx.passes, ctx.dtype = passes, layer.dtype
        return columns.support, columns.tail, columns.sampled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        rows, weight = ctx.saved_tensors
        target = WeightGradient(weight, ctx.dtype)
        rows_grad = torch.zeros_like(rows)
        ctx.passes.add_gradients(Columns(*grads), rows_grad, target.sum)
        return rows_grad, target.returned(rows.new_ones(())), None, None, None
