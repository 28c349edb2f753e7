"""OPSD: a divergence from a frozen teacher that has read the reference solution, cut at each vocabulary entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Clip, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_distil.algo.objectives.objective import Future, Tokens


class Opsd(Objective):
    """On-policy self-distillation of arXiv:2601.18734; no importance weights, no credit.

        loss = sum_t w_t sum_v min(D_{t,v}, entry_clip)

    D is the forward KL (``fkl``, the release's beta = 0) or the Jensen-Shannon divergence (``js``, beta = ``mix``) on the
    teacher's support, both sides normalised inside it, or on the whole vocabulary.
    """

    divergence: Literal["fkl", "js"] = "fkl"
    """Forward KL, or Jensen-Shannon."""
    mix: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the teacher in the mixture; read with ``js`` only."""
    tail: Literal["none", "renorm"] = "renorm"
    """Ids outside the support are cut away on both sides; none where the support is everything."""
    entry_clip: Clip = 0.05
    """Largest contribution of a vocabulary entry, nats; above it the entry teaches nothing."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """Imitation of the teacher; ``future`` is not asked."""
        return divergence_terms(
            tokens, tokens.weights, divergence=self.divergence, mix=self.mix, tail=self.tail, entry_clip=self.entry_clip
        )


def divergence_terms(
    tokens: Tokens,
    weights: Tensor,
    *,
    divergence: Literal["js", "rkl", "fkl"],
    mix: float,
    tail: Literal["none", "bucket", "renorm"],
    entry_clip: Clip,
) -> algo.LossTerms:
    """Terms of a local divergence, and what of the teacher is left to learn.

    Args:
        tokens: of an objective.
        weights: [T] of the tokens, importance weights included; constant.
        divergence: Jensen-Shannon, reverse or forward KL.
        mix: share of the teacher in the mixture of Jensen-Shannon.
        tail: as in ``algo.forward_kl``.
        entry_clip: as in ``algo.forward_kl``.

    Returns:
        Terms whose ``credit`` is 0. The counts of cross-entropy and forward KL are those of the same support and tail.
    """
    clip = float("inf") if entry_clip == "none" else entry_clip
    teacher, student = tokens.teacher_logprobs, tokens.student
    if divergence == "js":
        value = algo.jensen_shannon(teacher, student, tail=tail, mix=mix, entry_clip=clip)
    elif divergence == "rkl":
        value = algo.reverse_kl(teacher, student, tail=tail, entry_clip=clip)
    else:
        value = algo.forward_kl(teacher, student, tail=tail, entry_clip=clip)
    ce = algo.topk_cross_entropy(teacher, student, tail=tail).detach()
    is_in_loss = tokens.weights != 0
    counts = {
        "loss/ce_nats": (ce * is_in_loss).sum(),
        "loss/kl_nats": ((ce - algo.support_entropy(teacher, tail=tail)) * is_in_loss).sum(),
        "loss/divergence_nats": (value.detach() * is_in_loss).sum(),
    }
    imitation = (weights.detach() * value).sum()
    return algo.LossTerms(imitation=imitation, credit=imitation.new_zeros(()), counts=counts)
