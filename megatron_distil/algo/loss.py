"""From numbers per token to the sums whose gradient is the update."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """Weighted sums over the tokens of a microbatch; their sum is what is differentiated."""

    imitation: Tensor
    """[] of the cost at each position itself."""
    credit: Tensor
    """[] of log-probabilities of sampled tokens, weighted with what came of them. Its value means nothing."""
    counts: Mapping[str, Tensor] = MappingProxyType({})
    """Sums over the tokens of the loss, without gradient, under the names of metrics."""
    maxima: Mapping[str, Tensor] = MappingProxyType({})
    """Largest values among the tokens of the loss, likewise; -inf where there are none."""


def distil_terms(
    ce: Tensor,
    sampled_logprobs: Tensor,
    cost: Tensor,
    weights: Tensor,
    *,
    form: Literal["score", "reweight"] = "score",
) -> LossTerms:
    """Both parts of the gradient of E_{y ~ pi}[ sum_t ce_t ].

        score     sum_t w_t ce_t  +  sum_t w_t c_t log pi(a_t)
        reweight  sum_t w_t ce_t  +  sum_t w_t c_t ce_t

    The expectation is over the student's own samples: the loss moves (imitation), and the states that are visited move
    (credit). ``cost`` is a cost, not an advantage: descent lowers the probability of a token whose future is bad.
    ``reweight`` is the form of a release; it is no policy gradient.

    Args:
        ce: [T] cross-entropy to the teacher, nats.
        sampled_logprobs: [T] log pi of the sampled token, over the whole vocabulary.
        cost: [T] from ``future_credit``; treated as a constant.
        weights: [T] 0 outside the loss. The reduction (per token, per sequence) is in here. Treated as a constant.
        form: what the cost multiplies.

    Source: arXiv:2606.05152.
    """
    carrier = sampled_logprobs if form == "score" else ce
    constant = (weights * cost).detach()
    return LossTerms(imitation=(weights.detach() * ce).sum(), credit=(constant * carrier).sum())


def clipped_policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> LossTerms:
    """Clipped policy gradient.

        rho_t = pi(a_t) / pi_old(a_t)
        loss  = sum_t w_t max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A);  where A < 0: at most -dual_clip A

    Args:
        logprobs: [T] log pi of the sampled token, nats; carries gradient.
        old_logprobs: [T] the same under the policy that the step started from; constant.
        advantages: [T] constant.
        weights: [T] 0 outside the loss; importance weights from that policy to the one that sampled are in here. Constant.
        clip_low: how far below 1 a ratio counts.
        clip_high: how far above 1 a ratio counts.
        dual_clip: largest ratio that counts where the advantage is negative; inf: no bound.

    Returns:
        Terms whose ``imitation`` is 0.

    Source: arXiv:1707.06347; asymmetric clip: arXiv:2503.14476; dual clip: arXiv:1912.09729.
    """
    ratio = (logprobs - old_logprobs).exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = torch.maximum(plain, clipped)
    is_clipped = clipped > plain
    if dual_clip != float("inf"):
        bound = -dual_clip * advantages
        is_bounded = (advantages < 0) & (bound < loss)
        loss = torch.where(is_bounded, bound, loss)
        is_clipped = is_clipped | is_bounded
    credit = (weights * loss).sum()
    is_in_loss = weights != 0
    counts = {
        "loss/policy_gain": -(loss.detach() * is_in_loss).sum(),
        "train/ratio": (ratio.detach() * is_in_loss).sum(),
        "train/ratio_clipped_frac": (is_clipped & is_in_loss).sum(),
    }
    return LossTerms(imitation=credit.new_zeros(()), credit=credit, counts=counts)


def sampled_policy_terms(logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, weights: Tensor) -> LossTerms:
    """Importance-sampled policy gradient: of a divergence that is known at the sampled token only.

        loss = - sum_t w_t rho_t A_t,     rho_t = pi(a_t) / pi_sampler(a_t)

    With A_t = log p(a_t) - log pi_sampler(a_t) it is on average, where pi has sampled, the gradient of sum_t KL(pi || p)
    at the states that were visited.

    Args:
        logprobs: [T] log pi of the sampled token, nats; carries gradient.
        sampling_logprobs: [T] the same under the policy that sampled; constant.
        advantages: [T] constant.
        weights: [T] 0 outside the loss; constant.

    Returns:
        Terms whose ``imitation`` is 0.

    Source: tinker-cookbook, train_on_policy (importance_sampling).
    """
    ratio = (logprobs - sampling_logprobs).exp()
    gain = ratio * advantages
    credit = -(weights * gain).sum()
    is_in_loss = weights != 0
    counts = {
        "loss/policy_gain": (gain.detach() * is_in_loss).sum(),
        "train/ratio": (ratio.detach() * is_in_loss).sum(),
    }
    return LossTerms(imitation=credit.new_zeros(()), credit=credit, counts=counts)
