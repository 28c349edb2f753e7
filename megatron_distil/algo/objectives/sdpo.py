"""SDPO: a divergence from the self-teacher at every vocabulary entry, at the student's own states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Clip, Objective, weighted
from megatron_distil.algo.objectives.opsd import divergence_terms

if TYPE_CHECKING:
    from megatron_distil.algo.objectives.objective import Future, Tokens


class Sdpo(Objective):
    """Self-distillation of arXiv:2601.20802; no credit for the states that are visited.

        loss = sum_t w_t D_t

    D is the Jensen-Shannon divergence (``js``, the release's alpha = ``mix``), the reverse KL (``rkl``, alpha 1) or the
    forward KL divergence (``fkl``, alpha 0) over the vocabulary. ``rkl_sampled`` is the release's mode without logits: the
    reverse KL divergence by its policy gradient at the sampled token, sg(log pi(a) - log p(a)) log pi(a).

    The EMA and the trust region of the paper are settings of the teacher: ``teacher.weights`` and ``teacher.rate``.
    """

    divergence: Literal["js", "rkl", "fkl", "rkl_sampled"] = "js"
    """Jensen-Shannon, reverse or forward KL over the vocabulary; or reverse KL at the sampled token only."""
    mix: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the teacher in the mixture; read with ``js`` only."""
    tail: Literal["none", "bucket", "renorm"] = "bucket"
    """Ids outside the support: one class together, or cut away on both sides; none where the support is everything."""
    entry_clip: Clip = "none"
    """Largest contribution of a vocabulary entry, nats; above it the entry teaches nothing."""
    ratio_clip: Clip = 2.0
    """Largest importance weight of a token, now against before the step (1 in its first update); none: weight 1."""
    tis_clip: Clip = 2.0
    """Largest importance weight of a token, trainer before the step against the engine that sampled; none: weight 1."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Imitation of the teacher; ``future`` is not asked."""
        weights, counts = weighted(tokens, ratio_clip=self.ratio_clip, tis_clip=self.tis_clip)
        if self.divergence == "rkl_sampled":
            sampled = tokens.student.sampled
            gap = sampled.detach() - tokens.teacher_sampled
            counts["loss/reverse_kl_nats"] = (gap * (tokens.weights != 0)).sum()
            return algo.sampled_policy_terms(sampled, sampled.detach(), -gap, weights)._replace(counts=counts)
        terms = divergence_terms(
            tokens, weights, divergence=self.divergence, mix=self.mix, tail=self.tail, entry_clip=self.entry_clip
        )
        return terms._replace(counts={**terms.counts, **counts})
