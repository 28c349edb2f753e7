"""An expert as teacher: another model, behind servers of its own, scores the student's response. Knows no vendor.

Its log-probabilities are normalised over its whole vocabulary and at temperature 1. Of its distribution it gives the top-k and
the sampled token; an id that the student has not (rows that pad a larger embedding) counts as outside the support.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_distil.config.schema import Config
from megatron_distil.errors import DataError, EngineUnavailable
from megatron_distil.http import attempts
from megatron_distil.registry import Record, Registry
from megatron_distil.types import Example, Floats, Ids, RolloutId, Targets

if TYPE_CHECKING:
    from torch import Tensor

ROLE = "teacher"


class Scores(Protocol):
    """What an expert says of a response of R tokens, in nats."""

    @property
    def sampled(self) -> Floats: ...
    @property
    def top_ids(self) -> Ids: ...
    @property
    def top_logprobs(self) -> Floats: ...


class Scorer(Protocol):
    """One server of an expert."""

    async def score(self, context_ids: Ids, response_ids: Ids, top_k: int, rollout_id: RolloutId) -> Scores:
        """The expert at every token of a response behind a context.

        Raises:
            EngineUnavailable: it does not answer; another server may.
            EngineReplyError: it says no or nonsense.
        """
        ...

    async def info(self) -> object:
        """What it is.

        Raises:
            EngineReplyError: it is a version that we do not speak.
        """
        ...


OnHead = Callable[[Callable[[], Awaitable[list[Targets]]]], list[Targets]]
"""``Replica.on_head``: runs it once per replica and shares the result; an error reaches every rank."""


class ExpertTeacher:
    """Fulfils ``protocols.Teacher``. Collective: requests are the heads' work."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        connect: Callable[[Record], Scorer],
        on_head: OnHead,
        *,
        vocab_size: int,
    ) -> None:
        """Keep what a step needs.

        Args:
            config: support, deadlines, concurrency.
            registry: where the servers of role ``teacher`` are.
            connect: record -> server.
            on_head: of this replica.
            vocab_size: ids that the student knows.
        """
        self._registry = registry
        self._connect = connect
        self._on_head = on_head
        self._vocab_size = vocab_size
        self._top_k = min(config.teacher.top_k, vocab_size) if config.objective.needs_support else 0
        self._num_servers = config.teacher.num_engines
        self._start_timeout_s = config.rollout.start_timeout_s
        self._budget_s = config.rollout.budget_s
        self._in_flight = max(1, config.rollout.concurrency * config.teacher.num_engines // config.parallel.dp)

    def score(self, examples: Sequence[Example]) -> list[Targets | None]:
        """The expert at every token of every response; None exactly where an example has no context.

        Raises:
            EngineUnavailable: no server answered within the budget.
            EngineReplyError: a server answered something that cannot be trusted.
        """
        taught = [example for example in examples if example.context is not None]
        answers = iter(self._on_head(lambda: self._ask(taught)))
        return [None if example.context is None else next(answers) for example in examples]

    def follow(self) -> None:
        """Nothing moves."""

    def state(self) -> Mapping[str, Tensor]:
        """Nothing to save."""
        return {}

    async def wait(self) -> None:
        """Until the servers are there, and speak as we do.

        Raises:
            RegistryError: they did not appear in time.
            EngineReplyError: one is of another version.
        """

        def appeared() -> list[Record]:
            stopped = self._registry.stop_requested
            return self._registry.wait_for(ROLE, self._num_servers, timeout_s=self._start_timeout_s, stopped=stopped)

        for record in await asyncio.to_thread(appeared):
            await self._connect(record).info()

    async def _ask(self, taught: Sequence[Example]) -> list[Targets]:
        """One request per example. Those of a prompt go to one server, which has the beginning of their contexts cached."""
        prompts = {prompt_id: k for k, prompt_id in enumerate(dict.fromkeys(e.prompt.prompt_id for e in taught))}
        seats = asyncio.Semaphore(self._in_flight)
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(self._one(e, prompts[e.prompt.prompt_id], seats)) for e in taught]
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        return [task.result() for task in asked]

    async def _one(self, example: Example, home: int, seats: asyncio.Semaphore) -> Targets:
        assert example.context is not None
        context_ids, response = example.context.token_ids, example.rollout
        # Waiting for a seat is no part of the budget: a step may hold many more requests than seats.
        async with seats:
            try:
                async for attempt in attempts(self._budget_s, on=EngineUnavailable):
                    with attempt:
                        server = await self._server(home + attempt.retry_state.attempt_number - 1)
                        scores = await server.score(context_ids, response.token_ids, self._top_k, response.rollout_id)
                        return targets(scores, self._vocab_size)
            except EngineUnavailable as error:
                raise EngineUnavailable(
                    f"{response.rollout_id}: no score of the expert within {self._budget_s:g} s; last: {error}"
                ) from error
        raise AssertionError("attempts end with a result or an error")

    async def _server(self, place: int) -> Scorer:
        records = await asyncio.to_thread(self._registry.live, ROLE)
        if not records:
            raise EngineUnavailable(f"no server of role {ROLE!r} is ready in {self._registry.folder}")
        return self._connect(records[place % len(records)])


def targets(scores: Scores, vocab_size: int) -> Targets:
    """Scores -> targets of a student that knows ``vocab_size`` ids.

    The entropy is that of what is known: the ids of the support (without one, the sampled id) and all others as one class.
    That is a lower bound of the entropy over the vocabulary.
    """
    is_known = scores.top_ids < vocab_size
    logprobs = np.where(is_known, scores.top_logprobs, -np.inf).astype(np.float32)
    classes = logprobs if scores.top_ids.shape[1] else scores.sampled[:, None]
    return Targets(
        support_ids=np.where(is_known, scores.top_ids, -1).astype(np.int32),
        logprobs=logprobs,
        entropy=_known_entropy(classes.astype(np.float64)),
        sampled=scores.sampled,
    )


def _known_entropy(logprobs: np.ndarray) -> Floats:
    probs = np.exp(logprobs)
    rest = np.clip(1.0 - probs.sum(1), 0.0, None)
    inside = np.where(probs > 0.0, probs * np.where(probs > 0.0, logprobs, 0.0), 0.0).sum(1)
    outside = rest * np.log(np.where(rest > 0.0, rest, 1.0))
    return -(inside + outside).astype(np.float32)


def check_vocabulary(student: Mapping[str, int], expert: Mapping[str, int], name: str) -> None:
    """Whether both mean the same by an id: the response is sent as ids.

    Args:
        student: ids by token.
        expert: likewise.
        name: of the expert, for the error.

    Raises:
        DataError: a token of the student is another one to the expert.
    """
    for token, index in student.items():
        if expert.get(token) != index:
            other = "no token" if token not in expert else f"token {expert[token]}"
            raise DataError(
                f"teacher.model = {name!r}: {token!r} is token {index} to the student and {other} to the expert; "
                "an expert has the student's tokenizer, as a larger model of the same family does"
            )
