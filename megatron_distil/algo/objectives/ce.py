"""Local cross-entropy to the teacher: DistIL without credit for the states that are visited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron_distil import algo
from megatron_distil.algo.objectives.distil import Distil
from megatron_distil.algo.objectives.objective import Clip, Objective

if TYPE_CHECKING:
    from megatron_distil.algo.objectives.objective import Future, Tokens


class Ce(Objective):
    """Cross-entropy to the teacher at the student's own states; the gradient of the forward KL divergence.

    loss = sum_t w_t CE_t
    """

    tail: Literal["none", "bucket", "renorm"] = "bucket"
    """Ids outside the support: no opinion, one class together, or cut away on both sides."""
    token_clip: Clip = "none"
    """Largest cross-entropy of a token, nats; above it the token teaches nothing."""
    ratio_clip: Clip = 2.0
    """Largest importance weight of a token, now against before the step (1 in its first update); none: weight 1."""
    tis_clip: Clip = 2.0
    """Largest importance weight of a token, trainer before the step against the engine that sampled; none: weight 1."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Imitation of the teacher; ``future`` is not asked."""
        distil = Distil(
            name="distil",
            future="none",
            tail=self.tail,
            token_clip=self.token_clip,
            ratio_clip=self.ratio_clip,
            tis_clip=self.tis_clip,
        )
        return distil.terms(tokens, future)
