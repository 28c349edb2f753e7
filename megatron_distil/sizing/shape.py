"""The dimensions of a model that memory and time depend on, read from its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distil.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of equal layers: attention with grouped queries, and a gated feed-forward layer or a mixture of them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Of one expert, where there are experts."""
    experts: int
    """1 for a dense model."""
    active_experts: int
    """That one token meets."""
    vocab: int
    is_tied: bool
    """Embedding and head are one matrix."""
    has_qk_norm: bool
    """Queries and keys are normalised by head."""

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
            DataError: a dimension is missing, or the layers differ from each other.
        """

        def size(*names: str) -> int:
            for name in names:
                if isinstance(value := table.get(name), int):
                    return value
            raise DataError(f"{source}: has no {' or '.join(names)}")

        heads, experts = size("num_attention_heads"), table.get("num_experts") or table.get("num_local_experts") or 1
        is_mixture = experts > 1
        if is_mixture and (table.get("mlp_only_layers") or table.get("decoder_sparse_step", 1) != 1):
            raise DataError(f"{source}: some layers have experts and some have none; sizes are known for equal layers")
        return cls(
            layers=size("num_hidden_layers"),
            hidden=size("hidden_size"),
            heads=heads,
            kv_heads=size("num_key_value_heads") if table.get("num_key_value_heads") else heads,
            head_dim=size("head_dim") if table.get("head_dim") else size("hidden_size") // heads,
            ffn=size("moe_intermediate_size", "intermediate_size") if is_mixture else size("intermediate_size"),
            experts=experts,
            active_experts=size("num_experts_per_tok") if is_mixture else 1,
            vocab=size("vocab_size"),
            is_tied=bool(table.get("tie_word_embeddings", False)),
            has_qk_norm=str(table.get("model_type", "")).startswith("qwen3"),
        )

    @property
    def query_width(self) -> int:
        """Of a token's queries, all heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of a token's keys, all heads; its values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Of the gated feed-forward layer, or of one expert."""
        return 3 * self.hidden * self.ffn

    @property
    def attention_parameters(self) -> int:
        """Of the two matrices of a layer's attention; biases are left out."""
        return 2 * self.hidden * (self.query_width + self.kv_width)

    @property
    def norm_parameters(self) -> int:
        """Of a layer's norms."""
        return 2 * self.hidden + (2 * self.head_dim if self.has_qk_norm else 0)

    @property
    def router_parameters(self) -> int:
        """Of the choice among a layer's experts; 0 for a dense model."""
        return self.hidden * self.experts if self.experts > 1 else 0

    @property
    def layer_parameters(self) -> int:
        """Of one transformer layer."""
        matrices = self.attention_parameters + self.experts * self.expert_parameters
        return matrices + self.router_parameters + self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, or of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        matrices = 1 if self.is_tied else 2
        return self.layers * self.layer_parameters + matrices * self.embedding_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """That one token is multiplied with: its experts only, and of embedding and head the head."""
        idle = (self.experts - self.active_experts) * self.expert_parameters
        return self.layers * (self.layer_parameters - idle) + self.embedding_parameters + self.hidden

    def kv_bytes(self, *, tp: int, wide: int) -> float:
        """Keys and values of one token on one of ``tp`` ranks; more ranks than heads hold copies."""
        return 2 * self.layers * self.kv_width * wide / min(tp, self.kv_heads)

    def attention_flops(self, length: float) -> float:
        """Of one token against ``length`` earlier ones, forward: 4 s per layer and query entry (``arXiv:2205.05198`` A)."""
        return 4 * self.layers * self.query_width * length
