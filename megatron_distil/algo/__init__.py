"""The specification: every loss, scan and weight in its pure, readable form, on full logits or on what is left of them.

Needs torch and nothing of ours; usable in any other trainer. The names load on first use, because the settings of
objectives live below this package and are read where there is no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_distil.algo.advantages import group_advantages
    from megatron_distil.algo.loss import LossTerms, clipped_policy_terms, distil_terms
    from megatron_distil.algo.ratios import truncated_ratio
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
    "future_credit": "scan",
    "group_advantages": "advantages",
    "support_entropy": "topk",
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
    "future_credit",
    "group_advantages",
    "support_entropy",
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
