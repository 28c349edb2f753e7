"""Supervised training on given responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Objective

if TYPE_CHECKING:
    from megatron_distil.algo.objectives.objective import Future, Tokens


class Sft(Objective):
    """Negative log-likelihood of the given response.

    loss = - sum_t w_t log pi(a_t)
    """

    needs_teacher: ClassVar[bool] = False
    reads_samples: ClassVar[bool] = False

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Imitation of the given tokens; ``future`` is not asked."""
        ce = algo.label_cross_entropy(tokens.student)
        imitation = (tokens.weights * ce).sum()
        is_in_loss = tokens.weights != 0
        counts = {"loss/ce_nats": (ce.detach() * is_in_loss).sum()}
        return algo.LossTerms(imitation=imitation, credit=imitation.new_zeros(()), counts=counts)
