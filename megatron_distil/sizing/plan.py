"""What a configuration needs, whether it fits, and the nearest layout that does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from megatron_distil.config import check
from megatron_distil.config.check import is_supervised
from megatron_distil.config.schema import Config
from megatron_distil.errors import Problem
from megatron_distil.sizing.layout import Layout
from megatron_distil.sizing.machine import H200_NODES, Machine
from megatron_distil.sizing.parts import BYTES_BY_DTYPE, Part, Span, human, peak
from megatron_distil.sizing.server import Capacity, capacity, engine_parts, expert_parts, request_tokens
from megatron_distil.sizing.shape import ModelShape
from megatron_distil.sizing.step import step_parts, step_spans
from megatron_distil.sizing.trainer import trainer_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a run needs."""

    parameters: int
    processes_by_role: Mapping[str, int]
    trainer: tuple[Part, ...]
    """Memory of the fullest rank."""
    engine: tuple[Part, ...]
    """Memory of one process of an engine."""
    teacher: tuple[Part, ...]
    """Memory of one process of the expert's servers; empty where its shape is not known."""
    capacity: Capacity
    """Of one engine, on GPUs."""
    step: tuple[Part, ...]
    """Bytes that a step makes or moves."""
    spans: tuple[Span, ...]
    """Seconds of a step, on GPUs."""


def problems(config: Config, shape: ModelShape, *, ep: int = 1) -> Iterator[Problem]:
    """What is wrong with a configuration for a model of this shape."""
    parallel = config.parallel
    replicas = parallel.tp * parallel.cp * parallel.dp
    if shape.experts % ep or replicas % ep:
        reason = f"has to divide the {shape.experts} experts and the {replicas} ranks of a pipeline stage"
        yield Problem("--ep", ep, reason, f"Try {math.gcd(shape.experts, replicas, ep)}.")
    heads, kv_heads = f"{shape.heads} attention heads", f"{shape.kv_heads} heads of keys and values"
    if shape.heads % parallel.tp:
        yield _indivisible("parallel.tp", parallel.tp, shape.heads, heads)
    elif shape.kv_heads % parallel.tp:
        yield _indivisible("parallel.tp", parallel.tp, shape.kv_heads, kv_heads)
    if shape.layers % parallel.pp:
        yield _indivisible("parallel.pp", parallel.pp, shape.layers, f"{shape.layers} layers")
    if shape.heads % config.rollout.engine_tp:
        yield _indivisible("rollout.engine_tp", config.rollout.engine_tp, shape.heads, heads)
    if config.objective.needs_teacher and config.teacher.support != "full" and config.teacher.top_k >= shape.vocab:
        reason = f"the model knows {shape.vocab} tokens, and at least one has to lie outside the support"
        yield Problem("teacher.top_k", config.teacher.top_k, reason, f"Try {min(100, shape.vocab // 2)}.")


def _indivisible(field: str, value: int, count: int, what: str) -> Problem:
    return Problem(field, value, f"the model has {what}", f"Try {_divisor(count, value)}.")


def sizes(
    config: Config,
    shape: ModelShape,
    machine: Machine = H200_NODES,
    *,
    ep: int = 1,
    expert: ModelShape | None = None,
) -> Sizes:
    """What a configuration needs for a model of this shape.

    Args:
        config: of the run.
        shape: of the student.
        machine: where it runs; memory on a CPU is the same but for NCCL and the context.
        ep: ranks that share the experts of a layer.
        expert: shape of the teacher, where it is another model.
    """
    layout = Layout.of(config.parallel, ep=ep)
    engines = config.rollout.num_engines * config.rollout.engine_tp
    experts = config.teacher.num_engines * config.teacher.engine_tp if config.has_expert else 0
    return Sizes(
        parameters=shape.parameters,
        processes_by_role={
            "trainer": config.parallel.world_size,
            "engine": engines,
            "teacher": experts,
            "sandbox": config.feedback.num_sandboxes,
        },
        trainer=trainer_parts(config, shape, layout),
        engine=engine_parts(config, shape),
        teacher=expert_parts(config, expert) if expert else (),
        capacity=_capacity(config, shape, machine, tp=config.rollout.engine_tp),
        step=tuple(step_parts(config, shape, layout)),
        spans=tuple(step_spans(config, shape, layout, machine)),
    )


def shortfalls(config: Config, shape: ModelShape, machine: Machine, *, ep: int = 1) -> Iterator[Problem]:
    """What of a configuration does not fit into the GPUs, each with the nearest setting that does."""
    need, usable = _need(config, shape, ep), machine.usable_frac * machine.gpu.memory_bytes
    if need > usable:
        reason = f"a trainer rank needs {human(need)}, and {human(usable)} of a {machine.gpu.name} can be used"
        settings = nearest(config, shape, machine, ep=ep)
        hint = f"Try {' '.join(settings)}." if settings else "No layout of eight times as many ranks fits."
        yield Problem("parallel", _text(config), reason, hint)
    if is_supervised(config):
        return
    room, tp = _capacity(config, shape, machine, tp=config.rollout.engine_tp), config.rollout.engine_tp
    if room.requests:
        return
    fitting = next(
        (n for n in _server_sizes(shape) if n > tp and _capacity(config, shape, machine, tp=n).requests), None
    )
    reason = (
        f"beside the weights there is room for {room.tokens:,} tokens, and one request has {request_tokens(config):,}"
    )
    yield Problem("rollout.engine_tp", tp, reason, f"Try {fitting}." if fitting else "No server of one node holds it.")


def nearest(config: Config, shape: ModelShape, machine: Machine, *, ep: int = 1) -> tuple[str, ...]:
    """The overrides that make a trainer rank fit and change least; none where no layout does.

    Near is few doublings of the sizes of groups and of the world, which count twice, and recomputing before another world.
    """
    usable = machine.usable_frac * machine.gpu.memory_bytes
    eps = [ep * 2**doublings for doublings in range(7 if shape.experts > 1 else 1)]
    near = [
        (distance + math.log2(wider / ep), wider, candidate)
        for distance, candidate in _candidates(config, shape, machine)
        for wider in eps
    ]
    for _, wider, candidate in sorted(near, key=lambda one: one[0]):
        if any(problems(candidate, shape, ep=wider)) or _need(candidate, shape, wider) > usable:
            continue
        if not any(check.problems(candidate)):
            return (*_changes(config, candidate), *([f"--ep={wider}"] if wider != ep else []))
    return ()


def _candidates(config: Config, shape: ModelShape, machine: Machine) -> Iterator[tuple[float, Config]]:
    old, recomputes = config.parallel, {config.train.recompute, "full"}
    tps = [size for size in _server_sizes(shape) if size <= machine.gpus_per_node and shape.kv_heads % size == 0]
    pps = [size for size in range(1, 17) if shape.layers % size == 0]
    for tp, pp, cp, growth, recompute in product(tps, pps, (1, 2, 4, 8), (1, 2, 4, 8), sorted(recomputes)):
        world = old.world_size * growth
        if world % (tp * pp * cp):
            continue
        new = {"tp": tp, "pp": pp, "cp": cp, "dp": world // (tp * pp * cp), "sequence_parallel": tp > 1}
        parallel = old.model_copy(update=new)
        train = config.train.model_copy(update={"recompute": recompute})
        distance = sum(abs(math.log2(new[axis] / getattr(old, axis))) for axis in ("tp", "pp", "cp", "dp"))
        distance += 2 * math.log2(growth) + (1.5 if recompute != config.train.recompute else 0.0)
        distance += 0.25 * (parallel.sequence_parallel != old.sequence_parallel)
        yield distance, config.model_copy(update={"parallel": parallel, "train": train})


def _changes(old: Config, new: Config) -> Iterator[str]:
    for axis in ("tp", "pp", "cp", "dp"):
        if (value := getattr(new.parallel, axis)) != getattr(old.parallel, axis):
            yield f"parallel.{axis}={value}"
    if new.parallel.sequence_parallel != old.parallel.sequence_parallel:
        yield f"parallel.sequence_parallel={str(new.parallel.sequence_parallel).lower()}"
    if new.train.recompute != old.train.recompute:
        yield f"train.recompute={new.train.recompute}"


def _need(config: Config, shape: ModelShape, ep: int) -> float:
    return peak(trainer_parts(config, shape, Layout.of(config.parallel, ep=ep)))


def _capacity(config: Config, shape: ModelShape, machine: Machine, *, tp: int) -> Capacity:
    wide = BYTES_BY_DTYPE[config.rollout.engine_dtype]
    return capacity(shape, machine, tp=tp, wide=wide, length=request_tokens(config))


def _server_sizes(shape: ModelShape) -> list[int]:
    """Tensor-parallel sizes of a server: beyond the heads of keys and values these are held more than once."""
    return [
        size
        for size in (1, 2, 4, 8, 16)
        if shape.heads % size == 0 and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)
    ]


def _text(config: Config) -> str:
    parallel = config.parallel
    return f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {parallel.dp}"


def _divisor(value: int, largest: int) -> int:
    return next(candidate for candidate in range(min(value, largest), 0, -1) if value % candidate == 0)
