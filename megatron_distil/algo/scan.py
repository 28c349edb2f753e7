"""Along time: what a token can still influence."""

from __future__ import annotations

import torch
from torch import Tensor


def future_credit(
    cost: Tensor, mask: Tensor, segment_ids: Tensor, *, mean: bool = False, discount: float = 1.0
) -> Tensor:
    """Cost that the token sampled at each position can still influence.

        c_t = sum over i > t in the segment of t:  discount^(i - t - 1) * mask_i * cost_i
              (``mean``: / max(1, number of such i with mask_i))

    The sum is strict: cost_t is a function of the tokens before t, so including i = t would leave the expected gradient
    unchanged and only add variance. The mean is the length-normalised variant of MiniLLM; it is biased.

    The scan doubles its reach in each round, inside segments only: no difference of running totals, so a segment cannot
    lose digits to its neighbours, and a discount cannot under- or overflow.

    Args:
        cost: [T] float. Cost of each position, nats. Treated as a constant.
        mask: [T] bool. True at response positions that carry a loss.
        segment_ids: [T] int. Equal for positions of one sequence, and contiguous.
        mean: divide by the number of masked later positions.
        discount: weight of the next position, in [0, 1].

    Returns:
        [T] float, same dtype and device as ``cost``, without gradient. 0 at the last masked position of a segment;
        positions outside the mask have a value too.

    Raises:
        ValueError: the shapes differ or are not one-dimensional.

    Source: arXiv:2606.05152, sequence-level gradient; mean: appendix (length normalisation).
    """
    if cost.dim() != 1 or cost.shape != mask.shape or cost.shape != segment_ids.shape:
        shapes = f"{tuple(cost.shape)}, {tuple(mask.shape)}, {tuple(segment_ids.shape)}"
        raise ValueError(f"cost, mask and segment_ids must be vectors of one length; their shapes are {shapes}")
    total = _later(torch.where(mask, cost.detach(), 0.0).double(), segment_ids, discount)
    if mean:
        total = total / _later(mask.double(), segment_ids, 1.0).clamp(min=1.0)
    return total.to(cost.dtype)


def _later(values: Tensor, segment_ids: Tensor, discount: float) -> Tensor:
    """[T] -> [T]: discounted sum over strictly later positions of the segment."""
    reach, length = 1, len(values)
    inclusive = values
    while reach < length:
        same = segment_ids[reach:] == segment_ids[:-reach]
        step = torch.where(same, inclusive[reach:], 0.0) * discount**reach
        inclusive = torch.cat([inclusive[:-reach] + step, inclusive[-reach:]])
        reach *= 2
    result = torch.zeros_like(values)
    if length > 1:
        result[:-1] = torch.where(segment_ids[1:] == segment_ids[:-1], inclusive[1:], 0.0)
    return result
