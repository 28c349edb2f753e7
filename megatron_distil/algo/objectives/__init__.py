"""Losses by name. A file of this folder is an objective; its file name is its name in recipes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from megatron_distil.algo.objectives.objective import Objective


def objective_names() -> list[str]:
    """The names that a recipe may use, sorted."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != "objective")


def objective_class(name: str) -> type[Objective]:
    """The class in the file of that name.

    Raises:
        ValueError: there is no such file; the text lists those that there are.
    """
    names = objective_names()
    if name not in names:
        raise ValueError(f"{name!r} is not an objective; there are {', '.join(names)}")
    module = import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return found


def objective_from_table(value: Any) -> Objective:
    """The objective that a table ``{name = ..., ...}`` describes; an ``Objective`` is returned as it is.

    Raises:
        ValueError: no table, no name or an unknown one; pydantic's ``ValidationError`` for its other settings.
    """
    if isinstance(value, Objective):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"must be a table with a name, one of {', '.join(objective_names())}")
    return objective_class(value["name"]).model_validate(dict(value))
