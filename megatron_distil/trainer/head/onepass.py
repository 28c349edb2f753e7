"""The one-pass head: loss and gradients of an objective inside the forward, the last rows of every sequence first.

A stage is a set of rows whose later rows, on whichever rank, are in the same or an earlier stage (``stages.py``). Its columns are
computed, the objective is differentiated with respect to them, which needs no vocabulary, and the two products of the gradient
follow while the exponentials still lie in their buffer. Nothing is computed twice, no logits are kept, and the objective is the
same object that every other head takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup  # noqa: TID251 - the type of a group

from megatron_distil.algo.objectives.objective import Future
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head.chunk import Layer
from megatron_distil.trainer.head.columns import HeadInputs
from megatron_distil.trainer.head.passes import Passes, WeightGradient, chunk_rows, make_buffers
from megatron_distil.trainer.head.scan import CreditScan
from megatron_distil.trainer.head.stages import CreditPlan


class Program(Protocol):
    """The loss of some rows, given what the head left of them."""

    def __call__(self, columns: Columns, rows: Tensor, future: Future) -> Tensor:
        """A weighted sum over rows, so that the sum over stages is the loss.

        Args:
            columns: of the rows; carry gradient where one is wanted.
            rows: [n] int64, which rows these are.
            future: the credit scan of these rows.

        Returns:
            [] loss.
        """
        ...


def onepass_loss(
    inputs: HeadInputs,
    program: Program,
    plan: CreditPlan,
    group: ProcessGroup | None,
    *,
    keep_bytes: int = 0,
    grad_scale: float = 1.0,
    wrong_scale: Tensor | None = None,
) -> Tensor:
    """The sum of ``program`` over the stages of ``plan``. Collective over tp, and over ``group`` in ``future``.

    The gradient of ``weight`` is added to its ``main_grad``, if it has one, while this runs: a forward without its backward leaves
    a wrong ``main_grad``, and must not be inside a checkpointed region. Without gradients enabled nothing is touched.

    Args:
        inputs: N rows of this rank.
        program: the loss; the same rows in the same stages on every tensor rank.
        plan: of the N rows.
        group: cp; None: one rank.
        keep_bytes: exponentials of a stage with several chunks that may be kept for its gradients.
        grad_scale: what the backward will be given.
        wrong_scale: [] counts backwards that were given something else. With ``main_grad`` the gradient of the rows is then NaN.

    Returns:
        [] loss over the rows of this rank; the gradient of ``rows`` is this rank's part of a sum over tp.

    Raises:
        ValueError: the weights are float16.
        RuntimeError: a second backward.

    Source: arXiv:2606.05152 for the loss; ``docs/head.md`` for the computation.
    """
    rows, weight = inputs.rows, inputs.weight
    layer = Layer.of(weight, inputs.shard, temperature=inputs.temperature)
    stages = _Stages(layer, inputs, program, plan, CreditScan(plan, group, rows.device), keep_bytes)
    if not torch.is_grad_enabled() or not (rows.requires_grad or weight.requires_grad):
        return stages.run(None, None, grad_scale)
    return _OnePass.apply(rows, weight, stages, grad_scale, wrong_scale)


class _Stages:
    """The loop over stages."""

    def __init__(
        self,
        layer: Layer,
        inputs: HeadInputs,
        program: Program,
        plan: CreditPlan,
        scan: CreditScan,
        keep_bytes: int,
    ) -> None:
        self.layer, self._inputs = layer, inputs
        self._program, self._plan, self._scan = program, plan, scan
        self._keep_bytes = keep_bytes

    def run(self, rows_grad: Tensor | None, weight_grad: Tensor | None, grad_scale: float) -> Tensor:
        """The loss; fills the gradients, if they are given, of ``grad_scale`` times the loss."""
        step = chunk_rows(self._inputs.weight, self._inputs.shard)
        cuts = [stage.rows.split(step) if len(stage.rows) else () for stage in self._plan.stages]
        longest = max((len(chunk) for chunks in cuts for chunk in chunks), default=0)
        buffers = make_buffers(self.layer, longest, max(map(len, cuts), default=0), self._keep_bytes)
        total = torch.zeros((), dtype=self.layer.dtype, device=self._inputs.rows.device)
        for number, (stage, chunks) in enumerate(zip(self._plan.stages, cuts, strict=True)):
            passes = Passes(self.layer, self._inputs, chunks, buffers)
            columns, future = passes.columns(), self._future(number)
            if rows_grad is None or weight_grad is None:
                total += self._program(columns, stage.rows, future)
                continue
            loss, upstream = _differentiated(self._program, columns, stage.rows, future)
            total += loss
            passes.add_gradients(Columns(*(g * grad_scale for g in upstream)), rows_grad, weight_grad)
        return total

    def _future(self, number: int) -> Callable[..., Tensor]:
        def future(cost: Tensor, *, mean: bool, discount: float) -> Tensor:
            return self._scan.credit(number, cost, mean=mean, discount=discount)

        return future


def _differentiated(program: Program, columns: Columns, rows: Tensor, future: Future) -> tuple[Tensor, Columns]:
    """The loss of a stage, and its gradient with respect to the columns."""
    leaves = Columns(*(column.detach().requires_grad_() for column in columns))
    with torch.enable_grad():
        loss = program(leaves, rows, future)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = (torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))
    return loss.detach(), Columns(*zeros)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, stages: _Stages, grad_scale: float, wrong_scale: Tensor | None
    ) -> Tensor:
        target = WeightGradient(weight, stages.layer.dtype)
        rows_grad = torch.zeros_like(rows)
        loss = stages.run(rows_grad, target.sum, grad_scale)
        ctx.made = rows_grad, target
        ctx.scale = grad_scale, wrong_scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        if ctx.made is None:
            raise RuntimeError(
                "a second backward through the one-pass head: its gradients were made once, in the forward"
            )
        (rows_grad, target), ctx.made = ctx.made, None
        scale, wrong_scale = ctx.scale
        factor = grads[0] / scale
        if target.is_in_place:  # it holds the gradient of another loss: no norm may be a number
            factor = torch.where(grads[0] == scale, factor, torch.nan)
        if wrong_scale is not None:
            wrong_scale += (grads[0] != scale) & grads[0].isfinite()
        return rows_grad.mul_(factor), target.returned(factor), None, None, None
