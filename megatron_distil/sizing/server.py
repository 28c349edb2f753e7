"""Memory of a process of a server, and how many requests it holds at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_distil.config.schema import Config
from megatron_distil.sizing.machine import CONTEXT_BYTES, Machine
from megatron_distil.sizing.parts import BYTES_BY_DTYPE, Part
from megatron_distil.sizing.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one server holds beside its weights."""

    tokens: int
    """Whose keys and values fit; 0 where not even the weights do."""
    requests: int
    """Of full length."""


def capacity(shape: ModelShape, machine: Machine, *, tp: int, wide: int, length: int) -> Capacity:
    """Tokens = (share of the memory - weights / tp) / bytes of a token's keys and values on a rank."""
    room = machine.server_frac * machine.gpu.memory_bytes - server_weight_bytes(shape, tp=tp, wide=wide)
    tokens = max(0, int(room // shape.kv_bytes(tp=tp, wide=wide)))
    return Capacity(tokens=tokens, requests=tokens // length)


def server_weight_bytes(shape: ModelShape, *, tp: int, wide: int) -> float:
    """Of one process; fewer heads of keys and values than processes are held more than once."""
    copies = max(tp, shape.kv_heads) / shape.kv_heads
    kv = 2 * shape.layers * shape.hidden * shape.kv_width
    return wide * (shape.parameters + (copies - 1) * kv) / tp


def engine_parts(config: Config, shape: ModelShape) -> tuple[Part, ...]:
    """Memory of one process of an engine."""
    rollout = config.rollout
    found = _parts(
        shape,
        rollout.engine_dtype,
        tp=rollout.engine_tp,
        in_flight=requests_in_flight(config),
        length=request_tokens(config),
    )
    return tuple(found)


def expert_parts(config: Config, shape: ModelShape) -> tuple[Part, ...]:
    """Memory of one process of the expert's servers."""
    rollout, teacher = config.rollout, config.teacher
    total = rollout.prompts_per_step * rollout.samples_per_prompt
    found = _parts(
        shape,
        rollout.engine_dtype,
        tp=teacher.engine_tp,
        in_flight=min(rollout.concurrency, -(-total // teacher.num_engines)),
        length=teacher.max_context_tokens + rollout.max_response_tokens,
    )
    return tuple(found)


def _parts(shape: ModelShape, dtype: str, *, tp: int, in_flight: int, length: int) -> Iterator[Part]:
    wide = BYTES_BY_DTYPE[dtype]
    yield Part(name="weights", bytes=server_weight_bytes(shape, tp=tp, wide=wide), why=dtype)
    each = shape.kv_bytes(tp=tp, wide=wide)
    why = f"at most {in_flight} requests of {length:,} tokens, {each:,.0f} bytes each"
    yield Part(name="keys and values", bytes=each * in_flight * length, why=why)
    yield Part(name="context", bytes=float(CONTEXT_BYTES), why="CUDA and libraries, estimate")


def request_tokens(config: Config) -> int:
    """The longest request to an engine."""
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def requests_in_flight(config: Config) -> int:
    """In one engine at a time, at most."""
    rollout = config.rollout
    total = rollout.prompts_per_step * rollout.samples_per_prompt
    return min(rollout.concurrency, -(-total // rollout.num_engines))
