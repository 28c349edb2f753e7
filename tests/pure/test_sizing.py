from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_distil.config.load import load_config
from megatron_distil.config.schema import Config
from megatron_distil.errors import DataError
from megatron_distil.sizing import ModelShape, Part, human, problems, sizes
from tests.recipe import write_recipe

# Published dimensions and parameter counts (model cards of Qwen3-8B and Qwen3-0.6B).
QWEN3_8B = {
    "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_SMALL = {
    "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B_A3B = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip


def shape_of(table: dict) -> ModelShape:
    return ModelShape.from_table(table, source="config.json")


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(write_recipe(tmp_path), overrides)


def by_name(parts: tuple[Part, ...]) -> dict[str, float]:
    return {part.name: part.bytes for part in parts}


@pytest.mark.parametrize(("table", "billions"), [(QWEN3_8B, 8.19), (QWEN3_SMALL, 0.596), (QWEN3_30B_A3B, 30.53)])
def test_parameters_are_those_of_the_model_card(table: dict, billions: float):
    assert shape_of(table).parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_model_of_eight_billion_on_sixteen_ranks(tmp_path: Path):
    # By hand: 8.19e9 parameters over tp 4 are 2.05e9 on a rank.
    chosen = config(
        tmp_path, "parallel.tp=4", "parallel.dp=4", "train.dtype=bfloat16", "train.max_microbatch_tokens=16384"
    )
    found = sizes(chosen, shape_of(QWEN3_8B))
    assert found.processes_by_role == {"trainer": 16, "engine": 1, "teacher": 0, "sandbox": 1}
    parts = by_name(found.trainer)
    giga = 2.0477e9
    assert parts["weights"] == pytest.approx(2 * giga, rel=1e-3)
    assert parts["gradients"] == pytest.approx(4 * giga, rel=1e-3)
    assert parts["main weights"] == pytest.approx(4 * giga / 4, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(8 * giga / 4, rel=1e-3)
    assert parts["teacher"] == pytest.approx(4 * giga, rel=1e-3)
    assert by_name(found.step)["publication"] == pytest.approx(2 * 8.19e9, rel=1e-3)


def test_an_unsharded_optimizer_is_whole_on_every_rank(tmp_path: Path):
    shape = shape_of(QWEN3_SMALL)
    sharded = by_name(sizes(config(tmp_path, "parallel.dp=2"), shape).trainer)
    whole = by_name(sizes(config(tmp_path, "parallel.dp=2", "train.is_distributed_optimizer=false"), shape).trainer)
    assert whole["optimizer"] == 2 * sharded["optimizer"]
    assert whole["weights"] == sharded["weights"]


def test_float32_has_no_second_copy_of_the_weights(tmp_path: Path):
    assert "main weights" not in by_name(sizes(config(tmp_path, "train.dtype=float32"), shape_of(QWEN3_SMALL)).trainer)


def test_a_live_teacher_takes_no_room(tmp_path: Path):
    parts = by_name(sizes(config(tmp_path, "teacher.weights=live"), shape_of(QWEN3_SMALL)).trainer)
    assert not {"teacher", "student, set aside"} & set(parts)


def test_recomputing_keeps_less(tmp_path: Path):
    shape = shape_of(QWEN3_8B)
    kept = by_name(sizes(config(tmp_path), shape).trainer)["activations"]
    recomputed = by_name(sizes(config(tmp_path, "train.recompute=full"), shape).trainer)["activations"]
    assert recomputed < kept / 10


def test_keys_and_values_of_a_token(tmp_path: Path):
    # 2 x 36 layers x 8 heads x 128 x 2 bytes = 147,456 bytes; 256 requests of 64 tokens.
    parts = by_name(sizes(config(tmp_path), shape_of(QWEN3_8B)).engine)
    assert parts["keys and values"] == 147_456 * 256 * 64


@pytest.mark.parametrize(("overrides", "text"), [
    (["parallel.tp=3"], "parallel.tp = 3: the model has 16 attention heads. Try 2."),
    (["parallel.tp=16", "parallel.pp=3"], "parallel.pp = 3: the model has 28 layers. Try 2."),
    (["rollout.engine_tp=5"], "rollout.engine_tp = 5: the model has 16 attention heads. Try 4."),
    (["teacher.top_k=151936"], "teacher.top_k = 151936: the model knows 151936 tokens, and at least one has to lie outside the support. Try 100."),
])  # fmt: skip
def test_a_layout_that_does_not_fit_the_model_is_told_one_that_does(tmp_path: Path, overrides: list[str], text: str):
    assert [str(one) for one in problems(config(tmp_path, *overrides), shape_of(QWEN3_SMALL))] == [text]


def test_a_layout_that_fits_is_left_alone(tmp_path: Path):
    assert list(problems(config(tmp_path, "parallel.tp=8", "parallel.pp=4"), shape_of(QWEN3_SMALL))) == []


def test_an_expert_is_other_processes_and_no_weights_of_a_rank(tmp_path: Path):
    shape = shape_of(QWEN3_SMALL)
    expert = ["teacher.weights=expert", "teacher.model=m", "teacher.num_engines=3", "teacher.engine_tp=2"]
    found = sizes(config(tmp_path, *expert), shape)
    assert found.processes_by_role["teacher"] == 6
    assert not {"teacher", "student, set aside"} & {part.name for part in found.trainer}
    without = sizes(config(tmp_path, *expert, 'objective={name="grpo"}'), shape)
    assert without.processes_by_role["teacher"] == 0
    sampled = sizes(config(tmp_path, *expert, 'objective={name="opd"}'), shape)
    (targets,) = [part.bytes for part in sampled.step if part.name == "targets of a replica"]
    assert targets == 0


def test_a_model_without_a_dimension_is_named(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"config.json: No such file or directory; sizes come from the model's own files"
    ):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(DataError, match=r"config.json: has no num_hidden_layers"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json: not JSON"):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB"), (5000 * 2**40, "5000.0 TiB"),
])  # fmt: skip
def test_bytes_as_people_read_them(count: float, text: str):
    assert human(count) == text
