"""A packed problem of the head, its answer from full logits by autograd, and the same on the ranks of a tp x cp world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_from_table
from megatron_distil.algo.objectives.objective import Objective, Tokens
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.cp import contiguous_order, zigzag_buffer_order, zigzag_order
from megatron_distil.trainer.head.columns import HeadInputs, VocabShard, columns
from megatron_distil.trainer.head.onepass import onepass_loss
from megatron_distil.trainer.head.scan import CreditScan
from megatron_distil.trainer.head.stages import credit_plan
from megatron_distil.trainer.head.topk_ce import topk_logprobs

HIDDEN, TEMPERATURE = 12, 0.8
Head = Literal["plain", "composable", "onepass"]

PACKINGS = {
    "one": [48],
    "uneven": [8, 24, 8, 56],
    "short": [8] * 6,
}
"""Lengths; multiples of 2 * cp for cp up to 4."""


@dataclass(frozen=True)
class Problem:
    """Whole vectors over T packed tokens."""

    hidden: torch.Tensor
    weight: torch.Tensor
    vocab: int
    support_ids: torch.Tensor
    teacher_logprobs: torch.Tensor
    sampled_ids: torch.Tensor
    vectors: dict[str, torch.Tensor]
    segment_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    is_row: torch.Tensor

    def tokens(self, columns: Columns, at: torch.Tensor) -> Tokens:
        """Of the tokens ``at``."""
        return Tokens(
            student=columns,
            teacher_logprobs=self.teacher_logprobs[at],
            **{name: vector[at] for name, vector in self.vectors.items()},
        )


def problem(
    packing: str = "uneven",
    mask: str = "all",
    *,
    dtype: torch.dtype = torch.float64,
    vocab: int = 61,
    padded: int = 64,
    k: int = 7,
    scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Random hidden states, a sharp teacher; sampled ids inside and outside the support, unused slots beside a genuine id 0."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(PACKINGS[packing])
    total = int(lengths.sum())
    hidden = torch.randn(total, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(padded, HIDDEN, generator=draw, dtype=torch.float64) * scale
    top = algo.top_k(torch.randn(total, vocab, generator=draw, dtype=torch.float64) * 3, max(k, 1))
    ids, logprobs = top.ids[:, :k].clone(), top.logprobs[:, :k].clone()
    if k > 1:
        ids[::3, k // 2 :], logprobs[::3, k // 2 :] = -1, -torch.inf
        ids[1], logprobs[1] = -1, -torch.inf
        ids[2, 0] = 0 if not (ids[2] == 0).any() else ids[2, 0]
    sampled = torch.randint(0, vocab, (total,), generator=draw)
    if k:
        sampled[::2] = ids[::2, 0].clamp(min=0)
    segments = torch.arange(len(lengths)).repeat_interleave(lengths)
    is_row = torch.ones(total, dtype=torch.bool)
    if mask == "random":
        is_row = torch.rand(total, generator=draw) < 0.7
    elif mask == "a sequence":
        is_row = segments != len(lengths) - 1
    elif mask == "one token":
        is_row = torch.arange(total) == 5
    elif mask == "nothing":
        is_row = torch.zeros(total, dtype=torch.bool)
    weights = torch.rand(total, generator=draw, dtype=torch.float64) / total
    weights[::5] = 0.0
    vectors = {
        "teacher_sampled": -torch.rand(total, generator=draw, dtype=torch.float64) * 3,
        "sampling_logprobs": -torch.rand(total, generator=draw, dtype=torch.float64) * 4,
        "old_logprobs": -torch.rand(total, generator=draw, dtype=torch.float64) * 4,
        "advantages": torch.randn(total, generator=draw, dtype=torch.float64),
        "baseline": torch.rand(total, generator=draw, dtype=torch.float64),
        "weights": weights,
    }
    return Problem(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        vocab=vocab,
        support_ids=ids,
        teacher_logprobs=logprobs.to(torch.float64 if dtype == torch.float64 else torch.float32),
        sampled_ids=sampled,
        vectors={name: v.to(torch.float64 if dtype == torch.float64 else torch.float32) for name, v in vectors.items()},
        segment_ids=segments,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        is_row=is_row,
    )


@dataclass(frozen=True)
class Answer:
    """Loss, credit of each row, and gradients."""

    loss: torch.Tensor
    columns: Columns
    hidden_grad: torch.Tensor
    weight_grad: torch.Tensor


def reference(p: Problem, objective: Objective) -> Answer:
    """From full logits in float64, differentiated by autograd."""
    rows = p.is_row.nonzero()[:, 0]
    hidden, weight = (x.double().clone().requires_grad_() for x in (p.hidden, p.weight))
    logits = hidden[rows] @ weight[: p.vocab].t() / TEMPERATURE
    found = algo.columns(logits, p.support_ids[rows], p.sampled_ids[rows])
    tokens = p.tokens(found, rows)

    def future(cost: torch.Tensor, *, mean: bool, discount: float) -> torch.Tensor:
        every = torch.ones(len(rows), dtype=torch.bool)
        return algo.future_credit(cost, every, p.segment_ids[rows], mean=mean, discount=discount)

    terms = objective.terms(tokens, future)
    loss = terms.imitation + terms.credit
    hidden_grad, weight_grad = torch.autograd.grad(loss, [hidden, weight], allow_unused=True)
    return Answer(
        loss=loss.detach(),
        columns=Columns(*(c.detach() for c in found)),
        hidden_grad=torch.zeros_like(hidden) if hidden_grad is None else hidden_grad,
        weight_grad=torch.zeros_like(weight) if weight_grad is None else weight_grad,
    )


def order_of(layout: str, cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """[size, T / size] tokens of each rank."""
    if layout == "contiguous":
        return contiguous_order(int(cu_seqlens[-1]), size)
    if layout == "zigzag":
        return zigzag_order(cu_seqlens, size)
    return zigzag_buffer_order(int(cu_seqlens[-1]), size)


def by_head(
    p: Problem,
    objective: Objective | dict[str, Any],
    head: Head,
    *,
    tp: dist.ProcessGroup | None = None,
    cp: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    stage_rows: int | None = 16,
    keep_bytes: int = 0,
    main_grad: torch.Tensor | None = None,
) -> Answer:
    """The same on this rank's share; gradients summed over the ranks that share them, the weight's rows those of this rank."""
    objective = objective_from_table(objective)
    tp_size, tp_rank = (1, 0) if tp is None else (tp.size(), tp.rank())
    cp_size, cp_rank = (1, 0) if cp is None else (cp.size(), cp.rank())
    order = order_of(layout, p.cu_seqlens, cp_size)
    own = order[cp_rank]
    mine = own[p.is_row[own]]
    per_rank = len(p.weight) // tp_size
    hidden = p.hidden.clone().requires_grad_()
    weight = p.weight[tp_rank * per_rank : (tp_rank + 1) * per_rank].clone().requires_grad_()
    if main_grad is not None:
        weight.main_grad = main_grad
    shard = VocabShard.of(tp, vocab_size=p.vocab, rows=per_rank)
    seen: list[tuple[torch.Tensor, Columns]] = []

    def program(columns: Columns, rows: torch.Tensor, future: Any) -> torch.Tensor:
        seen.append((rows, Columns(*(c.detach() for c in columns))))
        terms = objective.terms(p.tokens(columns, mine[rows]), future)
        return terms.imitation + terms.credit

    inputs = HeadInputs(hidden[mine], weight, p.support_ids[mine], p.sampled_ids[mine], shard, TEMPERATURE)
    rows_by_stage = stage_rows if head == "onepass" else None
    plan = credit_plan(order, p.segment_ids, p.is_row, cp_rank, stage_rows=rows_by_stage)
    if head == "onepass":
        loss = onepass_loss(inputs, program, plan, cp, keep_bytes=keep_bytes)
    else:
        scan = CreditScan(plan, cp, torch.device("cpu"))
        if head == "plain":
            found = columns(inputs)
        else:
            found = topk_logprobs(inputs, keep_bytes=keep_bytes)

        def future(cost: torch.Tensor, *, mean: bool, discount: float) -> torch.Tensor:
            return scan.credit(0, cost, mean=mean, discount=discount)

        loss = program(found, torch.arange(len(mine)), future)
    loss.backward()
    hidden_grad = hidden.grad
    weight_grad = weight.grad if main_grad is None else main_grad
    if tp is not None:
        dist.all_reduce(hidden_grad, group=tp)
    value = loss.detach().clone()
    if cp is not None:
        for tensor in (hidden_grad, weight_grad, value):
            dist.all_reduce(tensor, group=cp)
    return Answer(loss=value, columns=_in_order(seen, mine, p), hidden_grad=hidden_grad, weight_grad=weight_grad)


def _in_order(seen: list[tuple[torch.Tensor, Columns]], mine: torch.Tensor, p: Problem) -> Columns:
    """The columns of this rank's rows, in the order of ``reference``; NaN elsewhere."""
    rows = p.is_row.nonzero()[:, 0]
    place = torch.full((len(p.is_row),), -1)
    place[rows] = torch.arange(len(rows))
    found = Columns(
        support=torch.full((len(rows), p.support_ids.shape[1]), torch.nan, dtype=torch.float64),
        tail=torch.full((len(rows),), torch.nan, dtype=torch.float64),
        sampled=torch.full((len(rows),), torch.nan, dtype=torch.float64),
    )
    for indices, part in seen:
        for whole, some in zip(found, part, strict=True):
            whole[place[mine[indices]]] = some.double()
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the norm; absolute where what is wanted is 0."""
    return ((got.double() - want).norm() / (want.norm() or 1.0)).item()


def errors(got: Answer, want: Answer, *, rank: int = 0) -> dict[str, float]:
    """Of everything, relative to norms; a loss, whose terms have both signs, and columns of log 1 relative to 1."""
    found = {"loss": (got.loss - want.loss).abs().item() / max(1.0, want.loss.abs().item())}
    for name, mine, theirs in zip(Columns._fields, got.columns, want.columns, strict=True):
        here = ~mine.isnan()
        scale = max(theirs[here].norm().item(), here.sum().item() ** 0.5, 1.0)
        found[name] = (mine[here] - theirs[here]).norm().item() / scale
    part = want.weight_grad.split(len(got.weight_grad))[rank]
    return found | {"dh": error(got.hidden_grad, want.hidden_grad), "dW": error(got.weight_grad, part)}


def compare(got: Answer, want: Answer, *, value: float, gradient: float, rank: int = 0) -> dict[str, float]:
    """The errors, all of them within tolerances."""
    found = errors(got, want, rank=rank)
    for name, gap in found.items():
        assert gap < (gradient if name in ("dh", "dW") else value), (name, gap)
    return found
