"""What is left of the vocabulary: the log-probabilities that an objective can read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """Log-probabilities of the student, nats, all normalised over the whole vocabulary."""

    support: Tensor
    """[T, K] at the support; 0 in unused slots."""
    tail: Tensor
    """[T] of all other ids together; summed, never 1 - sum."""
    sampled: Tensor
    """[T] at the sampled id, inside or outside the support."""


def columns(logits: Tensor, support_ids: Tensor, sampled_ids: Tensor) -> Columns:
    """The columns of ``logits`` that an objective can read.

    The mass outside the support is summed over its own ids: ``1 - sum`` has no correct digit left in float32 once that
    mass is below 1e-7, and the gradient divides by it.

    Args:
        logits: [T, V] float, divided by the temperature.
        support_ids: [T, K] int64, unique in each row, K < V; -1 in unused slots.
        sampled_ids: [T] int64.

    Returns:
        Columns of the dtype of ``logits``. The tail is -inf where the support is the whole vocabulary.

    Raises:
        ValueError: the rows of the three arguments do not line up.
    """
    if support_ids.shape[:-1] != sampled_ids.shape or logits.shape[:-1] != sampled_ids.shape:
        shapes = f"{tuple(logits.shape)}, {tuple(support_ids.shape)}, {tuple(sampled_ids.shape)}"
        raise ValueError(f"logits, support_ids and sampled_ids need the same rows; their shapes are {shapes}")
    logprobs = logits.log_softmax(dim=-1)
    used, vocab = support_ids >= 0, logits.shape[-1]
    spare = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    inside = spare.scatter(-1, torch.where(used, support_ids, vocab), True)[:, :vocab]
    return Columns(
        support=torch.where(used, logprobs.gather(-1, support_ids.clamp(min=0)), 0.0),
        tail=logprobs.masked_fill(inside, -torch.inf).logsumexp(dim=-1),
        sampled=logprobs.gather(-1, sampled_ids[:, None]).squeeze(-1),
    )
