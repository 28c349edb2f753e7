"""GRPO: clipped policy gradient on rewards, each compared with its group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Clip, Objective, weighted

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_distil.algo.objectives.objective import Future, Tokens


class Grpo(Objective):
    """Policy gradient with the mean reward of the group as baseline; no KL term, no entropy bonus.

        rho_t = pi(a_t) / pi_old(a_t),    u_t = min(pi_old(a_t) / pi_sampler(a_t), tis_clip)
        loss  = sum_t w_t u_t max(-rho_t A, -clip(rho_t, 1 - clip_low, 1 + clip_high) A);  where A < 0: at most -dual_clip A

    The ratio is taken to the trainer before the first update of the step, so it is 1 with one update a step: the steps and
    the numerical gap between the engine and that policy are in u_t.
    """

    needs_teacher: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True

    clip_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """A ratio below 1 minus this is not lowered further."""
    clip_high: Annotated[float, Field(ge=0.0)] = 0.28
    """A ratio above 1 plus this is not raised further."""
    dual_clip: Clip = 3.0
    """Where the advantage is negative, the largest ratio that counts."""
    tis_clip: Clip = 2.0
    """Largest importance weight of a token, trainer before the step against the engine that sampled; none: weight 1."""
    normalise_std: bool = False
    """Divide the advantages of a group by their standard deviation."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Reinforcement of what did better than its group; ``future`` is not asked."""
        weights, counts = weighted(tokens, ratio_clip="none", tis_clip=self.tis_clip)
        terms = algo.clipped_policy_terms(
            tokens.student.sampled,
            tokens.old_logprobs,
            tokens.advantages,
            weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=float("inf") if self.dual_clip == "none" else self.dual_clip,
        )
        return terms._replace(counts={**terms.counts, **counts})

    def advantages(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Reward minus the mean of the group."""
        return algo.group_advantages(rewards, group_ids, normalise_std=self.normalise_std)
