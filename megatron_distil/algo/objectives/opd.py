"""On-policy distillation of an expert: its reverse KL divergence, by policy gradient on the sampled tokens alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Objective

if TYPE_CHECKING:
    from megatron_distil.algo.objectives.objective import Future, Tokens


class Opd(Objective):
    """Policy gradient whose advantage is what the expert finds more likely than the student did.

        A_t  = coef (log p(a_t) - log pi_sampler(a_t))
        loss = - sum_t w_t pi(a_t) / pi_sampler(a_t) sum over i >= t of discount^(i - t) A_i

    It asks the expert for one number per token, the log-probability of the sampled id: no support, so any larger model
    with the same tokenizer will do. With ``discount = 0`` (published) a token answers for itself only.

    Source: tinker-cookbook, distillation/train_on_policy; the divergence: arXiv:2306.13649.
    """

    needs_support: ClassVar[bool] = False

    coef: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor on the advantage."""
    discount: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Weight of the advantage of each later position, relative to the one before it; 0: its own only."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Reinforcement of what the expert would have said, here and, with a discount, later."""
        gap = tokens.sampling_logprobs - tokens.teacher_sampled
        advantages = -self.coef * gap
        if self.discount:
            advantages = advantages + self.discount * future(advantages, mean=False, discount=self.discount)
        terms = algo.sampled_policy_terms(tokens.student.sampled, tokens.sampling_logprobs, advantages, tokens.weights)
        reverse_kl = (gap * (tokens.weights != 0)).sum()
        return terms._replace(counts={**terms.counts, "loss/reverse_kl_nats": reverse_kl})
