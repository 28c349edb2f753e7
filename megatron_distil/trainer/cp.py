"""Vectors over tokens under context parallelism: Megatron's two-chunk layout, and back.

Each padded sequence is cut into 2 * cp pieces; rank r holds pieces r and 2 * cp - 1 - r, so that causal attention costs
every rank the same. Only vectors of floats are gathered here, never hidden states, and without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist  # noqa: TID251 - vectors over tokens are gathered over cp
from torch import Tensor
from torch.distributed import ProcessGroup  # noqa: TID251 - the type of a group


@dataclass(frozen=True)
class SequenceCut:
    """How one packed row is shared by the context-parallel ranks."""

    group: ProcessGroup
    order: Tensor
    """[cp, T/cp] int64: which tokens each rank holds, in its order."""

    @property
    def own(self) -> Tensor:
        """[T/cp] tokens of this rank."""
        return self.order[self.group.rank()]


def sequence_cut(cu_seqlens: Tensor, group: ProcessGroup) -> SequenceCut:
    """The cut of a packed row.

    Args:
        cu_seqlens: [S + 1] of the whole row; each length a multiple of 2 * cp, or anything where cp is 1.
        group: cp.

    Raises:
        ValueError: a length is no such multiple.
    """
    return SequenceCut(group=group, order=zigzag_order(cu_seqlens, group.size()))


def zigzag_order(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """[cp, T/cp] int64: the tokens of each rank; a pure function.

    Raises:
        ValueError: a length is not a multiple of 2 * cp.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    if cp_size == 1:
        return torch.arange(total, device=cu_seqlens.device)[None]
    if bool((lengths % (2 * cp_size)).any()):
        raise ValueError(f"lengths {lengths.tolist()} are not all multiples of 2 * cp = {2 * cp_size}")
    position = torch.arange(total, device=cu_seqlens.device) - starts.repeat_interleave(lengths)
    piece = position // (lengths // (2 * cp_size)).repeat_interleave(lengths)
    owner = torch.minimum(piece, 2 * cp_size - 1 - piece)
    return owner.argsort(stable=True).view(cp_size, total // cp_size)


def contiguous_order(total: int, cp_size: int) -> Tensor:
    """[cp, T/cp] int64: one run of the buffer for each rank.

    Raises:
        ValueError: ``total`` is not a multiple of cp.
    """
    if total % cp_size:
        raise ValueError(f"{total} tokens are not a multiple of cp = {cp_size}; pad them to {_up(total, cp_size)}")
    return torch.arange(total).view(cp_size, total // cp_size)


def zigzag_buffer_order(total: int, cp_size: int) -> Tensor:
    """[cp, T/cp] int64: as ``zigzag_order``, of the buffer as if it were one sequence.

    Raises:
        ValueError: ``total`` is not a multiple of 2 * cp.
    """
    return zigzag_order(torch.tensor([0, total]), cp_size)


def row_shards(order: Tensor, tp_size: int) -> Tensor:
    """[cp, T/cp] -> [cp * tp, T/cp/tp]: the tokens of each rank of a cp rank are cut over tp, tp fastest.

    Raises:
        ValueError: the tokens of a cp rank are not a multiple of tp.
    """
    cp_size, tokens = order.shape
    if tokens % tp_size:
        wanted = _up(tokens, tp_size)
        raise ValueError(f"{tokens} tokens of a rank are not a multiple of tp = {tp_size}; pad them to {wanted}")
    return order.reshape(cp_size * tp_size, tokens // tp_size)


def own_part(whole: Tensor, cut: SequenceCut) -> Tensor:
    """[T, ...] -> [T/cp, ...]: the rows of this rank."""
    return whole if cut.group.size() == 1 else whole.index_select(0, cut.own)


def whole_sequence(part: Tensor, cut: SequenceCut) -> Tensor:
    """[T/cp] -> [T] in token order, without gradient. Collective over cp."""
    if cut.group.size() == 1:
        return part.detach()
    parts = torch.empty(cut.order.numel(), dtype=part.dtype, device=part.device)
    dist.all_gather_single(parts, part.detach().contiguous(), group=cut.group)
    return torch.empty_like(parts).index_copy_(0, cut.order.flatten(), parts)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
