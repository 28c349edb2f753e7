"""The command line with a credit that is wrong on purpose: ``-m tests.wrong_credit KIND train RECIPE ...``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_distil import algo
from megatron_distil.cli import main

_right = algo.future_credit


def flipped(cost: Tensor, mask: Tensor, segment_ids: Tensor, *, mean: bool, discount: float) -> Tensor:
    """Praise for what it should blame."""
    return -_right(cost, mask, segment_ids, mean=mean, discount=discount)


def missing(cost: Tensor, mask: Tensor, segment_ids: Tensor, *, mean: bool, discount: float) -> Tensor:
    """None at all."""
    return torch.zeros_like(cost)


def misdirected(cost: Tensor, mask: Tensor, segment_ids: Tensor, *, mean: bool, discount: float) -> Tensor:
    """The cost of earlier tokens instead of later ones."""
    return _right(cost.flip(0), mask.flip(0), segment_ids.flip(0), mean=mean, discount=discount).flip(0)


KINDS: dict[str, Callable[..., Tensor]] = {"flipped": flipped, "missing": missing, "misdirected": misdirected}

if __name__ == "__main__":
    algo.future_credit = KINDS[sys.argv[1]]
    main(sys.argv[2:])
