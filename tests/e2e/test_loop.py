"""The quickstart, shortened: prepare, warm start, serve, train, evaluate, export, report.

Its thresholds are far from what it reaches (in brackets), and further from what it reaches when something is wrong.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_distil.data.rollout_log import LoggedStep, read_step_file
from tests.quickstart import QUICK_STEPS as STEPS
from tests.quickstart import finished_quickstart, metrics, values


@pytest.fixture(scope="module")
def run() -> Path:
    return finished_quickstart().run


@pytest.fixture(scope="module")
def last(run) -> LoggedStep:
    """The rollouts of the last step."""
    step = read_step_file(run / "rollouts" / f"step_{STEPS - 1:06d}.dp0.jsonl")
    assert step is not None
    return step


@functools.cache
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logprobs(folder: Path, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """[R] nats, of a response, by transformers from a folder in its format."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    with torch.no_grad():
        rows = model(folder)(ids[None]).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(rows, -1).gather(1, ids[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("name", ["eval/avg_at_8", "eval/new_avg_at_8"])
def test_the_student_learns_functions_that_it_saw_and_functions_that_nobody_showed_it(run, name):
    before, after = values(run, name)
    assert before < 0.05
    assert after > 0.55


def test_trainer_and_server_agree_about_every_sampled_token(run):
    assert max(values(run, "sync/logprob_gap_nats")) <= 1e-4
    assert max(values(run, "sync/logprob_gap_max_nats")) <= 1e-3
    assert len(values(run, "sync/logprob_gap_nats")) == STEPS


def test_every_step_is_sampled_with_the_weights_of_that_step(run):
    for index in range(STEPS):
        step = read_step_file(run / "rollouts" / f"step_{index:06d}.dp0.jsonl")
        assert step is not None
        served = {(one.rollout.oldest_weights, one.rollout.newest_weights) for one in step.examples}
        assert served == {(index, index)}
    assert set(values(run, "rollout/lag_steps_max")) == {0.0}


def test_what_the_server_said_is_what_transformers_says_of_the_weights_that_were_published(run, last):
    for example in last.examples:
        theirs = logprobs(run / "weights" / str(STEPS - 1), example.prompt.token_ids, example.rollout.token_ids)
        np.testing.assert_allclose(theirs.numpy(), example.rollout.logprobs, rtol=0.0, atol=1e-4)


def test_the_exported_model_is_the_last_one_and_solves_what_the_warm_start_could_not(run, last):
    ours, published = (load_file(folder / "model.safetensors") for folder in (run / "hf", run / "weights" / str(STEPS)))
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    prompts = {example.prompt.prompt_id: example.prompt for example in last.examples}
    chance = dict.fromkeys(("base", "hf"), 0.0)
    for prompt in prompts.values():
        right = tokenizer(str(prompt.task["solution"]) + "\n", add_special_tokens=False)["input_ids"]
        for folder in chance:
            said = logprobs(run / folder, prompt.token_ids, np.array(right))
            chance[folder] += float(said.sum().exp()) / len(prompts)
    assert chance["base"] < 0.05
    assert chance["hf"] > 0.5


def test_everything_that_a_run_leaves_is_there(run):
    terminal = finished_quickstart().terminal
    assert [row["step"] for row in metrics(run) if "loss/ce_nats" in row] == list(range(STEPS))
    for name in ("config.json", "versions.json", "samples.jsonl", "hf/tokenizer.json", "hf/config.json"):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000004", f"step_{STEPS:08d}"}
    assert all((path / "COMPLETE").exists() for path in (run / "checkpoints").iterdir())
    (events,) = (run / "tensorboard").glob("events.out.tfevents.*")
    assert b"eval/avg_at_8" in events.read_bytes()
    assert "eval/avg_at_8" in (run / "report.html").read_text()
    assert "before     after" in terminal
    assert f"after step {STEPS}" in terminal
