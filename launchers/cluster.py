"""Where a run happens, as a file says it: machine, scheduler, images. What a run is, is in the recipe."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from megatron_distil.config.load import Assignment, assign, read_assignment
from megatron_distil.config.schema import Count, Section
from megatron_distil.errors import MISSING, ConfigError, Problem
from megatron_distil.sizing import GPUS

CLUSTERS = Path(__file__).parent / "clusters"
ROLES = ("trainer", "rollout", "teacher", "sandbox")
_MONITOR_POLLS = 3
"""Of the warning, so many intervals of the monitor are gone before the trainer's exit leads to a requeue."""
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_KEY|ACCESS_KEY|PRIVATE_KEY)$")
_SECRET_VALUE = re.compile(r"^(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[bp]-|AKIA|-----BEGIN )")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_FLAG = re.compile(r"[a-z][a-z0-9_]*")

Whole = Annotated[int, Field(ge=0)]


class Placement(Section):
    """Whose nodes a role runs on. Nodes of its own come after the trainer's."""

    rollout: Literal["own", "trainer"] = "own"
    """Nodes of their own, or GPUs of the trainer's nodes that no rank uses."""
    teacher: Literal["own", "trainer"] = "own"
    """Servers of an expert, likewise; on the trainer's nodes after those of the student."""
    sandbox: Literal["own", "rollout", "trainer"] = "rollout"
    """A node of its own each, or spread over the nodes of another role."""


class Cluster(Section):
    """One machine, or many."""

    name: str
    scheduler: Literal["slurm", "none"] = "slurm"
    """``none``: this machine, at once and in the foreground."""
    account: str = ""
    """Of Slurm."""
    partition: str = ""
    """Of Slurm."""
    time: str = "04:00:00"
    """Limit of one life, ``[D-]HH:MM:SS``; the run goes on in the next."""
    warn_s: Count = 600
    """How long before the limit the run is asked to save and end: one step, one save, three monitor intervals, a margin."""
    retries: Whole = 100
    """Lives after the first. Every restart counts, a preemption as well."""
    max_lives_without_progress: Count = 3
    """So many lives without a new checkpoint, and the run gives up."""
    restarts_in_place: Whole = 0
    """How often torchrun starts failed ranks again within a life."""
    monitor_s: Count = 10
    """How often the batch shell looks whether a role has ended."""
    gpus_per_node: Whole = 8
    """0: a cluster without GPUs."""
    gpu: str = ""
    """Their kind, so that a plan that does not fit their memory is refused; empty: nobody asks."""
    processes_per_node: Whole = 0
    """Ranks or shares of servers that a node takes; 0: one for each GPU."""
    max_nodes: Whole = 0
    """Of one job; 0: not known."""
    shared: str = ""
    """Folder that all nodes see; runs, data and models lie in it, relative paths of a recipe start there."""
    code: str = ""
    """This package as the nodes see it; empty: where the launcher itself lies."""
    host_ip: str = ""
    """Address that every node publishes, for several nodes on one machine; empty: it is asked of the routing table."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Who starts the images."""
    placement: Placement = Placement()
    image: Mapping[str, str] = {}
    """By role: all of them, or none."""
    mounts: Mapping[str, str] = {}
    """Folders, outside to inside."""
    python: Mapping[str, str] = {}
    """By role, ``all`` for every one: the interpreter, in the image where there is one; ``python3`` if not given."""
    secrets: Mapping[str, tuple[str, ...]] = {}
    """By role: names of variables of the submitting shell. Their values are never written."""
    env: Mapping[str, Mapping[str, str]] = {}
    """By role, ``all`` for every one."""
    modules: tuple[str, ...] = ()
    """Environment modules that the job loads before its first step."""
    preflight: Literal["never", "first", "every"] = "never"
    """Before which lives the job tries its nodes, and ends with the reason where something is wrong."""
    sbatch: Mapping[str, str | int | bool] = {}
    """Further flags of sbatch, with underscores."""

    def env_of(self, role: str) -> dict[str, str]:
        """What the processes of a role find in their environment."""
        return {**self.env.get("all", {}), **self.env.get(role, {})}

    def python_of(self, role: str) -> str:
        """The interpreter of a role."""
        return _of(self.python, role) or self.python.get("all", "python3")

    def image_of(self, role: str) -> str:
        """The image of a role; empty: none."""
        return _of(self.image, role)

    @property
    def slots(self) -> int:
        """Ranks, or shares of servers, that a node takes."""
        return self.processes_per_node or self.gpus_per_node

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        return _seconds(self.time) or 0


def load_cluster(cluster: str | Path, overrides: Sequence[str] = ()) -> Cluster:
    """The cluster of a TOML file, or of that name in ``launchers/clusters``; ``overrides`` are ``key=value``.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    table = _read(cluster)
    read = [read_assignment(override) for override in overrides]
    found = [one for one in read if isinstance(one, Problem)]
    found += [problem for one in read if isinstance(one, Assignment) and (problem := assign(table, one)) is not None]
    loaded, wrong = _validated(table)
    if found := [*found, *wrong, *problems(loaded)]:
        raise ConfigError(found)
    return loaded


def _of(by_role: Mapping[str, str], role: str) -> str:
    """What is said for a role; the servers of an expert are as those of the student."""
    return by_role.get(role) or (by_role.get("rollout", "") if role == "teacher" else "")


def cluster_names() -> list[str]:
    """The clusters that can be named without a path."""
    return sorted(path.stem for path in CLUSTERS.glob("*.toml"))


def problems(cluster: Cluster) -> Iterator[Problem]:
    """What is wrong with a cluster whose keys are right one by one."""
    yield from _roles(cluster)
    yield from _variables(cluster)
    if cluster.scheduler == "slurm":
        yield from _job(cluster)
        yield from _time(cluster)
        yield from _paths(cluster)
        yield from _images(cluster)


def _read(cluster: str | Path) -> dict[str, Any]:
    named = CLUSTERS / f"{cluster}.toml"
    path = named if named.exists() else Path(cluster)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = f"Known: {', '.join(cluster_names())}."
        raise ConfigError([Problem("cluster", str(cluster), f"{error.strerror}", known)]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("cluster", str(path), f"not TOML: {error}")]) from error


def _validated(table: dict[str, Any]) -> tuple[Cluster, list[Problem]]:
    """The cluster without what is wrong with it, so that everything can be said at once."""
    try:
        return Cluster.model_validate(_frozen(table)), []
    except ValidationError as error:
        entries = error.errors()
    table.setdefault("name", "unnamed")
    for entry in entries:
        table = _without(table, entry["loc"])
    loaded, rest = _validated(table)
    return loaded, [*(_translated(entry) for entry in entries), *rest]


def _without(table: dict[str, Any], loc: tuple[int | str, ...]) -> dict[str, Any]:
    """The table without the entry at ``loc``; without the whole value where that is no table."""
    key, *rest = loc
    value = table.get(str(key))
    kept = {name: entry for name, entry in table.items() if name != key}
    if rest and isinstance(value, dict) and str(rest[0]) in value:
        return {**kept, str(key): _without(value, tuple(rest))}
    return kept if key != "name" else {**kept, "name": "unnamed"}


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _translated(entry: ErrorDetails) -> Problem:
    loc = [str(key) for key in entry["loc"] if key not in ("str", "int", "bool")]
    path, value = ".".join(loc), entry["input"]
    match entry["type"]:
        case "extra_forbidden":
            known = Placement.model_fields if loc[0] == "placement" else Cluster.model_fields
            near = get_close_matches(loc[-1], known, 1)
            return Problem(path, value, "not a key of a cluster file", f"Did you mean {near[0]}?" if near else "")
        case "missing":
            return Problem(path, MISSING, "must be stated", 'For example name = "mine".')
        case "string_type":
            return Problem(path, value, "must be a text", f'Try "{value}".')
        case "mapping_type" | "dict_type" | "model_type":
            return Problem(path, value, "must be a table", f"Try [{path}].")
        case _:
            return Problem(path, value, entry["msg"].replace("Input should be", "must be"))


def _roles(cluster: Cluster) -> Iterator[Problem]:
    for name, roles, extra in (
        ("image", cluster.image, ()),
        ("python", cluster.python, ("all",)),
        ("secrets", cluster.secrets, ()),
        ("env", cluster.env, ("all",)),
    ):
        for role in roles:
            if role not in (*extra, *ROLES):
                yield Problem(f"{name}.{role}", roles[role], "not a role", f"Use {', '.join((*extra, *ROLES))}.")


def _variables(cluster: Cluster) -> Iterator[Problem]:
    for role, variables in cluster.env.items():
        for name, value in variables.items():
            path = f"env.{role}.{name}"
            if not _VARIABLE.fullmatch(name):
                reason = "not upper case, digits and underscores; nemo-run writes names in upper case"
                yield Problem(path, value, reason, f"Try {re.sub('[^A-Z0-9_]', '_', name.upper())}.")
            if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
                reason = "looks like a secret, and would stand in scripts and logs"
                yield Problem(
                    path,
                    MISSING,
                    reason,
                    f'Export it in the shell and write secrets.{role if role in ROLES else "trainer"} = ["{name}"].',
                )
            elif "\n" in value or "\0" in value:
                yield Problem(path, value, "has a line break", "Write it in one line.")
    for role, names in cluster.secrets.items():
        if role == "sandbox" and names:
            reason = "it runs programs that nobody has read, and must know no secret"
            yield Problem("secrets.sandbox", names, reason, "Leave it out.")
        for name in names:
            if not _VARIABLE.fullmatch(name):
                reason = "not the name of a variable: upper case, digits and underscores"
                yield Problem(f"secrets.{role}", MISSING, reason, 'Write names only, such as ["HF_TOKEN"].')


def _job(cluster: Cluster) -> Iterator[Problem]:
    for key in ("account", "partition"):
        value = getattr(cluster, key)
        if not re.fullmatch(r"[\w.,-]+", value):
            reason = "has to be stated" if not value else "has characters other than letters, digits and _ . , -"
            yield Problem(key, value, reason, f"{'sacctmgr show assoc' if key == 'account' else 'sinfo'} lists yours.")
    if not re.fullmatch(r"[\w.-]+", cluster.name):
        yield Problem("name", cluster.name, "has characters other than letters, digits and _ . -", 'Try "mine".')
    if not cluster.slots:
        reason = "a node without GPUs takes as many processes as it is said to"
        yield Problem("processes_per_node", 0, reason, "Try 4.")
    if cluster.gpu and cluster.gpu not in GPUS:
        reason = "its memory is not known"
        yield Problem("gpu", cluster.gpu, reason, f"Use {', '.join(GPUS)}, or leave it out.")
    for flag, value in cluster.sbatch.items():
        if flag in _OWN_FLAGS:
            yield Problem(f"sbatch.{flag}", value, "is decided by the launcher", _OWN_FLAGS[flag])
        elif not _FLAG.fullmatch(flag):
            near = re.sub("[^a-z0-9]+", "_", flag.lower()).strip("_")
            yield Problem(f"sbatch.{flag}", value, "not the long name of a flag, with underscores", f"Try {near}.")


_OWN_FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("account", "partition", "time", "gpus_per_node"), "It is a key of its own."),
    **dict.fromkeys(("nodes", "ntasks", "ntasks_per_node", "exclusive", "mem", "job_name", "output", "open_mode"),
                    "Leave it out."),
    "signal": "Set warn_s.",
    "requeue": "Set retries.",
    "no_requeue": "Set retries to 0.",
    "export": "Name variables in [secrets] or [env].",
    "no_kill": "A dead first node would leave a job that nothing ends.",
    "array": "Launch several runs.",
}  # fmt: skip
"""Flags of sbatch that the plan needs to be as they are."""


def _time(cluster: Cluster) -> Iterator[Problem]:
    limit = _seconds(cluster.time)
    if limit is None:
        yield Problem("time", cluster.time, "not [D-]HH:MM:SS", 'Try "04:00:00".')
        return
    gone = cluster.warn_s + _MONITOR_POLLS * cluster.monitor_s
    if gone >= limit:
        reason = f"with three monitor intervals of {cluster.monitor_s} s nothing is left of the limit of {limit} s"
        yield Problem("warn_s", cluster.warn_s, reason, f"Try {max(1, limit // 4)}, or a longer time.")
    if cluster.warn_s <= _MONITOR_POLLS * cluster.monitor_s:
        reason = f"the monitor takes up to three intervals of {cluster.monitor_s} s of it, and nothing is left to save"
        yield Problem("warn_s", cluster.warn_s, reason, f"Try {_MONITOR_POLLS * cluster.monitor_s + 60}.")


def _paths(cluster: Cluster) -> Iterator[Problem]:
    if not cluster.shared:
        yield Problem("shared", "", "has to be stated", "A folder that all nodes see, for example /shared/distil.")
    paths = {"shared": cluster.shared, "code": cluster.code}
    paths |= {
        f"image.{role}": image for role, image in cluster.image.items() if "://" not in image and "#" not in image
    }
    paths |= {f"mounts.{outside}": inside for outside, inside in cluster.mounts.items()}
    paths |= {f"mounts ({outside})": outside for outside in cluster.mounts}
    for path, value in paths.items():
        if value and not value.startswith("/"):
            yield Problem(path, value, "not an absolute path", f"Try /{value.lstrip('./')}.")
        elif path == "shared" and re.search(r"[^\w./-]", value):
            reason = "has characters other than letters, digits and _ . / -, which nemo-run would not quote"
            yield Problem(path, value, reason, "Try a link without them.")
        elif path == "shared" and "/nemo_run" in value:
            yield Problem(path, value, "holds /nemo_run, which nemo-run replaces in its scripts", "Try another name.")
        elif re.search(r"[:,\s]", value) and path.startswith("mounts"):
            yield Problem(path, value, "a mount cannot have spaces, commas or colons in its path", "Rename the folder.")


def _images(cluster: Cluster) -> Iterator[Problem]:
    if not cluster.image:
        return
    missing = [role for role in ROLES if not cluster.image.get(role) and role != "teacher"]
    if missing:
        reason = f"images for some roles only; {', '.join(missing)} {'has' if len(missing) == 1 else 'have'} none"
        yield Problem("image", dict(cluster.image), reason, "Give one to every role, or to none.")
    inside = [place for place in cluster.mounts if _is_below(cluster.shared, place)]
    if cluster.shared and not any(cluster.mounts[place] == place for place in inside):
        reason = f"the shared folder {cluster.shared} is not in the images under the same path"
        yield Problem("mounts", dict(cluster.mounts), reason, f'Add "{cluster.shared}" = "{cluster.shared}".')


def _is_below(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _seconds(text: str) -> int | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
