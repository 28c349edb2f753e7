"""DistIL: cross-entropy to the teacher at the student's own states, and credit for the states it visits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Clip, Objective, largest, weighted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from megatron_distil.algo.objectives.objective import Future, Tokens


class Distil(Objective):
    """The sequence-level gradient of arXiv:2606.05152; exact with ``future = "sum"`` and everything else as it is.

        loss = sum_t w_t (CE_t + future_coef (c_t - b_t) log pi(a_t))

    w_t holds the reduction and both truncated importance weights; c_t is the cost of later tokens, b_t the baseline.
    """

    future: Literal["none", "sum", "mean"]
    """What a token answers for: nothing, all later cost, or its mean (length-normalised; biased). Always stated."""
    future_coef: Annotated[float, Field(ge=0.0)] = 1.0
    """Factor on the credit."""
    future_form: Literal["score", "reweight"] = "score"
    """Credit through the log-probability of the sampled token, or as a factor on its cross-entropy (no policy gradient)."""
    discount: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Weight of the cost of each later position, relative to the one before it."""
    baseline: Literal["none", "loo_position", "loo_batch"] = "none"
    """Taken off the credit: the mean of the other rollouts of the prompt at that position, or of all others of the step."""
    future_clip: Clip = "none"
    """Largest credit of a token, nats, after the baseline."""
    cost: Literal["ce", "kl"] = "ce"
    """What credit adds up: the cross-entropy, or the same without the teacher's entropy (does not favour short answers)."""
    tail: Literal["none", "bucket", "renorm"] = "bucket"
    """Ids outside the support: no opinion, one class together, or cut away on both sides."""
    token_clip: Clip = "none"
    """Largest cross-entropy of a token, nats; above it the token teaches nothing."""
    ratio_clip: Clip = 2.0
    """Largest importance weight of a token, now against before the step (1 in its first update); none: weight 1."""
    tis_clip: Clip = 2.0
    """Largest importance weight of a token, trainer before the step against the engine that sampled; none: weight 1."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Imitation of the teacher here, and blame for the cost that comes later."""
        costs = self._costs(tokens)
        credit = costs.kl.new_zeros(costs.kl.shape)
        if self.future != "none":
            credit = self.future_coef * (self._future_cost(costs, future) - tokens.baseline)
        if self.future_clip != "none":
            credit = credit.clamp(max=self.future_clip)

        weights, counts = weighted(tokens, ratio_clip=self.ratio_clip, tis_clip=self.tis_clip)
        is_in_loss = tokens.weights != 0
        counts |= {
            "loss/ce_nats": (costs.full_ce.detach() * is_in_loss).sum(),
            "loss/kl_nats": (costs.kl * is_in_loss).sum(),
            "loss/credit_nats": (credit * is_in_loss).sum(),
        }
        if self.token_clip != "none":
            counts["train/token_clipped_frac"] = ((costs.full_ce.detach() > self.token_clip) & is_in_loss).sum()
        maxima = {} if self.future == "none" else {"loss/credit_max_nats": largest(credit, tokens)}
        terms = algo.distil_terms(costs.ce, tokens.student.sampled, credit, weights, form=self.future_form)
        return terms._replace(counts=counts, maxima=maxima)

    @property
    def needs_baseline(self) -> bool:
        """Whether there is a credit, and something is taken off it."""
        return self.baseline != "none" and self.future != "none"

    def credit(self, tokens: Tokens, future: Future) -> Tensor:
        """c_t: the cost of later tokens, before coefficient, baseline and clip."""
        return self._future_cost(self._costs(tokens), future)

    def baselines(self, credits: Sequence[Tensor], group_ids: Sequence[int]) -> list[Tensor]:
        """Leave-one-out means of c_t."""
        if self.baseline == "loo_batch":
            return algo.leave_one_out_batch(credits)
        return algo.leave_one_out_position(credits, group_ids)

    def _costs(self, tokens: Tokens) -> _Costs:
        full_ce = algo.topk_cross_entropy(tokens.teacher_logprobs, tokens.student, tail=self.tail)
        kl = full_ce.detach() - algo.support_entropy(tokens.teacher_logprobs, tail=self.tail)
        ce = full_ce if self.token_clip == "none" else full_ce.clamp(max=self.token_clip)
        return _Costs(full_ce=full_ce, ce=ce, kl=kl)

    def _future_cost(self, costs: _Costs, future: Future) -> Tensor:
        cost = costs.ce if self.cost == "ce" else costs.kl
        return future(cost, mean=self.future == "mean", discount=self.discount)


class _Costs(NamedTuple):
    """[T] nats each."""

    full_ce: Tensor
    ce: Tensor
    """Cut at ``token_clip``."""
    kl: Tensor
    """Without gradient."""
