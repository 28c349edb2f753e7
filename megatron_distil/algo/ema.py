"""Weights that follow other weights slowly: the teacher of a self-distillation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_step(averages: Iterable[Tensor], values: Iterable[Tensor], *, rate: float) -> None:
    """One step of an exponential moving average, in place.

        theta_T <- (1 - rate) theta_T + rate theta

    Args:
        averages: tensors of any shapes, float32 or float64; changed.
        values: as many, of the same shapes and any float dtype.
        rate: share of the new value, in [0, 1].

    Raises:
        ValueError: an average is narrower than float32, where a step of rate 0.01 is rounded away; the rate is no share;
            the arguments differ in number.

    Source: arXiv:2606.05152 (the teacher's weights, once for each batch of rollouts).
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate = {rate}: the share of the new weights; give 0.01")
    for average, value in zip(averages, values, strict=True):
        if torch.finfo(average.dtype).bits < 32:
            raise ValueError(f"an average in {average.dtype} loses steps of rate {rate}; keep it in torch.float32")
        average.lerp_(value.to(average.dtype), rate)
