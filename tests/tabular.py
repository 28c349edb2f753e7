"""A decision process small enough to enumerate: every prefix is a state, every sequence a row of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_from_table
from megatron_distil.algo.objectives.objective import Tokens
from tests.tokens import tokens_of

V = 3

Scan = Callable[..., Tensor]
"""As ``algo.future_credit``."""


@dataclass(frozen=True)
class Process:
    """N sequences of at most L tokens over S states; float64."""

    logits: Tensor
    """[S, V] of the policy."""
    teacher: Tensor
    """[S, V] probabilities."""
    behaviour: Tensor
    """[S, V] logits of another policy."""
    states: Tensor
    """[N, L]; 0 behind the end of a sequence."""
    actions: Tensor
    """[N, L]; likewise."""
    mask: Tensor
    """[N, L] bool."""

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)

    def taken(self, logits: Tensor) -> Tensor:
        """[N, L] log-probability of each token; 0 behind the end."""
        return torch.where(self.mask, logits.log_softmax(-1)[self.states, self.actions], 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[N] of the sequences."""
        return self.taken(logits).sum(-1).exp()


def process(*, eos: int | None, horizon: int = 4) -> Process:
    """A fixed draw; ``eos`` ends a sequence and is its last token, None: all have the length of the horizon."""
    draw = torch.Generator().manual_seed(0)
    prefixes = [p for n in range(horizon) for p in itertools.product(range(V), repeat=n) if eos not in p]
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    whole = itertools.product(range(V), repeat=horizon)
    sequences = sorted({y[: y.index(eos) + 1] if eos in y else y for y in whole})

    def rows(of: Callable[[tuple[int, ...], int], int]) -> Tensor:
        padded = [[of(y, t) if t < len(y) else 0 for t in range(horizon)] for y in sequences]
        return torch.tensor(padded)

    logits = torch.randn(len(prefixes), V, generator=draw, dtype=torch.float64)
    teacher = (1.5 * torch.randn(len(prefixes), V, generator=draw, dtype=torch.float64)).softmax(-1)
    behaviour = 0.5 * torch.randn(len(prefixes), V, generator=draw, dtype=torch.float64) + logits
    return Process(
        logits=logits,
        teacher=teacher,
        behaviour=behaviour,
        states=rows(lambda y, t: index[y[:t]]),
        actions=rows(lambda y, t: y[t]),
        mask=rows(lambda y, t: 1).bool(),
    )


def taught_by_itself(one: Process) -> Process:
    return replace(one, teacher=one.logits.softmax(-1))


def local_cost(logits: Tensor, teacher: Tensor, tail: str, k: int) -> Tensor:
    """[S] cross-entropy at each state on the teacher's k likeliest ids, from its definition."""
    logprobs = logits.log_softmax(-1)
    ids = teacher.topk(k, -1).indices
    p, log_q = teacher.gather(-1, ids), logprobs.gather(-1, ids)
    if tail == "renorm":
        return -(p / p.sum(-1, keepdim=True) * logits.gather(-1, ids).log_softmax(-1)).sum(-1)
    cost = -(p * log_q).sum(-1)
    if tail == "none":
        return cost
    return cost - (1 - p.sum(-1)) * (1 - log_q.exp().sum(-1)).log()


def exact_gradient(one: Process, *, tail: str = "none", k: int = V) -> Tensor:
    """d/dtheta of sum_y pi(y) sum_t cost_t, the probabilities differentiated too."""
    logits = one.logits.clone().requires_grad_()
    cost = torch.where(one.mask, local_cost(logits, one.teacher, tail, k)[one.states], 0.0)
    (one.probabilities(logits) * cost.sum(-1)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def tokens_at(one: Process, logits: Tensor, weights: Tensor, k: int, **fields: Tensor) -> Tokens:
    """All tokens of all sequences in one row, on the teacher's k likeliest ids."""
    top = algo.top_k(one.teacher.log(), k)
    at, actions = one.states.flatten(), one.actions.flatten()
    student = algo.columns(logits[at], top.ids[at], actions)
    weights = torch.where(one.mask, weights, 0.0).flatten()
    return tokens_of(student, top.logprobs[at], weights=weights, **{k: v.flatten() for k, v in fields.items()})


def scan_of(one: Process, scan: Scan = algo.future_credit) -> Callable[..., Tensor]:
    """The time axis over all sequences."""
    segments = torch.arange(len(one.mask)).repeat_interleave(one.mask.shape[1])

    def future(cost: Tensor, *, mean: bool, discount: float) -> Tensor:
        return scan(cost, one.mask.flatten(), segments, mean=mean, discount=discount)

    return future


def expected_gradient(
    one: Process,
    table: dict[str, object],
    *,
    k: int = V,
    weights: Tensor | None = None,
    scan: Scan = algo.future_credit,
    **fields: Tensor,
) -> Tensor:
    """[S, V] expectation over the policy of the gradient of an objective's terms.

    ``weights``: [N, L] of the tokens, the probabilities of the sequences included; those of a sum over tokens if None.
    """
    logits = one.logits.clone().requires_grad_()
    if weights is None:
        weights = one.probabilities(one.logits)[:, None].expand(one.mask.shape)
    objective = objective_from_table({"tail": "none"} | table if table["name"] == "distil" else table)
    terms = objective.terms(tokens_at(one, logits, weights, k, **fields), scan_of(one, scan))
    (terms.imitation + terms.credit).backward()
    assert logits.grad is not None
    return logits.grad


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
