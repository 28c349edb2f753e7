"""Checkpoints to Hugging Face's format and back, in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing

from megatron_distil.config.schema import Config
from megatron_distil.errors import CheckpointError, DataError
from megatron_distil.trainer.checkpoint import load_weights, save_weights
from megatron_distil.trainer.export import save_hf
from megatron_distil.trainer.groups import close_groups, make_groups
from megatron_distil.trainer.model import Student, build_student

_SOURCE = "hf"
_TIMEOUT_S = 600.0

Dtype = Literal["float32", "bfloat16"]


def export_checkpoint(checkpoint: Path, folder: Path, *, model: Path | None = None) -> None:
    """Writes the student of a checkpoint as a folder that transformers loads.

    Args:
        checkpoint: a folder ``step_00000010`` of a run, or one that ``import_model`` made.
        folder: where to.
        model: whose configuration and tokenizer are copied; None: the model that the checkpoint names.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written.
        DataError: the model is not there.
    """
    source = model or _source_of(checkpoint)
    student = _alone(source, _dtype_of(checkpoint), has_weights=False)
    try:
        load_weights(student, checkpoint)
        save_hf(student, folder, source)
    finally:
        close_groups()


def import_model(model: Path, checkpoint: Path, *, dtype: Dtype) -> None:
    """Writes a model in Hugging Face's format as a checkpoint of weights alone, for any parallel layout.

    Raises:
        CheckpointError: the checkpoint cannot be written, or is there already.
        DataError: the model is damaged.
    """
    if checkpoint.exists():
        raise CheckpointError(f"{checkpoint}: is there already; name a folder that is not")
    student = _alone(model, dtype, has_weights=True)
    try:
        temporary = checkpoint.with_name(f".{checkpoint.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / _SOURCE).mkdir(parents=True)
        for path in model.iterdir():
            if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / _SOURCE / path.name)
        save_weights(student, temporary)
        temporary.rename(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: cannot be written: {error}") from error
    finally:
        close_groups()


def _alone(model: Path, dtype: Dtype, *, has_weights: bool) -> Student:
    """The whole student in this process."""
    table: dict[str, Any] = {
        "model": str(model),
        "task": {"name": "none"},
        "data": {"train": "none"},
        "objective": {"name": "sft"},
        "train": {"num_steps": 1, "dtype": dtype, "is_distributed_optimizer": False},
    }
    config = Config.model_validate(table)
    groups = make_groups(config.parallel, collective_timeout_s=_TIMEOUT_S, collect_timeout_s=_TIMEOUT_S)
    return build_student(model, config, groups, load_weights=has_weights)


def _source_of(checkpoint: Path) -> Path:
    if (checkpoint / _SOURCE).is_dir():
        return checkpoint / _SOURCE
    try:
        named = Path(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: is not a checkpoint of ours: {error!r}") from error
    if not named.is_dir():
        raise DataError(f"{named}: the model of {checkpoint} is no folder here; name one with --model")
    return named


def _dtype_of(checkpoint: Path) -> Dtype:
    try:
        tensors: Any = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        dtype = tensors["embedding.word_embeddings.weight"].dtype
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}") from error
    return "bfloat16" if dtype == torch.bfloat16 else "float32"
