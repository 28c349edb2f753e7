"""Which rows of sharded, packed sequences a credit may be computed for together, and what crosses the ranks between them.

    row      a response token that this rank holds
    stage    rows whose later rows of the same sequence, on any rank, are in the same or an earlier stage
    piece    rows of a stage that follow each other in a sequence and lie on one rank; its total is all that travels
    block    up to 16 rows of a piece, counted from the end of the piece, so that only its first block is partial

All of it is known on the host before the step, from the lengths of the sequences. Pure; ``scan.py`` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
R = TypeVar("R", "Level", "Hop", "Stage")

BLOCK = 16
"""Entries of a block, a power of two."""


@dataclass(frozen=True)
class Level:
    """Entries (rows, or the blocks of the level below) in blocks; every piece begins a new block."""

    slots: Tensor
    """[entries] int64 into ``BLOCK * stride``; a block is a column."""
    blocks: int
    stride: int
    """Columns. Odd, so one may be unused: entries that lie a power of two apart evict each other from a cache."""


@dataclass(frozen=True)
class Hop:
    """From a node to the one ``2^k`` further along its sequence."""

    target: Tensor
    """[nodes] int64 into the nodes; the last node is the end of every sequence."""
    span: Tensor
    """[nodes] float64: rows on the way."""


@dataclass(frozen=True)
class Stage:
    """What the scan of one stage needs on one rank.

    The nodes are the pieces of all ranks in the order in which their totals arrive (``ranks * width``, some unused), then
    what the earlier stages say about each sequence of this stage, then an end that is zero.
    """

    rows: Tensor
    """[n] int64 local rows, rising; n may be 0."""
    later: Tensor
    """[n] float64: later rows of the sequence on all ranks, at least 1."""
    levels: tuple[Level, ...]
    """From rows up to one block per piece."""
    block_piece: Tensor
    """[blocks of rows] int64: local piece."""
    block_after: Tensor
    """[blocks of rows] float64: rows of the piece after the block."""
    first_block: Tensor
    """[local pieces] int64: block of the first row."""
    first_entry: Tensor
    """[local pieces] int64: its place in that block."""
    after: Tensor
    """[local pieces] int64: the node behind each piece."""
    hops: tuple[Hop, ...]
    width: int
    """Pieces of the busiest rank."""
    sequences: Tensor
    """[sequences of this stage] int64 into those of the plan."""
    heads: Tensor
    """[sequences of this stage] int64: the node of the earliest piece."""


@dataclass(frozen=True)
class CreditPlan:
    """How one rank's rows are scanned; the same number of stages on every rank."""

    stages: tuple[Stage, ...]
    """In processing order: the last tokens first."""
    num_rows: int
    """Rows of this rank."""
    num_sequences: int
    num_ranks: int

    def to(self, device: torch.device | str) -> CreditPlan:
        """The plan with its tensors on ``device``."""
        return replace(self, stages=tuple(_moved(stage, torch.device(device)) for stage in self.stages))


def _moved(record: R, device: torch.device) -> R:
    changes = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(_moved(one, device) for one in value)
    return replace(record, **changes)


class _Rows(NamedTuple):
    """The rows of all ranks, in token order."""

    rank: Ints
    local: Ints
    """Place among the rows of its rank."""
    sequence: Ints
    """From 0, over sequences that have rows."""


class _Pieces(NamedTuple):
    """The pieces of all ranks, in token order or, after ``_by_stage``, stage after stage."""

    size: Ints
    rank: Ints
    sequence: Ints
    stage: Ints
    slot: Ints
    """Place among the pieces of its stage on its rank."""


class _Own(NamedTuple):
    """The rows of one rank, stage after stage."""

    local: Ints
    later: Ints
    """Later rows of the sequence."""
    slot: Ints
    """Of its piece."""
    after: Ints
    """Later rows of the piece."""


def credit_plan(
    order: Tensor, segment_ids: Tensor, is_row: Tensor, rank: int, *, stage_rows: int | None = None
) -> CreditPlan:
    """The stages of one rank. On the host, without communication; linear in the tokens.

    One rank is cut every ``stage_rows`` rows from the end, wherever that falls in a sequence. Several ranks are cut between
    sequences, and inside a sequence where a rank would have to come a second time (the halves of the two-chunk layout); a
    stage is longer than asked where nothing else is possible.

    Args:
        order: [ranks, T/ranks] int64, the tokens of each rank of the group in its order, as ``cp.SequenceCut.order``.
        segment_ids: [T] int, equal for tokens of one sequence, and contiguous; -1 in padding.
        is_row: [T] bool, True at response tokens. Local row i is the i-th of them in ``order[rank]``.
        rank: of this process in the group.
        stage_rows: rows of a stage on the busiest rank, about; None: a single stage.

    Raises:
        ValueError: shapes that do not fit, a token that two ranks hold, a row in padding, ``stage_rows`` below 1.
    """
    tokens, segments, mask = (tensor.cpu().numpy() for tensor in (order, segment_ids, is_row))
    _check(tokens, segments, mask, rank, stage_rows)
    rows = _rows(tokens, segments, mask)
    stage = _stages(rows, len(tokens), stage_rows)
    piece = _run_ids(rows.sequence, rows.rank, stage)
    pieces = _pieces(rows, stage, piece, len(tokens))
    own, bounds = _own_rows(rows, stage, piece, pieces, rank)
    pieces, ends = _by_stage(pieces, len(bounds) - 1)
    return CreditPlan(
        stages=tuple(
            _stage(_Own(*(x[a:b] for x in own)), _Pieces(*(x[c:d] for x in pieces)), rank, len(tokens))
            for a, b, c, d in zip(bounds, bounds[1:], ends, ends[1:], strict=False)
        ),
        num_rows=len(own.local),
        num_sequences=int(rows.sequence.max(initial=-1)) + 1,
        num_ranks=len(tokens),
    )


def _check(tokens: Ints, segments: NDArray, mask: NDArray, rank: int, stage_rows: int | None) -> None:
    if tokens.ndim != 2 or segments.ndim != 1 or segments.shape != mask.shape:
        shapes = f"{tokens.shape}, {segments.shape}, {mask.shape}"
        raise ValueError(
            f"order, segment_ids and is_row must be [ranks, T/ranks], [T] and [T]; their shapes are {shapes}"
        )
    if not 0 <= rank < len(tokens):
        raise ValueError(f"rank {rank} of {len(tokens)} ranks; give 0 to {len(tokens) - 1}")
    if stage_rows is not None and stage_rows < 1:
        raise ValueError(f"stage_rows = {stage_rows}; give 1 or more, or None for a single stage")
    holders = np.bincount(tokens.ravel(), minlength=len(mask))
    if len(holders) > len(mask) or (holders[mask] != 1).any():
        raise ValueError("order must name each response token once, and no token beyond T; shards of tp are not copies")
    if (segments[mask] < 0).any():
        at = int(np.flatnonzero(mask & (segments < 0))[0])
        raise ValueError(f"token {at} is a row in padding (segment -1); a row belongs to a sequence")


def _rows(tokens: Ints, segments: NDArray, mask: NDArray) -> _Rows:
    is_row = mask[tokens]
    local = np.cumsum(is_row, axis=1) - 1
    place = np.full(len(mask), -1)
    place[tokens[is_row]] = np.flatnonzero(is_row)
    place = place[place >= 0]
    return _Rows(
        rank=place // max(1, tokens.shape[1]),
        local=local.ravel()[place],
        sequence=_run_ids(segments[mask]),
    )


def _stages(rows: _Rows, num_ranks: int, stage_rows: int | None) -> Ints:
    """[rows] the stage of each row: never smaller than that of a later row of its sequence."""
    if stage_rows is None:
        return np.zeros(len(rows.rank), dtype=np.int64)
    behind = _counts_behind(rows.rank)
    if num_ranks > 1:
        behind = _suffix_max(rows.sequence, _of_items(rows, behind, num_ranks))
    stage = behind // stage_rows
    is_used = np.bincount(stage, minlength=1) > 0
    return (np.cumsum(is_used) - 1)[stage]


def _of_items(rows: _Rows, behind: Ints, num_ranks: int) -> Ints:
    """[rows] ``behind``, but equal inside an item on several ranks: the largest among the ends of its ranks.

    An item is a part of a sequence in which each rank comes once.
    """
    item = _run_ids(rows.sequence, _levels(rows, num_ranks))
    end = np.full((int(item.max(initial=-1)) + 1, num_ranks), -1)
    end[item, rows.rank] = behind  # of equal indices the last one stays: the last row of each rank
    is_shared = (end >= 0).sum(axis=1) > 1
    return np.where(is_shared[item], end.max(axis=1)[item], behind)


def _levels(rows: _Rows, num_ranks: int) -> Ints:
    """[rows] how often the rank of a row, or of a later one, has come before, counted from the end of the sequence."""
    run = _run_ids(rows.sequence, rows.rank)
    first, size = _first_of_runs(run), np.bincount(run)
    sequence = rows.sequence[first]
    level = _suffix_max(sequence, _counts_behind(sequence * num_ranks + rows.rank[first]))
    # The run in which two items meet is on one rank: cut so that this rank has no more of the later item than the others.
    item = _run_ids(sequence, level)
    head = _first_of_runs(item)
    others = size.copy()
    others[head] = 0
    longest = np.maximum.reduceat(others, head) if len(head) else head
    has_earlier = np.append(False, sequence[head[1:]] == sequence[head[:-1]])
    excess = np.zeros(len(size), dtype=np.int64)
    excess[head] = np.where(has_earlier & (longest > 0), np.maximum(size[head] - longest, 0), 0)
    within = np.arange(len(run)) - first[run]
    return level[run] + (within < excess[run])


def _pieces(rows: _Rows, stage: Ints, piece: Ints, num_ranks: int) -> _Pieces:
    first = _first_of_runs(piece)
    rank, stages = rows.rank[first], stage[first]
    return _Pieces(
        size=np.bincount(piece),
        rank=rank,
        sequence=rows.sequence[first],
        stage=stages,
        slot=_counts_before(stages * num_ranks + rank),
    )


def _by_stage(pieces: _Pieces, num_stages: int) -> tuple[_Pieces, list[int]]:
    order = np.argsort(pieces.stage, kind="stable")
    return _Pieces(*(column[order] for column in pieces)), _bounds(pieces.stage, num_stages)


def _own_rows(rows: _Rows, stage: Ints, piece: Ints, pieces: _Pieces, rank: int) -> tuple[_Own, list[int]]:
    mine = np.flatnonzero(rows.rank == rank)
    place = np.empty(len(mine), dtype=np.int64)
    place[rows.local[mine]] = mine
    place = place[_stable_order(stage[place])]
    end_of_sequence = np.cumsum(np.bincount(rows.sequence))
    end_of_piece = np.cumsum(pieces.size)
    own = _Own(
        local=rows.local[place],
        later=end_of_sequence[rows.sequence[place]] - 1 - place,
        slot=pieces.slot[piece[place]],
        after=end_of_piece[piece[place]] - 1 - place,
    )
    return own, _bounds(stage[mine], int(stage.max(initial=0)) + 1)


def _stage(own: _Own, pieces: _Pieces, rank: int, num_ranks: int) -> Stage:
    is_mine = pieces.rank == rank
    size = pieces.size[is_mine]
    blocks = -(-size // BLOCK)
    ends = np.cumsum(blocks)
    block_piece = np.repeat(np.arange(len(blocks)), blocks)
    block_after = (ends[block_piece] - 1 - np.arange(len(block_piece))) * BLOCK
    width = int(pieces.slot.max(initial=-1)) + 1
    node = pieces.rank * width + pieces.slot
    sequence = _run_ids(pieces.sequence)
    heads = _first_of_runs(sequence)
    hops = _hops(node, sequence, pieces.size, num_ranks * width)
    return Stage(
        rows=_tensor(own.local),
        later=_tensor(np.maximum(own.later, 1).astype(np.float64)),
        levels=(_level(blocks, own.slot, own.after), *_upper_levels(blocks)),
        block_piece=_tensor(block_piece),
        block_after=_tensor(block_after.astype(np.float64)),
        first_block=_tensor(ends - blocks),
        first_entry=_tensor(-size % BLOCK),
        after=hops[0].target[_tensor(node[is_mine])],
        hops=hops,
        width=width,
        sequences=_tensor(pieces.sequence[heads]),
        heads=_tensor(node[heads]),
    )


def _level(blocks: Ints, piece: Ints, after: Ints) -> Level:
    """Blocks of the entries of ``piece`` that have ``after`` more of them behind."""
    total = int(blocks.sum())
    stride = total | 1
    block = np.cumsum(blocks)[piece] - 1 - after // BLOCK
    return Level(slots=_tensor((BLOCK - 1 - after % BLOCK) * stride + block), blocks=total, stride=stride)


def _upper_levels(entries: Ints) -> list[Level]:
    """The levels over ``entries[p]`` blocks of each piece."""
    levels = []
    while entries.max(initial=1) > 1:
        piece = np.repeat(np.arange(len(entries)), entries)
        after = np.cumsum(entries)[piece] - 1 - np.arange(len(piece))
        entries = -(-entries // BLOCK)
        levels.append(_level(entries, piece, after))
    return levels


def _hops(node: Ints, sequence: Ints, size: Ints, first_carry: int) -> tuple[Hop, ...]:
    """Doubling along each sequence: its pieces, then its carry, then the end."""
    num_sequences = int(sequence.max(initial=-1)) + 1
    end = first_carry + num_sequences
    target, span = np.full(end + 1, end), np.zeros(end + 1)
    is_last = np.append(sequence[1:] != sequence[:-1], True)[: len(node)]
    target[node] = np.where(is_last, first_carry + sequence, np.append(node[1:], 0)[: len(node)])
    span[node] = size
    hops = [Hop(target=_tensor(target), span=_tensor(span))]
    while (target[target] != end).any():
        target, span = target[target], span + span[target]
        hops.append(Hop(target=_tensor(target), span=_tensor(span)))
    return tuple(hops)


def _run_ids(*columns: NDArray) -> Ints:
    """[n] from 0: rises where one of the columns changes."""
    is_new = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        is_new[1:] |= column[1:] != column[:-1]
    return np.cumsum(is_new)


def _first_of_runs(run: Ints) -> Ints:
    return np.flatnonzero(np.append(True, run[1:] != run[:-1])[: len(run)])


def _stable_order(keys: Ints) -> Ints:
    # numpy sorts 16-bit integers by radix, in linear time
    narrow = keys.max(initial=0) <= np.iinfo(np.uint16).max
    return np.argsort(keys.astype(np.uint16) if narrow else keys, kind="stable")


def _counts_before(keys: Ints) -> Ints:
    """[n] earlier entries of equal key."""
    order = _stable_order(keys)
    run = _run_ids(keys[order])
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.arange(len(keys)) - _first_of_runs(run)[run]
    return counts


def _counts_behind(keys: Ints) -> Ints:
    """[n] later entries of equal key."""
    return _counts_before(keys[::-1])[::-1]


def _suffix_max(group: Ints, values: Ints) -> Ints:
    """[n] the largest of this and the later values of the group; ``group`` rises."""
    bound = int(values.max(initial=0)) + 1
    backwards = group.max(initial=0) - group[::-1]
    highest: Ints = np.maximum.accumulate(backwards * bound + values[::-1])
    return (highest - backwards * bound)[::-1]


def _bounds(stage: Ints, num_stages: int) -> list[int]:
    return [0, *np.cumsum(np.bincount(stage, minlength=num_stages)).tolist()]


def _tensor(values: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
