"""Where a run happens, as a file says it. What a run is, is in the recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_distil.errors import ConfigError, Problem

CLUSTERS = Path(__file__).parent / "clusters"
ROLES = ("trainer", "rollout", "teacher", "sandbox")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One machine, or many."""

    name: str
    env: Mapping[str, Mapping[str, str]]
    """By role, ``all`` for every one."""

    def env_of(self, role: str) -> dict[str, str]:
        """What the processes of a role find in their environment."""
        return {**self.env.get("all", {}), **self.env.get(role, {})}


def load_cluster(cluster: str | Path) -> Cluster:
    """The cluster of a TOML file, or of that name in ``launchers/clusters``.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    named = CLUSTERS / f"{cluster}.toml"
    path = named if named.exists() else Path(cluster)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.toml")))
        raise ConfigError([Problem("cluster", str(cluster), f"{error.strerror}", f"Known: {known}.")]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("cluster", str(path), f"not TOML: {error}")]) from error
    if problems := list(_problems(table)):
        raise ConfigError(problems)
    return Cluster(name=table["name"], env=table.get("env", {}))


def _problems(table: Mapping[str, Any]) -> Iterator[Problem]:
    known = ("name", "env")
    for key, value in table.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            yield Problem(key, value, "not a key of a cluster file", f"Did you mean {near[0]}?" if near else "")
    if not isinstance(table.get("name"), str) or not table["name"]:
        yield Problem("name", table.get("name"), "must be a text", 'Try name = "local".')
    env = table.get("env", {})
    if not isinstance(env, dict):
        yield Problem("env", env, "must be tables by role", 'Try [env.all], then NAME = "value".')
        return
    for role, variables in env.items():
        if role not in ("all", *ROLES):
            yield Problem(f"env.{role}", variables, "not a role", f"Use all, {', '.join(ROLES)}.")
        elif not isinstance(variables, dict):
            yield Problem(f"env.{role}", variables, "must be a table", f'Try [env.{role}], then NAME = "value".')
        else:
            for name, value in variables.items():
                if not isinstance(value, str):
                    yield Problem(f"env.{role}.{name}", value, "must be a text", f'Try "{value}".')
