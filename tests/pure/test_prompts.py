import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_distil.config.schema import Config, EvalSet
from megatron_distil.data.documents import load_documents
from megatron_distil.data.prompts import load_eval_prompts, load_prompts
from megatron_distil.data.rows import CHECKED_AT_START, Share
from megatron_distil.data.tokenizer import Tokenizer, prompt_encoder
from megatron_distil.errors import DataError
from megatron_distil.tasks.task import GeneratedTask, task_by_name
from megatron_distil.tasks.tiny_model import TinyShape, write_tiny_model

TASK = task_by_name("two_roads")
assert isinstance(TASK, GeneratedTask)
ALPHABET = TASK.alphabet
ALONE = Share(0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, ALPHABET, seed=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.load(model)


def rows(count):
    return [{"id": f"r{index:03d}", "prompt": f"{index:04d}", "key": "123"} for index in range(count)]


def write(path, values):
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return str(path)


def config(data, *, per_step=4, seed=0, max_prompt_tokens=48, task="two_roads"):
    return Config.model_validate(
        {
            "model": "unused",
            "task": {"name": task},
            "data": {"train": data, "seed": seed},
            "objective": {"name": "ce"},
            "train": {"num_steps": 1, "max_microbatch_tokens": 64},
            "rollout": {"prompts_per_step": per_step, "max_prompt_tokens": max_prompt_tokens},
            "sft": {"documents_per_step": per_step},
        }
    )


def prompt_ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def test_prompts_of_a_step_are_a_function_of_seed_and_step(tmp_path, tokenizer):
    data = write(tmp_path / "train.jsonl", rows(11))
    first = load_prompts(config(data), TASK, tokenizer, ALONE)
    order = [prompt_ids(first.take(step)) for step in range(7)]
    again = load_prompts(config(data), TASK, tokenizer, ALONE)
    assert [prompt_ids(again.take(step)) for step in reversed(range(7))] == order[::-1]
    other = load_prompts(config(data, seed=1), TASK, tokenizer, ALONE)
    assert [prompt_ids(other.take(step)) for step in range(7)] != order


def test_no_row_is_in_an_epoch_twice_and_every_epoch_has_an_order_of_its_own(tmp_path, tokenizer):
    data = write(tmp_path / "train.jsonl", rows(12))
    prompts = load_prompts(config(data), TASK, tokenizer, ALONE)
    epochs = [[pid for step in range(3 * e, 3 * e + 3) for pid in prompt_ids(prompts.take(step))] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[row["id"] for row in rows(12)]] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_replicas_share_a_step_without_gap_or_overlap(tmp_path, tokenizer, num_replicas):
    data = write(tmp_path / "train.jsonl", rows(11))
    whole = load_prompts(config(data), TASK, tokenizer, ALONE)
    shares = [load_prompts(config(data), TASK, tokenizer, Share(index, num_replicas)) for index in range(num_replicas)]
    for step in (0, 1, 5):
        together = [pid for share in shares for pid in prompt_ids(share.take(step))]
        assert together == prompt_ids(whole.take(step))


def test_a_step_that_replicas_cannot_share_is_refused(tmp_path, tokenizer):
    data = write(tmp_path / "train.jsonl", rows(11))
    with pytest.raises(DataError, match="4 rows per step cannot be shared equally by 3 replicas"):
        load_prompts(config(data), TASK, tokenizer, Share(0, 3)).take(0)


def test_a_prompt_has_the_tokens_of_its_text_and_carries_its_row(tmp_path, tokenizer):
    data = write(tmp_path / "train.jsonl", [{"id": "a", "prompt": "4721", "key": "538"}])
    (prompt,) = load_prompts(config(data, per_step=1), TASK, tokenizer, ALONE).take(0)
    assert prompt.text == "4721>"
    assert prompt.token_ids.tolist() == [4, 7, 2, 1, 18]
    assert prompt.token_ids.dtype == np.int32
    assert prompt.task == {"id": "a", "prompt": "4721", "key": "538"}


def test_all_bad_rows_are_named_at_once_with_file_and_line_and_a_row_that_works(tmp_path, tokenizer):
    values = [*rows(2), {"id": "x", "prompt": "12a4", "key": "1"}, "", {"id": "y", "key": "2"}]
    data = write(tmp_path / "train.jsonl", values)
    with pytest.raises(DataError) as raised:
        load_prompts(config(data, per_step=1), TASK, tokenizer, ALONE)
    text = str(raised.value)
    assert f"{data}:3: prompt: has 'a', which no token stands for" in text
    assert f"{data}:5: prompt: is missing" in text
    assert json.dumps(TASK.example) in text


def test_a_bad_row_behind_those_that_are_checked_at_start_is_named_when_it_is_taken(tmp_path, tokenizer):
    values = rows(CHECKED_AT_START + 1)
    values[-1]["prompt"] = "x"
    data = write(tmp_path / "train.jsonl", values)
    prompts = load_prompts(config(data, per_step=CHECKED_AT_START + 1), TASK, tokenizer, ALONE)
    with pytest.raises(DataError, match=rf"train\.jsonl:{CHECKED_AT_START + 1}: prompt: has 'x'"):
        prompts.take(0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["{", *rows(1), "[1]"], r"train\.jsonl:1: not JSON(.|\n)*train\.jsonl:3: is a list, not an object"),
        ([], "no rows"),
        ([{"id": "a", "prompt": "1", "key": 5}, {"id": "b", "prompt": "1", "key": "x"}], "same type in all rows"),
        ([*rows(1), *rows(1)], "two rows have the id 'r000'"),
        (rows(1), "1 rows, and a step takes 2"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, tokenizer, values, reason):
    data = write(tmp_path / "train.jsonl", values)
    with pytest.raises(DataError, match=reason):
        load_prompts(config(data, per_step=2), TASK, tokenizer, ALONE).take(0)


def test_a_file_that_is_not_there_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_prompts(config(str(tmp_path / "nowhere.jsonl")), TASK, tokenizer, ALONE)


def test_a_prompt_that_is_too_long_is_named(tmp_path, tokenizer):
    data = write(tmp_path / "train.jsonl", [{"id": "a", "prompt": "4" * 10, "key": "1"}])
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: the prompt has 11 tokens, and rollout\.max_prompt_tokens is 10"
    ):
        load_prompts(config(data, per_step=1, max_prompt_tokens=10), TASK, tokenizer, ALONE).take(0)
    assert load_prompts(config(data, per_step=1, max_prompt_tokens=11), TASK, tokenizer, ALONE).take(0)


def test_evaluation_prompts_are_all_rows_in_their_order(tmp_path, tokenizer):
    data = write(tmp_path / "eval.jsonl", rows(5))
    prompts = load_eval_prompts(config(data), EvalSet(data=data), TASK, tokenizer)
    assert prompt_ids(prompts) == ["r000", "r001", "r002", "r003", "r004"]


def test_a_document_is_context_and_response_and_ends_once(tmp_path, tokenizer):
    values = [{"context": "12>", "response": "x1\n"}, {"context": "12>", "response": "x1"}]
    data = write(tmp_path / "sft.jsonl", values)
    for document in load_documents(config(data, per_step=2), TASK, tokenizer, ALONE).take(0):
        assert document.context_ids.tolist() == [1, 2, 18]
        assert document.response_ids.tolist() == [10, 1, 21]
        assert document.response_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"context": "1>"}, "sft.jsonl:1: response: is missing"),
        ({"context": "1>", "response": 5}, "sft.jsonl:1: response: is 5, not a text"),
        ({"context": "1" * 64, "response": "1"}, "sft.jsonl:1: 66 tokens"),
    ],
)
def test_a_bad_document_is_named(tmp_path, tokenizer, row, reason):
    data = write(tmp_path / "sft.jsonl", [row])
    with pytest.raises(DataError, match=reason):
        load_documents(config(data, per_step=1), TASK, tokenizer, ALONE).take(0)


def test_every_character_is_one_token_and_comes_back(tokenizer):
    text = ALPHABET[:-2] + "0:2,1:83,10:812?x*18+2:2,20,182#x*81+2>"
    assert tokenizer.encode(ALPHABET).tolist() == list(range(len(ALPHABET)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([10, 21, 22]) == "x"
    assert tokenizer.stop_ids(("\n",)) == tokenizer.stop_ids() == (21,)
    assert tokenizer.eos_id == 21


def test_a_token_that_is_not_there_is_named(tokenizer):
    with pytest.raises(DataError, match="no token '<end>'"):
        tokenizer.stop_ids(("<end>",))


def test_a_task_that_speaks_as_a_user_needs_a_chat_template(tokenizer):
    with pytest.raises(DataError, match="no chat_template"):
        prompt_encoder(tokenizer, "chat")("4721")


def test_a_chat_template_ends_with_the_generation_prompt(tmp_path, model):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}>{% endif %}"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(prompt_encoder(tokenizer, "chat")("4721")) == "(4721)>"
    assert tokenizer.decode(prompt_encoder(tokenizer, "raw")("4721")) == "4721"


def test_reading_prompts_imports_neither_transformers_nor_torch_models(tmp_path, model):
    data = write(tmp_path / "train.jsonl", rows(4))
    code = (
        "import sys\n"
        "from megatron_distil.data.tokenizer import Tokenizer\n"
        "from megatron_distil.data.rows import load_rows\n"
        f"Tokenizer.load({str(model)!r}).encode('1')\n"
        f"assert load_rows({data!r}, 'train')[0]['id'] == 'r000'\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_every_weight_of_the_tiny_model(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_model(tmp_path, ALPHABET, seed=7, shape=TinyShape(num_hidden_layers=2, tie_word_embeddings=tied))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert (loaded.config.vocab_size, loaded.config.eos_token_id, loaded.dtype) == (24, 21, torch.float32)
    assert loaded.config.rope_parameters["rope_theta"] == 10000.0
    embedding = loaded.get_input_embeddings().weight
    assert embedding.std().item() == pytest.approx(0.05, rel=0.1)
    assert (loaded.get_output_embeddings().weight is embedding) == tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "0:2,1:83?x*18+2:2#x*81+2>"
    assert tokenizer(text)["input_ids"] == Tokenizer.load(tmp_path).encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (21, 22, 24)
    # A random model is close to uniform: it has not learned, and it is not saturated.
    with torch.no_grad():
        entropy = torch.distributions.Categorical(
            logits=loaded(torch.tensor([tokenizer(text)["input_ids"]])).logits
        ).entropy()
    assert 0.8 * np.log(24) < entropy.min().item() < np.log(24)
