"""One optimizer step: forward and backward over the microbatches, finite check, clip, step.

What Megatron multiplies and divides. The weights of the tokens are divided by the global denominator already, so gradients
are plain sums over microbatches, dp and cp. With ``calculate_per_token_loss`` the schedule divides no loss
(core/pipeline_parallel/schedules.py, forward_step_calc_loss), DDP scales by 1 (core/distributed/distributed_data_parallel.py),
and ``finalize_model_grads`` divides by the count of tokens only where it is given one; ours withholds it (``model.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distil.algo.objectives.objective import Objective
from megatron_distil.errors import NonFiniteLossError
from megatron_distil.trainer.anchor import Gather, anchored
from megatron_distil.trainer.counts import Counts, Totals, as_sums
from megatron_distil.trainer.loss import HeadName, MicrobatchLoss, invalid_rows
from megatron_distil.trainer.model import Student
from megatron_distil.trainer.optim import Optimizer
from megatron_distil.trainer.schedule import place, run_schedule
from megatron_distil.types import Batch, Microbatch, Sums


class Updater:
    """Optimizer steps of one student."""

    def __init__(
        self,
        student: Student,
        optimizer: Optimizer,
        objective: Objective,
        *,
        temperature: float,
        head: HeadName,
        run_dir: Path,
    ) -> None:
        """Keep what an update needs; ``run_dir`` gets the microbatches of a loss that is not finite."""
        self._student = student
        self._optimizer = optimizer
        self._objective = objective
        self._loss = MicrobatchLoss(student, objective, temperature=temperature, head=head)
        self._run_dir = run_dir

    def anchored(self, batches: Sequence[Batch], gather: Gather) -> list[Batch]:
        """What the objective wants to know of the policy before the step's first update. Collective over the world.

        Args:
            batches: of the step, in order.
            gather: what every replica gives; collective over dp.

        Returns:
            The batches with ``old_logprobs`` where there are several, and with ``baseline`` where the objective asks for one.
        """
        has_ratio = len(batches) > 1 and self._objective.reads_samples
        if not has_ratio and not self._objective.needs_baseline:
            return list(batches)
        return anchored(batches, self._loss, gather, has_ratio=has_ratio)

    def update(self, batch: Batch) -> Sums:
        """Theta <- theta - lr * grad L(theta; batch). Collective over the world.

        Raises:
            NonFiniteLossError: on every rank, before the step.
        """
        student = self._student
        placed = [place(one, one.loss_weights != 0, student.groups) for one in batch.microbatches]
        counted = Counts()

        def on_rows(index: int, rows: Tensor) -> Tensor:
            return self._loss(batch.microbatches[index], placed[index], rows, counted)

        student.ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        run_schedule(student, placed, on_rows, has_backward=True)
        totals = counted.over_replica(student.groups)
        norm = self._finite_norm(batch, totals)
        rate = self._optimizer.learning_rate
        self._optimizer.step()
        return as_sums(totals, batch, norm=norm, rate=rate)

    def _finite_norm(self, batch: Batch, totals: Totals) -> float:
        """The norm of the gradient, known to every rank: what one rank cannot compute, all refuse to apply."""
        megatron: Any = self._optimizer.megatron
        found = bool(megatron.prepare_grads())
        norm = float(megatron.get_grad_norm())
        if found or not math.isfinite(norm):
            raise NonFiniteLossError(
                f"gradient norm {norm}, {self._reason(batch, totals)} of replica {self._student.groups.replica_index}; "
                f"its microbatches are in {self._saved(batch)}. The weights are those before this update"
            )
        return norm

    def _reason(self, batch: Batch, totals: Totals) -> str:
        """What this replica knows of a norm that is no number."""
        wrong = totals.wrong
        if wrong["invalid_support"]:
            return f"{wrong['invalid_support']:.0f} invalid supports ({self._first_invalid(batch)})"
        if wrong["wrong_scale"]:
            return (
                f"{wrong['wrong_scale']:.0f} backwards that were given another loss scale than the head had assumed, 1,"
            )
        return f"loss not finite at {wrong['not_finite']:.0f} of {totals.tokens:.0f} tokens"

    def _first_invalid(self, batch: Batch) -> str:
        vocab_size = self._student.dims.vocab_size
        for number, one in enumerate(batch.microbatches):
            bad = invalid_rows(one.support_ids, vocab_size) & (one.loss_weights != 0)
            if bad.any():
                at = int(bad.nonzero()[0])
                rule = f"ids of a row must differ and lie in 0 to {vocab_size - 1}; -1 in unused slots"
                return f"support_ids of microbatch {number}, token {at}: {one.support_ids[at].tolist()}; {rule}"
        return "on another rank"

    def _saved(self, batch: Batch) -> Path:
        groups = self._student.groups
        path = self._run_dir / "logs" / f"not_finite.dp{groups.replica_index}.pt"
        if groups.is_head:
            path.parent.mkdir(parents=True, exist_ok=True)
            fields = [{name: getattr(one, name) for name in Microbatch.__slots__} for one in batch.microbatches]
            torch.save(fields, path)
        return path
