"""Which node and which GPUs every process of a run gets. Pure arithmetic, no file is read.

    nodes of the allocation   0 .. trainer .. | .. rollout .. | .. teacher .. | .. sandbox ..      each part may be empty

A role that lives on the nodes of another one has no part of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launchers.cluster import Cluster
from megatron_distil.config.check import is_supervised
from megatron_distil.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_distil.config.schema import Config


class Span(NamedTuple):
    """Consecutive nodes of the allocation."""

    first: int
    nodes: int


class Seat(NamedTuple):
    """The place of one service."""

    node: int
    """Index into the nodes of its role."""
    gpus: tuple[int, ...] = ()
    """Indices on the node; none where there are no GPUs, or none are needed."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The places of all processes."""

    nodes: int
    """Of the whole allocation."""
    ranks_per_node: int
    spans: Mapping[str, Span]
    """By role, the trainer first."""
    seats: Mapping[str, Seat]
    """By the name of the service."""


class Servers(NamedTuple):
    """Servers of one role."""

    role: str
    setting: str
    """What a user sets their number with."""
    number: int
    tp: int
    is_beside: bool
    """On the trainer's nodes."""


def layout(config: Config, cluster: Cluster) -> Layout:
    """Seats for every process.

    Raises:
        ConfigError: with everything that keeps the recipe from these nodes.
    """
    if found := list(problems(config, cluster)):
        raise ConfigError(found)
    train_nodes, ranks = trainer_nodes(config, cluster)
    spans, seats = {"trainer": Span(0, train_nodes)}, dict[str, Seat]()
    end, taken = train_nodes, ranks
    for servers in _servers(config, cluster):
        if servers.is_beside:
            nodes = min(train_nodes, servers.number)
            span, first_gpu = Span(0, nodes), taken
            taken += -(-servers.number // nodes) * servers.tp
        else:
            span, first_gpu = Span(end, _own_nodes(servers, cluster)), 0
            end += span.nodes
        spans[servers.role] = span
        for index in range(servers.number):
            first = first_gpu + index // span.nodes * servers.tp
            gpus = tuple(range(first, first + servers.tp)) if cluster.gpus_per_node else ()
            seats[f"{servers.role}-{index}"] = Seat(index % span.nodes, gpus)
    if count := _sandboxes(config):
        host = spans.get(cluster.placement.sandbox)
        span = Span(end, count) if host is None else Span(host.first, min(host.nodes, count))
        spans["sandbox"] = span
        end = max(end, span.first + span.nodes)
        seats |= {f"sandbox-{index}": Seat(index % span.nodes) for index in range(count)}
    return Layout(nodes=end, ranks_per_node=ranks, spans=spans, seats=seats)


def trainer_nodes(config: Config, cluster: Cluster) -> tuple[int, int]:
    """Nodes of the trainer, and ranks on each."""
    world = config.parallel.world_size
    nodes = -(-world // cluster.slots)
    return nodes, world // nodes


def problems(config: Config, cluster: Cluster) -> Iterator[Problem]:
    """Everything that keeps a recipe from the nodes of a cluster, each with a value that works."""
    parallel, slots = config.parallel, cluster.slots
    world = parallel.world_size
    on_node = f"{slots} {'GPUs' if cluster.gpus_per_node else 'processes'} of a node"
    found = list[Problem]()
    if parallel.tp > slots or (world > slots and slots % parallel.tp):
        reason = f"tensor-parallel ranks would talk over the boundary of the {on_node}"
        found.append(Problem("parallel.tp", parallel.tp, reason, f"Try {_divisor(slots, parallel.tp)}."))
    elif world > slots and world % slots:
        replica = world // parallel.dp
        reason = f"{world} ranks do not fill nodes of {slots}, and every node has to have as many"
        near = next((dp for dp in range(parallel.dp, 0, -1) if _is_even(dp * replica, slots)), 0)
        up = next(dp for dp in range(parallel.dp, parallel.dp + slots + 1) if _is_even(dp * replica, slots))
        hint = f"Try {near} or {up}." if near else f"Try {up}."
        found.append(Problem("parallel.dp", parallel.dp, reason, hint))
    servers = list(_servers(config, cluster))
    for one in servers:
        if one.tp > slots:
            reason = f"a server does not reach beyond the {on_node}"
            found.append(Problem(f"{one.setting}.engine_tp", one.tp, reason, f"Try {slots}."))
    if not found:
        found += _crowded(config, cluster, servers)
    if not found and cluster.max_nodes:
        found += _too_many(config, cluster, servers)
    yield from found


def _crowded(config: Config, cluster: Cluster, servers: list[Servers]) -> Iterator[Problem]:
    """Servers beside the ranks need GPUs that no rank uses."""
    nodes, free = trainer_nodes(config, cluster)
    free = cluster.slots - free
    for one in servers:
        if not one.is_beside:
            continue
        used = min(nodes, one.number)
        need = -(-one.number // used) * one.tp
        if need > free:
            room = free // one.tp * nodes
            reason = (
                f"{one.number} servers of {one.tp} need {need} of the {cluster.slots} on each of the trainer's {nodes} "
                f"nodes, and the ranks leave {max(free, 0)}"
            )
            hint = f" or {one.setting}.num_engines = {room}" if room else ""
            yield Problem(f"cluster.placement.{one.role}", "trainer", reason, f'Try "own"{hint}.')
        free -= need


def _too_many(config: Config, cluster: Cluster, servers: list[Servers]) -> Iterator[Problem]:
    needs = {"trainer": trainer_nodes(config, cluster)[0]}
    needs |= {one.role: _own_nodes(one, cluster) for one in servers if not one.is_beside}
    if _sandboxes(config) and cluster.placement.sandbox == "own":
        needs["sandbox"] = _sandboxes(config)
    if (total := sum(needs.values())) > cluster.max_nodes:
        parts = ", ".join(f"{role} {count}" for role, count in needs.items())
        reason = f"the recipe needs {total} nodes ({parts}), and a job may have {cluster.max_nodes}"
        yield Problem(
            "cluster.max_nodes",
            cluster.max_nodes,
            reason,
            "Lower parallel.dp, rollout.num_engines or rollout.engine_tp.",
        )


def _servers(config: Config, cluster: Cluster) -> Iterator[Servers]:
    if is_supervised(config):
        return
    rollout, teacher, placement = config.rollout, config.teacher, cluster.placement
    yield Servers("rollout", "rollout", rollout.num_engines, rollout.engine_tp, placement.rollout == "trainer")
    if config.has_expert:
        yield Servers("teacher", "teacher", teacher.num_engines, teacher.engine_tp, placement.teacher == "trainer")


def _sandboxes(config: Config) -> int:
    return 0 if is_supervised(config) else config.feedback.num_sandboxes


def _own_nodes(servers: Servers, cluster: Cluster) -> int:
    return -(-servers.number // (cluster.slots // servers.tp))


def _is_even(world: int, slots: int) -> bool:
    return world <= slots or world % slots == 0


def _divisor(value: int, largest: int) -> int:
    return next(candidate for candidate in range(min(value, largest), 0, -1) if value % candidate == 0)
