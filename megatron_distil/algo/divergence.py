"""Divergences of the student from the teacher on a support, and the cross-entropy to a label."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_distil.algo.topk import Tail
from megatron_distil.algo.vocabulary import Columns


def forward_kl(teacher_logprobs: Tensor, student: Columns, *, tail: Tail, entry_clip: float = float("inf")) -> Tensor:
    """Divergence that punishes the student where it misses what the teacher says.

        KL(p || q) = sum_C p_C (log p_C - log q_C)

        bucket  classes C: the support, and all other ids together (p_C = max(0, 1 - sum_S p))
        renorm  classes C: the support; p / sum_S p and q / sum_S q
        none    classes C: the support, which has to be the whole vocabulary

    Its gradient is that of ``topk_cross_entropy`` with the same tail.

    Args:
        teacher_logprobs: [T, K] nats, log p, normalised over the whole vocabulary; -inf in unused slots, which weigh
            nothing. Constant.
        student: columns at the same support; log q. Carries gradient.
        tail: what is said about ids outside the support.
        entry_clip: largest contribution of a class, nats, cut before the sum; above it a class teaches nothing.
            Negative contributions stay, so that a clipped divergence can be negative. inf: no clip.

    Returns:
        [T] nats. 0 in a row without support.

    Raises:
        ValueError: tail none, and ids outside the support. Seen on a CPU only, where looking costs no synchronisation.

    Source: arXiv:2601.20802 (alpha = 0); clip: arXiv:2601.18734, release.
    """
    it = _compared(teacher_logprobs, student, tail)
    return _clipped_sum(it.probs * (it.teacher - it.student), entry_clip)


def reverse_kl(teacher_logprobs: Tensor, student: Columns, *, tail: Tail, entry_clip: float = float("inf")) -> Tensor:
    """Divergence that punishes the student where it says what the teacher does not.

        KL(q || p) = sum_C q_C (log q_C - log p_C)

    The gradient goes through q in both places; there is no score function in it. With the bucket, log p_C is that of
    max(1 - sum_S p, eps): the difference has no digits below the resolution of its dtype.

    Args:
        teacher_logprobs: as in ``forward_kl``.
        student: as in ``forward_kl``.
        tail: as in ``forward_kl``.
        entry_clip: as in ``forward_kl``.

    Returns:
        [T] nats. 0 in a row without support.

    Raises:
        ValueError: as in ``forward_kl``.

    Source: arXiv:2601.20802 (alpha = 1).
    """
    it = _compared(teacher_logprobs, student, tail)
    return _clipped_sum(it.student.exp() * (it.student - it.teacher), entry_clip)


def jensen_shannon(
    teacher_logprobs: Tensor, student: Columns, *, tail: Tail, mix: float = 0.5, entry_clip: float = float("inf")
) -> Tensor:
    """Both sides against their mixture.

        M = (1 - mix) q + mix p
        D = mix KL(p || M) + (1 - mix) KL(q || M)

    D / mix goes to the forward KL divergence as mix goes to 0, D / (1 - mix) to the reverse one as mix goes to 1.

    Args:
        teacher_logprobs: as in ``forward_kl``.
        student: as in ``forward_kl``.
        tail: as in ``forward_kl``.
        mix: share of the teacher in the mixture, between 0 and 1.
        entry_clip: as in ``forward_kl``; a contribution is the sum of both parts at a class.

    Returns:
        [T] nats. 0 in a row without support; with mix = 0.5 at most log 2.

    Raises:
        ValueError: as in ``forward_kl``, or ``mix`` is not inside (0, 1).

    Source: arXiv:2601.20802 (0 < alpha < 1).
    """
    if not 0.0 < mix < 1.0:
        raise ValueError(
            f"mix = {mix}: at 0 and 1 the divergence is 0 everywhere; give 0.5, or use forward or reverse KL"
        )
    it = _compared(teacher_logprobs, student, tail)
    mixture = torch.logaddexp(it.student + math.log(1.0 - mix), it.teacher + math.log(mix))
    from_teacher = it.probs * (it.teacher - mixture)
    from_student = it.student.exp() * (it.student - mixture)
    return _clipped_sum(mix * from_teacher + (1.0 - mix) * from_student, entry_clip)


def label_cross_entropy(student: Columns) -> Tensor:
    """Negative log-likelihood of the label.

        - log q(a)

    Args:
        student: columns whose sampled id is the label; log q. Carries gradient.

    Returns:
        [T] nats.

    Source: supervised training; no support is read.
    """
    return -student.sampled


class _Compared(NamedTuple):
    """Both sides over the same classes, [T, C]; where there is nothing to compare, both logarithms are 0."""

    student: Tensor
    """Log-probabilities; carries gradient."""
    teacher: Tensor
    """Log-probabilities."""
    probs: Tensor
    """Of the teacher."""


def _compared(teacher_logprobs: Tensor, student: Columns, tail: Tail) -> _Compared:
    used = teacher_logprobs != -torch.inf  # a teacher that is not a number is used, and is seen in the result
    if tail == "renorm":
        teacher = _normalised(teacher_logprobs, used)
        return _Compared(student=_normalised(student.support, used), teacher=teacher, probs=teacher.exp())
    support, teacher = student.support.masked_fill(~used, 0.0), teacher_logprobs.masked_fill(~used, 0.0)
    if tail == "none":
        _refuse_ids_outside(used, student.tail)
        return _Compared(student=support, teacher=teacher, probs=teacher.exp())
    rest = (1.0 - teacher_logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=0.0)
    is_outside = student.tail[:, None] > -torch.inf  # False where the support is the whole vocabulary
    log_rest = rest.clamp(min=torch.finfo(rest.dtype).eps).log()
    return _Compared(
        student=torch.cat([support, student.tail[:, None].masked_fill(~is_outside, 0.0)], dim=-1),
        teacher=torch.cat([teacher, log_rest.masked_fill(~is_outside, 0.0)], dim=-1),
        probs=torch.cat([teacher.exp(), rest.masked_fill(~is_outside, 0.0)], dim=-1),
    )


def _normalised(logprobs: Tensor, used: Tensor) -> Tensor:
    """[T, K] -> [T, K] inside the support; 0 in unused slots."""
    kept = logprobs.masked_fill(~used, -torch.inf)
    return (kept - kept.logsumexp(dim=-1, keepdim=True)).masked_fill(~used, 0.0)


def _refuse_ids_outside(used: Tensor, tail: Tensor) -> None:
    if tail.device.type == "cpu" and bool((used.any(dim=-1) & (tail > -torch.inf)).any()):
        raise ValueError(
            "tail = none, but there are ids outside the support, and a divergence cut off at the support can be negative; "
            "use bucket or renorm, or a support of the whole vocabulary"
        )


def _clipped_sum(entries: Tensor, entry_clip: float) -> Tensor:
    return (entries if entry_clip == float("inf") else entries.clamp(max=entry_clip)).sum(dim=-1)
