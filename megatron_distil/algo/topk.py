"""Supports: which ids of a distribution are kept, and what is said about the others."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_distil.algo.vocabulary import Columns

Tail = Literal["none", "bucket", "renorm"]


class TopK(NamedTuple):
    """The most probable ids of each row, in falling order."""

    ids: Tensor
    """[T, k] int64."""
    logprobs: Tensor
    """[T, k] nats, normalised over the whole vocabulary."""
    entropy: Tensor
    """[T] nats, over the whole vocabulary."""


def top_k(logits: Tensor, k: int) -> TopK:
    """The ``k`` most probable ids of each row; among equal logits the smaller id comes first.

    Args:
        logits: [T, V] float, divided by the temperature.
        k: ids to keep; at most V.

    Returns:
        Constants, of the dtype of ``logits``.

    Raises:
        ValueError: ``k`` is not between 1 and V.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k = {k} of {logits.shape[-1]} ids; give 1 to {logits.shape[-1]}")
    logprobs = logits.detach().log_softmax(dim=-1)
    # The order is that of the logits: the subtraction of the normaliser may round two of them to the same value.
    ids = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return TopK(ids=ids, logprobs=logprobs.gather(-1, ids), entropy=-(logprobs.exp() * logprobs).sum(dim=-1))


def topk_cross_entropy(teacher_logprobs: Tensor, student: Columns, *, tail: Tail) -> Tensor:
    """Cross-entropy of the student to the teacher, on the support.

        none    - sum_S p log q
        bucket  - sum_S p log q - (1 - sum_S p) log q_tail         one more class for all other ids
        renorm  - sum_S (p / sum_S p) log (q / sum_S q)            both sides normalised inside the support

    No clamp at zero: a cross-entropy is not negative but for rounding, and a clamp would remove its gradient. The values
    of different tails are not comparable.

    Args:
        teacher_logprobs: [T, K] nats, log p, normalised over the whole vocabulary; -inf in unused slots, which weigh
            nothing. Constant.
        student: columns at the same support; log q. Carries gradient.
        tail: what is said about ids outside the support.

    Returns:
        [T] nats. 0 in a row without support.

    Source: arXiv:2606.05152; the tails are those of its release (bucket: science and coding, renorm: maths).
    """
    used = teacher_logprobs > -torch.inf
    probs = teacher_logprobs.exp()
    mass = probs.sum(dim=-1)
    inside = -(probs * student.support).sum(dim=-1)
    if tail == "none":
        return inside
    if tail == "bucket":
        rest = (1.0 - mass).clamp(min=0.0)
        is_outside = student.tail > -torch.inf  # False where the support is the whole vocabulary
        return inside - torch.where(is_outside, rest * student.tail.masked_fill(~is_outside, 0.0), 0.0)
    # A row without support has nothing to normalise: its logsumexp gets harmless values, so that no NaN enters a gradient.
    empty = ~used.any(dim=-1)
    kept = student.support.masked_fill(~used, -torch.inf).masked_fill(empty[:, None], 0.0)
    normaliser = kept.logsumexp(dim=-1)
    return torch.where(empty, 0.0, inside / mass.clamp(min=torch.finfo(mass.dtype).tiny) + normaliser)


def support_entropy(teacher_logprobs: Tensor, *, tail: Tail) -> Tensor:
    """The cross-entropy that a student equal to the teacher has: what ``topk_cross_entropy`` cannot go below.

        none    - sum_S p log p
        bucket  - sum_S p log p - (1 - sum_S p) log (1 - sum_S p)
        renorm  - sum_S (p / sum_S p) log (p / sum_S p)

    (With ``none`` it is not a lower bound, since a truncated cross-entropy is none of a distribution.)

    Args:
        teacher_logprobs: [T, K] nats, -inf in unused slots.
        tail: as in ``topk_cross_entropy``.

    Returns:
        [T] nats, constant. 0 in a row without support.
    """
    used = teacher_logprobs > -torch.inf
    rest = (1.0 - teacher_logprobs.exp().sum(dim=-1)).clamp(min=0.0)
    same = Columns(
        support=torch.where(used, teacher_logprobs, 0.0),
        tail=rest.clamp(min=torch.finfo(rest.dtype).tiny).log(),
        sampled=rest,
    )
    return topk_cross_entropy(teacher_logprobs, same, tail=tail).detach()
