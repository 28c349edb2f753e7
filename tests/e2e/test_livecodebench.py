"""Steps of LiveCodeBench with the real trainer, server and sandbox: a tiny model writes no program, and the loop takes it."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

from megatron_distil.tasks.livecodebench_data import Selection, prepare
from megatron_distil.tasks.tiny_model import TinyShape, write_tiny_model
from tests.contest import write_upstream
from tests.quickstart import START_S, Base, launched, metrics, train_plan, values
from tests.server import skip_without_server

ALPHABET = string.printable.replace("\r", "").replace("\x0b", "").replace("\x0c", "") + "\u00a7\u00b6"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}\n> {% endif %}"
)
RECIPE = """\
model = "data/model"

[task]
name = "livecodebench"
tests = "{folder}/data/tests"

[data]
train = "data/train.jsonl"

[rollout]
prompts_per_step = 4
samples_per_prompt = 2
max_prompt_tokens = 1024
max_response_tokens = 24
engine_dtype = "float32"

[feedback]
min_isolation = 1
sandbox_workers = 1
test_timeout_s = 1.0

[teacher]
support = "teacher"
top_k = 5
max_context_tokens = 2048

[objective]
name = "distil"
future = "mean"
tail = "none"

[train]
num_steps = 2
dtype = "float32"
learning_rate = 1e-4
max_microbatch_tokens = 4096

[sync]
idle_engines = "stop"
timeout_s = 120.0

[eval]
every_steps = 2
samples_per_prompt = 2
sets = [{{ data = "data/test.jsonl" }}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    skip_without_server()
    folder = tmp_path_factory.mktemp("lcb")
    write_upstream(folder / "upstream.jsonl")
    prepare(folder / "data", [str(folder / "upstream.jsonl")], Selection())
    for name in ("data/model", "base"):
        write_tiny_model(folder / name, ALPHABET, seed=0, shape=TinyShape(max_position_embeddings=4096))
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder))
    base = Base(str(recipe), folder, ())
    with launched(train_plan(base, folder / "run", ()), folder / "run") as running:
        assert running.wait(3 * START_S) == 0, running.text()[-4000:]
    return folder / "run"


def test_the_loop_runs_on_responses_that_hold_no_program(run: Path) -> None:
    assert len(values(run, "loss/ce_nats")) == 2
    assert values(run, "feedback/invalid_frac") == [1.0, 1.0]
    assert values(run, "feedback/unavailable_frac") == [0.0, 0.0]
    assert values(run, "feedback/pass_fraction") == [0.0, 0.0]
    assert values(run, "teacher/has_context_frac") == [1.0, 1.0]  # it reads that there was none


def test_evaluations_have_all_four_kinds(run: Path) -> None:
    last = [row for row in metrics(run) if "eval/avg_at_2" in row][-1]
    assert {name: last[f"eval/{name}"] for name in ("avg_at_2", "pass_at_2", "best_at_2", "maj_at_2")} == {
        "avg_at_2": 0.0,
        "pass_at_2": 0.0,
        "best_at_2": 0.0,
        "maj_at_2": 0.0,
    }


def test_the_run_says_how_its_rewards_were_made(run: Path) -> None:
    (said,) = json.loads((run / "sandboxes.json").read_text()).values()
    assert said["level"] >= 1
    assert said["workers"] == 1
    assert "python" in said["versions"]
