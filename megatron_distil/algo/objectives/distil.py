"""DistIL: cross-entropy to the teacher at the student's own states, and credit for the states it visits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Objective

if TYPE_CHECKING:
    from megatron_distil.algo.objectives.objective import Future, Tokens

Clip = Annotated[float, Field(gt=0.0)] | Literal["none"]


class Distil(Objective):
    """The sequence-level gradient of arXiv:2606.05152; exact with ``future = "sum"`` and everything else as it is."""

    needs_teacher: ClassVar[bool] = True

    future: Literal["none", "sum", "mean"]
    """What a token answers for: nothing, all later cost, or its mean (length-normalised; biased). Always stated."""
    future_coef: Annotated[float, Field(ge=0.0)] = 1.0
    """Factor on the credit."""
    future_form: Literal["score", "reweight"] = "score"
    """Credit through the log-probability of the sampled token, or as a factor on its cross-entropy (no policy gradient)."""
    discount: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Weight of the cost of each later position, relative to the one before it."""
    future_clip: Clip = "none"
    """Largest credit of a token, nats."""
    cost: Literal["ce", "kl"] = "ce"
    """What credit adds up: the cross-entropy, or the same without the teacher's entropy (does not favour short answers)."""
    tail: Literal["none", "bucket", "renorm"] = "bucket"
    """Ids outside the support: no opinion, one class together, or cut away on both sides."""
    token_clip: Clip = "none"
    """Largest cross-entropy of a token, nats; above it the token teaches nothing."""
    tis_clip: Clip = 2.0
    """Largest importance weight of a token, trainer against the engine that sampled; none: weight 1."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Imitation of the teacher here, and blame for the cost that comes later."""
        full_ce = algo.topk_cross_entropy(tokens.teacher_logprobs, tokens.student, tail=self.tail)
        kl = full_ce.detach() - algo.support_entropy(tokens.teacher_logprobs, tail=self.tail)
        ce = full_ce if self.token_clip == "none" else full_ce.clamp(max=self.token_clip)
        credit = kl.new_zeros(kl.shape)
        if self.future != "none":
            credit = self.future_coef * future(
                ce if self.cost == "ce" else kl, mean=self.future == "mean", discount=self.discount
            )
        if self.future_clip != "none":
            credit = credit.clamp(max=self.future_clip)

        is_in_loss = tokens.weights != 0
        counts = {
            "loss/ce_nats": (full_ce.detach() * is_in_loss).sum(),
            "loss/kl_nats": (kl * is_in_loss).sum(),
            "loss/credit_nats": (credit * is_in_loss).sum(),
        }
        if self.token_clip != "none":
            counts["train/token_clipped_frac"] = ((full_ce.detach() > self.token_clip) & is_in_loss).sum()
        weights = tokens.weights
        if self.tis_clip != "none":
            ratio = algo.truncated_ratio(tokens.student.sampled, tokens.sampling_logprobs, clip=self.tis_clip)
            weights = weights * ratio
            counts["train/tis_clipped_frac"] = ((ratio >= self.tis_clip) & is_in_loss).sum()
        terms = algo.distil_terms(ce, tokens.student.sampled, credit, weights, form=self.future_form)
        return terms._replace(counts=counts)
