"""Importance weights between the policy that is trained and the one that sampled."""

from __future__ import annotations

from torch import Tensor


def truncated_ratio(logprobs: Tensor, sampling_logprobs: Tensor, *, clip: float) -> Tensor:
    """Truncated importance weight of each sampled token.

        u_t = min(pi(a_t) / pi_sampler(a_t), clip)

    Both the numerical gap between trainer and engine and the optimizer steps since sampling are in it.

    Args:
        logprobs: [T] log pi of the sampled token, nats.
        sampling_logprobs: [T] the same under the policy that sampled, nats.
        clip: largest weight, positive.

    Returns:
        [T] without gradient.

    Source: arXiv:2606.05152, release (threshold 2).
    """
    gap = logprobs.detach() - sampling_logprobs
    return gap.exp().clamp(max=clip)
