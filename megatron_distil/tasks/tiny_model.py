"""A tiny random model in Hugging Face's format, for tasks with an alphabet: Qwen3's architecture, one token per character.

The files hold the spellings of transformers 4 and 5 side by side, so that every version that we run reads them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Dimensions. The defaults learn the toy tasks within minutes on one CPU core."""

    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = False


VOCAB_MULTIPLE = 4  # so that the vocabulary can be cut over 2 or 4 ranks
EMBEDDING_STD = 0.05
ROPE_THETA = 10000.0


def write_tiny_model(folder: Path, alphabet: str, *, seed: int, shape: TinyShape | None = None) -> None:
    """Write config, tokenizer and random float32 weights; the same bytes for the same arguments.

    Args:
        folder: made if it is not there.
        alphabet: one character per token, in the order of their ids; the last two end a response and pad.
        seed: of the weights.
        shape: dimensions; None: the defaults.
    """
    from safetensors.torch import save_file

    dims = shape or TinyShape()
    folder.mkdir(parents=True, exist_ok=True)
    tokens = vocabulary(alphabet)
    eos_id, pad_id = len(alphabet) - 2, len(alphabet) - 1
    _write_json(folder / "config.json", model_config(dims, len(tokens), eos_id=eos_id, pad_id=pad_id))
    _write_json(folder / "tokenizer.json", tokenizer_file(tokens, eos_id=eos_id, pad_id=pad_id))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(dims, alphabet))
    _write_json(folder / "generation_config.json", {"do_sample": True, "eos_token_id": eos_id, "pad_token_id": pad_id})
    save_file(random_weights(dims, len(tokens), seed), folder / "model.safetensors", metadata={"format": "pt"})


def vocabulary(alphabet: str) -> list[str]:
    """The characters, then unused tokens that no text becomes, up to a multiple of four."""
    num_unused = -len(alphabet) % VOCAB_MULTIPLE
    return [*alphabet, *(f"<unused{index}>" for index in range(num_unused))]


def model_config(dims: TinyShape, vocab_size: int, *, eos_id: int, pad_id: int) -> dict[str, object]:
    """``config.json``."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        **asdict(dims),
        "layer_types": ["full_attention"] * dims.num_hidden_layers,
        "max_window_layers": dims.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": EMBEDDING_STD,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


def tokenizer_file(tokens: list[str], *, eos_id: int, pad_id: int) -> dict[str, object]:
    """``tokenizer.json``: byte-pair encoding without a single merge, which is one token per character."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(tokens[index], index) for index in (eos_id, pad_id)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [],
        },
    }


def random_weights(dims: TinyShape, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """Embeddings N(0, .05^2), norms 1, every other matrix N(0, 1 / (3 fan_in)): the variance of torch's own linear layers."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, std: float | None = None) -> Tensor:
        scale = std if std is not None else (3 * columns) ** -0.5
        return torch.randn(rows, columns, generator=generator) * scale

    hidden, queries, keys = dims.hidden_size, dims.num_attention_heads, dims.num_key_value_heads
    weights = {"model.embed_tokens.weight": matrix(vocab_size, hidden, EMBEDDING_STD)}
    for index in range(dims.num_hidden_layers):
        layer = {
            "input_layernorm": torch.ones(hidden),
            "self_attn.q_proj": matrix(queries * dims.head_dim, hidden),
            "self_attn.k_proj": matrix(keys * dims.head_dim, hidden),
            "self_attn.v_proj": matrix(keys * dims.head_dim, hidden),
            "self_attn.o_proj": matrix(hidden, queries * dims.head_dim),
            "self_attn.q_norm": torch.ones(dims.head_dim),
            "self_attn.k_norm": torch.ones(dims.head_dim),
            "post_attention_layernorm": torch.ones(hidden),
            "mlp.gate_proj": matrix(dims.intermediate_size, hidden),
            "mlp.up_proj": matrix(dims.intermediate_size, hidden),
            "mlp.down_proj": matrix(hidden, dims.intermediate_size),
        }
        weights |= {f"model.layers.{index}.{name}.weight": value for name, value in layer.items()}
    weights["model.norm.weight"] = torch.ones(hidden)
    if not dims.tie_word_embeddings:
        weights["lm_head.weight"] = matrix(vocab_size, hidden)
    return weights


def _tokenizer_config(dims: TinyShape, alphabet: str) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": alphabet[-2],
        "pad_token": alphabet[-1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": dims.max_position_embeddings,
    }


def _special(token: str, index: int) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": token, **flags}


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
