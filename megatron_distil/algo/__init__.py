"""The specification: every loss, scan and weight in its pure, readable form, on full logits or on what is left of them.

Needs torch and nothing of ours; usable in any other trainer. The names load on first use, because the settings of
objectives live below this package and are read where there is no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_distil.algo.advantages import group_advantages
    from megatron_distil.algo.baselines import leave_one_out_batch, leave_one_out_position
    from megatron_distil.algo.divergence import forward_kl, jensen_shannon, label_cross_entropy, reverse_kl
    from megatron_distil.algo.ema import ema_step
    from megatron_distil.algo.loss import LossTerms, clipped_policy_terms, distil_terms, sampled_policy_terms
    from megatron_distil.algo.ratios import truncated_ratio
    from megatron_distil.algo.reductions import token_weights
    from megatron_distil.algo.scan import future_credit
    from megatron_distil.algo.topk import TopK, support_entropy, top_k, topk_cross_entropy
    from megatron_distil.algo.vocabulary import Columns, columns

_MODULE_BY_NAME = {
    "Columns": "vocabulary",
    "LossTerms": "loss",
    "TopK": "topk",
    "clipped_policy_terms": "loss",
    "columns": "vocabulary",
    "distil_terms": "loss",
    "ema_step": "ema",
    "forward_kl": "divergence",
    "future_credit": "scan",
    "group_advantages": "advantages",
    "jensen_shannon": "divergence",
    "label_cross_entropy": "divergence",
    "leave_one_out_batch": "baselines",
    "leave_one_out_position": "baselines",
    "reverse_kl": "divergence",
    "sampled_policy_terms": "loss",
    "support_entropy": "topk",
    "token_weights": "reductions",
    "top_k": "topk",
    "topk_cross_entropy": "topk",
    "truncated_ratio": "ratios",
}

__all__ = [
    "Columns",
    "LossTerms",
    "TopK",
    "clipped_policy_terms",
    "columns",
    "distil_terms",
    "ema_step",
    "forward_kl",
    "future_credit",
    "group_advantages",
    "jensen_shannon",
    "label_cross_entropy",
    "leave_one_out_batch",
    "leave_one_out_position",
    "reverse_kl",
    "sampled_policy_terms",
    "support_entropy",
    "token_weights",
    "top_k",
    "topk_cross_entropy",
    "truncated_ratio",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)
    globals()[name] = value
    return value
