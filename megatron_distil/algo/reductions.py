"""From tokens to one number: what each of them weighs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def token_weights(mask: Tensor, segment_ids: Tensor, *, reduction: Reduction, denominator: float) -> Tensor:
    """What each token weighs, so that the loss is a plain sum over tokens however they are packed and cut.

        token-mean            mask_t / denominator                                  denominator: tokens of the loss
        seq-mean-token-mean   mask_t / (tokens of its sequence) / denominator       denominator: sequences
        seq-mean-token-sum    mask_t / denominator                                  denominator: sequences

    The denominator is given, not counted: it is that of the whole batch, of which a microbatch sees a part, and a sequence
    without a token in the loss is a sequence.

    Args:
        mask: [T] bool. True at tokens that carry a loss.
        segment_ids: [T] int. Equal for positions of one sequence.
        reduction: how tokens become one number.
        denominator: of the whole batch, positive.

    Returns:
        [T] float64. 0 outside the mask.

    Raises:
        ValueError: the denominator is not positive.

    Source: arXiv:2606.05152, release (seq-mean-token-mean); seq-mean-token-sum is the reduction of its objective.
    """
    if not denominator > 0.0:
        counted = "tokens of the loss" if reduction == "token-mean" else "sequences"
        raise ValueError(f"denominator = {denominator}: give the number of {counted} in the whole batch, at least 1")
    weights = mask.double() / denominator
    if reduction != "seq-mean-token-mean":
        return weights
    _, sequence = segment_ids.unique(return_inverse=True)
    num_sequences = int(sequence.max()) + 1 if len(sequence) else 0
    length = weights.new_zeros(num_sequences).index_add(0, sequence, mask.double())
    return weights / length[sequence].clamp(min=1.0)
