"""Along time: what a token can still influence."""

from __future__ import annotations

import torch
from torch import Tensor


def future_credit(
    cost: Tensor, mask: Tensor, segment_ids: Tensor, *, mean: bool = False, discount: float = 1.0
) -> Tensor:
    """Cost that the token sampled at each position can still influence.

        c_t = sum over i > t in the segment of t:  discount^(masked positions between t and i) * mask_i * cost_i
              (``mean``: / max(1, number of such i with mask_i))

    The sum is strict: cost_t is a function of the tokens before t, so including i = t would leave the expected gradient
    unchanged and only add variance. The mean is the length-normalised variant of MiniLLM; it is biased.

    The discount counts masked positions only: a gap in a response is no distance. The scan doubles its reach in each
    round, inside segments only: no difference of running totals, so a segment cannot lose digits to its neighbours, and a
    discount cannot under- or overflow.

    Args:
        cost: [T] float. Cost of each position, nats. Treated as a constant.
        mask: [T] bool. True at response positions that carry a loss.
        segment_ids: [T] int. Equal for positions of one sequence, and contiguous.
        mean: divide by the number of masked later positions.
        discount: weight of each masked position relative to the one before, in [0, 1].

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
    total = _later(cost.detach().double(), mask, segment_ids, discount)
    if mean:
        total = total / _later(mask.double(), mask, segment_ids, 1.0).clamp(min=1.0)
    return total.to(cost.dtype)


def _later(values: Tensor, mask: Tensor, segment_ids: Tensor, discount: float) -> Tensor:
    """[T] -> [T]: discounted sum over strictly later masked positions of the segment."""
    segments = segment_ids[mask]
    inclusive = values[mask]
    reach, length = 1, len(inclusive)
    while reach < length:
        same = segments[reach:] == segments[:-reach]
        step = torch.where(same, inclusive[reach:], 0.0) * discount**reach
        inclusive = torch.cat([inclusive[:-reach] + step, inclusive[-reach:]])
        reach *= 2
    result = torch.zeros_like(values)
    following = mask.cumsum(0)  # the place, among the masked positions, of the first one behind each position
    has_any = following < length
    following = following[has_any]
    result[has_any] = torch.where(segments[following] == segment_ids[has_any], inclusive[following], 0.0)
    return result
