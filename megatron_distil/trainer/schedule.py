"""Packed rows through Megatron's schedule: this rank's part of each, and what the last stage does with hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_distil.trainer.attention import packed_params
from megatron_distil.trainer.cp import SequenceCut, own_part, sequence_cut
from megatron_distil.trainer.groups import Groups
from megatron_distil.trainer.head.columns import VocabShard, rows_of
from megatron_distil.trainer.model import Student
from megatron_distil.types import Microbatch

_ONE = torch.tensor(1, dtype=torch.int)


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
