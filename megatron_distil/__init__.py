"""DistIL (arXiv:2606.05152) at scale. Names are loaded on first use: importing the package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "megatron_distil.config.schema",
    "ConfigError": "megatron_distil.errors",
    "DistilError": "megatron_distil.errors",
    "evaluate": "megatron_distil.app",
    "load_config": "megatron_distil.config.load",
    "sft": "megatron_distil.app",
    "train": "megatron_distil.app",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
