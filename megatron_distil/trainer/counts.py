"""What an update counts on this rank, and what a replica's ranks know together afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist  # noqa: TID251 - counts of an update go to every rank of the replica
from torch import Tensor

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Objective, Tokens
from megatron_distil.trainer.groups import Groups
from megatron_distil.types import Batch, Sums

WRONG = ("not_finite", "invalid_support", "wrong_scale")
"""Tokens whose loss is no number; rows whose support repeats an id or leaves the vocabulary; backwards of the one-pass head that
were given another scale than it had assumed."""

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
class Totals:
    """What the ranks of a replica counted together."""

    tokens: float
    wrong: dict[str, float]
    """Counts of what must not be, by the names of ``WRONG``; 0 in a step that is done."""
    sums: dict[str, float]
    maxima: dict[str, float]


class Counts:
    """Sums of one update on this rank, on its device until the end of the update."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def counter(self, name: str, device: torch.device) -> Tensor:
        """[] float64, whose value when the update is over counts as ``name``."""
        return self._sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=device))

    def add_wrong(self, name: str, count: Tensor) -> None:
        """Count what must not be; ``name`` is one of ``WRONG``."""
        self.counter(name, count.device).add_(count)

    def add(self, terms: algo.LossTerms, objective: Objective, tokens: Tokens, teacher_entropy: Tensor) -> None:
        """Count one microbatch; all its rows carry a loss."""
        sampled = tokens.student.sampled.detach()
        found = dict(terms.counts)
        for name, value in terms.maxima.items():
            self._peak(name, value)
        self.add_wrong("not_finite", (~sampled.isfinite()).sum())
        if objective.reads_samples:
            gap = (sampled - tokens.sampling_logprobs).abs()
            found["sync/logprob_gap_nats"] = gap.sum()
            if len(gap):
                self._peak("sync/logprob_gap_max_nats", gap.amax())
        if objective.needs_teacher:
            if objective.needs_support:
                is_used = tokens.teacher_logprobs > -torch.inf
                found["teacher/support_mass_frac"] = tokens.teacher_logprobs.exp().sum()
                found["teacher/student_mass_frac"] = (tokens.student.support.detach().exp() * is_used).sum()
            found["teacher/entropy_nats"] = teacher_entropy.sum()
        for name, value in found.items():
            self._sums[name] = self._sums[name] + value.detach().double() if name in self._sums else value.double()
        self._tokens += len(sampled)

    def _peak(self, name: str, value: Tensor) -> None:
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def over_replica(self, groups: Groups) -> Totals:
        """One small collective over the replica, whose every rank gets the result.

        The last stage counts, and there the first tensor rank, since the others have the same numbers.
        """
        names = (*WRONG, *_PER_TOKEN)
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
        return Totals(
            tokens=sums[0],
            wrong={name: sums[2 + 2 * i] for i, name in enumerate(WRONG)},
            sums={name: sums[2 + 2 * i] for i, name in enumerate(names) if name not in WRONG and sums[1 + 2 * i]},
            maxima={name: value for name, value in zip(_MAXIMA, maxima, strict=True) if value > -math.inf},
        )


def as_sums(totals: Totals, batch: Batch, *, norm: float, rate: float) -> Sums:
    """An update in the names of metrics."""
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
