"""Reads a recipe and its overrides, and says everything that is wrong with them in one error.

Two passes: names, types and ranges of every setting; then, once the tree has a shape, the rules over several settings.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_distil.algo.objectives import objective_class, objective_names
from megatron_distil.config import check
from megatron_distil.config.preset import preset_names, read_preset
from megatron_distil.config.schema import Config, EvalSet, Identity
from megatron_distil.errors import MISSING, ConfigError, Problem

RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"

RENAMED: Mapping[str, str] = {
    "objective.reduce": "objective.reduction",
    "objective.topk": "teacher.top_k",
    "teacher.teacher_rate": "teacher.rate",
    "teacher.topk": "teacher.top_k",
    "train.lr": "train.learning_rate",
    "train.steps": "train.num_steps",
}
"""Settings under names that people know from elsewhere or from an earlier version: refused, with the name that works."""


class Assignment(NamedTuple):
    """An override, read."""

    path: str
    value: Any


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a recipe and its overrides describe.

    A preset that the recipe names gives what its tables leave out. ``preset=...`` as an override goes before the recipe's
    tables, and replaces ``[objective]`` as a whole; other overrides go before both, wherever they stand.
    ``objective.name=...`` as an override keeps of ``[objective]`` what the new objective has too: the rest described another
    method. What an override says is never dropped.

    Args:
        recipe: a TOML file, or the name of one in ``launchers/recipes`` without its ending.
        overrides: ``path=value``, the value in TOML syntax; a bare word is a string. Later ones win.

    Raises:
        ConfigError: with all problems of the first pass that finds any.
    """
    table = read_recipe(recipe)
    read = [read_assignment(override) for override in overrides]
    assignments = [one for one in read if isinstance(one, Assignment)]
    problems = [one for one in read if isinstance(one, Problem)]
    table = _with_preset(table, _last(assignments, "preset"), problems)
    if "objective" in table:
        table["objective"] = _fitting(table["objective"], _last(assignments, "objective.name"))
    problems += [problem for one in assignments if (problem := assign(table, one)) is not None]
    return config_from_table(table, problems)


def config_from_table(table: Mapping[str, Any], problems: Sequence[Problem] = ()) -> Config:
    """The configuration in a nested table; ``problems`` were found before and are reported with the others.

    Raises:
        ConfigError: with all problems of the first pass that finds any.
    """
    config, found = _validated(_frozen(table))
    found = [*problems, *found]
    if found or config is None:
        raise ConfigError(found)
    if found := list(check.problems(config)):
        raise ConfigError(found)
    return config


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The tables of a recipe, as they are written.

    Raises:
        ConfigError: there is no such file, or it is not TOML; the text names file and line.
    """
    path = _recipe_path(recipe)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("recipe", str(path), f"not TOML: {error}")]) from error
    except OSError as error:
        raise ConfigError([Problem("recipe", str(path), f"cannot be read: {error.strerror}")]) from error


def recipe_names() -> list[str]:
    """The recipes that can be named without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _recipe_path(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    named = RECIPES / f"{recipe}.toml"
    if path.name == str(recipe) and named.is_file():
        return named
    names = recipe_names()
    close = get_close_matches(path.stem, names, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Recipes: {', '.join(names)}."
    raise ConfigError([Problem("recipe", str(recipe), "no such file, and no recipe of that name", hint)])


def read_assignment(override: str) -> Assignment | Problem:
    """What ``path=value`` says, or what is wrong with it."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        return Problem("override", override, "must be path=value", "For example train.num_steps=100.")
    value = _toml_value(text.strip())
    return value._replace(path=path) if isinstance(value, Problem) else Assignment(path, value)


def assign(table: dict[str, Any], assignment: Assignment) -> Problem | None:
    """Put an override into nested tables. Returns what is wrong with it, if something is."""
    path, value = assignment
    keys = path.split(".")
    for depth, key in enumerate(keys[:-1], start=1):
        child = table.setdefault(key, {})
        if not isinstance(child, dict):
            return Problem(path, value, f"{'.'.join(keys[:depth])} is no table, it is {child!r}")
        table = child
    table[keys[-1]] = value
    return None


def _last(assignments: Sequence[Assignment], path: str) -> Any:
    return next((one.value for one in reversed(assignments) if one.path == path), None)


def _fitting(objective: Any, name: Any) -> Any:
    """An ``[objective]`` without what only its own objective has, once another one is named."""
    names = objective_names()
    if not isinstance(objective, dict) or objective.get("name") not in names or name not in names:
        return objective
    gone = objective_class(objective["name"]).model_fields.keys() - objective_class(name).model_fields.keys()
    return {key: value for key, value in objective.items() if key not in gone}


def _with_preset(table: dict[str, Any], asked: Any, problems: list[Problem]) -> dict[str, Any]:
    """The tables of a recipe and of its preset, or of the one that the command line asks for."""
    name = table.get("preset") if asked is None else asked
    if not isinstance(name, str) or not name:
        return table
    if name not in preset_names():
        close = get_close_matches(name, preset_names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Presets: {', '.join(preset_names())}."
        problems.append(Problem("preset", name, "not a preset", hint))
        return table
    preset = read_preset(name)
    if asked is not None:
        return {**_merged_tables(table, preset), "objective": preset["objective"]}
    preset["objective"] = _fitting(preset["objective"], _at(table, "objective.name"))
    return _merged_tables(preset, table)


def _merged_tables(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Key by key, two levels deep."""
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, dict) and isinstance(above.get(key), dict):
            merged[key] = {**value, **above[key]}
    return merged


def _toml_value(text: str) -> Any:
    """The value of an override. What TOML does not know is a string, unless it started out as something else."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("[", "{", '"', "'")):
            return Problem(
                "", text, f"not a value in TOML: {error}", "In a shell, put the override into single quotes."
            )
        return text
    # A line break would have opened another key; a date is what it looks like, and no setting is one.
    if len(parsed) == 1 and isinstance(parsed["value"], (bool, int, float, str, list, dict)):
        return parsed["value"]
    return text


def _frozen(value: Any) -> Any:
    """Lists become tuples: a frozen tree has no part that can grow."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(entry) for entry in value)
    return value


def _validated(table: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    renamed = [
        Problem(old, value, "goes by another name", f"Write {new}.")
        for old, new in RENAMED.items()
        if (value := _at(table, old)) is not MISSING
    ]
    for problem in renamed:  # said once: neither as unknown here nor as missing there
        *parents, last = problem.path.split(".")
        _at(table, ".".join(parents)).pop(last)
        *parents, last = RENAMED[problem.path].split(".")
        if isinstance(section := _at(table, ".".join(parents)), dict):
            section.setdefault(last, problem.value)
    try:
        return Config.model_validate(table), renamed
    except ValidationError as error:
        found = [problem for entry in error.errors() for problem in _translated(entry, _settings(table), table)]
    return None, renamed + _merged(found)


def _at(table: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(table, Mapping) or key not in table:
            return MISSING
        table = table[key]
    return table


def _settings(table: Mapping[str, Any]) -> dict[str, FieldInfo]:
    """Every setting by its path; those of the objective are known once its name is."""
    settings = dict(_leaves(Config, ""))
    for index in range(len(sets) if isinstance(sets := _at(table, "eval.sets"), tuple) else 0):
        settings.update(_leaves(EvalSet, f"eval.sets[{index}]."))
    name = _at(table, "objective.name")
    if name in objective_names():
        settings.update(_leaves(objective_class(name), "objective."))
    return settings


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _translated(entry: ErrorDetails, settings: Mapping[str, FieldInfo], table: Mapping[str, Any]) -> Iterator[Problem]:
    path = _path(entry["loc"])
    name = _at(table, "objective.name")
    if path == "objective" and isinstance(name, str):
        close = get_close_matches(name, objective_names(), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Objectives: {', '.join(objective_names())}."
        yield Problem("objective.name", name, "not an objective", hint)
        return
    match entry["type"]:
        case "extra_forbidden":
            yield Problem(path, entry["input"], "not a setting", _did_you_mean(path, settings))
        case "missing":
            below = [(leaf, info) for leaf, info in settings.items() if leaf.startswith(f"{path}.")]
            for leaf, info in below or [(path, settings.get(path))]:
                if leaf == "objective.name":
                    yield Problem(leaf, MISSING, "has to be stated", f"Objectives: {', '.join(objective_names())}.")
                elif info is None or info.is_required():
                    yield Problem(leaf, MISSING, "has to be stated", (info and info.description) or "")
        case _:
            path = next((leaf for leaf in settings if path.startswith(f"{leaf}.")), path)
            reason = entry["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            yield Problem(path, entry["input"], reason, _unquoted(entry))


def _path(loc: Sequence[Any]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc).removeprefix(".")


def _unquoted(entry: ErrorDetails) -> str:
    """A way out for the commonest slip: a number or truth value in quotes."""
    value = entry["input"]
    if isinstance(value, str) and entry["type"] in ("int_type", "float_type", "bool_type"):
        parsed = _toml_value(value)
        if isinstance(parsed, (bool, int, float)):
            return f"Write {value} without quotes."
    return ""


def _merged(problems: Sequence[Problem]) -> list[Problem]:
    """One problem per path: a setting that takes several kinds of values is refused by each of them."""
    by_path: dict[str, Problem] = {}
    for problem in problems:
        known = by_path.setdefault(problem.path, problem)
        if known is not problem:
            by_path[problem.path] = known._replace(
                reason=f"{known.reason} or {problem.reason.removeprefix('must be ')}"
            )
    return list(by_path.values())


def _did_you_mean(path: str, settings: Mapping[str, FieldInfo]) -> str:
    parent, _, name = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    siblings = sorted({leaf.removeprefix(prefix).split(".")[0] for leaf in settings if leaf.startswith(prefix)})
    if close := get_close_matches(name, siblings, n=1):
        return f"Did you mean {prefix}{close[0]}?"
    if elsewhere := [leaf for leaf in settings if leaf.rpartition(".")[2] == name]:
        return f"Did you mean {elsewhere[0]}?"
    return f"{parent or 'The configuration'} has {', '.join(siblings)}." if siblings else ""


def to_json(config: Config) -> str:
    """The complete tree, for the run directory and for checkpoints."""
    return config.model_dump_json(indent=2) + "\n"


def to_toml(config: Config) -> str:
    """The complete tree as a recipe, one setting in a line; each line is an override as well."""
    return "".join(f"{path} = {toml_value(value)}\n" for path, value in flat(config).items())


def toml_value(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(entry) for entry in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(entry)}' for key, entry in value.items())} }}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)


def config_from_json(text: str) -> Config:
    """The tree that ``to_json`` wrote.

    Raises:
        ConfigError: it does not fit this version.
    """
    return config_from_table(json.loads(text))


class Difference(NamedTuple):
    """A setting that two configurations disagree on."""

    path: str
    old: object
    new: object
    is_identity: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


def differences(old: Config, new: Config) -> list[Difference]:
    """The settings that ``old`` and ``new`` disagree on, in the order of the tree."""
    before, after = flat(old), flat(new)
    identity = _identity_prefixes()
    return [
        Difference(path, before.get(path, MISSING), after.get(path, MISSING), _is_below(path, identity))
        for path in dict.fromkeys([*before, *after])
        if before.get(path, MISSING) != after.get(path, MISSING)
    ]


def identity_differences(old: Config, new: Config) -> list[str]:
    """Paths of the settings that say what a run *is* and that ``old`` and ``new`` disagree on."""
    return [difference.path for difference in differences(old, new) if difference.is_identity]


def flat(config: Config) -> dict[str, object]:
    """Every setting by its path."""
    return dict(_flat(config.model_dump(), ""))


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _identity_prefixes(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in model.model_fields.items():
        if any(isinstance(mark, Identity) for mark in info.metadata):
            found.append(f"{prefix}{name}")
        elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += _identity_prefixes(info.annotation, f"{prefix}{name}.")
    return found


def _is_below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)
