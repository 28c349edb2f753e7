"""What a run needs: processes by role, memory of each part, bytes that travel. Pure arithmetic; reads only ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distil.config.schema import Config, TeacherConfig
from megatron_distil.errors import DataError, Problem

BYTES_BY_DTYPE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions that memory depends on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Of one expert, where there are experts."""
    experts: int
    """1 for a dense model."""
    vocab: int
    is_tied: bool
    """Embedding and head are one matrix."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelShape:
        """Read from a model in Hugging Face's format.

        Raises:
            DataError: there is no ``config.json``, or something is missing in it.
        """
        path = Path(folder) / "config.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; sizes come from the model's own files, give a local folder"
            ) from error
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        return cls.from_table(table, source=str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, source: str) -> ModelShape:
        """Read from the content of a ``config.json``.

        Raises:
            DataError: a dimension is missing.
        """

        def size(*names: str) -> int:
            for name in names:
                if isinstance(value := table.get(name), int):
                    return value
            raise DataError(f"{source}: has no {' or '.join(names)}")

        heads, experts = size("num_attention_heads"), table.get("num_experts") or table.get("num_local_experts") or 1
        return cls(
            layers=size("num_hidden_layers"),
            hidden=size("hidden_size"),
            heads=heads,
            kv_heads=size("num_key_value_heads") if table.get("num_key_value_heads") else heads,
            head_dim=size("head_dim") if table.get("head_dim") else size("hidden_size") // heads,
            ffn=size("moe_intermediate_size", "intermediate_size") if experts > 1 else size("intermediate_size"),
            experts=experts,
            vocab=size("vocab_size"),
            is_tied=bool(table.get("tie_word_embeddings", False)),
        )

    @property
    def layer_parameters(self) -> int:
        """Of one transformer layer; biases are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + 3 * self.hidden * self.ffn * self.experts + router + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        matrices = 1 if self.is_tied else 2
        return self.layers * self.layer_parameters + matrices * self.vocab * self.hidden + self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing that takes room."""

    name: str
    bytes: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a run needs."""

    parameters: int
    processes_by_role: Mapping[str, int]
    trainer: tuple[Part, ...]
    """Memory of the fullest rank."""
    engine: tuple[Part, ...]
    """Memory of one process of a server."""
    step: tuple[Part, ...]
    """Bytes that a step makes or moves."""


def problems(config: Config, shape: ModelShape) -> Iterator[Problem]:
    """What is wrong with a configuration for a model of this shape."""
    parallel = config.parallel
    if shape.heads % parallel.tp:
        yield Problem(
            "parallel.tp",
            parallel.tp,
            f"the model has {shape.heads} attention heads",
            f"Try {_divisor(shape.heads, parallel.tp)}.",
        )
    elif shape.kv_heads % parallel.tp and parallel.tp % shape.kv_heads:
        yield Problem(
            "parallel.tp",
            parallel.tp,
            f"the model has {shape.kv_heads} heads of keys and values",
            f"Try {_divisor(shape.kv_heads, parallel.tp)}.",
        )
    if shape.layers % parallel.pp:
        yield Problem(
            "parallel.pp",
            parallel.pp,
            f"the model has {shape.layers} layers",
            f"Try {_divisor(shape.layers, parallel.pp)}.",
        )
    if shape.heads % config.rollout.engine_tp:
        yield Problem(
            "rollout.engine_tp",
            config.rollout.engine_tp,
            f"the model has {shape.heads} attention heads",
            f"Try {_divisor(shape.heads, config.rollout.engine_tp)}.",
        )
    if config.objective.needs_teacher and config.teacher.support != "full" and config.teacher.top_k >= shape.vocab:
        reason = f"the model knows {shape.vocab} tokens, and at least one has to lie outside the support"
        yield Problem("teacher.top_k", config.teacher.top_k, reason, f"Try {min(100, shape.vocab // 2)}.")


def sizes(config: Config, shape: ModelShape) -> Sizes:
    """What a configuration needs for a model of this shape."""
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
        trainer=tuple(_trainer(config, shape)),
        engine=tuple(_engine(config, shape)),
        step=tuple(_step(config, shape)),
    )


def _trainer(config: Config, shape: ModelShape) -> Iterator[Part]:
    parallel, train = config.parallel, config.train
    wide = BYTES_BY_DTYPE[train.dtype]
    matrices = 2 if parallel.pp == 1 and not shape.is_tied else 1
    held = (shape.layers // parallel.pp * shape.layer_parameters + matrices * shape.vocab * shape.hidden) / parallel.tp
    shards = parallel.dp * parallel.cp if train.is_distributed_optimizer else 1
    yield Part(name="weights", bytes=wide * held, why=f"{held:,.0f} parameters in {train.dtype}")
    yield Part(name="gradients", bytes=4 * held, why="added up in float32")
    if wide < 4:
        yield Part(name="main weights", bytes=4 * held / shards, why=f"float32, over {shards} ranks")
    yield Part(name="optimizer", bytes=8 * held / shards, why=f"two moments in float32, over {shards} ranks")
    if config.objective.needs_teacher and not config.has_expert:
        yield from _teacher(config.teacher, held, wide)
    tokens = train.max_microbatch_tokens / parallel.cp
    kept = _activations(config, shape, tokens) * wide / 2
    yield Part(name="activations", bytes=kept, why=f"estimate, {tokens:,.0f} tokens, recompute = {train.recompute}")


def _teacher(teacher: TeacherConfig, held: float, wide: int) -> Iterator[Part]:
    if teacher.weights == "ema":
        yield Part(name="teacher", bytes=4 * held, why="average in float32")
    elif teacher.weights != "live":
        yield Part(name="teacher", bytes=wide * held, why="the first student")
    if teacher.weights != "live":
        yield Part(name="student, set aside", bytes=wide * held, why="while the teacher's weights lie in its buffers")


def _activations(config: Config, shape: ModelShape, tokens: float) -> float:
    """Bytes in 16 bit (arXiv:2205.05198, without the attention matrix, which no kernel of ours keeps)."""
    parallel, train = config.parallel, config.train
    layers = shape.layers // parallel.pp
    shared = parallel.tp if parallel.sequence_parallel else 1
    per_layer = tokens * shape.hidden * (10 / shared + 24 / parallel.tp)
    in_flight = parallel.pp  # microbatches that the first stage of 1F1B has begun and not ended
    if train.recompute == "full":
        return layers * in_flight * tokens * shape.hidden * 2 / shared + per_layer
    return layers * in_flight * per_layer


def _engine(config: Config, shape: ModelShape) -> Iterator[Part]:
    rollout = config.rollout
    wide = BYTES_BY_DTYPE[rollout.engine_dtype]
    yield Part(name="weights", bytes=wide * shape.parameters / rollout.engine_tp, why=rollout.engine_dtype)
    total = rollout.prompts_per_step * rollout.samples_per_prompt
    in_flight = min(rollout.concurrency, -(-total // rollout.num_engines))
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * wide / min(rollout.engine_tp, shape.kv_heads)
    why = f"at most {in_flight} requests of {length:,} tokens, {cache:,.0f} bytes each"
    yield Part(name="keys and values", bytes=cache * in_flight * length, why=why)


def _step(config: Config, shape: ModelShape) -> Iterator[Part]:
    rollout, wide = config.rollout, BYTES_BY_DTYPE[config.train.dtype]
    buckets = -(-wide * shape.parameters // config.sync.bucket_bytes)
    why = f"about {buckets} buckets, to {rollout.num_engines} engines"
    yield Part(name="publication", bytes=float(wide * shape.parameters), why=why)
    if config.objective.needs_teacher:
        width = shape.vocab if config.teacher.support == "full" else config.teacher.top_k
        width = width if config.objective.needs_support else 0
        tokens = (
            rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_response_tokens // config.parallel.dp
        )
        why = f"at most {tokens:,} tokens with {width:,} entries of 8 bytes"
        yield Part(name="targets of a replica", bytes=8.0 * width * tokens, why=why)
    saved = wide * shape.parameters + 12 * shape.parameters
    saved += 4 * shape.parameters if config.objective.needs_teacher and config.teacher.weights == "ema" else 0
    why = f"every {config.checkpoint.every_steps} steps, the last {config.checkpoint.keep_last} are kept"
    yield Part(name="checkpoint", bytes=float(saved), why=why)


def human(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _divisor(value: int, largest: int) -> int:
    return next(candidate for candidate in range(min(value, largest), 0, -1) if value % candidate == 0)
