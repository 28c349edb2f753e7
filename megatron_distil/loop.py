"""DistIL (arXiv:2606.05152). Nothing here knows an engine, a rank or a shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_distil.config.schema import Config
from megatron_distil.protocols import (
    Contexts,
    Evals,
    Judge,
    Learner,
    Log,
    Packer,
    Prompts,
    RolloutLog,
    Sampler,
    Stopped,
    Teacher,
    Weights,
)
from megatron_distil.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop is made of, one field per protocol."""

    prompts: Prompts
    sampler: Sampler
    judge: Judge
    contexts: Contexts
    rollout_log: RolloutLog
    teacher: Teacher
    packer: Packer
    learner: Learner
    weights: Weights
    evals: Evals
    log: Log
    stopped: Stopped


def train(config: Config, parts: Parts) -> int:
    """Run until ``config.train.num_steps`` steps are done, or somebody asks to stop; resumes by itself.

    Returns:
        The number of steps that are done and saved.

    Raises:
        DistilError: on every rank, whichever rank it happened on.
    """
    learner, teacher, weights, log = parts.learner, parts.teacher, parts.weights, parts.log

    step = learner.resume()
    weights.publish(version=step)
    parts.evals.run_if_due(step)
    while step < config.train.num_steps and not parts.stopped():
        with log.span("collect"):
            examples = learner.on_head(partial(collect, parts, step))
            weights.release()  # engines that share our processors give them back; others do nothing
        with log.span("teach"):
            targets = teacher.score(examples)  # p_t = sg p(. | c, y_<t), on a support of k tokens
        with log.span("update"):
            batches = learner.anchored(parts.packer.batches(examples, targets, step))  # log pi_old(a_t), baselines
            updates = [learner.update(batch) for batch in batches]  # theta <- theta - lr * grad L(theta; batch)
            teacher.follow()  # theta_T <- (1 - r) theta_T + r theta, once per step
        with log.span("publish"):
            weights.publish(version=step + 1)
        log.write(step, examples, targets, updates)
        step += 1
        learner.save_if_due(step)
        parts.evals.run_if_due(step)
    learner.finish(step)
    return step


async def collect(parts: Parts, step: int) -> list[Example]:
    """One replica's share of a step: what the student did, and what the teacher may read about it."""
    if (logged := parts.rollout_log.read(step)) is not None:
        return logged

    prompts = parts.prompts.take(step)  # x ~ D
    with parts.log.span("sample"):
        rollouts = await parts.sampler.sample(prompts, step)  # y ~ pi(. | x), several per prompt
    with parts.log.span("judge"):
        feedback = await parts.judge.judge(prompts, rollouts)  # f ~ F(x, y)
    contexts = parts.contexts.build(prompts, rollouts, feedback)  # c = c(x, f, siblings of y)

    prompt_by_id = {prompt.prompt_id: prompt for prompt in prompts}
    examples = [
        Example(prompt=prompt_by_id[r.rollout_id.prompt], rollout=r, feedback=f, context=c)
        for r, f, c in zip(rollouts, feedback, contexts, strict=True)
    ]
    parts.rollout_log.write(step, examples)
    return examples
