"""Configurations for tests of the trainer."""

from typing import Any

from megatron_distil.config.schema import Config


def trainer_config(**tables: dict[str, Any]) -> Config:
    """A small float32 run; each table is laid over the defaults."""
    train = {"num_steps": 3, "dtype": "float32", "learning_rate": 1e-3}
    base: dict[str, Any] = {
        "model": "tiny",
        "task": {"name": "program_induction"},
        "data": {"train": "train.jsonl"},
        "objective": {"name": "sft"},
        "train": train | tables.pop("train", {}),
    }
    return Config.model_validate(base | tables)
