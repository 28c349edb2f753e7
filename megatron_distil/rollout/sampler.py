"""Responses of the student: groups, retries, staleness, cancellation. Knows no vendor.

One request per rollout, all of a step at once. A request that fails is asked again on another server, or on the same one
after its restart, under the same rollout id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_distil.errors import EngineUnavailable, StaleWeightsError
from megatron_distil.http import attempts
from megatron_distil.protocols import SamplingSpec
from megatron_distil.rollout.pool import EnginePool
from megatron_distil.types import Prompt, Rollout, RolloutId


class GroupSampler:
    """Fulfils ``protocols.Sampler``. The weights of step ``s`` have version ``s``."""

    def __init__(self, pool: EnginePool, spec: SamplingSpec, *, samples_per_prompt: int, budget_s: float) -> None:
        self._pool = pool
        self._spec = spec
        self._samples_per_prompt = samples_per_prompt
        self._budget_s = budget_s

    async def sample(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """``samples_per_prompt`` rollouts of each prompt, in the order of the prompts."""
        wanted = [
            (prompt, RolloutId(step, prompt.prompt_id, k))
            for prompt in prompts
            for k in range(self._samples_per_prompt)
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._pool.watch(version=step))
                drawn = [tasks.create_task(self._one(prompt, rollout_id)) for prompt, rollout_id in wanted]
                rollouts = [await task for task in drawn]
                watch.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        return rollouts

    async def _one(self, prompt: Prompt, rollout_id: RolloutId) -> Rollout:
        # Waiting for the first seat is no part of the budget: a step may hold many more requests than seats.
        seat = await self._pool.take(prompt.prompt_id)
        try:
            async for attempt in attempts(self._budget_s, on=EngineUnavailable):
                with attempt:
                    key, engine = seat or await self._pool.take(prompt.prompt_id)
                    seat = None
                    try:
                        return _fresh(await engine.generate(prompt, self._spec, rollout_id), engine.name)
                    except EngineUnavailable as error:
                        self._pool.doubt(key, error)
                        raise
                    finally:
                        self._pool.give(key)
        except EngineUnavailable as error:
            raise EngineUnavailable(
                f"{rollout_id}: gave up after {self._budget_s:g} s; last: {error}; servers: {self._pool.describe()}"
            ) from error
        raise AssertionError("attempts end with a result or an error")


def _fresh(rollout: Rollout, engine: str) -> Rollout:
    version = rollout.rollout_id.step
    if not rollout.oldest_weights == rollout.newest_weights == version:
        raise StaleWeightsError(
            f"{rollout.rollout_id}: {engine} sampled it under versions {rollout.oldest_weights} to "
            f"{rollout.newest_weights}, the student is at {version}"
        )
    return rollout


def _first(group: BaseExceptionGroup) -> BaseException:
    """The first error of a failed group: the others are what its cancellation made of the rest."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
