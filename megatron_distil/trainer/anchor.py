"""What is known of a step before its first update: the policy that it starts from, and the credit of all its rollouts.

One forward without gradient. The policy's log-probabilities are the trainer's own, so that the ratio of an update is 1 where
nothing was updated yet; what the engine said is another column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - the credit of a replica's rollouts goes to all its ranks
from torch import Tensor

from megatron_distil.trainer.cp import whole_sequence
from megatron_distil.trainer.loss import MicrobatchLoss
from megatron_distil.trainer.schedule import Placed, place, run_schedule
from megatron_distil.types import Batch, Microbatch

Gather = Callable[[list[tuple[int, Tensor]]], list[list[tuple[int, Tensor]]]]
"""(prompt of the step, [R] credit) of a replica's rollouts -> those of every replica; collective over dp."""


class _Before(NamedTuple):
    """Of one microbatch, in token order; empty but on the last stage."""

    logprobs: Tensor
    """[T]"""
    credit: Tensor
    """[T]"""


def anchored(batches: Sequence[Batch], loss: MicrobatchLoss, gather: Gather, *, has_ratio: bool) -> list[Batch]:
    """The batches of a step with ``old_logprobs`` and ``baseline``. Collective over the world.

    Args:
        batches: of the step, in order.
        loss: of the student before the step.
        gather: over replicas.
        has_ratio: whether ``old_logprobs`` are wanted; the first batch needs none, it starts from that policy.
    """
    microbatches = [one for batch in batches for one in batch.microbatches]
    before = _before(microbatches, loss)
    baselines = _baselines(microbatches, before, loss, gather) if loss.objective.needs_baseline else None
    found: list[Batch] = []
    for number, batch in enumerate(batches):
        at = sum(len(earlier.microbatches) for earlier in found)
        filled = tuple(
            replace(
                one,
                old_logprobs=before[at + i].logprobs if has_ratio and number and before else None,
                baseline=baselines[at + i] if baselines is not None else None,
            )
            for i, one in enumerate(batch.microbatches)
        )
        found.append(replace(batch, microbatches=filled))
    return found


def _before(microbatches: Sequence[Microbatch], loss: MicrobatchLoss) -> list[_Before]:
    """One forward over all of them; whole vectors on every rank of the last stage, nothing on the others."""
    groups, found = loss.student.groups, list[_Before]()
    placed = [place(one, one.loss_weights != 0, groups) for one in microbatches]

    def on_rows(index: int, rows: Tensor) -> Tensor:
        logprobs, credit = loss.before(microbatches[index], placed[index], rows)
        found.append(_Before(_whole(logprobs, placed[index]), _whole(credit, placed[index])))
        return rows.new_zeros(())

    with torch.no_grad():
        run_schedule(loss.student, placed, on_rows, has_backward=False)
    return found


def _whole(part: Tensor, placed: Placed) -> Tensor:
    """[N] at this rank's rows -> [T] on the CPU. Collective over cp."""
    own = part.new_zeros(len(placed.token_ids)).index_copy(0, placed.rows, part.detach())
    return whole_sequence(own, placed.cut).cpu()


def _baselines(
    microbatches: Sequence[Microbatch], before: Sequence[_Before], loss: MicrobatchLoss, gather: Gather
) -> list[Tensor]:
    """[T] of each microbatch of this replica, given the credit of the rollouts of all of them."""
    mine = _shared([_by_rollout(one, known.credit) for one, known in zip(microbatches, before, strict=False)], loss)
    everyone = gather([rollout for part in mine for rollout in part])
    own = loss.student.groups.replica_index
    credits = [credit for part in everyone for _, credit in part]
    group_ids = [group_id for part in everyone for group_id, _ in part]
    baselines = loss.objective.baselines(credits, group_ids)
    at = sum(len(part) for part in everyone[:own])
    found = []
    for one, part in zip(microbatches, mine, strict=True):
        whole = torch.zeros(len(one.token_ids))
        whole[one.loss_weights != 0] = torch.cat([torch.zeros(0), *baselines[at : at + len(part)]]).float()
        found.append(whole)
        at += len(part)
    return found


def _by_rollout(microbatch: Microbatch, credit: Tensor) -> list[tuple[int, Tensor]]:
    """(prompt, [R] credit) of each of its sequences."""
    rows = microbatch.loss_weights != 0
    return [
        (int(group_id), credit[rows & (microbatch.segment_ids == index)])
        for index, group_id in enumerate(microbatch.group_ids.tolist())
        if group_id >= 0
    ]


def _shared(known: list[list[tuple[int, Tensor]]], loss: MicrobatchLoss) -> list[list[tuple[int, Tensor]]]:
    """What the last stage knows, on every rank of the replica."""
    group = loss.student.groups.replica
    if group.size() == 1:
        return known
    parts: list[list[list[tuple[int, Tensor]]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, known, group=group)
    return next(part for part in parts if part)
