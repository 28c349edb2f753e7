"""The future-credit scan over stages: one small exchange each, time linear in the rows.

Sums are in float64 and never a difference of running totals, so that a sequence cannot lose digits to its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - totals of pieces are gathered over the ranks of a sequence
from torch import Tensor
from torch.distributed import ProcessGroup  # noqa: TID251 - the type of a group

from megatron_distil.trainer.head.stages import BLOCK, CreditPlan, Level


class _Weights(NamedTuple):
    """Powers of a discount g inside of a block."""

    halves: tuple[Tensor, ...]
    """[h, 1] for h = 1, 2, 4, ...: of what begins h rows further along, g^(h - t)."""
    rest: Tensor
    """[BLOCK + 1, 1] of what lies behind the block, g^(BLOCK - t)."""


class CreditScan:
    """Credit of the stages of one microbatch, in order; what they say about a sequence is carried to the next ones."""

    def __init__(self, plan: CreditPlan, group: ProcessGroup | None, device: torch.device | str) -> None:
        """Move the plan to ``device``.

        Args:
            plan: of this rank.
            group: the ranks of the plan; None where it is one.
            device: of the costs.

        Raises:
            ValueError: the group has another number of ranks than the plan.
        """
        size = 1 if group is None else group.size()
        if size != plan.num_ranks:
            raise ValueError(f"the plan is made for {plan.num_ranks} ranks, the group has {size}")
        self._plan = plan.to(device)
        self._group = group
        self._carries: list[Tensor] = []
        """[sequences] float64 for each call within a stage: the discounted sum of the rows that are done."""
        self._stage, self._call = -1, 0
        self._weights: dict[float, _Weights] = {}

    @torch.no_grad()
    def credit(self, stage: int, cost: Tensor, *, mean: bool, discount: float) -> Tensor:
        """``algo.future_credit`` of the rows of one stage. Collective over the group, also without rows.

            c_t = sum over later rows i of the sequence:  discount^(rows between t and i) * cost_i
                  (``mean``: / max(1, number of later rows of the sequence))

        One all-gather of one float64 per piece where there are several ranks. No synchronisation with the device. A cost
        that is not finite spoils its own sequence only.

        Args:
            stage: 0, 1, ...; the same again for another cost of this stage, as often in each stage.
            cost: [n] float, of ``plan.stages[stage].rows``. Treated as a constant.
            mean: divide by the number of later rows.
            discount: weight of the next row, in [0, 1].

        Returns:
            [n] of the dtype of ``cost``, without gradient.

        Raises:
            ValueError: a stage out of order, asked more or less often than the first, or with a cost of another length.
        """
        part = self._plan.stages[stage]
        if cost.shape != part.rows.shape:
            raise ValueError(
                f"stage {stage} has {len(part.rows)} rows on this rank, its cost has shape {tuple(cost.shape)}"
            )
        carry = self._carry(stage, cost)
        weights, level = self._powers(discount, cost.device), part.levels[0]
        sums = _block_sums(cost.double(), level, weights)
        behind = self._behind(sums[0, : level.blocks], part.levels[1:], discount**BLOCK)
        at, block = part.first_entry, part.first_block
        totals = sums[at, block] + weights.rest[at, 0] * behind[block]
        nodes = torch.cat([self._everyone(totals, part.width), carry[part.sequences], carry.new_zeros(1)])
        for hop in part.hops:
            nodes = torch.addcmul(nodes, discount**hop.span, nodes[hop.target])
        carry[part.sequences] = nodes[part.heads]
        behind = torch.addcmul(behind, discount**part.block_after, nodes[part.after][part.block_piece])
        credit = _later_entries(sums, behind, level, weights)
        if mean:
            credit /= part.later
        return credit.to(cost.dtype)

    def _carry(self, stage: int, cost: Tensor) -> Tensor:
        if stage == self._stage:
            self._call += 1
        elif stage == self._stage + 1 and (stage == 0 or self._call + 1 == len(self._carries)):
            self._stage, self._call = stage, 0
        else:
            raise ValueError(
                f"stage {stage} after {self._call + 1} of {len(self._carries)} calls for stage {self._stage}; "
                "stages come in order, each as often as the first"
            )
        if stage == 0:
            self._carries.append(cost.new_zeros(self._plan.num_sequences, dtype=torch.float64))
        if self._call >= len(self._carries):
            raise ValueError(f"stage {stage} was asked {self._call + 1} times, stage 0 only {len(self._carries)}")
        return self._carries[self._call]

    def _behind(self, totals: Tensor, levels: tuple[Level, ...], discount: float) -> Tensor:
        """[entries] -> [entries]: sum over the later entries of the piece."""
        if not levels:
            return torch.zeros_like(totals)
        weights = self._powers(discount, totals.device)
        sums = _block_sums(totals, levels[0], weights)
        behind = self._behind(sums[0, : levels[0].blocks], levels[1:], discount**BLOCK)
        return _later_entries(sums, behind, levels[0], weights)

    def _everyone(self, totals: Tensor, width: int) -> Tensor:
        """[pieces of this rank] -> [ranks * width]."""
        if self._group is None or self._group.size() == 1 or width == 0:
            return totals
        mine = totals.new_zeros(width)
        mine[: len(totals)] = totals
        parts = mine.new_empty(width * self._group.size())
        dist.all_gather_single(parts, mine, group=self._group)
        return parts

    def _powers(self, discount: float, device: torch.device) -> _Weights:
        if discount not in self._weights:
            gaps = torch.arange(BLOCK, -1, -1, dtype=torch.float64, device=device)[:, None]
            rest = discount**gaps
            halves = tuple(rest[BLOCK - half : BLOCK] for half in _halves())
            self._weights[discount] = _Weights(halves=halves, rest=rest)
        return self._weights[discount]


def future_credit(cost: Tensor, plan: CreditPlan, group: ProcessGroup | None, *, mean: bool, discount: float) -> Tensor:
    """``algo.future_credit`` of all local rows at once: ``CreditScan.credit`` of a plan of one stage.

    Args:
        cost: [plan.num_rows] float. Treated as a constant.
        plan: made with ``stage_rows=None``.
        group: the ranks of the plan; None where it is one.
        mean: divide by the number of later rows.
        discount: weight of the next row, in [0, 1].

    Raises:
        ValueError: the plan has several stages.
    """
    if len(plan.stages) != 1:
        raise ValueError(f"the plan has {len(plan.stages)} stages; make it with stage_rows=None")
    return CreditScan(plan, group, cost.device).credit(0, cost, mean=mean, discount=discount)


def _block_sums(entries: Tensor, level: Level, weights: _Weights) -> Tensor:
    """[entries] -> [BLOCK + 1, stride]: the discounted sum from each entry to the end of its block; nothing behind it.

    Halves of halves are joined: each adds what its second half sums up to, so that no difference is ever taken.
    """
    sums = entries.new_zeros((BLOCK + 1) * level.stride).scatter_(0, level.slots, entries).view(BLOCK + 1, level.stride)
    for half, weight in zip(_halves(), weights.halves, strict=True):
        pairs = sums[:BLOCK].view(BLOCK // (2 * half), 2, half, level.stride)
        pairs[:, 0].addcmul_(weight, pairs[:, 1, :1])
    return sums


def _halves() -> list[int]:
    """1, 2, 4, ... below BLOCK."""
    return [1 << bit for bit in range(BLOCK.bit_length() - 1)]


def _later_entries(sums: Tensor, behind: Tensor, level: Level, weights: _Weights) -> Tensor:
    """The sums of the blocks and what lies behind them, [blocks] -> [entries]. ``sums`` is overwritten."""
    sums[:, : level.blocks].addcmul_(weights.rest, behind)
    return sums[1:].view(-1).index_select(0, level.slots)
