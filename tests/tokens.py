"""Tokens of an objective: what a test does not care about is as on policy, with one update and without a baseline."""

import torch

from megatron_distil.algo.objectives.objective import Tokens
from megatron_distil.algo.vocabulary import Columns


def tokens_of(student: Columns, teacher_logprobs: torch.Tensor, **fields: torch.Tensor) -> Tokens:
    """``fields`` replace what they name."""
    sampled = student.sampled.detach()
    base = {
        "teacher_sampled": torch.zeros_like(sampled),
        "sampling_logprobs": sampled,
        "old_logprobs": sampled,
        "advantages": torch.zeros_like(sampled),
        "baseline": torch.zeros_like(sampled),
        "weights": torch.ones_like(sampled),
    }
    return Tokens(student=student, teacher_logprobs=teacher_logprobs, **(base | fields))
