"""One optimizer step: forward and backward over the microbatches, finite check, clip, step.

What Megatron multiplies and divides. The weights of the tokens are divided by the global denominator already, so gradients
are plain sums over microbatches, dp and cp. With ``calculate_per_token_loss`` the schedule divides no loss
(core/pipeline_parallel/schedules.py, forward_step_calc_loss), DDP scales by 1 (core/distributed/distributed_data_parallel.py),
and ``finalize_model_grads`` divides by the count of tokens only where it is given one; ours withholds it (``model.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - counts of an update go to every rank of the replica
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Objective, Tokens
from megatron_distil.errors import NonFiniteLossError
from megatron_distil.trainer.attention import packed_params
from megatron_distil.trainer.cp import SequenceCut, own_part, sequence_cut, whole_sequence
from megatron_distil.trainer.groups import Groups
from megatron_distil.trainer.head.columns import VocabShard, columns, rows_of
from megatron_distil.trainer.model import Student
from megatron_distil.trainer.optim import Optimizer
from megatron_distil.types import Batch, Microbatch, Sums

_ONE = torch.tensor(1, dtype=torch.int)

_PER_TOKEN = (
    "loss/ce_nats",
    "loss/kl_nats",
    "loss/credit_nats",
    "loss/divergence_nats",
    "loss/policy_gain",
    "loss/reverse_kl_nats",
    "sync/logprob_gap_nats",
    "teacher/entropy_nats",
    "teacher/student_mass_frac",
    "teacher/support_mass_frac",
    "train/ratio",
    "train/ratio_clipped_frac",
    "train/tis_clipped_frac",
    "train/token_clipped_frac",
)
"""Sums over the tokens of the loss, in the order in which they travel."""
_MAXIMA = ("loss/credit_max_nats", "sync/logprob_gap_max_nats")


@dataclass(frozen=True)
class Placed:
    """A packed row as this rank computes it."""

    token_ids: Tensor
    """[T/cp]"""
    positions: Tensor
    """[T/cp]"""
    packed: PackedSeqParams
    cut: SequenceCut
    rows: Tensor
    """[N] int64 into ``T/cp``: the positions that the head looks at."""


def place(microbatch: Microbatch, is_wanted: Tensor, groups: Groups) -> Placed:
    """This rank's part of a packed row.

    Args:
        microbatch: whole, on the CPU.
        is_wanted: [T] bool, True at the positions that the head looks at.
        groups: of this rank.
    """
    cut = sequence_cut(microbatch.cu_seqlens, groups.cp)
    device = groups.device
    return Placed(
        token_ids=own_part(microbatch.token_ids, cut).to(device),
        positions=own_part(microbatch.positions, cut).to(device),
        packed=packed_params(microbatch.cu_seqlens.to(device)),
        cut=SequenceCut(group=cut.group, order=cut.order.to(device)),
        rows=own_part(is_wanted, cut).nonzero()[:, 0].to(device),
    )


def run_schedule(
    student: Student, placed: Sequence[Placed], on_rows: Callable[[int, Tensor], Tensor], *, has_backward: bool
) -> None:
    """Megatron's schedule over the microbatches. Collective over the replica.

    Args:
        student: whose forward it is.
        placed: the microbatches of this rank.
        on_rows: called on the last stage with a microbatch's index and its hidden states [N, H]; returns a loss.
        has_backward: whether gradients are wanted; they arrive in the buffers of ``student.ddp``, reduced.
    """
    groups = student.groups
    is_cut = student.transformer.sequence_parallel

    def forward_step(iterator: Iterator[int], _: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict]]]:
        index = next(iterator)
        part = placed[index]

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            rows = rows_of(hidden, part.rows, groups.tp, is_sequence_parallel=is_cut)
            return on_rows(index, rows), _ONE, {}

        return student.hidden(part.token_ids, part.positions, part.packed), loss_func

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(len(placed))),
        model=student.ddp,
        num_microbatches=len(placed),
        seq_length=len(placed[0].token_ids),
        micro_batch_size=1,
        forward_only=not has_backward,
    )


def vocab_shard(student: Student) -> VocabShard:
    """The part of the vocabulary on this rank; on the last stage."""
    return VocabShard.of(student.groups.tp, vocab_size=student.dims.vocab_size, rows=len(student.head_weight))


class Updater:
    """Optimizer steps of one student."""

    def __init__(
        self, student: Student, optimizer: Optimizer, objective: Objective, *, temperature: float, run_dir: Path
    ) -> None:
        """Keep what an update needs; ``run_dir`` gets the microbatches of a loss that is not finite."""
        self._student = student
        self._optimizer = optimizer
        self._objective = objective
        self._temperature = temperature
        self._run_dir = run_dir

    def update(self, batch: Batch) -> Sums:
        """Theta <- theta - lr * grad L(theta; batch). Collective over the world.

        Raises:
            NonFiniteLossError: on every rank, before the step.
        """
        student = self._student
        placed = [place(one, one.loss_weights != 0, student.groups) for one in batch.microbatches]
        counted = _Counts()

        def on_rows(index: int, rows: Tensor) -> Tensor:
            return self._loss(batch.microbatches[index], placed[index], rows, counted)

        student.ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        run_schedule(student, placed, on_rows, has_backward=True)
        totals = counted.over_replica(student.groups)
        norm = self._finite_norm(batch, totals)
        rate = self._optimizer.learning_rate
        self._optimizer.step()
        return _as_sums(totals, batch, norm=norm, rate=rate)

    def _loss(self, microbatch: Microbatch, placed: Placed, rows: Tensor, counted: _Counts) -> Tensor:
        """The loss of one microbatch on this rank's rows; a loss that is not finite makes every gradient NaN."""

        def at_rows(vector: Tensor) -> Tensor:
            return own_part(vector.to(rows.device), placed.cut).index_select(0, placed.rows)

        student = columns(
            rows,
            self._student.head_weight,
            at_rows(microbatch.support_ids),
            at_rows(microbatch.sampled_ids),
            vocab_shard(self._student),
            temperature=self._temperature,
        )
        tokens = Tokens(
            student=student,
            teacher_logprobs=at_rows(microbatch.teacher_logprobs),
            teacher_sampled=at_rows(microbatch.teacher_sampled),
            sampling_logprobs=at_rows(microbatch.sampling_logprobs),
            old_logprobs=student.sampled.detach(),
            advantages=at_rows(microbatch.advantages),
            baseline=rows.new_zeros(len(rows)),
            weights=at_rows(microbatch.loss_weights),
        )
        terms = self._objective.terms(tokens, _credit_scan(microbatch, placed))
        counted.add(terms, self._objective, tokens, at_rows(microbatch.teacher_entropy))
        loss = terms.imitation + terms.credit
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _finite_norm(self, batch: Batch, totals: _Totals) -> float:
        """The norm of the gradient, known to every rank: what one rank cannot compute, all refuse to apply."""
        megatron: Any = self._optimizer.megatron
        found = bool(megatron.prepare_grads())
        norm = float(megatron.get_grad_norm())
        if found or not math.isfinite(norm):
            raise NonFiniteLossError(
                f"gradient norm {norm}, loss not finite at {totals.not_finite:.0f} of {totals.tokens:.0f} tokens of replica "
                f"{self._student.groups.replica_index}; its microbatches are in {self._saved(batch)}. "
                "The weights are those before this update"
            )
        return norm

    def _saved(self, batch: Batch) -> Path:
        groups = self._student.groups
        path = self._run_dir / "logs" / f"not_finite.dp{groups.replica_index}.pt"
        if groups.is_head:
            path.parent.mkdir(parents=True, exist_ok=True)
            fields = [{name: getattr(one, name) for name in Microbatch.__slots__} for one in batch.microbatches]
            torch.save(fields, path)
        return path


def _credit_scan(microbatch: Microbatch, placed: Placed) -> Callable[..., Tensor]:
    """``algo.future_credit`` of whole sequences, for vectors over this rank's rows."""

    def credit(cost: Tensor, *, mean: bool, discount: float) -> Tensor:
        device, cut = cost.device, placed.cut
        segment_ids = microbatch.segment_ids.to(device)
        mask = (microbatch.loss_weights != 0).to(device)
        part = cost.new_zeros(len(placed.token_ids)).index_copy(0, placed.rows, cost.detach())
        whole = algo.future_credit(whole_sequence(part, cut), mask, segment_ids, mean=mean, discount=discount)
        return own_part(whole, cut).index_select(0, placed.rows)

    return credit


@dataclass(frozen=True)
class _Totals:
    """What the ranks of a replica counted together."""

    tokens: float
    not_finite: float
    sums: dict[str, float]
    maxima: dict[str, float]


class _Counts:
    """Sums of one update on this rank, on its device until the end of the update."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, terms: algo.LossTerms, objective: Objective, tokens: Tokens, teacher_entropy: Tensor) -> None:
        """Count one microbatch; all its rows carry a loss."""
        sampled = tokens.student.sampled.detach()
        found = dict(terms.counts)
        for name, value in terms.maxima.items():
            self._peak(name, value)
        found["not_finite"] = (~sampled.isfinite()).sum()
        if objective.reads_samples:
            gap = (sampled - tokens.sampling_logprobs).abs()
            found["sync/logprob_gap_nats"] = gap.sum()
            if len(gap):
                self._peak("sync/logprob_gap_max_nats", gap.amax())
        if objective.needs_teacher:
            is_used = tokens.teacher_logprobs > -torch.inf
            found["teacher/support_mass_frac"] = tokens.teacher_logprobs.exp().sum()
            found["teacher/student_mass_frac"] = (tokens.student.support.detach().exp() * is_used).sum()
            found["teacher/entropy_nats"] = teacher_entropy.sum()
        for name, value in found.items():
            self._sums[name] = self._sums[name] + value.detach().double() if name in self._sums else value.double()
        self._tokens += len(sampled)

    def _peak(self, name: str, value: Tensor) -> None:
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def over_replica(self, groups: Groups) -> _Totals:
        """One small collective over the replica, whose every rank gets the result.

        The last stage counts, and there the first tensor rank, since the others have the same numbers.
        """
        names = ("not_finite", *_PER_TOKEN)
        unknown = set(self._sums) - set(names)
        if unknown:
            raise ValueError(f"an objective counts {sorted(unknown)}, which update.py does not know")
        mine = torch.full((1 + 2 * len(names) + len(_MAXIMA),), 0.0, dtype=torch.float64)
        mine[-len(_MAXIMA) :] = -torch.inf
        if groups.is_last_stage and groups.tp_rank == 0:
            mine[0] = self._tokens
            for place_, name in enumerate(names):
                if name in self._sums:
                    mine[1 + 2 * place_], mine[2 + 2 * place_] = 1.0, self._sums[name]
            for place_, name in enumerate(_MAXIMA):
                if name in self._maxima:
                    mine[place_ - len(_MAXIMA)] = self._maxima[name]
        flat = torch.empty(groups.replica.size() * len(mine), dtype=torch.float64)
        dist.all_gather_single(flat, mine, group=groups.replica)
        everyone = flat.view(groups.replica.size(), len(mine))
        sums, maxima = everyone.sum(0).tolist(), everyone.amax(0).tolist()[-len(_MAXIMA) :]
        return _Totals(
            tokens=sums[0],
            not_finite=sums[2],
            sums={name: sums[2 + 2 * i] for i, name in enumerate(names) if i and sums[1 + 2 * i]},
            maxima={name: value for name, value in zip(_MAXIMA, maxima, strict=True) if value > -math.inf},
        )


def _as_sums(totals: _Totals, batch: Batch, *, norm: float, rate: float) -> Sums:
    packed = sum(len(one.token_ids) for one in batch.microbatches)
    padding = sum(int((one.segment_ids < 0).sum()) for one in batch.microbatches)
    return Sums(
        sums={
            **{name: (value, totals.tokens) for name, value in totals.sums.items()},
            "loss/tokens": (totals.tokens, 1.0),
            "train/grad_norm": (norm, 1.0),
            "train/learning_rate": (rate, 1.0),
            "train/padding_frac": (float(padding), float(packed)),
        },
        maxima={**totals.maxima, "train/grad_norm_max": norm},
    )
