"""Random Qwen3 models of less than a million parameters, as folders in Hugging Face's format."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def tiny_qwen3(*, is_tied: bool = False, seed: int = 0, **dims: Any) -> Any:
    """A model whose norms are not 1, so that errors in them show."""
    torch.manual_seed(seed)
    config = Qwen3Config(**(TINY | dims), tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.add_(0.1 * torch.randn_like(param))
            else:
                param.mul_(3.0)  # attention that is not uniform
    return model.eval()


def write_tiny_qwen3(folder: Path, **options: Any) -> Path:
    """The same model as a folder."""
    tiny_qwen3(**options).save_pretrained(folder)
    return folder
