"""A small recipe that is right, for tests that make one thing wrong."""

from __future__ import annotations

from pathlib import Path

RECIPE = """\
model = "data/model"

[task]
name = "program_induction"

[data]
train = "data/train.jsonl"

[rollout]
max_prompt_tokens = 48
max_response_tokens = 16

[teacher]
top_k = 10
max_context_tokens = 96

[objective]
name = "distil"
future = "sum"

[train]
num_steps = 100
max_microbatch_tokens = 4096
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path
