"""What is taken off the credit of a rollout: what the others had. No function of its own credit, so it adds no bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leave_one_out_position(credits: Sequence[Tensor], group_ids: Sequence[int]) -> list[Tensor]:
    """Mean credit of the other rollouts of a prompt at the same position.

        b_{i,t} = mean over j != i of the group of i that have a position t:  c_{j,t}          (0 if there is none)

    Args:
        credits: [R_i] of each rollout, from its first token on.
        group_ids: equal for the rollouts of one prompt, in any order.

    Returns:
        [R_i] of each rollout, of the dtype of its credit; constant.

    Raises:
        ValueError: the arguments differ in length.

    Source: arXiv:2402.14740 (leave-one-out), here for each position.
    """
    if len(credits) != len(group_ids):
        raise ValueError(f"{len(credits)} credits, but {len(group_ids)} group ids; give one for each rollout")
    members: dict[int, list[int]] = {}
    for index, group in enumerate(group_ids):
        members.setdefault(group, []).append(index)
    found = [torch.zeros_like(credit) for credit in credits]
    for indices in members.values():
        for index, baseline in zip(indices, _of_group([credits[i].detach() for i in indices]), strict=True):
            found[index] = baseline.to(credits[index].dtype)
    return found


def leave_one_out_batch(credits: Sequence[Tensor]) -> list[Tensor]:
    """Mean credit of all tokens of all other rollouts.

        b_{i,t} = mean over j != i and all their positions s:  c_{j,s}          (0 if there are none)

    Args:
        credits: [R_i] of each rollout.

    Returns:
        [R_i] of each rollout, of the dtype of its credit, all entries equal; constant.

    Source: arXiv:2402.14740 (leave-one-out), here over the batch.
    """
    sums = [credit.detach().double().sum() for credit in credits]
    total = sum(sums)
    num_tokens = sum(len(credit) for credit in credits)
    found = []
    for credit, own in zip(credits, sums, strict=True):
        num_others = num_tokens - len(credit)
        mean = (total - own) / num_others if num_others else torch.zeros_like(own)
        found.append(mean.to(credit.dtype).repeat(len(credit)))
    return found


def _of_group(credits: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(credit) for credit in credits)
    total = credits[0].new_zeros(longest, dtype=torch.float64)
    count = torch.zeros_like(total)
    for credit in credits:
        total[: len(credit)] += credit
        count[: len(credit)] += 1.0
    return [
        (total[: len(credit)] - credit) / (count[: len(credit)] - 1.0).clamp(min=1.0)  # alone: 0 over 1
        for credit in credits
    ]
