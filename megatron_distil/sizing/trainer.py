"""Memory of a trainer rank, part by part.

Weights, gradients, main weights and moments are counted from the layout. Activations are counted from the tensors that
autograd keeps, with their formulas beside them. NCCL and the context are estimates (``machine.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_distil.config.schema import Config
from megatron_distil.sizing.layout import Held, Layout, held
from megatron_distil.sizing.machine import CONTEXT_BYTES, NCCL_GROUP_BYTES
from megatron_distil.sizing.parts import BYTES_BY_DTYPE, Part, peak
from megatron_distil.sizing.shape import ModelShape

# trainer/head/passes.py and trainer/head/columns.py, which need torch; a test holds these to them
HEAD_BUFFER_BYTES = 2**27
HEAD_LEAST_CHUNK = 4096
SCORES_BUFFER_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How often autograd keeps the parts of a token in a layer; the norms' inputs and outputs it keeps once each."""

    query: int
    key_value: int
    """Of keys and values, each counted as one."""
    ffn: int


KEPT_ON_GPU = Kept(query=4, key_value=4, ffn=5)
"""TransformerEngine with q/k norm: q, k, v as the product left them, q in order, q and k rotated, v, the result. The gate
without Megatron's fusion: the product of 2 F, its activated half, its other half, what the second product takes."""
KEPT_ON_CPU = Kept(query=5, key_value=4, ffn=5)
"""``trainer/attention.py``, which also keeps the result in its slots."""


def trainer_parts(config: Config, shape: ModelShape, layout: Layout) -> tuple[Part, ...]:
    """Memory of the fullest rank: of the first pipeline stage, or of the last."""
    stages = [tuple(stage_parts(config, shape, layout, stage=stage)) for stage in sorted({0, layout.pp - 1})]
    return max(stages, key=peak)


def stage_parts(config: Config, shape: ModelShape, layout: Layout, *, stage: int) -> Iterator[Part]:
    """Memory of a rank of one pipeline stage."""
    own = held(shape, layout, stage=stage)
    yield from _states(config, layout, own)
    yield from _teacher(config, own)
    yield from _activations(config, shape, layout, stage=stage)
    if stage == layout.pp - 1:
        yield from _head(config, shape, layout)
    yield from _publication(config, shape)
    reason = f"{layout.groups} communicators, estimate"
    yield Part(name="NCCL", bytes=float(layout.groups * NCCL_GROUP_BYTES), why=reason)
    yield Part(name="context", bytes=float(CONTEXT_BYTES), why="CUDA and libraries, estimate")


def _states(config: Config, layout: Layout, own: Held) -> Iterator[Part]:
    """2 + 4 + (4 + 8) / shards bytes per parameter in bfloat16, 4 + 4 + 8 / shards in float32."""
    train, wide = config.train, BYTES_BY_DTYPE[config.train.dtype]
    yield Part(name="weights", bytes=wide * own.count, why=f"{own.count:,.0f} parameters in {train.dtype}")
    yield Part(name="gradients", bytes=4 * own.count, why="added up in float32")
    shards, expert_shards = 1, 1
    if train.is_distributed_optimizer:
        shards = layout.dp * layout.cp
        expert_shards = layout.tp * shards // layout.ep
    sharded = own.shared / shards + own.experts / expert_shards
    over = f"over {shards} ranks" + (f", experts over {expert_shards}" if own.experts else "")
    if wide < 4:
        yield Part(name="main weights", bytes=4 * sharded, why=f"float32, {over}")
    yield Part(name="optimizer", bytes=8 * sharded, why=f"two moments in float32, {over}")


def _teacher(config: Config, own: Held) -> Iterator[Part]:
    if not config.objective.needs_teacher or config.has_expert:
        return
    weights, wide = config.teacher.weights, BYTES_BY_DTYPE[config.train.dtype]
    if weights == "ema":
        yield Part(name="teacher", bytes=4 * own.count, why="average in float32")
    elif weights != "live":
        yield Part(name="teacher", bytes=wide * own.count, why="the first student")
    if weights != "live":
        why = "while the teacher's weights lie in its buffers"
        yield Part(name="student, set aside", bytes=wide * own.count, why=why, phase="scoring")


def _activations(config: Config, shape: ModelShape, layout: Layout, *, stage: int) -> Iterator[Part]:
    train, wide = config.train, BYTES_BY_DTYPE[config.train.dtype]
    tokens, layers = train.max_microbatch_tokens / layout.cp, shape.layers // layout.pp
    each = layer_bytes(shape, layout, tokens, wide=wide, kept=KEPT_ON_GPU)
    in_flight = layout.pp - stage  # microbatches that a stage of 1F1B has begun and not ended
    kept = in_flight * forward_bytes(config, shape, layout, tokens, stage=stage, kept=KEPT_ON_GPU)
    why = f"{tokens:,.0f} tokens, {layers} layers x {in_flight} in flight"
    if train.recompute == "full":
        kept += each
        why = f"{tokens:,.0f} tokens, inputs of {layers} layers x {in_flight} in flight, and one layer"
    yield Part(name="activations", bytes=kept, why=why, phase="update")
    if config.objective.needs_teacher and not config.has_expert:
        why = f"{tokens:,.0f} tokens, one layer"
        yield Part(name="activations without gradient", bytes=each, why=why, phase="scoring")


def forward_bytes(config: Config, shape: ModelShape, layout: Layout, tokens: float, *, stage: int, kept: Kept) -> float:
    """What the forward of one microbatch keeps on a stage: its layers, or their inputs, and the last norm's input.

    "selective" recomputes core attention, of which these kernels keep no matrix of scores: it gains nothing.
    """
    wide = BYTES_BY_DTYPE[config.train.dtype]
    residual = wide * tokens * shape.hidden / layout.residual_share
    is_input_only = config.train.recompute == "full"
    each = residual if is_input_only else layer_bytes(shape, layout, tokens, wide=wide, kept=kept)
    return shape.layers // layout.pp * each + (residual if stage == layout.pp - 1 else 0.0)


def layer_bytes(shape: ModelShape, layout: Layout, tokens: float, *, wide: int, kept: Kept) -> float:
    """What one layer keeps for its backward.

    Entries of ``wide`` bytes, per token: 4 H / t' (inputs and outputs of two norms) + (n_q Q + n_kv K) / t (attention, with
    queries of width Q and keys of width K) + n_f F / t. t' is t with sequence parallelism, else 1. In a mixture each of a
    token's experts keeps n_f F and its input. Besides 4 bytes a head, and 8 a router's choice.

    Source of the method: arXiv:2205.05198, section 4.1.
    """
    residual = 4 * shape.hidden / layout.residual_share
    attention = (kept.query * shape.query_width + kept.key_value * shape.kv_width) / layout.tp
    sums = 4 * shape.heads / layout.tp
    if shape.experts == 1:
        return tokens * (wide * (residual + attention + kept.ffn * shape.ffn / layout.tp) + sums)
    # tokens of other ranks come in, as many as leave: a balanced router
    routed = shape.active_experts * (kept.ffn * shape.ffn + shape.hidden) / layout.residual_share
    return tokens * (wide * (residual + attention + routed) + sums + 8 * shape.experts / layout.residual_share)


def _head(config: Config, shape: ModelShape, layout: Layout) -> Iterator[Part]:
    """Of the one-pass head: a chunk's exponentials and its logits; the gradient of the layer goes to the gradients."""
    train, wide = config.train, BYTES_BY_DTYPE[config.train.dtype]
    tokens = train.max_microbatch_tokens / layout.cp
    columns = -(-shape.vocab // layout.tp)
    if train.head == "plain":
        yield Part(name="logits", bytes=3 * 4 * tokens * columns, why="float32, softmax and gradient", phase="update")
    else:
        rows = min(tokens, head_chunk_rows(columns, wide))
        logits = 4 * rows * columns if wide < 4 else 0.0
        why = f"chunks of {rows:,.0f} rows x {columns:,} ids"
        yield Part(name="head", bytes=wide * rows * columns + logits, why=why, phase="update")
    rows_bytes = 2 * wide * tokens * shape.hidden
    yield Part(name="rows of the head", bytes=rows_bytes, why="hidden states and their gradient", phase="update")
    if not config.objective.needs_teacher:
        return
    width = shape.vocab if config.teacher.support == "full" else config.teacher.top_k
    width = width if config.objective.needs_support else 0
    targets = tokens * width * (8 + 4 * 4)  # ids, and the teacher's and student's columns with their gradients
    yield Part(name="columns", bytes=targets, why=f"{tokens:,.0f} rows x {width:,} ids", phase="update")
    if not config.has_expert:
        rows = max(1, min(tokens, SCORES_BUFFER_BYTES // (4 * columns)))
        voices = 2 if config.teacher.weights == "trust_region" else 1
        logits = 2 * voices * 4 * rows * columns
        yield Part(name="teacher's logits", bytes=logits, why=f"{rows:,.0f} rows x {columns:,} ids", phase="scoring")


def head_chunk_rows(columns: int, wide: int) -> int:
    """Rows of a chunk on a GPU (``trainer/head/passes.py: chunk_rows``)."""
    width = (columns // 64 + 1) * 64
    return max(HEAD_LEAST_CHUNK, HEAD_BUFFER_BYTES // (width * wide) // 256 * 256)


def _publication(config: Config, shape: ModelShape) -> Iterator[Part]:
    """On the first head, which alone sends: the bucket that is filled and the tensor that is gathered."""
    wide = BYTES_BY_DTYPE[config.train.dtype]
    largest = wide * max(shape.embedding_parameters, 2 * shape.hidden * shape.ffn)
    bucket = max(config.sync.bucket_bytes, largest)
    why = "a bucket and the largest tensor, gathered"
    yield Part(name="publication", bytes=float(bucket + largest), why=why, phase="publication")
