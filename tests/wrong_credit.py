"""The command line with a credit that is wrong on purpose: ``-m tests.wrong_credit KIND train RECIPE ...``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_distil import algo
from megatron_distil.cli import main

HEAD = "train.head=composable"
"""Costs of earlier tokens are known to a head that has all of them before the first gradient."""


def flipped() -> None:
    """Praise for what it should blame."""
    _replace_credit(lambda credit: -credit)


def missing() -> None:
    """None at all."""
    _replace_credit(torch.zeros_like)


def misdirected() -> None:
    """The cost of earlier tokens instead of later ones."""
    from megatron_distil.trainer.loss import MicrobatchLoss, at_rows

    def scan(_: MicrobatchLoss, microbatch: Any, placed: Any) -> Callable[..., Tensor]:
        segment_ids = at_rows(microbatch.segment_ids, placed).flip(0)

        def earlier(cost: Tensor, *, mean: bool, discount: float) -> Tensor:
            every = torch.ones_like(segment_ids, dtype=torch.bool)
            return algo.future_credit(cost.flip(0), every, segment_ids, mean=mean, discount=discount).flip(0)

        return earlier

    MicrobatchLoss._scan = scan


def _replace_credit(wrong: Callable[[Tensor], Tensor]) -> None:
    from megatron_distil.trainer.head.scan import CreditScan

    right = CreditScan.credit

    def credit(self: CreditScan, stage: int, cost: Tensor, *, mean: bool, discount: float) -> Tensor:
        return wrong(right(self, stage, cost, mean=mean, discount=discount))

    CreditScan.credit = credit


KINDS: dict[str, Callable[[], None]] = {"flipped": flipped, "missing": missing, "misdirected": misdirected}

if __name__ == "__main__":
    KINDS[sys.argv[1]]()
    main(sys.argv[2:])
