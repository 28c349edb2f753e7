"""Held-out prompts, answered by the engines and judged as in training: avg@n, pass@k, best@k, maj@k and what the task measures."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Protocol

import numpy as np

from megatron_distil.config.schema import EvalConfig
from megatron_distil.metrics.log import RunLog
from megatron_distil.metrics.reduce import Totals
from megatron_distil.protocols import Judge, Sampler
from megatron_distil.types import Feedback, FinishReason, Outcome, Prompt, Rollout, Sums

logger = logging.getLogger(__name__)

RESAMPLES, RESAMPLING_SEED = 1000, 42


class OnHead(Protocol):
    """Runs work on the head of each replica and shares the result in the replica. ``Learner.on_head``."""

    def __call__(self, work: Callable[[], Awaitable[list[Sums]]]) -> list[Sums]:
        """Collective."""
        ...


class Measures(Protocol):
    """What a task measures of a response besides right and wrong. ``Task.measures``."""

    def __call__(self, prompt: Prompt, response_text: str) -> Mapping[str, float]:
        """Values by name; the mean is ``eval/<prefix><name>``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One set of prompts."""

    prefix: str
    prompts: Sequence[Prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvals:
    """Fulfils ``protocols.Evals``."""

    config: EvalConfig
    num_steps: int
    sets: Sequence[HeldOut]
    sampler: Sampler
    """Its own: it draws ``eval.samples_per_prompt`` responses at ``eval.temperature``."""
    judge: Judge
    measures: Measures
    on_head: OnHead
    is_first_replica: bool
    """The one that evaluates; the others wait for it."""
    log: RunLog

    def is_due(self, step: int) -> bool:
        """Before the first step, after every so many, and after the last."""
        every = self.config.every_steps
        return bool(every) and bool(self.sets) and (step % every == 0 or step == self.num_steps)

    def run_if_due(self, step: int) -> None:
        """Collective. Evaluates the student after ``step`` steps and logs it, when the configuration says so."""
        if self.is_due(step):
            self.run(step)

    def run(self, step: int) -> Mapping[str, float]:
        """Collective. Evaluates the student after ``step`` steps, logs it and returns the table."""
        with self.log.span("eval"):
            counted = self.on_head(lambda: self._evaluate(step))
        return self.log.write_eval(step, Totals(counted))

    async def _evaluate(self, step: int) -> list[Sums]:
        if not self.is_first_replica:
            return []
        totals = Totals()
        for one in self.sets:
            rollouts = await self.sampler.sample(one.prompts, step)
            feedback = await self.judge.judge(one.prompts, rollouts)
            count(totals, one, rollouts, feedback, num_samples=self.config.samples_per_prompt)
            _count_measures(totals, one, rollouts, self.measures)
        return [totals.as_sums()]


def count(
    totals: Totals, held_out: HeldOut, rollouts: Sequence[Rollout], feedback: Sequence[Feedback], *, num_samples: int
) -> None:
    """Add what the judge said of one set. A rollout without a verdict counts for nothing but ``unavailable_frac``."""
    prefix = f"eval/{held_out.prefix}"
    judged_by_prompt: dict[str, list[Feedback]] = defaultdict(list)
    for rollout, said in zip(rollouts, feedback, strict=True):
        totals.add(f"{prefix}response_tokens", float(len(rollout.token_ids)))
        totals.add(f"{prefix}truncated_frac", float(rollout.finish is FinishReason.LENGTH))
        totals.add(f"{prefix}unavailable_frac", float(said.outcome is Outcome.UNAVAILABLE))
        if said.outcome is not Outcome.UNAVAILABLE:
            judged_by_prompt[rollout.rollout_id.prompt].append(said)
        if said.reward is not None:
            totals.add(f"{prefix}reward", said.reward)
        if said.pass_fraction is not None:
            totals.add(f"{prefix}pass_fraction", said.pass_fraction)
    for judged in judged_by_prompt.values():
        passed = sum(said.outcome is Outcome.PASSED for said in judged)
        totals.add(f"{prefix}avg_at_{num_samples}", passed / len(judged))
        for k in tried(num_samples):
            if k <= len(judged):
                totals.add(f"{prefix}pass_at_{k}", pass_at_k(len(judged), passed, k))
                _count_votes(totals, prefix, judged, k)


def _count_votes(totals: Totals, prefix: str, judged: Sequence[Feedback], k: int) -> None:
    """best@k and maj@k, where every response says what it stands for."""
    rewards = [said.reward for said in judged if said.reward is not None]
    votes = [said.vote for said in judged if said.vote]
    if len(rewards) == len(votes) == len(judged):
        totals.add(f"{prefix}best_at_{k}", best_at_k(rewards, k))
        totals.add(f"{prefix}maj_at_{k}", maj_at_k(votes, rewards, k))


def _count_measures(totals: Totals, held_out: HeldOut, rollouts: Sequence[Rollout], measures: Measures) -> None:
    prompt_by_id = {prompt.prompt_id: prompt for prompt in held_out.prompts}
    for rollout in rollouts:
        for name, value in measures(prompt_by_id[rollout.rollout_id.prompt], rollout.text).items():
            totals.add(f"eval/{held_out.prefix}{name}", value)


def tried(num_samples: int) -> list[int]:
    """The k of pass@k: powers of two from 2, and all samples. pass@1 is avg@n."""
    powers = [1 << exponent for exponent in range(1, num_samples.bit_length())]
    return sorted({*(k for k in powers if k < num_samples), num_samples})


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that one of ``k`` samples passes, without bias from ``num_samples`` of which ``num_passed`` did.

        1 - C(n - c, k) / C(n, k)

    Source: arXiv:2107.03374, section 2.1.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} cannot be told from {num_samples} samples")
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """Best of ``k`` rewards drawn with replacement, in expectation.

        sum_i r_(i) ((i/n)^k - ((i-1)/n)^k)        r_(1) <= ... <= r_(n)

    verl draws 1000 times and takes the mean (trainer/ppo/metric_utils.py, bootstrap_metric); this is what that tends to. It is
    below pass@k, which draws without replacement.
    """
    n = len(rewards)
    return sum(
        reward * ((rank / n) ** k - ((rank - 1) / n) ** k) for rank, reward in enumerate(sorted(rewards), start=1)
    )


def maj_at_k(votes: Sequence[str], rewards: Sequence[float], k: int) -> float:
    """Reward of the most frequent of ``k`` responses drawn with replacement, mean over 1000 draws with a fixed seed.

    Of several that are most frequent, the one drawn first counts. Source: verl, trainer/ppo/metric_utils.py, calc_maj_val and
    bootstrap_metric; their random numbers are others.
    """
    codes = np.unique(np.asarray(votes), return_inverse=True)[1]
    drawn = np.random.default_rng(RESAMPLING_SEED).integers(len(votes), size=(RESAMPLES, k))
    cast = codes[drawn]
    counts = (cast[:, :, None] == cast[:, None, :]).sum(2)
    first = counts.argmax(1)  # the first of the largest
    return float(np.asarray(rewards)[drawn[np.arange(RESAMPLES), first]].mean())
