"""Records of a step by hand, for tests of tasks, judge, contexts and log."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_distil.tasks.task import Task
from megatron_distil.types import Feedback, FinishReason, Outcome, Prompt, Rollout, RolloutId, Sums


def characters(text: str) -> np.ndarray:
    """One token per character, whatever the character."""
    return np.asarray([ord(c) for c in text], dtype=np.int32)


def prompt_from(task: Task, row: Mapping[str, object]) -> Prompt:
    text = task.prompt_text(row)
    return Prompt(prompt_id=task.prompt_id(row), text=text, token_ids=characters(text), task=row)


def rollout(
    text: str,
    *,
    prompt: str = "train-00000",
    sample: int = 0,
    step: int = 3,
    finish: FinishReason = FinishReason.STOP,
) -> Rollout:
    ids = characters(text + ("\n" if finish is FinishReason.STOP else ""))
    return Rollout(
        rollout_id=RolloutId(step, prompt, sample),
        token_ids=ids,
        text=text,
        logprobs=np.linspace(-1, -0.1, len(ids), dtype=np.float32),
        finish=finish,
        oldest_weights=step,
        newest_weights=step,
    )


def said(
    of: Rollout, outcome: Outcome, text: str = "", *, reward: float | None = None, duration_s: float = 0.25
) -> Feedback:
    if reward is None and outcome is not Outcome.UNAVAILABLE:
        reward = float(outcome is Outcome.PASSED)
    return Feedback(rollout_id=of.rollout_id, outcome=outcome, reward=reward, text=text, duration_s=duration_s)


class Counts:
    """What a part has counted."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def __call__(self, sums: Sums) -> None:
        self.sums |= sums.sums
