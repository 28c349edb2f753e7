"""The self-teacher: the same model, shown the feedback, reads the student's response without gradient.

Its response tokens are the rollout's own ids, appended to the context, never text that is tokenised again. They are
predicted from the end of the context on, as the student's are from the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251 - targets go from the last stage to every rank of the replica
from torch import Tensor

from megatron_distil import algo
from megatron_distil.config.schema import Config
from megatron_distil.errors import NonFiniteLossError
from megatron_distil.trainer.cp import own_part
from megatron_distil.trainer.head.topk import Scores, Voice, at_ids, top_k
from megatron_distil.trainer.model import Student
from megatron_distil.trainer.schedule import Placed, place, run_schedule, vocab_shard
from megatron_distil.types import Example, Ids, Microbatch, Targets

Pack = Callable[[Sequence[tuple[str, Ids, Ids]]], Sequence[tuple[Sequence[int], Microbatch]]]
"""(name, context, response) of each sequence -> microbatches, each with the indices of its sequences."""

Kind = Literal["ema", "frozen", "live", "trust_region"]

WeightsByName = Mapping[str, Tensor]
"""Under the names of ``gpt.named_parameters()``, in the shapes of this rank's shards."""


def make_teacher(student: Student, config: Config, pack: Pack) -> SelfTeacher | NoTeacher:
    """The teacher of a run. Call it while the student still has the weights that training starts from.

    Args:
        student: whose weights it takes, and whose buffers it computes in.
        config: objective, kind of teacher, temperature.
        pack: makes microbatches of sequences that are only read.
    """
    if not config.objective.needs_teacher:
        return NoTeacher()
    return SelfTeacher(student, config, pack)


class NoTeacher:
    """For objectives that need none. Fulfils ``protocols.Teacher``."""

    def score(self, examples: Sequence[Example]) -> list[Targets | None]:
        """None for every example."""
        return [None] * len(examples)

    def follow(self) -> None:
        """Nothing moves."""

    def state(self) -> WeightsByName:
        """Nothing to save."""
        return {}


@dataclass(frozen=True)
class _Row:
    """One packed row that is read, with where its response tokens lie on each context-parallel rank."""

    sequences: Sequence[int]
    placed: Placed
    slots: tuple[Tensor, ...]
    """For each rank of cp: [N] which response token of the row, in token order, each of its head's rows predicts."""
    sampled_ids: Tensor
    """[N] the response tokens that this rank's rows of the head predict."""


class SelfTeacher:
    """Fulfils ``protocols.Teacher``."""

    def __init__(self, student: Student, config: Config, pack: Pack) -> None:
        """Copy the weights that the teacher starts from, unless it has none of its own."""
        self._student = student
        kind = config.teacher.weights
        if kind == "expert":
            raise ValueError("an expert has servers of its own (teacher/expert.py)")
        self._kind: Kind = kind
        self._rate = config.teacher.rate
        self._support = config.teacher.support
        vocab = student.dims.vocab_size
        self._k = vocab if config.teacher.support == "full" else min(config.teacher.top_k, vocab)
        if not config.objective.needs_support:
            self._k = 0
        self._temperature = config.rollout.temperature
        self._pack = pack
        dtype = torch.float32 if self._kind == "ema" else student.transformer.params_dtype
        self._own: dict[str, Tensor] = {}
        if self._kind != "live":
            self._own = {name: p.detach().to(dtype, copy=True) for name, p in student.gpt.named_parameters()}

    def score(self, examples: Sequence[Example]) -> list[Targets | None]:
        """The teacher on a support, at every token of every response. Collective over the replica.

        Raises:
            DataError: a context with its response fits no microbatch.
            NonFiniteLossError: on every rank of the replica; a logit of a response is NaN or infinite.
        """
        taught = [example for example in examples if example.context is not None]
        support = None
        if self._k == 0:
            support = [np.empty((len(e.rollout.token_ids), 0), dtype=np.int32) for e in taught]
        elif self._support == "student":
            prompts = [(f"rollout {e.rollout.rollout_id}", e.prompt.token_ids, e.rollout.token_ids) for e in taught]
            support = [targets.support_ids for targets in self._read(prompts, "live", None)]
        contexts = [
            (f"the teacher's context of rollout {e.rollout.rollout_id}", e.context.token_ids, e.rollout.token_ids)
            for e in taught
            if e.context is not None
        ]
        answers = iter(self._read(contexts, self._kind, support))
        return [next(answers) if example.context is not None else None for example in examples]

    @torch.no_grad()
    def follow(self) -> None:
        """``algo.ema_step`` in float32, for ``ema``; the others stay or have no weights. Once per step, after its updates."""
        if self._kind == "ema":
            params = dict(self._student.gpt.named_parameters())
            algo.ema_step([self._own[name] for name in params], params.values(), rate=self._rate)

    def state(self) -> WeightsByName:
        """What a checkpoint holds of the teacher; loading fills these tensors in place."""
        return self._own

    def _read(
        self, sequences: Sequence[tuple[str, Ids, Ids]], kind: Kind, support: Sequence[Ids] | None
    ) -> list[Targets]:
        """Targets of each sequence, on every rank of the replica; with ``support`` at those ids, else at the largest."""
        if not sequences:
            return []
        rows = [self._row(indices, microbatch) for indices, microbatch in self._pack(sequences)]
        parts = self._shared(rows, self._spoken(rows, kind, support))
        found = _by_sequence(rows, parts, [len(response) for _, _, response in sequences])
        check_finite([name for name, _, _ in sequences], found, kind)
        return found

    def _row(self, sequences: Sequence[int], microbatch: Microbatch) -> _Row:
        mask = microbatch.response_mask
        placed = place(microbatch, mask, self._student.groups)
        number = mask.cumsum(0) - 1
        slots = tuple(number[tokens][mask[tokens]] for tokens in placed.cut.order.cpu())
        sampled = own_part(microbatch.sampled_ids.to(placed.rows.device), placed.cut).index_select(0, placed.rows)
        return _Row(sequences, placed, slots, sampled)

    @torch.no_grad()
    def _spoken(self, rows: Sequence[_Row], kind: Kind, support: Sequence[Ids] | None) -> list[Scores]:
        """What the head says of each row's response tokens; empty but on the last stage. Logits live for one chunk."""
        student, found = self._student, list[Scores]()
        first = self._first_voice(rows) if kind == "trust_region" else None

        def answer(index: int, hidden: Tensor) -> Tensor:
            voices = [Voice(hidden, student.head_weight, 1.0)]
            if first is not None:
                states, weight = first
                voices = [
                    Voice(states[index], weight, 1.0 - self._rate),
                    Voice(hidden, student.head_weight, self._rate),
                ]
            found.append(self._columns(rows[index], voices, support))
            return hidden.new_zeros(())

        with self._in_place() if kind in ("ema", "frozen") else _as_it_is():
            run_schedule(student, [row.placed for row in rows], answer, has_backward=False)
        return found

    def _first_voice(self, rows: Sequence[_Row]) -> tuple[list[Tensor], Tensor]:
        """Hidden states of the first student, and its output layer: they wait for those of the live one."""
        states: list[Tensor] = []

        def keep(_: int, hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden.new_zeros(())

        with self._in_place():
            run_schedule(self._student, [row.placed for row in rows], keep, has_backward=False)
            is_last = self._student.groups.is_last_stage
            weight = self._student.head_weight.detach().clone() if is_last else torch.empty(0)
        return states, weight

    def _columns(self, row: _Row, voices: Sequence[Voice], support: Sequence[Ids] | None) -> Scores:
        shard = vocab_shard(self._student)
        if support is None:
            return top_k(voices, self._k, row.sampled_ids, shard, temperature=self._temperature)
        whole = np.concatenate([support[i] for i in row.sequences]).astype(np.int64)
        own = row.slots[self._student.groups.cp_rank].numpy()
        ids = torch.from_numpy(whole[own]).to(voices[0].rows.device)
        return at_ids(voices, ids, row.sampled_ids, shard, temperature=self._temperature)

    def _shared(self, rows: Sequence[_Row], found: Sequence[Scores]) -> list[Tensor]:
        """The columns of every context-parallel rank, on every rank of the replica; two collectives.

        Returns:
            For each rank of cp [rows of all microbatches, 2 K + 2] int32: ids, then the bits of log-probabilities, of
            that of the sampled id, and of the entropy.
        """
        groups = self._student.groups
        counts = [sum(len(row.slots[rank]) for row in rows) for rank in range(groups.cp_size)]
        bits = torch.zeros(max(counts), 2 * self._k + 2, dtype=torch.int32, device=groups.device)
        if found:
            ids = torch.cat([columns.ids for columns in found]).int()
            floats = torch.cat(
                [torch.cat([c.logprobs, c.sampled[:, None], c.entropy[:, None]], 1).float() for c in found]
            )
            bits[: len(ids)] = torch.cat([ids, floats.contiguous().view(torch.int32)], 1)
        whole = bits
        if groups.cp_size > 1:
            whole = torch.empty(groups.cp_size * len(bits), bits.shape[1], dtype=bits.dtype, device=bits.device)
            if groups.is_last_stage:
                dist.all_gather_single(whole, bits, group=groups.cp)
        if groups.pp_size > 1:
            dist.broadcast(whole, group=groups.pp, group_src=groups.pp_size - 1)
        parts = whole.cpu().view(groups.cp_size, max(counts), -1)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The teacher's weights in the student's buffers; the student's are put back from a copy, bit for bit."""
        params = dict(self._student.gpt.named_parameters())
        kept = {name: param.detach().clone() for name, param in params.items()}
        try:
            for name, param in params.items():
                param.data.copy_(self._own[name])
            yield
        finally:
            for name, param in params.items():
                param.data.copy_(kept[name])


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _by_sequence(rows: Sequence[_Row], parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Targets]:
    """Cut what all ranks found into targets, one for each sequence."""
    found: dict[int, Targets] = {}
    taken = [0] * len(parts)
    for row in rows:
        total = sum(lengths[i] for i in row.sequences)
        table = torch.empty(total, parts[0].shape[1], dtype=torch.int32)
        for rank, (part, slots) in enumerate(zip(parts, row.slots, strict=True)):
            table[slots] = part[taken[rank] : taken[rank] + len(slots)]
            taken[rank] += len(slots)
        at = 0
        for index in row.sequences:
            found[index] = _targets(table[at : at + lengths[index]].numpy())
            at += lengths[index]
    return [found[index] for index in range(len(lengths))]


def _targets(bits: np.ndarray) -> Targets:
    k = bits.shape[1] // 2 - 1
    floats = np.ascontiguousarray(bits[:, k:]).view(np.float32)
    return Targets(
        support_ids=np.ascontiguousarray(bits[:, :k]),
        logprobs=np.ascontiguousarray(floats[:, :k]),
        entropy=np.ascontiguousarray(floats[:, k + 1]),
        sampled=np.ascontiguousarray(floats[:, k]),
    )


def check_finite(names: Sequence[str], found: Sequence[Targets], kind: Kind) -> None:
    """All ranks of a replica have the same targets, so all of them raise.

    Args:
        names: of the sequences, for the error.
        found: targets of each.
        kind: whose weights were read.

    Raises:
        NonFiniteLossError: names the first sequence with a logit that is NaN or infinite, and the token.
    """
    for name, targets in zip(names, found, strict=True):
        is_finite = np.isfinite(targets.logprobs).all(1) & np.isfinite(targets.sampled) & np.isfinite(targets.entropy)
        if not is_finite.all():
            at = np.flatnonzero(~is_finite)
            raise NonFiniteLossError(
                f"{name}: logits are not finite at {len(at)} of {len(is_finite)} response tokens, first at token {at[0]}, "
                f'with the weights that are read, "{kind}". No update was made in this step; go back to a checkpoint'
            )
