"""What the loops need of the world. One protocol per part; ``app.py`` knows who fulfils it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from megatron_distil.types import (
    Batch,
    Document,
    Example,
    Feedback,
    Prompt,
    Rollout,
    RolloutId,
    Sums,
    Targets,
    TeacherContext,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How tokens are drawn. One object, given to every engine call; there are no defaults at the wire."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


class Prompts(Protocol):
    """The training prompts; their order is a pure function of (seed, step)."""

    def take(self, step: int) -> list[Prompt]:
        """This replica's prompts of a step."""
        ...


class Documents(Protocol):
    """Supervised documents; their order is a pure function of (seed, step)."""

    def take(self, step: int) -> list[Document]:
        """This replica's documents of a step."""
        ...


class Sampler(Protocol):
    """Draws responses from the student."""

    async def sample(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """``samples_per_prompt`` rollouts of each prompt, in the order of the prompts.

        Raises:
            EngineUnavailable: no server answered within the budget.
            EngineReplyError: a server answered something that cannot be trusted.
        """
        ...


class Judge(Protocol):
    """Feedback on responses."""

    async def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Feedback]:
        """One per rollout, in their order. No verdict is ``Outcome.UNAVAILABLE``, never a reward of zero.

        Raises:
            SandboxUnavailable: more than the allowed share of the step has no verdict.
        """
        ...


class Contexts(Protocol):
    """What the teacher reads in place of the prompt."""

    def build(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], feedback: Sequence[Feedback]
    ) -> list[TeacherContext | None]:
        """One per rollout; None where there is nothing to teach from, or it does not fit."""
        ...


class RolloutLog(Protocol):
    """Every step's examples on disk, complete or absent, before they are trained on."""

    def read(self, step: int) -> list[Example] | None:
        """The examples of this replica that an earlier attempt collected; None: sample them."""
        ...

    def write(self, step: int, examples: Sequence[Example]) -> None:
        """Atomic: after a crash the step is there as a whole or not at all."""
        ...


class Teacher(Protocol):
    """The teacher at the student's own states. Collective."""

    def score(self, examples: Sequence[Example]) -> list[Targets | None]:
        """None exactly where an example has no context, or the objective needs no teacher."""
        ...

    def follow(self) -> None:
        """theta_T <- (1 - rate) theta_T + rate theta, if the teacher has weights that move. Once per step."""
        ...


class Packer(Protocol):
    """Examples -> tensors: masks, weights, advantages, layouts."""

    def batches(self, examples: Sequence[Example], targets: Sequence[Targets | None], step: int) -> list[Batch]:
        """One batch per optimizer step, in order. Collective over dp: the denominators are global."""
        ...

    def documents(self, documents: Sequence[Document]) -> Batch:
        """One batch of supervised documents. Collective over dp."""
        ...


class Learner(Protocol):
    """The student and its optimizer. All methods are collective but ``on_head``'s work."""

    def resume(self) -> int:
        """Number of steps that are done: restores the newest complete checkpoint, or starts at 0."""
        ...

    def on_head(self, work: Callable[[], Awaitable[list[Example]]]) -> list[Example]:
        """Run ``work`` once per replica, on its head, and an error reaches every rank.

        The examples are then spread over the replicas, so that each has about as many tokens.
        """
        ...

    def anchored(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches of a step, in order, with log pi_old(a_t) and the baseline of the credit where the objective reads them.

        Both are functions of the policy before the step's first update. At most one forward without gradient.
        """
        ...

    def update(self, batch: Batch) -> Sums:
        """Theta <- theta - lr * grad L(theta; batch).

        Raises:
            NonFiniteLossError: on every rank, before the step.
        """
        ...

    def save_if_due(self, step: int) -> None:
        """Save after ``step`` steps when the configuration says so. Returns before the bytes are on disk."""
        ...

    def finish(self, step: int) -> None:
        """Save the state after ``step`` steps unless it is saved, and wait until it is on disk."""
        ...


class Weights(Protocol):
    """Publication of the student to the engines. Collective."""

    def publish(self, version: int) -> None:
        """Returns when every engine serves ``version``; the version is the number of finished steps.

        Raises:
            SyncError: an engine holds something else than was sent.
        """
        ...

    def release(self) -> None:
        """No engine is needed until the next ``publish``."""
        ...


class Evals(Protocol):
    """Held-out prompts, answered by the engines."""

    def run_if_due(self, step: int) -> None:
        """Collective. Evaluates the student after ``step`` steps and logs it, when the configuration says so."""
        ...


class Log(Protocol):
    """Metrics and the clock."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Times a phase: ``time/<name>_s``."""
        ...

    def write(
        self, step: int, examples: Sequence[Example], targets: Sequence[Targets | None], updates: Sequence[Sums]
    ) -> None:
        """One line of metrics: reduces over replicas, divides once. Collective."""
        ...

    def add(self, sums: Sums) -> None:
        """Counts something that belongs to the current step."""
        ...


class Engine(Protocol):
    """One inference server, as the sampler and the publisher see it."""

    @property
    def name(self) -> str:
        """For logs and errors."""
        ...

    async def generate(self, prompt: Prompt, spec: SamplingSpec, rollout_id: RolloutId) -> Rollout:
        """One response."""
        ...


class Stopped(Protocol):
    """Whether somebody asked the run to end."""

    def __call__(self) -> bool:
        """Collective, the same answer on every rank."""
        ...
