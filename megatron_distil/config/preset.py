"""Methods by name: what a paper or a release sets objective, teacher and optimizer to. Each is a file of ``config/presets``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The presets that a recipe may name, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The tables of a preset; ``[objective]`` is always among them."""
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
