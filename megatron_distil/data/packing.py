"""Examples -> batches: which token predicts which, what each of them weighs, and how sequences share a microbatch.

The shift. A vector of a microbatch lives at the predicting position: entry ``t`` speaks about the token after ``t``. For a
prompt ``p0 p1`` and a response ``r0 r1 r2``:

    token_ids      p0  p1  r0  r1  r2
    sampled_ids    p1  r0  r1  r2  0
    response_mask  -   x   x   x   -         the targets, rewards and log-probabilities of r0 lie where p1 is read

The reduction is data. ``loss_weights`` are 0 outside the loss and divided by one global denominator, so the loss is a plain
sum over tokens, and replicas, layouts, microbatch sizes and packing cannot change it:

    token-mean            weight 1                denominator: tokens of the loss
    seq-mean-token-mean   1 / tokens of its own   denominator: sequences
    seq-mean-token-sum    weight 1                denominator: sequences

A rollout without verdict is in neither. A rollout without teacher context has weight 0 and is a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from megatron_distil.algo.objectives.objective import Objective
from megatron_distil.config.schema import Config, ParallelConfig
from megatron_distil.errors import DataError
from megatron_distil.types import Batch, Document, Example, Floats, Ids, Microbatch, Targets

T = TypeVar("T")


class Alignment(NamedTuple):
    """Multiples that lengths are padded to, so that every rank gets an equal share of a row."""

    sequence: int
    total: int


def alignment(parallel: ParallelConfig) -> Alignment:
    """Context parallelism cuts each sequence into 2 * cp pieces; sequence parallelism cuts a rank's tokens over tp."""
    shards = parallel.tp if parallel.sequence_parallel else 1
    if parallel.cp == 1:
        return Alignment(sequence=1, total=shards)
    return Alignment(sequence=2 * parallel.cp * shards, total=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence before it is packed. Vectors over ``R`` speak about the tokens of the response."""

    name: str
    prompt_ids: Ids
    response_ids: Ids
    is_counted: bool
    """A sequence of the denominator."""
    is_taught: bool
    """Its tokens carry a loss."""
    advantage: float
    sampling_logprobs: Floats
    targets: Targets | None
    group_id: int = -1
    """Equal for rollouts of one prompt of the step."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


class BatchPacker:
    """Fulfils ``protocols.Packer``. Knows sizes of the layout and no rank of it."""

    def __init__(self, config: Config, *, gather: Callable[[T], list[T]]) -> None:
        """Keep what packing depends on.

        Args:
            config: objective, layout, microbatch size, updates per step.
            gather: what every replica gives, in the order of the replicas; collective over dp. One call per step.
        """
        self._objective: Objective = config.objective
        self._align = alignment(config.parallel)
        self._max_tokens = config.train.max_microbatch_tokens
        self._num_updates = config.train.updates_per_step
        self._seed = config.train.seed
        self._gather: Callable[..., list] = gather

    def batches(self, examples: Sequence[Example], targets: Sequence[Targets | None], step: int) -> list[Batch]:
        """One batch per optimizer step, in order. Collective over dp: the denominators are global."""
        mine = [(e.prompt.prompt_id, e.feedback.reward) for e in examples]
        everyone = [entry for part in self._gather(mine) for entry in part]
        group_by_prompt = {prompt: index for index, prompt in enumerate(dict.fromkeys(p for p, _ in everyone))}
        update_by_prompt = split_prompts([prompt for prompt, _ in everyone], self._num_updates, (self._seed, step))
        advantage_by_entry = self._advantages(everyone)
        rows = [
            [
                self._row(
                    e,
                    t,
                    advantage_by_entry.get((e.prompt.prompt_id, e.feedback.reward), 0.0),
                    group_by_prompt[e.prompt.prompt_id],
                )
                for e, t in zip(examples, targets, strict=True)
                if update_by_prompt[e.prompt.prompt_id] == update
            ]
            for update in range(self._num_updates)
        ]
        shares = [self._share(part) for part in rows]
        denominators = [sum(column) for column in zip(*self._gather(shares), strict=True)]
        return [self._batch(part, total) for part, total in zip(rows, denominators, strict=True)]

    def documents(self, documents: Sequence[Document]) -> Batch:
        """One batch of supervised documents. Collective over dp."""
        rows = [
            Row(
                name=f"document {index}",
                prompt_ids=document.context_ids,
                response_ids=document.response_ids,
                is_counted=True,
                is_taught=True,
                advantage=0.0,
                sampling_logprobs=np.zeros(len(document.response_ids), dtype=np.float32),
                targets=None,
            )
            for index, document in enumerate(documents)
        ]
        return self._batch(rows, sum(self._gather(self._share(rows))))

    def sequences(self, sequences: Sequence[tuple[str, Ids, Ids]]) -> list[tuple[list[int], Microbatch]]:
        """Sequences that are only read: (name, context, response) -> (indices into the argument, microbatch).

        The response mask says where tokens of the response are predicted. At least one microbatch, if of padding.

        Raises:
            DataError: a sequence fits no microbatch; names it.
        """
        rows = [
            Row(
                name=name,
                prompt_ids=context,
                response_ids=response,
                is_counted=True,
                is_taught=True,
                advantage=0.0,
                sampling_logprobs=np.zeros(len(response), dtype=np.float32),
                targets=None,
            )
            for name, context, response in sequences
        ]
        bins = self._bins(rows) or [[]]
        return [(chosen, pack([rows[i] for i in chosen], [0.0] * len(chosen), 0, self._align)) for chosen in bins]

    def _advantages(self, everyone: Sequence[tuple[str, float | None]]) -> dict[tuple[str, float | None], float]:
        """The advantage is a function of group and reward, so equal entries need no name of their own."""
        if not self._objective.needs_rewards:
            return {}
        judged: list[tuple[str, float | None]] = [(prompt, reward) for prompt, reward in everyone if reward is not None]
        index_by_prompt = {prompt: index for index, prompt in enumerate(dict.fromkeys(p for p, _ in judged))}
        advantages = self._objective.advantages(
            torch.tensor([reward for _, reward in judged], dtype=torch.float64),
            torch.tensor([index_by_prompt[prompt] for prompt, _ in judged], dtype=torch.int64),
        )
        return dict(zip(judged, advantages.tolist(), strict=True))

    def _row(self, example: Example, targets: Targets | None, advantage: float, group_id: int) -> Row:
        has_verdict = example.feedback.reward is not None
        return Row(
            name=f"rollout {example.rollout.rollout_id}",
            prompt_ids=example.prompt.token_ids,
            response_ids=example.rollout.token_ids,
            is_counted=has_verdict,
            is_taught=has_verdict and (targets is not None or not self._objective.needs_teacher),
            advantage=advantage,
            sampling_logprobs=example.rollout.logprobs,
            targets=targets,
            group_id=group_id,
        )

    def _share(self, rows: Sequence[Row]) -> float:
        """What this replica adds to the denominator."""
        if self._objective.reduction == "token-mean":
            return float(sum(len(row.response_ids) for row in rows if row.is_taught))
        return float(sum(row.is_counted for row in rows))

    def _batch(self, rows: Sequence[Row], denominator: float) -> Batch:
        taught = [row for row in rows if row.is_taught and len(row.response_ids)]
        support = max((row.targets.support_ids.shape[1] for row in taught if row.targets is not None), default=0)
        # A replica without a loss runs one forward and backward over padding: the others wait for it in collectives.
        bins = self._bins(taught) or [[]]
        weights = [self._weight(row) / (denominator or 1.0) for row in taught]
        microbatches = tuple(
            pack([taught[i] for i in chosen], [weights[i] for i in chosen], support, self._align) for chosen in bins
        )
        return Batch(microbatches=microbatches, denominator=denominator)

    def _bins(self, rows: Sequence[Row]) -> list[list[int]]:
        lengths = [_up(row.length, self._align.sequence) for row in rows]
        limit = self._max_tokens // self._align.total * self._align.total
        for row, length in zip(rows, lengths, strict=True):
            if length > limit:
                raise DataError(
                    f"{row.name}: {length} tokens with padding do not fit a microbatch; "
                    f"raise train.max_microbatch_tokens = {self._max_tokens} to {_up(length, self._align.total)} or more"
                )
        return balanced_bins(lengths, limit)

    def _weight(self, row: Row) -> float:
        return 1.0 / len(row.response_ids) if self._objective.reduction == "seq-mean-token-mean" else 1.0


def split_prompts(prompt_ids: Sequence[str], parts: int, seed: tuple[int, int]) -> dict[str, int]:
    """Cut the prompts of a step into parts of equal size (give or take one).

    The order is a pure function of the seed and the ids, so that it does not depend on who asks.
    """

    def place(prompt_id: str) -> bytes:
        return hashlib.sha256(f"{seed[0]}/{seed[1]}/{prompt_id}".encode()).digest()

    order = sorted(set(prompt_ids), key=place)
    return {prompt_id: index * parts // len(order) for index, prompt_id in enumerate(order)}


def balanced_bins(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """As few bins as first-fit finds, filled as evenly as possible.

    Args:
        lengths: none above ``limit``.
        limit: what a bin holds.

    Returns:
        Indices into ``lengths``, rising in each bin; no bin is empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first_fit: list[list[int]] = []
    used: list[int] = []
    for i in order:
        bin_ = next((b for b, total in enumerate(used) if total + lengths[i] <= limit), None)
        if bin_ is None:
            first_fit.append([])
            used.append(0)
            bin_ = len(used) - 1
        first_fit[bin_].append(i)
        used[bin_] += lengths[i]
    even: list[list[int]] = [[] for _ in used]
    loads = [0] * len(used)
    for i in order:
        lightest = min(range(len(loads)), key=loads.__getitem__)
        even[lightest].append(i)
        loads[lightest] += lengths[i]
    chosen = even if max(loads, default=0) <= limit else first_fit
    return [sorted(bin_) for bin_ in chosen]


def pack(rows: Sequence[Row], weights: Sequence[float], support: int, align: Alignment) -> Microbatch:
    """One packed row of tensors.

    Args:
        rows: all of them carry a loss.
        weights: of each token of the response, by row.
        support: K of the batch; narrower targets are padded with unused slots.
        align: multiples to pad to. Padding belongs to the sequence before it, where causality hides it.
    """
    padded = [_up(row.length, align.sequence) for row in rows]
    total = max(_up(sum(padded), align.total), align.sequence * align.total, 1)
    padded = [*padded[:-1], total - sum(padded[:-1])] if padded else [total]
    starts = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)

    token_ids, sampled_ids = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    segment_ids = np.full(total, -1, dtype=np.int32)
    response_mask = np.zeros(total, dtype=np.bool_)
    floats = np.zeros((5, total), dtype=np.float32)
    loss_weights, advantages, sampling_logprobs, entropy, teacher_sampled = floats
    support_ids = np.full((total, support), -1, dtype=np.int64)
    teacher_logprobs = np.full((total, support), -np.inf, dtype=np.float32)
    for index, (row, weight, start) in enumerate(zip(rows, weights, starts[: len(rows)].tolist(), strict=True)):
        stop = start + row.length
        token_ids[start:stop] = np.concatenate([row.prompt_ids, row.response_ids])
        sampled_ids[start : stop - 1] = token_ids[start + 1 : stop]
        segment_ids[start:stop] = index
        predicting = slice(start + len(row.prompt_ids) - 1, stop - 1)
        response_mask[predicting] = True
        loss_weights[predicting] = weight
        advantages[predicting] = row.advantage
        sampling_logprobs[predicting] = row.sampling_logprobs
        if row.targets is not None:
            width = row.targets.support_ids.shape[1]
            support_ids[predicting, :width] = row.targets.support_ids
            teacher_logprobs[predicting, :width] = row.targets.logprobs
            entropy[predicting] = row.targets.entropy
            teacher_sampled[predicting] = row.targets.sampled
    positions = np.arange(total) - np.repeat(starts[:-1], np.diff(starts))
    return Microbatch(
        token_ids=torch.from_numpy(token_ids),
        sampled_ids=torch.from_numpy(sampled_ids),
        cu_seqlens=torch.from_numpy(starts),
        positions=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segment_ids),
        response_mask=torch.from_numpy(response_mask),
        loss_weights=torch.from_numpy(loss_weights),
        advantages=torch.from_numpy(advantages),
        sampling_logprobs=torch.from_numpy(sampling_logprobs),
        group_ids=torch.tensor([row.group_id for row in rows] or [-1], dtype=torch.int64),
        support_ids=torch.from_numpy(support_ids),
        teacher_logprobs=torch.from_numpy(teacher_logprobs),
        teacher_entropy=torch.from_numpy(entropy),
        teacher_sampled=torch.from_numpy(teacher_sampled),
    )


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
