"""The student as the loop sees it: it resumes, learns, and is saved."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from megatron_distil.protocols import Teacher
from megatron_distil.trainer.checkpoint import Checkpoints
from megatron_distil.trainer.replica import Replica
from megatron_distil.trainer.update import Updater
from megatron_distil.types import Batch, Example, Sums


class StatefulTeacher(Teacher, Protocol):
    """A teacher whose weights are part of a checkpoint."""

    def state(self) -> Mapping[str, Tensor]:
        """Its own weights by parameter, empty if it has none; loading fills them in place."""
        ...


class MegatronLearner:
    """Fulfils ``protocols.Learner``. Every method is collective over the world."""

    def __init__(
        self,
        *,
        replica: Replica,
        updater: Updater,
        teacher: StatefulTeacher,
        checkpoints: Checkpoints,
        every_steps: int,
    ) -> None:
        self.teacher = teacher
        self._replica = replica
        self._updater = updater
        self._checkpoints = checkpoints
        self._every_steps = every_steps
        self._saved: int | None = None

    def resume(self) -> int:
        """Number of steps that are done: restores the newest complete checkpoint, or starts at 0.

        Raises:
            CheckpointError: on every rank: it is damaged, or of another run.
        """
        step = self._checkpoints.load(self._extra())
        self._saved = step or None
        return step

    def on_head(self, work: Callable[[], Awaitable[list[Example]]]) -> list[Example]:
        """Run ``work`` on the head of each replica; the examples are then spread evenly.

        One by one: a mini-batch may hold fewer prompts than there are replicas, and every replica shall have its part.
        """
        return self._replica.exchange(
            self._replica.on_head(work),
            group_of=lambda example: example.rollout.rollout_id,
            size_of=lambda example: len(example.prompt.token_ids) + len(example.rollout.token_ids),
        )

    def anchored(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches of a step with what the objective wants to know of the policy before the first update."""
        return self._updater.anchored(batches, self._replica.gather)

    def update(self, batch: Batch) -> Sums:
        """Theta <- theta - lr * grad L(theta; batch).

        Raises:
            NonFiniteLossError: on every rank, before the step.
        """
        return self._updater.update(batch)

    def save_if_due(self, step: int) -> None:
        """Save after ``step`` steps when the configuration says so. Returns before the bytes are on disk.

        Raises:
            CheckpointError: on every rank, also for an earlier save that failed in the background.
        """
        if step % self._every_steps == 0:
            self._save(step)
        else:
            self._checkpoints.poll()

    def finish(self, step: int) -> None:
        """Save the state after ``step`` steps unless it is saved, and wait until it is on disk."""
        if self._saved != step:
            self._save(step)
        self._checkpoints.wait()

    def _save(self, step: int) -> None:
        self._checkpoints.save(step, self._extra())
        self._saved = step

    def _extra(self) -> Mapping[str, Mapping[str, Tensor]]:
        weights = self.teacher.state()
        return {"teacher": weights} if weights else {}
