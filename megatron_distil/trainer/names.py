"""Hugging Face's tensors against Megatron's parameters: names, shapes, and how TP cuts them. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_distil.config.schema import ParallelConfig
from megatron_distil.errors import ConfigError, DataError, Problem

Layout = Literal["whole", "vocab", "rows", "columns", "qkv", "glu"]


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """A dense Qwen3 in numbers."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    is_tied: bool

    @classmethod
    def from_hf(cls, folder: str | Path) -> ModelDims:
        """Reads ``config.json``.

        Raises:
            DataError: the file is absent, or describes a model that the trainer does not build; all reasons at once.
        """
        path = Path(folder) / "config.json"
        table = _json_object(path)
        wrong = list(_unsupported(table))
        if wrong:
            raise DataError("\n".join([f"{path}: the trainer cannot build this model:", *(f"  - {w}" for w in wrong)]))
        heads = table["num_attention_heads"]
        return cls(
            vocab_size=table["vocab_size"],
            hidden_size=table["hidden_size"],
            ffn_size=table["intermediate_size"],
            num_layers=table["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=table.get("num_key_value_heads") or heads,
            head_dim=table.get("head_dim") or table["hidden_size"] // heads,
            max_positions=table["max_position_embeddings"],
            norm_eps=table["rms_norm_eps"],
            rope_theta=float(_rope(table)["rope_theta"]),
            is_tied=table.get("tie_word_embeddings", False),
        )

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding: the vocabulary, filled up so that ``tp_size`` divides it."""
        return -(-self.vocab_size // tp_size) * tp_size

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raises ConfigError where a parallel size does not divide the model."""
        problems = [
            Problem(f"parallel.{axis}", size, f"does not divide the {count} {what} of the model")
            for axis, size, count, what in (
                ("tp", parallel.tp, self.num_heads, "attention heads"),
                ("tp", parallel.tp, self.num_kv_heads, "key/value heads"),
                ("tp", parallel.tp, self.ffn_size, "rows of the feed-forward layer"),
                ("pp", parallel.pp, self.num_layers, "layers"),
            )
            if count % size
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter, named with the layer's number in the whole model, and the tensors that it holds."""

    name: str
    layout: Layout
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]


def entries(dims: ModelDims) -> list[Entry]:
    """Every parameter of the whole model, in the order in which it is published."""
    h, f, d = dims.hidden_size, dims.ffn_size, dims.head_dim
    q, kv = dims.num_heads * d, dims.num_kv_heads * d
    embedding = (("model.embed_tokens.weight",), ((dims.vocab_size, h),))
    found = [Entry("embedding.word_embeddings.weight", "vocab", *embedding)]
    for layer in range(dims.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        table: list[tuple[str, Layout, tuple[str, ...], tuple[tuple[int, ...], ...]]] = [
            ("self_attention.linear_qkv.layer_norm_weight", "whole", (theirs + "input_layernorm.weight",), ((h,),)),
            (
                "self_attention.linear_qkv.weight",
                "qkv",
                tuple(f"{attention}{x}_proj.weight" for x in "qkv"),
                ((q, h), (kv, h), (kv, h)),
            ),
            ("self_attention.q_layernorm.weight", "whole", (attention + "q_norm.weight",), ((d,),)),
            ("self_attention.k_layernorm.weight", "whole", (attention + "k_norm.weight",), ((d,),)),
            ("self_attention.linear_proj.weight", "columns", (attention + "o_proj.weight",), ((h, q),)),
            ("mlp.linear_fc1.layer_norm_weight", "whole", (theirs + "post_attention_layernorm.weight",), ((h,),)),
            (
                "mlp.linear_fc1.weight",
                "glu",
                (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
                ((f, h), (f, h)),
            ),
            ("mlp.linear_fc2.weight", "columns", (mlp + "down_proj.weight",), ((h, f),)),
        ]
        found += [Entry(ours + name, layout, names, shapes) for name, layout, names, shapes in table]
    found.append(Entry("decoder.final_layernorm.weight", "whole", ("model.norm.weight",), ((h,),)))
    if not dims.is_tied:
        found.append(Entry("output_layer.weight", "vocab", ("lm_head.weight",), ((dims.vocab_size, h),)))
    return found


def tied_copy(dims: ModelDims) -> Entry:
    """The output layer of a tied model where it is another parameter: on the last of several pipeline stages."""
    return Entry("output_layer.weight", "vocab", ("model.embed_tokens.weight",), ((dims.vocab_size, dims.hidden_size),))


def cut(entry: Entry, tensors: Sequence[Tensor], dims: ModelDims, *, tp_size: int, tp_rank: int) -> Tensor:
    """The shard of one TP rank, from whole tensors in the order of ``entry.hf_names``.

    Rows that fill up the vocabulary are 0.
    """
    match entry.layout:
        case "whole":
            return tensors[0]
        case "columns":
            return tensors[0].chunk(tp_size, 1)[tp_rank]
        case "rows":
            return tensors[0].chunk(tp_size, 0)[tp_rank]
        case "vocab":
            missing = dims.padded_vocab_size(tp_size) - dims.vocab_size
            return torch.nn.functional.pad(tensors[0], (0, 0, 0, missing)).chunk(tp_size, 0)[tp_rank]
        case "glu":
            return torch.cat([tensor.chunk(tp_size, 0)[tp_rank] for tensor in tensors])
        case "qkv":  # Megatron orders the rows by query group: the group's queries, its key, its value
            groups = dims.num_kv_heads // tp_size
            parts = [tensor.chunk(tp_size, 0)[tp_rank].view(groups, -1, dims.hidden_size) for tensor in tensors]
            return torch.cat(parts, 1).view(-1, dims.hidden_size)


def join(entry: Entry, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
    """The inverse of ``cut``: whole tensors in the order of ``entry.hf_names``, from the shards of all TP ranks."""
    match entry.layout:
        case "whole":
            return [shards[0]]
        case "columns":
            return [torch.cat(list(shards), 1)]
        case "rows":
            return [torch.cat(list(shards))]
        case "vocab":
            return [torch.cat(list(shards))[: dims.vocab_size]]
        case "glu":
            halves = [shard.chunk(2) for shard in shards]
            return [torch.cat([half[i] for half in halves]) for i in range(2)]
        case "qkv":
            rows = torch.cat(list(shards)).view(dims.num_kv_heads, -1, dims.hidden_size)
            queries = dims.num_heads // dims.num_kv_heads * dims.head_dim
            parts = rows.split([queries, dims.head_dim, dims.head_dim], 1)
            return [part.reshape(-1, dims.hidden_size) for part in parts]


def shard_shape(entry: Entry, dims: ModelDims, tp_size: int) -> tuple[int, ...]:
    """Shape of the parameter on one TP rank."""
    rows, *rest = entry.hf_shapes[0]
    match entry.layout:
        case "whole":
            return entry.hf_shapes[0]
        case "columns":
            return (rows, rest[0] // tp_size)
        case "vocab":
            return (dims.padded_vocab_size(tp_size) // tp_size, *rest)
        case "rows" | "glu" | "qkv":
            return (sum(shape[0] for shape in entry.hf_shapes) // tp_size, *rest)


def global_name(name: str, first_layer: int) -> str:
    """``decoder.layers.0.`` of a pipeline stage -> the name with the layer's number in the whole model."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; a model is a folder with config.json and *.safetensors") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: holds a {type(table).__name__} instead of an object")
    return table


def _rope(table: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes ``rope_parameters``; before, ``rope_theta`` stood beside ``rope_scaling``."""
    return table.get("rope_parameters") or {"rope_theta": table.get("rope_theta"), **(table.get("rope_scaling") or {})}


_IS_COUNT: Callable[[Any], bool] = lambda value: type(value) is int and value > 0  # noqa: E731
_COUNTS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
]
_FIXED = {  # key: the values with which our layers compute the same; None is an absent key
    "model_type": ("qwen3",),
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
}


def _unsupported(table: dict[str, Any]) -> list[str]:
    wrong = [
        f"{key} = {table.get(key)!r}, and it must be {' or '.join(repr(a) for a in allowed if a is not None) or 'absent'}"
        for key, allowed in _FIXED.items()
        if table.get(key) not in allowed
    ]
    wrong += [
        f"{key} = {table.get(key)!r}, and it must be a positive integer"
        for key in _COUNTS
        if not _IS_COUNT(table.get(key))
    ]
    for key in ("num_key_value_heads", "head_dim"):
        if table.get(key) is not None and not _IS_COUNT(table[key]):
            wrong.append(f"{key} = {table[key]!r}, and it must be a positive integer")
    if not isinstance(table.get("rms_norm_eps"), float):
        wrong.append(f"rms_norm_eps = {table.get('rms_norm_eps')!r}, and it must be a number")
    rope = _rope(table)
    if not isinstance(rope.get("rope_theta"), int | float):
        wrong.append(
            f"rope_theta = {rope.get('rope_theta')!r} (also looked in rope_parameters), and it must be a number"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        wrong.append(f"rope_type = {kind!r}, and it must be 'default'")
    return wrong
