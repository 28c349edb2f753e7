"""Rewards compared with those of their group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalise_std: bool) -> Tensor:
    """Each reward minus the mean of its group.

        A_i = r_i - mean(r of the group of i)          (``normalise_std``: / (standard deviation + 1e-6))

    The standard deviation is the unbiased one, 0 for a group of one.

    Args:
        rewards: [N] float.
        group_ids: [N] int. Equal for the rollouts of one prompt, in any order.
        normalise_std: divide by the standard deviation of the group.

    Returns:
        [N] float of the dtype of ``rewards``. 0 in a group whose rewards are equal.

    Source: arXiv:2402.03300 (GRPO); without the division: arXiv:2503.20783.
    """
    _, group = group_ids.unique(return_inverse=True)
    values = rewards.double()
    num_groups = int(group.max()) + 1 if len(group) else 0
    count = values.new_zeros(num_groups).index_add(0, group, torch.ones_like(values))
    mean = values.new_zeros(num_groups).index_add(0, group, values) / count
    centred = values - mean[group]
    if normalise_std:
        variance = values.new_zeros(num_groups).index_add(0, group, centred.square()) / (count - 1).clamp(min=1.0)
        centred = centred / (variance.sqrt() + 1e-6)[group]
    return centred.to(rewards.dtype)
