"""GRPO: clipped policy gradient on rewards, each compared with its group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.distil import Clip
from megatron_distil.algo.objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_distil.algo.objectives.objective import Future, Tokens


class Grpo(Objective):
    """Policy gradient with the mean reward of the group as baseline; no KL term, no entropy bonus.

    The ratio is taken to the policy of the engine that sampled, as it reported it, so it covers both the steps of the
    trainer since then and the numerical difference between the two.
    """

    needs_teacher: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True

    clip_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """A ratio below 1 minus this is not lowered further."""
    clip_high: Annotated[float, Field(ge=0.0)] = 0.28
    """A ratio above 1 plus this is not raised further."""
    dual_clip: Clip = 3.0
    """Where the advantage is negative, the largest ratio that counts."""
    normalise_std: bool = False
    """Divide the advantages of a group by their standard deviation."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Reinforcement of what did better than its group; ``future`` is not asked."""
        return algo.clipped_policy_terms(
            tokens.student.sampled,
            tokens.sampling_logprobs,
            tokens.advantages,
            tokens.weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=float("inf") if self.dual_clip == "none" else self.dual_clip,
        )

    def advantages(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Reward minus the mean of the group."""
        return algo.group_advantages(rewards, group_ids, normalise_std=self.normalise_std)
