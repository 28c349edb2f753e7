"""The loss of one microbatch on this rank's rows: the head, the credit scan and the objective put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_distil.algo.objectives.objective import Future, Objective, Tokens
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.counts import Counts
from megatron_distil.trainer.cp import own_part
from megatron_distil.trainer.head.columns import HeadInputs, columns
from megatron_distil.trainer.head.onepass import Program, onepass_loss
from megatron_distil.trainer.head.passes import chunk_rows
from megatron_distil.trainer.head.scan import CreditScan
from megatron_distil.trainer.head.stages import CreditPlan, credit_plan
from megatron_distil.trainer.head.topk_ce import topk_logprobs
from megatron_distil.trainer.model import Student
from megatron_distil.trainer.schedule import Placed, vocab_shard
from megatron_distil.types import Microbatch

HeadName = Literal["auto", "onepass", "composable", "plain"]


class MicrobatchLoss:
    """The weighted sum whose gradient is the update; on the last stage."""

    def __init__(self, student: Student, objective: Objective, *, temperature: float, head: HeadName) -> None:
        self.student, self.objective = student, objective
        self._temperature = temperature
        # every objective is a sum over stages (``Objective.terms``), so that the one-pass head takes all of them
        self._head = "onepass" if head == "auto" else head

    def __call__(self, microbatch: Microbatch, placed: Placed, rows: Tensor, counted: Counts) -> Tensor:
        """[] loss, over the rows of this rank. Collective over tp, and over cp where there is credit.

        Args:
            microbatch: whole, on the CPU.
            placed: this rank's part of it.
            rows: [N, H] hidden states of ``placed.rows``.
            counted: gets what is counted.
        """
        vectors = self._vectors(microbatch, placed)
        entropy = at_rows(microbatch.teacher_entropy, placed)

        def program(columns: Columns, rows: Tensor, future: Future) -> Tensor:
            tokens = _tokens(columns, vectors, rows)
            terms = self.objective.terms(tokens, future)
            counted.add(terms, self.objective, tokens, entropy[rows])
            return terms.imitation + terms.credit

        inputs = self._inputs(microbatch, placed, rows)
        invalid = invalid_rows(inputs.support_ids, self.student.dims.vocab_size).sum()
        counted.add_wrong("invalid_support", invalid)
        if self._head == "onepass":
            loss = self._onepass(inputs, program, microbatch, placed, counted)
        else:
            found = self._columns(inputs)
            loss = program(found, torch.arange(len(rows), device=rows.device), self._scan(microbatch, placed))
        # what is not finite, or not meant, makes every gradient NaN, and with it the norm that all ranks see
        return loss * torch.where(loss.detach().isfinite() & (invalid == 0), 1.0, torch.nan)

    @torch.no_grad()
    def before(self, microbatch: Microbatch, placed: Placed, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the sampled ids, and the credit of each token where the objective asks for a baseline.

        Returns:
            [N] nats and [N] (0 where there is no baseline), in the order of ``rows``.
        """
        vectors = self._vectors(microbatch, placed)
        inputs = self._inputs(microbatch, placed, rows)
        if not self.objective.needs_baseline:
            found = self._columns(replace(inputs, support_ids=inputs.support_ids[:, :0]))
            return found.sampled, torch.zeros_like(found.sampled)
        found = self._columns(inputs)
        tokens = _tokens(found, vectors, torch.arange(len(rows), device=rows.device))
        return found.sampled, self.objective.credit(tokens, self._scan(microbatch, placed))

    def _onepass(
        self, inputs: HeadInputs, program: Program, microbatch: Microbatch, placed: Placed, counted: Counts
    ) -> Tensor:
        step = chunk_rows(inputs.weight, inputs.shard)
        plan = self._plan(microbatch, placed, stage_rows=step)
        wrong_scale = counted.counter("wrong_scale", inputs.rows.device)  # its backward counts
        return onepass_loss(inputs, program, plan, placed.cut.group, wrong_scale=wrong_scale)

    def _columns(self, inputs: HeadInputs) -> Columns:
        return columns(inputs) if self._head == "plain" else topk_logprobs(inputs)

    def _inputs(self, microbatch: Microbatch, placed: Placed, rows: Tensor) -> HeadInputs:
        return HeadInputs(
            rows=rows,
            weight=self.student.head_weight,
            support_ids=at_rows(microbatch.support_ids, placed),
            sampled_ids=at_rows(microbatch.sampled_ids, placed),
            shard=vocab_shard(self.student),
            temperature=self._temperature,
        )

    def _vectors(self, microbatch: Microbatch, placed: Placed) -> dict[str, Tensor]:
        names = ("teacher_logprobs", "teacher_sampled", "sampling_logprobs", "advantages")
        found = {name: at_rows(getattr(microbatch, name), placed) for name in names}
        found["weights"] = at_rows(microbatch.loss_weights, placed)
        for name in ("old_logprobs", "baseline"):
            if (whole := getattr(microbatch, name)) is not None:
                found[name] = at_rows(whole, placed)
        return found

    def _plan(self, microbatch: Microbatch, placed: Placed, *, stage_rows: int | None) -> CreditPlan:
        cut = placed.cut
        is_row = microbatch.loss_weights != 0
        plan = credit_plan(cut.order.cpu(), microbatch.segment_ids, is_row, cut.group.rank(), stage_rows=stage_rows)
        return plan.to(self.student.groups.device)

    def _scan(self, microbatch: Microbatch, placed: Placed) -> Any:
        scan = CreditScan(self._plan(microbatch, placed, stage_rows=None), placed.cut.group, self.student.groups.device)

        def future(cost: Tensor, *, mean: bool, discount: float) -> Tensor:
            return scan.credit(0, cost, mean=mean, discount=discount)

        return future


def invalid_rows(support_ids: Tensor, vocab_size: int) -> Tensor:
    """[N] bool: whether a support names an id twice, or one that is not in the vocabulary."""
    ids = support_ids.sort(dim=1).values
    is_repeated = ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any(1)
    return is_repeated | ((ids < -1) | (ids >= vocab_size)).any(1)


def at_rows(whole: Tensor, placed: Placed) -> Tensor:
    """A vector over the tokens of a microbatch at this rank's rows, on its device."""
    return own_part(whole.to(placed.rows.device), placed.cut).index_select(0, placed.rows)


def _tokens(found: Columns, vectors: Mapping[str, Tensor], at: Tensor) -> Tokens:
    given = {name: vector[at] for name, vector in vectors.items()}
    sampled = found.sampled.detach()
    return Tokens(student=found, **({"old_logprobs": sampled, "baseline": torch.zeros_like(sampled)} | given))
