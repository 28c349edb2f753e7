"""Tries on every node what a run will need, and says what is wrong before GPU hours are spent.

    python -m launchers preflight CLUSTER --nodes N          from a login node: asks Slurm for the nodes, this on each of them
    srun --nodes=N --ntasks-per-node=1 python -m launchers preflight FOLDER      within an allocation
    python -m launchers preflight FOLDER                                         this machine alone

GPUs and driver, packages and code of every node, ports, clocks, the shared folder, the sandbox's walls, and an all-reduce
over all GPUs (gloo where there is none). Node 0 prints a table; every node ends alike.

    exit code   0 all is well · 1 something is wrong, it is listed · 2 the command line

Standard library only, but for the all-reduce, which runs in the trainer's Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launchers.links import LinkError, Links, collect, listening, measure, publish
from launchers.nodefacts import ROOT, Facts, gather, with_sources
from launchers.process import routed_address

if TYPE_CHECKING:
    from launchers.cluster import Cluster  # needs pydantic, which the nodes need not have

MAX_SKEW_S = 1.0
"""Readers of the registry take a heartbeat for stale after 10 s by their own clock."""
MAX_VISIBLE_S = 2.0
"""A heartbeat is written every 2 s, and has to be seen well before it is stale."""
MAX_USED_MIB = 2048
"""Of a GPU that nobody uses."""
ALL_REDUCE_BYTES = {"cpu": 2**24, "gpu": 2**29}


class Finding(NamedTuple):
    """One line of the table."""

    check: str
    where: str
    found: str
    problem: str = ""
    """Empty: all is well."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run needs."""

    gpus: int
    """Of every node."""
    min_bus_bytes_per_s: float
    min_level: int
    """Of the sandbox; 0: none is needed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one node."""

    folder: Path
    node: int
    nodes: int
    host_ip: str
    pythons: Mapping[str, str]
    wanted: Wanted
    file_bytes: int
    timeout_s: float


def findings(
    facts: Sequence[Facts], links: Sequence[Links], reduced: Mapping[str, Any], wanted: Wanted
) -> Iterator[Finding]:
    """The table, from what the nodes found. Pure: every node comes to the same.

    Args:
        facts: by node.
        links: by node.
        reduced: what the all-reduce printed, or ``{"error": why}``.
        wanted: of the run.
    """
    for one in facts:
        for what, why in one.wrong.items():
            yield Finding(what, _name(one), "no answer", why)
    yield from _gpus(facts, wanted)
    for name in sorted({name for one in facts for name in one.versions}):
        yield from _equal(name, facts, [one.versions.get(name, "missing") for one in facts])
    yield from _equal("code", facts, [one.code for one in facts])
    yield from _links(facts, links)
    if wanted.min_level:
        yield from _sandboxes(facts, wanted)
    yield _reduced(reduced, wanted)


def _gpus(facts: Sequence[Facts], wanted: Wanted) -> Iterator[Finding]:
    for one in facts:
        short = f"{wanted.gpus} are wanted" if len(one.gpus) < wanted.gpus else ""
        found = f"{len(one.gpus)} x {one.gpus[0]}, {one.gpu_mib} MiB" if one.gpus else "none"
        yield Finding("gpus", _name(one), found, short)
        if one.gpu_used_mib > MAX_USED_MIB:
            reason = f"somebody else is on it; an idle one uses less than {MAX_USED_MIB} MiB"
            yield Finding("gpu memory", _name(one), f"{one.gpu_used_mib} MiB in use", reason)
    if any(one.gpus for one in facts):
        yield from _equal("gpu", facts, [", ".join(sorted(set(one.gpus))) for one in facts])
        yield from _equal("driver", facts, [one.driver for one in facts])


def _equal(check: str, facts: Sequence[Facts], values: Sequence[str]) -> Iterator[Finding]:
    """One line where all nodes say the same, else one for each that differs from most."""
    (usual, count), *others = Counter(values).most_common()
    if not others:
        yield Finding(check, "all nodes", usual)
        return
    for one, value in zip(facts, values, strict=True):
        if value != usual:
            yield Finding(check, _name(one), value, f"{count} of {len(facts)} nodes have {usual}")


def _links(facts: Sequence[Facts], links: Sequence[Links]) -> Iterator[Finding]:
    for one, link in zip(facts, links, strict=True):
        for peer, why in link.unreachable.items():
            yield Finding("ports", _name(one), f"node {peer} cannot be reached", why)
    if not any(link.unreachable for link in links):
        yield Finding("ports", "all nodes", "each reaches every other")
    for one, link in zip(facts, links, strict=True):
        late = f"more than {MAX_SKEW_S:.0f} s: heartbeats would look stale; run an NTP client" * (
            link.skew_s > MAX_SKEW_S
        )
        yield Finding("clock", _name(one), f"{1e3 * link.skew_s:.1f} ms from the furthest other", late)
        slow = f"more than {MAX_VISIBLE_S:.0f} s; mount with a shorter attribute cache" * (
            link.visible_s > MAX_VISIBLE_S
        )
        speeds = f"writes {link.write_bytes_per_s / 1e6:.0f} MB/s, reads {link.read_bytes_per_s / 1e6:.0f} MB/s"
        found = f"seen by the next node after {1e3 * link.visible_s:.0f} ms; {speeds}"
        yield Finding("shared folder", _name(one), found, slow)


def _sandboxes(facts: Sequence[Facts], wanted: Wanted) -> Iterator[Finding]:
    for one in facts:
        weak = f"feedback.min_isolation = {wanted.min_level}; python -m sandbox.probe says what is missing"
        problem = weak if one.sandbox_level < wanted.min_level else ""
        yield Finding("sandbox", _name(one), f"isolation level {one.sandbox_level}", problem)


def _reduced(reduced: Mapping[str, Any], wanted: Wanted) -> Finding:
    if "error" in reduced:
        return Finding("all-reduce", "all nodes", "failed", str(reduced["error"]))
    speed = float(reduced["bus_bytes_per_s"])
    found = f"{reduced['backend']}, {reduced['ranks']} ranks, {reduced['bytes'] / 2**20:.0f} MiB: {speed / 1e9:.2f} GB/s of the bus"
    if reduced["ranks"] > 1 and speed < wanted.min_bus_bytes_per_s:
        reason = f"less than {wanted.min_bus_bytes_per_s / 1e9:g} GB/s; NCCL_DEBUG=INFO says which interface was taken"
        return Finding("all-reduce", "all nodes", found, reason)
    return Finding("all-reduce", "all nodes", found)


def _name(facts: Facts) -> str:
    return f"{facts.node} {facts.host}"


def run(options: Options) -> list[Finding]:
    """Try everything with all other nodes.

    Raises:
        LinkError: a node is missing, or the folder is not shared.
        OSError: the folder cannot be written to.
    """
    folder, node, count = options.folder, options.node, options.nodes
    folder.mkdir(parents=True, exist_ok=True)
    facts = gather(node, options.pythons, asks_sandbox=options.wanted.min_level > 0)
    address = options.host_ip or routed_address() or "127.0.0.1"
    with listening() as port, listening() as rendezvous:
        publish(folder / f"facts-{node}.json", asdict(facts))
        publish(folder / f"address-{node}.json", {"address": address, "port": port, "rendezvous": rendezvous})
        addresses = collect(folder, "address", count, options.timeout_s)
        peers = {index: (one["address"], one["port"]) for index, one in enumerate(addresses)}
        links = measure(folder, node, peers, file_bytes=options.file_bytes, timeout_s=options.timeout_s)
        publish(folder / f"links-{node}.json", asdict(links))
        every_link = collect(folder, "links", count, options.timeout_s)
        (folder / f"file-{node}.bin").unlink()  # everybody has read what it had to
    master = (addresses[0]["address"], addresses[0]["rendezvous"])
    publish(folder / f"reduced-{node}.json", _reduce(options, len(facts.gpus), master))
    reduced = collect(folder, "reduced", count, options.timeout_s)
    first = next((one for one in reduced if "error" in one), reduced[0])
    every_fact = collect(folder, "facts", count, options.timeout_s)
    return list(
        findings([_facts(one) for one in every_fact], [Links(**one) for one in every_link], first, options.wanted)
    )


def _facts(table: dict[str, Any]) -> Facts:
    return Facts(**{**table, "gpus": tuple(table["gpus"])})


def _reduce(options: Options, gpus: int, master: tuple[str, int]) -> dict[str, Any]:
    """The ranks of this node: one for each GPU, or one."""
    each = max(1, gpus)
    num_bytes = ALL_REDUCE_BYTES["gpu" if gpus else "cpu"]
    started = []
    for local in range(each):
        placed = {
            "RANK": str(options.node * each + local),
            "WORLD_SIZE": str(options.nodes * each),
            "LOCAL_RANK": str(local),
            "MASTER_ADDR": master[0],
            "MASTER_PORT": str(master[1]),
        }
        command = [options.pythons["trainer"], "-m", "launchers.allreduce", str(num_bytes), str(options.timeout_s)]
        env = {**with_sources(), **placed}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=options.timeout_s) for process in started]
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {options.timeout_s:.0f} s on node {options.node}"}
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            return {"error": f"a rank of node {options.node} ended with {process.returncode}: {last[:300]}"}
    return json.loads(said[0][0]) if options.node == 0 else {}


def srun_command(cluster: Cluster, nodes: int, arguments: Sequence[str]) -> list[str]:
    """What starts a preflight from a login node: an allocation of its own, for a quarter of an hour."""
    flags = {
        "account": cluster.account,
        "partition": cluster.partition,
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(cluster.gpus_per_node) if cluster.gpus_per_node else "",
        "time": "00:15:00",
        "job-name": "preflight",
        "cpu-bind": "none",
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value]
    code = cluster.code or str(ROOT)
    return ["srun", "--exclusive", *given, *_on_node(cluster, code, f"{cluster.shared}/preflight"), *arguments]


def step_command(cluster: Cluster, nodes: int, code: str, folder: str, min_level: int) -> list[str]:
    """What starts a preflight within the job that it is for, on all of its nodes.

    Args:
        cluster: says images, interpreters and GPUs.
        nodes: of the job.
        code: root of this package, as the nodes see it.
        folder: where the nodes meet, shared.
        min_level: isolation that the run asks of its sandboxes; not tried where these have an image of their own.
    """
    flags = [
        "--overlap",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--export=ALL",
    ]
    has_own_walls = bool(cluster.image_of("sandbox"))
    tried = ["--min-level", "0" if has_own_walls else str(min_level)]
    servers = [] if cluster.image_of("rollout") else ["--server-python", cluster.python_of("rollout")]
    return ["srun", *flags, *_on_node(cluster, code, folder), *servers, *tried]


def _on_node(cluster: Cluster, code: str, folder: str) -> list[str]:
    """Flags of a container, then the command of one node."""
    image = cluster.image_of("trainer")
    mounts = [f"{outside}:{inside}" for outside, inside in cluster.mounts.items()]
    container = [] if image else [f"--chdir={code}"]
    if image and cluster.runtime == "pyxis":
        container = [
            f"--container-image={image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={code}",
        ]
    elif image:
        container = ["apptainer", "exec", "--nv", *(f"--bind={mount}" for mount in mounts), f"--pwd={code}", image]
    inner = [cluster.python_of("trainer"), "-m", "launchers", "preflight", folder]
    if cluster.gpus_per_node:
        inner += ["--gpus", str(cluster.gpus_per_node)]
    if cluster.host_ip:
        inner += ["--host-ip", cluster.host_ip]
    return [*container, *inner]


def table(rows: Sequence[Finding]) -> str:
    """Columns for a terminal or a log; what is wrong is marked, and said at the end of its line."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        lines.append(f"{'WRONG' if row.problem else 'ok':5}  {cells}  {row.problem}".rstrip())
    wrong = sum(bool(row.problem) for row in rows)
    return "\n".join([*lines, f"{wrong} of {len(rows)} checks failed" if wrong else f"all {len(rows)} checks passed"])


def main(argv: Sequence[str]) -> int:
    """One node of a preflight, or from a login node all of them."""
    given = _parser().parse_args(argv)
    if given.where.endswith(".toml") or not (os.path.isabs(given.where) or os.path.isdir(given.where)):
        return _from_login_node(given, argv)
    try:
        options, is_own_folder = _options(given)
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    try:
        rows = run(options)
    except (LinkError, OSError) as error:
        print(f"preflight: node {options.node}: {error}", file=sys.stderr)
        return 1
    finally:
        if is_own_folder:
            shutil.rmtree(options.folder, ignore_errors=True)
    if options.node == 0:
        print(table(rows), flush=True)
    return int(any(row.problem for row in rows))


def _from_login_node(given: argparse.Namespace, argv: Sequence[str]) -> int:
    from launchers.cluster import load_cluster
    from megatron_distil.errors import ConfigError

    try:
        cluster = load_cluster(given.where)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    passed = [word for word in argv if word != given.where]
    command = srun_command(cluster, given.nodes or 1, _without(passed, "--nodes"))
    print("+", " ".join(command), file=sys.stderr, flush=True)
    try:
        return subprocess.run(command, env={**os.environ, **cluster.env_of("trainer")}, check=False).returncode
    except OSError as error:
        print(f"preflight: {error}; this command belongs on a login node of a Slurm cluster", file=sys.stderr)
        return 2


def _without(words: Sequence[str], option: str) -> list[str]:
    """The words without an option and its value."""
    kept = list(words)
    while option in kept:
        at = kept.index(option)
        del kept[at : at + 2]
    return [word for word in kept if not word.startswith(f"{option}=")]


def _options(given: argparse.Namespace) -> tuple[Options, bool]:
    """Of this node; and whether its folder is nobody else's."""
    env = os.environ
    nodes = given.nodes or int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    node = given.node if given.node >= 0 else int(env.get("SLURM_PROCID", "0"))
    if not 0 <= node < nodes:
        raise ValueError(f"--node {node}: there are {nodes} nodes; give 0 to {nodes - 1}")
    name = given.run or (f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '0')}" if "SLURM_JOB_ID" in env else "")
    if nodes > 1 and not name:
        raise ValueError("--run: several nodes have to agree on a name that was never used; try --run $(date +%s)")
    root = Path(given.where)
    if not name:
        root.mkdir(parents=True, exist_ok=True)
    folder = root / name if name else Path(tempfile.mkdtemp(prefix="one-node-", dir=root))
    pythons = {"trainer": given.python} | ({"server": given.server_python} if given.server_python else {})
    least = 10.0 if given.min_bus_gb_per_s is None and given.gpus else given.min_bus_gb_per_s or 0.0
    options = Options(
        folder=folder,
        node=node,
        nodes=nodes,
        host_ip=given.host_ip,
        pythons=pythons,
        wanted=Wanted(gpus=given.gpus, min_bus_bytes_per_s=least * 1e9, min_level=given.min_level),
        file_bytes=given.file_mib * 2**20,
        timeout_s=given.timeout_s,
    )
    return options, not name


def _parser() -> argparse.ArgumentParser:
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m launchers preflight", description=summary)
    add = parser.add_argument
    add(
        "where",
        metavar="CLUSTER|FOLDER",
        help="a cluster file or name, from a login node; else an absolute shared folder",
    )
    add("--nodes", type=int, default=0, help="how many [those of the Slurm step, or 1]")
    add("--node", type=int, default=-1, help="which of them this is [SLURM_PROCID, or 0]")
    add("--run", default="", help="name that all nodes share [job and step of Slurm]")
    add("--gpus", type=int, default=0, help="GPUs that every node must have [0]")
    add("--host-ip", default="", help="address of this node [asked of the routing table]")
    add("--python", default=sys.executable, help="of the trainer [this one]")
    add("--server-python", default="", help="of the servers, whose packages are compared too")
    add("--min-bus-gb-per-s", type=float, help="least bandwidth of the all-reduce [10 with GPUs, else 0]")
    add("--min-level", type=int, default=2, help="least isolation of the sandbox; 0: not tried [2]")
    add("--file-mib", type=int, default=64, help="written and read by every node [64]")
    add("--timeout-s", type=float, default=120.0, help="for each thing that others have to do [120]")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
