"""Feedback on responses: a task rules at once, or says which program is to be run first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_distil.errors import SandboxUnavailable
from megatron_distil.tasks.task import Response, Ruling, Task
from megatron_distil.types import Feedback, FinishReason, Outcome, Program, Prompt, Rollout, RunResult

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs programs that nobody vouches for."""

    async def run(self, program: Program) -> RunResult:
        """What the program did.

        Raises:
            SandboxUnavailable: nobody could run it.
        """
        ...


class TaskJudge:
    """Fulfils ``protocols.Judge``."""

    def __init__(self, task: Task, runner: Runner, *, concurrency: int, max_unavailable: float) -> None:
        self._task = task
        self._runner = runner
        self._concurrency = concurrency
        self._max_unavailable = max_unavailable

    async def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Feedback]:
        """One per rollout, in their order.

        Raises:
            SandboxUnavailable: more than the allowed share has no verdict.
            SandboxRefused: the sandbox refused a program; the same program would be refused again.
        """
        prompt_by_id = {prompt.prompt_id: prompt for prompt in prompts}
        asked = [(prompt_by_id[r.rollout_id.prompt], r, response_of(r)) for r in rollouts]
        wanted = [self._task.program(prompt, response) for prompt, _, response in asked]
        results = await self._run([entry for entry in wanted if isinstance(entry, Program)])
        feedback = [
            self._feedback(prompt, rollout, entry if isinstance(entry, Ruling) else results[entry])
            for (prompt, rollout, _), entry in zip(asked, wanted, strict=True)
        ]
        self._check_share(feedback, [entry for entry in results.values() if isinstance(entry, SandboxUnavailable)])
        return feedback

    async def _run(self, programs: Sequence[Program]) -> Mapping[Program, RunResult | SandboxUnavailable]:
        """Equal programs run once: the responses of one step often are."""
        permits = asyncio.Semaphore(self._concurrency)

        async def run(program: Program) -> RunResult | SandboxUnavailable:
            async with permits:
                try:
                    return await self._runner.run(program)
                except SandboxUnavailable as error:
                    return error

        distinct = list(dict.fromkeys(programs))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(program)) for program in distinct]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors  # callers know our errors, not groups of them
        return dict(zip(distinct, (task.result() for task in tasks), strict=True))

    def _feedback(self, prompt: Prompt, rollout: Rollout, said: Ruling | RunResult | SandboxUnavailable) -> Feedback:
        rollout_id, duration_s = rollout.rollout_id, 0.0
        if isinstance(said, SandboxUnavailable):
            logger.warning("%s: no verdict: %s", rollout_id, said)
            return Feedback(rollout_id=rollout_id, outcome=Outcome.UNAVAILABLE, reward=None, text="", duration_s=0.0)
        if isinstance(said, RunResult):
            duration_s = said.duration_s
            said = self._task.rule(prompt, response_of(rollout), said)
        return Feedback(
            rollout_id=rollout_id,
            outcome=said.outcome,
            reward=said.reward,
            text=said.text,
            duration_s=duration_s,
            pass_fraction=said.pass_fraction,
            vote=said.vote,
        )

    def _check_share(self, feedback: Sequence[Feedback], errors: Sequence[SandboxUnavailable]) -> None:
        without = sum(entry.outcome is Outcome.UNAVAILABLE for entry in feedback)
        if without > self._max_unavailable * len(feedback):
            raise SandboxUnavailable(
                f"{without} of {len(feedback)} responses have no verdict, and feedback.max_unavailable is "
                f"{self._max_unavailable}; the last reason: {errors[-1]}"
            )


class NoRunner:
    """For tasks that run no programs."""

    async def run(self, program: Program) -> RunResult:
        """Never asked by such a task.

        Raises:
            SandboxUnavailable: always.
        """
        raise SandboxUnavailable("this task runs programs, and feedback.num_sandboxes is 0; 1 or more works")


def response_of(rollout: Rollout) -> Response:
    """What a task sees of a rollout."""
    return Response(text=rollout.text, is_complete=rollout.finish is FinishReason.STOP)
