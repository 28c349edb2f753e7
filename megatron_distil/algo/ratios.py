"""Importance weights between two policies: the one that is trained, the one before the step, the one that sampled."""

from __future__ import annotations

from torch import Tensor


def truncated_ratio(logprobs: Tensor, old_logprobs: Tensor, *, clip: float) -> Tensor:
    """Truncated importance weight of each sampled token.

        u_t = min(pi(a_t) / pi_old(a_t), clip)

    Two of them make up the path from the engine to the policy that is trained. From the engine to the trainer before the
    first update of a step: the numerical gap between the two, and the steps since the tokens were sampled. From there to
    the trainer now: the updates of this step; with one update it is 1.

    Args:
        logprobs: [T] log pi of the sampled token, nats.
        old_logprobs: [T] the same under the older policy, nats.
        clip: largest weight, positive.

    Returns:
        [T] without gradient.

    Source: arXiv:2606.05152, release (threshold 2 for both).
    """
    gap = logprobs.detach() - old_logprobs
    return gap.exp().clamp(max=clip)
