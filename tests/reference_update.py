"""One step's examples and targets, and what an unsharded model makes of them: Hugging Face's forward, algo on full logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Objective
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
from tests.tokens import tokens_of

VOCAB, K = 256, 6
PROMPTS, SAMPLES = 4, 3


def step_examples() -> list[Example]:
    """Four groups of three; some without context, one without verdict; lengths from 1 to 23."""
    draw = np.random.default_rng(0)
    return [
        one_example(
            draw, f"p{p}", s, reward=None if (p, s) == (1, 1) else float(draw.random() < 0.5), taught=(p + s) % 4 != 3
        )
        for p in range(PROMPTS)
        for s in range(SAMPLES)
    ]


def one_example(draw: Any, prompt_id: str, sample: int, *, reward: float | None, taught: bool) -> Example:
    prompt_length, length = 3 + hash_of(prompt_id) % 7, int(draw.integers(1, 24))
    prompt_ids = (np.arange(prompt_length) * 7 + hash_of(prompt_id)) % VOCAB
    rollout_id = RolloutId(0, prompt_id, sample)
    context = TeacherContext(
        token_ids=draw.integers(0, VOCAB, int(draw.integers(4, 20))).astype(np.int32),
        text="",
        demonstration=None,
        shows_feedback=True,
    )
    return Example(
        prompt=Prompt(prompt_id=prompt_id, text="", token_ids=prompt_ids.astype(np.int32), task={}),
        rollout=Rollout(
            rollout_id=rollout_id,
            token_ids=draw.integers(0, VOCAB, length).astype(np.int32),
            text="",
            logprobs=draw.normal(-4.0, 1.0, length).astype(np.float32),
            finish=FinishReason.STOP,
            oldest_weights=0,
            newest_weights=0,
        ),
        feedback=Feedback(
            rollout_id=rollout_id,
            outcome=Outcome.UNAVAILABLE if reward is None else Outcome.PASSED if reward else Outcome.FAILED,
            reward=reward,
            text="",
            duration_s=0.0,
        ),
        context=context if taught else None,
    )


def hash_of(name: str) -> int:
    return sum(name.encode())


def random_targets(examples: list[Example]) -> list[Targets | None]:
    draw = torch.Generator().manual_seed(1)
    found: list[Targets | None] = []
    for example in examples:
        logits = torch.randn(len(example.rollout.token_ids), VOCAB, generator=draw) * 3
        top = algo.top_k(logits, K)
        ids, logprobs = top.ids.int().numpy(), top.logprobs.numpy()
        ids[::4, K // 2 :], logprobs[::4, K // 2 :] = -1, -np.inf
        response = torch.from_numpy(example.rollout.token_ids).long()
        sampled = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        targets = Targets(support_ids=ids, logprobs=logprobs, entropy=top.entropy.numpy(), sampled=sampled.numpy())
        found.append(targets if example.context is not None else None)
    return found


def reference_loss(
    hf: Any, objective: Objective, examples: list[Example], targets: list[Targets | None], *, temperature: float = 1.0
) -> torch.Tensor:
    """The loss of all examples, each alone, reduced as the objective says; carries gradient."""
    judged = [e.feedback.reward is not None for e in examples]
    taught = [j and (t is not None or not objective.needs_teacher) for j, t in zip(judged, targets, strict=True)]
    lengths = [len(e.rollout.token_ids) for e in examples]
    if objective.reduction == "token-mean":
        denominator = sum(n for n, is_taught in zip(lengths, taught, strict=True) if is_taught)
    else:
        denominator = sum(judged)
    total = torch.zeros(())
    for example, target, is_taught, length in zip(examples, targets, taught, lengths, strict=True):
        if is_taught:
            weight = 1.0 / denominator
            if objective.reduction == "seq-mean-token-mean":
                weight /= length
            total = total + sequence_loss(
                hf, objective, example, target, weight, advantage_of(example, examples), temperature
            )
    return total


def advantage_of(example: Example, examples: list[Example]) -> float:
    group = [
        e.feedback.reward
        for e in examples
        if e.prompt.prompt_id == example.prompt.prompt_id and e.feedback.reward is not None
    ]
    return float((example.feedback.reward or 0.0) - np.mean(group)) if group else 0.0


def response_logits(hf: Any, prefix: Any, response: Any) -> torch.Tensor:
    """[R, V] at the positions that predict the response."""
    ids = torch.from_numpy(np.concatenate([prefix, response]).astype(np.int64))
    return hf(ids[None]).logits[0, len(prefix) - 1 : -1]


def sequence_loss(
    hf: Any,
    objective: Objective,
    example: Example,
    target: Targets | None,
    weight: float,
    advantage: float,
    temperature: float,
) -> torch.Tensor:
    response = example.rollout.token_ids
    logits = response_logits(hf, example.prompt.token_ids, response) / temperature
    length = len(response)
    support = torch.zeros(length, 0, dtype=torch.int64)
    logprobs, teacher_sampled = torch.zeros(length, 0), torch.zeros(length)
    if target is not None:
        support, logprobs = torch.from_numpy(target.support_ids).long(), torch.from_numpy(target.logprobs)
        teacher_sampled = torch.from_numpy(target.sampled)
    tokens = tokens_of(
        algo.columns(logits, support, torch.from_numpy(response).long()),
        logprobs,
        teacher_sampled=teacher_sampled,
        sampling_logprobs=torch.from_numpy(example.rollout.logprobs),
        advantages=torch.full((length,), advantage),
        weights=torch.full((length,), weight),
    )

    def future(cost: torch.Tensor, *, mean: bool, discount: float) -> torch.Tensor:
        every, one = torch.ones(length, dtype=torch.bool), torch.zeros(length, dtype=torch.int64)
        return algo.future_credit(cost, every, one, mean=mean, discount=discount)

    terms = objective.terms(tokens, future)
    return terms.imitation + terms.credit
