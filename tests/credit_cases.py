"""Packings, layouts and masks of the future credit, and what it is on whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_distil import algo
from megatron_distil.trainer.cp import contiguous_order, row_shards, zigzag_buffer_order, zigzag_order
from megatron_distil.trainer.head.scan import CreditScan
from megatron_distil.trainer.head.stages import CreditPlan

CALLS = (
    {"mean": False, "discount": 1.0},
    {"mean": True, "discount": 1.0},
    {"mean": False, "discount": 0.9},
    {"mean": True, "discount": 0.9},
    {"mean": False, "discount": 0.0},
)
"""All of them are asked in each stage, each with a cost of its own."""

# lengths in units of 2 * ranks, so that every layout can cut them
PACKINGS = {"one": (9,), "uneven": (1, 7, 2, 12, 3), "equal": (4,) * 6}
LAYOUTS = {
    "contiguous": lambda cu, size: contiguous_order(int(cu[-1]), size),
    "zigzag": zigzag_order,
    "zigzag over the buffer": lambda cu, size: zigzag_buffer_order(int(cu[-1]), size),
    "row shards, contiguous": lambda cu, size: row_shards(contiguous_order(int(cu[-1]), size // 2), 2),
    "row shards, zigzag": lambda cu, size: row_shards(zigzag_order(cu, size // 2), 2),
    "row shards, zigzag over the buffer": lambda cu, size: row_shards(zigzag_buffer_order(int(cu[-1]), size // 2), 2),
}
MASKS = ("all", "random", "a sequence without rows", "a rank without rows", "responses with gaps", "none")


class Case(NamedTuple):
    order: Tensor
    segment_ids: Tensor
    is_row: Tensor
    costs: Tensor
    """[calls, T]"""


def make_case(packing: str, layout: str, mask: str, size: int) -> Case:
    """A packed row whose last sequence is padded."""
    lengths = torch.tensor(PACKINGS[packing]) * 2 * size
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total, draw = int(cu[-1]), torch.Generator().manual_seed(size)
    order = LAYOUTS[layout](cu, size)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    is_row = torch.ones(total, dtype=torch.bool)
    if mask == "random":
        is_row = torch.rand(total, generator=draw) < 0.7
    elif mask == "a sequence without rows":
        is_row &= segments != len(lengths) // 2
    elif mask == "a rank without rows":
        is_row[order[0]] = False
    elif mask == "responses with gaps":
        position = torch.arange(total) - cu[:-1].repeat_interleave(lengths)
        is_row &= (position >= 3) & (position % 7 < 4)
    elif mask == "none":
        is_row[:] = False
    segments[-2:], is_row[-2:] = -1, False
    return Case(order, segments, is_row, torch.randn(len(CALLS), total, generator=draw, dtype=torch.float64))


def whole_credit(case: Case) -> Tensor:
    """[calls, T] of ``algo``, 0 outside of the rows."""
    found = [
        algo.future_credit(cost, case.is_row, case.segment_ids, **call)
        for cost, call in zip(case.costs, CALLS, strict=True)
    ]
    return torch.where(case.is_row, torch.stack(found), 0.0)


def own_rows(case: Case, rank: int) -> Tensor:
    """[rows of the rank] tokens."""
    own = case.order[rank]
    return own[case.is_row[own]]


def scanned(case: Case, plan: CreditPlan, group, rank: int) -> Tensor:
    """[calls, rows of the rank] of every call in every stage."""
    rows, scan = own_rows(case, rank), CreditScan(plan, group, "cpu")
    result = torch.full((len(CALLS), len(rows)), torch.nan, dtype=torch.float64)
    for index, stage in enumerate(plan.stages):
        for number, call in enumerate(CALLS):
            result[number, stage.rows] = scan.credit(index, case.costs[number, rows[stage.rows]], **call)
    return result
