"""Small records of a step, for tests of what counts and shows them."""

from __future__ import annotations

import numpy as np

from megatron_distil.types import (
    Example,
    Feedback,
    FinishReason,
    Outcome,
    Prompt,
    Rollout,
    RolloutId,
    Targets,
    TeacherContext,
)


def prompt(name: str, *, tokens: int = 4) -> Prompt:
    return Prompt(prompt_id=name, text=f"{name}>", token_ids=np.arange(tokens, dtype=np.int32), task={"prompt": name})


def rollout(
    name: str,
    sample: int,
    *,
    tokens: int = 3,
    finish: FinishReason = FinishReason.STOP,
    version: int = 5,
    step: int = 5,
) -> Rollout:
    return Rollout(
        rollout_id=RolloutId(step, name, sample),
        token_ids=np.arange(tokens, dtype=np.int32),
        text=f"response {sample}",
        logprobs=np.full(tokens, -0.5, dtype=np.float32),
        finish=finish,
        oldest_weights=version,
        newest_weights=step,
    )


def feedback(of: Rollout, outcome: Outcome, *, reward: float | None = None, duration_s: float = 0.25) -> Feedback:
    return Feedback(
        rollout_id=of.rollout_id, outcome=outcome, reward=reward, text=f"{outcome} <b>&", duration_s=duration_s
    )


def example(
    name: str,
    sample: int,
    outcome: Outcome,
    *,
    tokens: int = 3,
    finish: FinishReason = FinishReason.STOP,
    version: int = 5,
    has_context: bool = True,
) -> Example:
    one = rollout(name, sample, tokens=tokens, finish=finish, version=version)
    reward = None if outcome is Outcome.UNAVAILABLE else float(outcome is Outcome.PASSED)
    context = TeacherContext(
        token_ids=np.arange(6, dtype=np.int32), text=f"{name}?hint>", demonstration=None, shows_feedback=True
    )
    return Example(
        prompt=prompt(name),
        rollout=one,
        feedback=feedback(one, outcome, reward=reward),
        context=context if has_context else None,
    )


def targets(tokens: int) -> Targets:
    """Half of the mass on the token that was sampled, a quarter on id 9."""
    ids = np.stack([np.arange(tokens), np.full(tokens, 9), np.full(tokens, -1)], axis=1).astype(np.int32)
    logprobs = np.tile(np.log([0.5, 0.25, 1.0]), (tokens, 1)).astype(np.float32)
    logprobs[:, 2] = -np.inf
    return Targets(
        support_ids=ids,
        logprobs=logprobs,
        entropy=np.full(tokens, 1.25, dtype=np.float32),
        sampled=np.full(tokens, -2.5, dtype=np.float32),
    )
