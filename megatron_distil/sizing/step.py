"""Bytes that a step moves, and how long it takes by a roofline.

Every response is counted at full length. A phase takes the time of what bounds it, at the shares of ``Machine`` of what
the data sheet promises; phases do not overlap, and neither does communication with computation: an upper guess under
its assumptions, good for comparing layouts. Nothing is counted for feedback, tokenisation and packing.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_distil.config.check import is_supervised
from megatron_distil.config.schema import Config
from megatron_distil.sizing.layout import Layout, held
from megatron_distil.sizing.machine import Machine
from megatron_distil.sizing.parts import BYTES_BY_DTYPE, Part, Span
from megatron_distil.sizing.server import capacity, request_tokens, requests_in_flight
from megatron_distil.sizing.shape import ModelShape


def step_parts(config: Config, shape: ModelShape, layout: Layout) -> Iterator[Part]:
    """Bytes that a step makes or moves."""
    rollout, wide = config.rollout, BYTES_BY_DTYPE[config.train.dtype]
    buckets = -(-wide * shape.parameters // config.sync.bucket_bytes)
    why = f"about {buckets} buckets, to {rollout.num_engines} engines"
    yield Part(name="publication", bytes=float(wide * shape.parameters), why=why)
    if config.objective.needs_teacher:
        width = shape.vocab if config.teacher.support == "full" else config.teacher.top_k
        width = width if config.objective.needs_support else 0
        tokens = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_response_tokens // layout.dp
        why = f"at most {tokens:,} tokens with {width:,} entries of 8 bytes"
        yield Part(name="targets of a replica", bytes=8.0 * width * tokens, why=why)
    saved = wide * shape.parameters + 12 * shape.parameters
    saved += 4 * shape.parameters if config.objective.needs_teacher and config.teacher.weights == "ema" else 0
    why = f"every {config.checkpoint.every_steps} steps, the last {config.checkpoint.keep_last} are kept"
    yield Part(name="checkpoint", bytes=float(saved), why=why)


def step_spans(config: Config, shape: ModelShape, layout: Layout, machine: Machine) -> Iterator[Span]:
    """Seconds of a step, phase by phase."""
    if is_supervised(config):
        length = config.train.max_microbatch_tokens
        yield from _update(config, shape, layout, machine, rows=config.sft.documents_per_step, length=length)
        return
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    yield _generation(config, shape, machine)
    if config.objective.needs_teacher and not config.has_expert:
        length = config.teacher.max_context_tokens + config.rollout.max_response_tokens
        passes = 2 if config.teacher.support == "student" or config.teacher.weights == "trust_region" else 1
        yield _forward("scoring", shape, layout, machine, rows=passes * rows, length=length)
    length = request_tokens(config)
    if config.train.updates_per_step > 1 or config.objective.needs_baseline:
        yield _forward("old log-probabilities", shape, layout, machine, rows=rows, length=length)
    yield from _update(config, shape, layout, machine, rows=rows, length=length)
    yield _publication(config, shape, machine)


def _generation(config: Config, shape: ModelShape, machine: Machine) -> Span:
    """Per token of a response max(2 N B / F, (weights + cache) / bandwidth) on each of tp GPUs, and the prompts before."""
    rollout, gpu = config.rollout, machine.gpu
    tp, wide, length = rollout.engine_tp, BYTES_BY_DTYPE[rollout.engine_dtype], request_tokens(config)
    requests = -(-rollout.prompts_per_step * rollout.samples_per_prompt // rollout.num_engines)
    room = capacity(shape, machine, tp=tp, wide=wide, length=length).requests
    batch = max(1, min(requests_in_flight(config), room))
    flops = machine.compute_efficiency * gpu.flops * tp
    bandwidth = machine.memory_efficiency * gpu.memory_bytes_per_s
    average = rollout.max_prompt_tokens + rollout.max_response_tokens / 2
    compute = (2 * shape.active_parameters + shape.attention_flops(average)) * batch / flops
    read = wide * read_parameters(shape, batch) / tp + batch * average * shape.kv_bytes(tp=tp, wide=wide)
    prompts = -(-rollout.prompts_per_step // rollout.num_engines)  # samples share the cache of their prompt
    prefill = 2 * shape.active_parameters * prompts * rollout.max_prompt_tokens / flops
    each = max(compute, read / bandwidth)
    waves = -(-requests // batch)
    why = f"{waves} x {rollout.max_response_tokens:,} tokens of {1e3 * each:.1f} ms, {batch} requests at a time"
    return Span(name="generation", seconds=prefill + waves * rollout.max_response_tokens * each, why=why)


def read_parameters(shape: ModelShape, batch: int) -> float:
    """Parameters that ``batch`` tokens meet together: of E experts E (1 - (1 - k/E)^batch), if all are as likely."""
    met = shape.experts * (1 - (1 - shape.active_experts / shape.experts) ** batch)
    missed = (shape.experts - met) * shape.expert_parameters * shape.layers
    return shape.parameters - missed - (0 if shape.is_tied else shape.embedding_parameters)


def _forward(name: str, shape: ModelShape, layout: Layout, machine: Machine, *, rows: int, length: int) -> Span:
    seconds = _compute_seconds(shape, layout, machine, rows=rows, length=length, passes=1)
    return Span(name=name, seconds=seconds, why=f"{rows:,} sequences of {length:,} tokens, forward")


def _compute_seconds(
    shape: ModelShape, layout: Layout, machine: Machine, *, rows: int, length: int, passes: int
) -> float:
    """(2 N + attention) x passes of all tokens, over all ranks; and two rings of a layer's tokens over tp per pass."""
    tokens = rows * length
    flops = tokens * (2 * shape.active_parameters + shape.attention_flops(length / 2))
    compute = passes * flops / (machine.compute_efficiency * machine.gpu.flops * layout.world_size)
    travelled = 2 * passes * 2 * shape.layers * tokens * shape.hidden * 2 * (layout.tp - 1) / layout.tp
    replicas = layout.cp * layout.dp * layout.pp
    return compute + travelled / (replicas * machine.ring_bytes_per_s(layout.tp))


def _update(
    config: Config, shape: ModelShape, layout: Layout, machine: Machine, *, rows: int, length: int
) -> Iterator[Span]:
    """Forward, backward of twice the products, and one more forward where everything is computed again."""
    passes = 4 if config.train.recompute == "full" else 3
    microbatches = max(1, rows * length // (layout.dp * config.train.max_microbatch_tokens))
    bubble = 1 + (layout.pp - 1) / microbatches
    seconds = bubble * _compute_seconds(shape, layout, machine, rows=rows, length=length, passes=passes)
    why = f"{rows:,} sequences of {length:,} tokens, {passes} forwards' products, pipeline x {bubble:.2f}"
    yield Span(name="update", seconds=seconds, why=why)
    replicas = layout.dp * layout.cp
    if replicas > 1:
        own = held(shape, layout, stage=0).count * (replicas - 1) / replicas
        updates = 1 if is_supervised(config) else config.train.updates_per_step
        reduced = (4 + BYTES_BY_DTYPE[config.train.dtype]) * own * updates
        speed = machine.ring_bytes_per_s(layout.tp * replicas)
        yield Span(
            name="gradients and weights", seconds=reduced / speed, why=f"reduced and gathered over {replicas} ranks"
        )


def _publication(config: Config, shape: ModelShape, machine: Machine) -> Span:
    """Gathered in the node of the first head, then one broadcast over the network; or written, and read by the engines."""
    moved = BYTES_BY_DTYPE[config.train.dtype] * shape.parameters
    if config.sync.sink == "disk":
        why = f"written and read at {machine.disk_bytes_per_s / 1e9:.0f} GB/s"
        return Span(name="publication", seconds=2 * moved / machine.disk_bytes_per_s, why=why)
    network = machine.link_efficiency * machine.network_bytes_per_s
    seconds = moved / machine.ring_bytes_per_s(1) + moved / network
    snapshot = ", beside the snapshot" if config.sync.snapshot else ""
    return Span(name="publication", seconds=seconds, why=f"one broadcast at {network / 1e9:.0f} GB/s{snapshot}")
