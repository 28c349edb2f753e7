from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_distil.cli import app
from megatron_distil.config.load import load_config
from megatron_distil.config.schema import Config
from megatron_distil.errors import DataError
from megatron_distil.sizing import (
    H200_NODES,
    Layout,
    Machine,
    ModelShape,
    Part,
    human,
    nearest,
    peak,
    problems,
    shortfalls,
    sizes,
)
from megatron_distil.sizing.layout import held
from megatron_distil.sizing.trainer import Kept, layer_bytes
from tests.recipe import write_recipe

MODELS = Path(__file__).parents[1] / "data" / "models"
QWEN3_8B = json.loads((MODELS / "Qwen3-8B" / "config.json").read_text())
QWEN3_SMALL = {
    "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True, "model_type": "qwen3",
}  # fmt: skip
# Qwen2.5-14B with 54 layers, as reported in flagos-ai/FlagScale pull request 454
QWEN25_16B = {
    "num_hidden_layers": 54, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 13824, "vocab_size": 152064, "tie_word_embeddings": False, "model_type": "qwen2",
}  # fmt: skip
MEBI = 2**20


def published(name: str) -> ModelShape:
    return ModelShape.from_folder(MODELS / name)


def shape_of(table: dict) -> ModelShape:
    return ModelShape.from_table(table, source="config.json")


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(write_recipe(tmp_path), overrides)


def by_name(parts: tuple[Part, ...]) -> dict[str, float]:
    return {part.name: part.bytes for part in parts}


# Model cards: 8.2B, 32.8B, 30.5B with 3.3B activated, 235B with 22B activated; "non-embedding" 6.95B, 31.2B, 29.9B, 234B.
@pytest.mark.parametrize(("name", "billions", "without_embedding"), [
    ("Qwen3-8B", 8.2, 6.95), ("Qwen3-32B", 32.8, 31.2), ("Qwen3-30B-A3B", 30.5, 29.9), ("Qwen3-235B-A22B", 235, 234),
])  # fmt: skip
def test_parameters_are_those_of_the_model_card(name: str, billions: float, without_embedding: float):
    shape = published(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    body = shape.parameters - 2 * shape.embedding_parameters
    assert body / 1e9 == pytest.approx(without_embedding, rel=3e-3)


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-30B-A3B", 3.3), ("Qwen3-235B-A22B", 22)])
def test_activated_parameters_are_those_of_the_model_card(name: str, billions: float):
    shape = published(name)
    assert (shape.active_parameters + shape.embedding_parameters) / 1e9 == pytest.approx(billions, rel=2e-2)


def test_a_published_report_of_megatron(tmp_path: Path):
    """flagos-ai/FlagScale pull request 454, case 1: tp 4 with sequence parallelism, distributed optimizer over 2 replicas.

    "Total number of parameters in billions: 16.42", "in most loaded shard in billions: 4.1055", "weight and optimizer =
    46983.28 MB", "Activation memory footprint per dense transformer layer: 155.0 MB" (4,096 tokens, gate fused, no q/k norm).
    """
    shape = shape_of(QWEN25_16B)
    assert shape.parameters / 1e9 == pytest.approx(16.42, rel=1e-3)
    layout = Layout(tp=4, pp=1, cp=1, dp=2, sequence_parallel=True)
    assert held(shape, layout, stage=0).count / 1e9 == pytest.approx(4.1055, rel=1e-3)
    chosen = config(
        tmp_path, "parallel.tp=4", "parallel.dp=2", "parallel.sequence_parallel=true", "train.dtype=bfloat16"
    )
    parts = by_name(sizes(chosen, shape).trainer)
    states = sum(parts[name] for name in ("weights", "gradients", "main weights", "optimizer"))
    assert states / MEBI == pytest.approx(46983.28, rel=1e-3)
    fused = Kept(query=3, key_value=3, ffn=3)
    assert layer_bytes(shape, layout, 4096, wide=2, kept=fused) / MEBI == pytest.approx(155.0, rel=0.03)


@pytest.mark.parametrize("tp", [1, 8])
def test_a_layer_of_the_paper_on_activations(tmp_path: Path, tp: int):
    """arXiv:2205.05198, table 2: 34 s b h / t bytes with sequence parallelism and no matrix of scores, 2 of them for masks
    of dropout, which we have not; 16 for a feed-forward layer of 4 h without gate, here a gated one that keeps as much."""
    hidden = 5120
    table = QWEN25_16B | {"num_key_value_heads": 40, "intermediate_size": hidden * 8 // 5}
    layout = Layout(tp=tp, pp=1, cp=1, dp=1, sequence_parallel=True)
    found = layer_bytes(shape_of(table), layout, 2048, wide=2, kept=Kept(query=2, key_value=2, ffn=5))
    sums = 4 * 40 * 2048 / tp
    assert found - sums == pytest.approx((34 - 2) * 2048 * hidden / tp)


def test_a_mixture_is_cut_as_megatron_bridge_says(tmp_path: Path):
    """docs.nvidia.com, Megatron Bridge, "Theoretical Memory Estimator": experts are divided by ep, their optimizer over the
    ranks that are left; 6 + 12 / shards bytes per parameter. By hand: 48 layers of 128 experts of 3 x 2048 x 768."""
    shape = published("Qwen3-30B-A3B")
    chosen = config(tmp_path, "parallel.dp=16", "train.dtype=bfloat16")
    parts = by_name(sizes(chosen, shape, ep=8).trainer)
    experts = 48 * 128 * 3 * 2048 * 768 / 8
    shared = shape.parameters - 8 * experts
    states = sum(parts[name] for name in ("weights", "gradients", "main weights", "optimizer"))
    assert states == pytest.approx(experts * (6 + 12 / 2) + shared * (6 + 12 / 16), rel=1e-6)


def test_the_phases_of_a_step_do_not_add_up(tmp_path: Path):
    found = sizes(config(tmp_path, "train.dtype=bfloat16"), published("Qwen3-8B")).trainer
    by_phase: dict[str, float] = {}
    for part in found:
        by_phase[part.phase] = by_phase.get(part.phase, 0.0) + part.bytes
    assert set(by_phase) == {"always", "scoring", "update", "publication"}
    assert peak(found) == by_phase["always"] + max(by_phase["scoring"], by_phase["update"], by_phase["publication"])
    assert peak(found) < sum(part.bytes for part in found)


def test_a_layout_that_does_not_fit_is_told_the_nearest_that_does(tmp_path: Path):
    chosen = config(tmp_path, "train.dtype=bfloat16", "rollout.prompts_per_step=32")
    (problem,) = shortfalls(chosen, published("Qwen3-8B"), H200_NODES)
    assert "a trainer rank needs" in str(problem)
    settings = nearest(chosen, published("Qwen3-8B"), H200_NODES)
    assert f"Try {' '.join(settings)}." in str(problem)
    better = config(tmp_path, "train.dtype=bfloat16", "rollout.prompts_per_step=32", *settings)
    assert list(shortfalls(better, published("Qwen3-8B"), H200_NODES)) == []
    # 8.2e9 x (2 + 4 + 4 + 8 + 4) bytes are more than one H200, and less than two
    assert better.parallel.world_size == 2


def test_a_mixture_is_told_to_share_its_experts_wider(tmp_path: Path):
    chosen = config(
        tmp_path, "train.dtype=bfloat16", "parallel.dp=8", "rollout.prompts_per_step=32", "teacher.weights=frozen"
    )
    shape = published("Qwen3-30B-A3B")
    # By hand: 30.5e9 x (2 + 4 + 12 / 8 + 2) bytes are 290 GB on each of 8 ranks; with the experts over 4 of them about 130
    settings = nearest(chosen, shape, H200_NODES)
    assert settings[-1].startswith("--ep=")
    ep = int(settings[-1].removeprefix("--ep="))
    better = config(
        tmp_path,
        *("train.dtype=bfloat16", "parallel.dp=8", "rollout.prompts_per_step=32", "teacher.weights=frozen"),
        *settings[:-1],
    )
    assert [one.path for one in shortfalls(better, shape, H200_NODES, ep=ep)] == []
    assert list(problems(better, shape, ep=ep)) == []
    assert "--ep = 3" in str(next(problems(better, shape, ep=3)))


def call_plan(tmp_path: Path, *words: str) -> Result:
    recipe = str(write_recipe(tmp_path))
    return CliRunner().invoke(app, ["plan", recipe, f"model={MODELS / 'Qwen3-8B'}", "train.dtype=bfloat16", *words])


def test_the_command_says_whether_it_fits(tmp_path: Path):
    done = call_plan(tmp_path)
    assert done.exit_code == 2
    assert "a trainer rank needs" in done.stderr
    assert "Try parallel." in done.stderr
    done = call_plan(tmp_path, "parallel.tp=2", "parallel.dp=2")
    assert done.exit_code == 0, done.stderr
    assert "Seconds of a step on H200" in done.stdout
    assert "An engine holds" in done.stdout


def test_without_a_gpu_nothing_has_to_fit(tmp_path: Path):
    done = call_plan(tmp_path, "--gpu", "cpu")
    assert done.exit_code == 0
    assert "Seconds" not in done.stdout
    done = call_plan(tmp_path, "--gpu", "a100")
    assert done.exit_code == 2
    assert "--gpu = 'a100': its data sheet is not known. Use h200, h100 or cpu." in done.stderr


def test_what_no_layout_holds_is_said(tmp_path: Path):
    tiny = replace(H200_NODES, gpu=replace(H200_NODES.gpu, memory_bytes=1e9))
    found = [str(one) for one in shortfalls(config(tmp_path), published("Qwen3-235B-A22B"), tiny)]
    assert any("No layout of eight times as many ranks fits." in text for text in found)
    assert any("rollout.engine_tp = 1" in text and "No server of one node holds it." in text for text in found)


def test_a_server_that_is_too_small_is_told_a_size(tmp_path: Path):
    # 65.5 GB of weights and 0.26 MB a token fit one H200; 470 GB want 4 x 0.85 x 141 GB
    small = [p.path for p in shortfalls(config(tmp_path, "parallel.dp=32"), published("Qwen3-32B"), H200_NODES)]
    assert "rollout.engine_tp" not in small
    large = list(shortfalls(config(tmp_path), published("Qwen3-235B-A22B"), H200_NODES))
    (engine,) = [problem for problem in large if problem.path == "rollout.engine_tp"]
    assert engine.suggestion == "Try 4."


def test_how_many_requests_a_server_holds(tmp_path: Path):
    # By hand: 0.85 x 141e9 - 2 x 8.19e9 bytes, and 147,456 bytes a token.
    found = sizes(config(tmp_path), published("Qwen3-8B")).capacity
    assert found.tokens == pytest.approx((0.85 * 141e9 - 2 * 8.1907e9) / 147_456, rel=1e-3)
    assert found.requests == found.tokens // 64


def test_decoding_is_bound_by_memory_and_a_larger_batch_costs_little(tmp_path: Path):
    # By hand: one request reads 2 x (8.19 - 0.62)e9 bytes at 0.7 x 4.8 TB/s for each of 16 tokens
    one = seconds(tmp_path, "rollout.prompts_per_step=1", "rollout.samples_per_prompt=1", 'objective={name="sft"}')
    assert set(one) == {"update"}
    alone = seconds(tmp_path, "rollout.prompts_per_step=1", "rollout.samples_per_prompt=1", 'objective={name="opsd"}')
    assert alone["generation"] == pytest.approx(16 * 2 * 7.568e9 / (0.7 * 4.8e12), rel=0.03)
    many = seconds(tmp_path, "rollout.prompts_per_step=8", "rollout.samples_per_prompt=1", 'objective={name="opsd"}')
    assert many["generation"] < 1.2 * alone["generation"]


def test_an_update_takes_six_flops_a_parameter_and_token(tmp_path: Path):
    shape = published("Qwen3-8B")
    chosen = config(tmp_path, "parallel.dp=8", "train.dtype=bfloat16")
    found = {span.name: span.seconds for span in sizes(chosen, shape).spans}
    tokens = 32 * 8 * 64
    by_hand = tokens * 6 * (8.19e9 - 0.622e9) / (8 * 0.4 * 989e12)  # the embedding multiplies nothing
    assert found["update"] == pytest.approx(by_hand, rel=0.01)
    again = sizes(config(tmp_path, "parallel.dp=8", "train.recompute=full"), shape).spans
    assert {span.name: span.seconds for span in again}["update"] == pytest.approx(by_hand * 4 / 3, rel=0.01)


def test_the_first_stage_holds_the_activations_of_every_microbatch_in_flight(tmp_path: Path):
    shape = published("Qwen3-8B")
    one = by_name(sizes(config(tmp_path, "train.dtype=bfloat16"), shape).trainer)["activations"]
    first = by_name(sizes(config(tmp_path, "train.dtype=bfloat16", "parallel.pp=4"), shape).trainer)["activations"]
    norm = 2 * 4096 * 4096  # the last norm's input is the last stage's
    assert first == pytest.approx(4 * (one - norm) / 4, rel=1e-6)


def test_the_last_stage_is_the_fullest_where_the_head_is_larger_than_what_waits(tmp_path: Path):
    tiny = ["train.dtype=bfloat16", "parallel.pp=2", "train.max_microbatch_tokens=256", "teacher.weights=live"]
    parts = by_name(sizes(config(tmp_path, *tiny), published("Qwen3-8B")).trainer)
    assert "head" in parts
    long = ["train.dtype=bfloat16", "parallel.pp=2", "train.max_microbatch_tokens=65536"]
    assert "head" not in by_name(sizes(config(tmp_path, *long), published("Qwen3-8B")).trainer)


def test_more_processes_of_a_server_than_heads_hold_copies(tmp_path: Path):
    # 4 heads of keys and values on 8 processes: one head each, twice
    shape = published("Qwen3-235B-A22B")
    four = by_name(sizes(config(tmp_path, "rollout.engine_tp=4"), shape).engine)
    eight = by_name(sizes(config(tmp_path, "rollout.engine_tp=8"), shape).engine)
    assert eight["keys and values"] == four["keys and values"]
    kv = 2 * 94 * 4096 * 4 * 128
    assert eight["weights"] == pytest.approx(2 * (shape.parameters + kv) / 8)


def seconds(tmp_path: Path, *overrides: str, machine: Machine = H200_NODES) -> dict[str, float]:
    chosen = config(tmp_path, "train.dtype=bfloat16", *overrides)
    return {span.name: span.seconds for span in sizes(chosen, published("Qwen3-8B"), machine).spans}


def test_a_pipeline_idles_while_it_fills(tmp_path: Path):
    # 32 x 8 sequences of 64 tokens are 4 microbatches of 4,096: (4 - 1) / 4 more, over as many ranks
    whole = seconds(tmp_path, "parallel.dp=4", "train.max_microbatch_tokens=4096", 'objective={name="opsd"}')
    piped = seconds(tmp_path, "parallel.pp=4", "train.max_microbatch_tokens=4096", 'objective={name="opsd"}')
    assert piped["update"] == pytest.approx(whole["update"] * 1.75, rel=1e-6)


def test_gradients_travel_once_an_update_and_slower_between_nodes(tmp_path: Path):
    """By hand: 4 + 2 bytes of each parameter, 7 / 8 of them, at 0.7 x 450 GB/s within a node and 0.7 x 50 GB/s between."""
    grpo = ["parallel.dp=8", 'objective={name="grpo"}', "rollout.prompts_per_step=32"]
    once = seconds(tmp_path, *grpo)["gradients and weights"]
    assert once == pytest.approx(6 * 8.1907e9 * 7 / 8 / (0.7 * 450e9), rel=1e-3)
    assert seconds(tmp_path, *grpo, "train.updates_per_step=4")["gradients and weights"] == pytest.approx(4 * once)
    small = replace(H200_NODES, gpus_per_node=4)
    assert seconds(tmp_path, *grpo, machine=small)["gradients and weights"] == pytest.approx(9 * once)


def test_a_publication_goes_through_links_or_through_files(tmp_path: Path):
    # By hand: 16.4 GB at 0.7 x 450 and 0.7 x 50 GB/s, or twice at 2 GB/s
    assert seconds(tmp_path)["publication"] == pytest.approx(16.38e9 / 315e9 + 16.38e9 / 35e9, rel=1e-3)
    assert seconds(tmp_path, "sync.sink=disk")["publication"] == pytest.approx(2 * 16.38e9 / 2e9, rel=1e-3)


def test_near_is_computing_again_before_more_ranks(tmp_path: Path):
    chosen = config(tmp_path, "train.dtype=bfloat16", "parallel.dp=8", "train.max_microbatch_tokens=16384")
    assert nearest(chosen, published("Qwen3-8B"), H200_NODES) == ("train.recompute=full",)


def test_near_is_a_configuration_that_is_right(tmp_path: Path):
    # with 4,096 tokens tp = 4 would be nearest; sequence parallelism cannot cut 4,098 tokens into four
    given = ["train.dtype=bfloat16", "parallel.dp=8", "train.max_microbatch_tokens=4098"]
    shape = published("Qwen3-32B")
    assert "parallel.tp=4" in nearest(config(tmp_path, *given[:2]), shape, H200_NODES)
    settings = nearest(config(tmp_path, *given), shape, H200_NODES)
    repaired = config(tmp_path, *given, *settings)  # raises where a rule is broken
    assert list(shortfalls(repaired, shape, H200_NODES)) == []


def test_a_plan_is_quick(tmp_path: Path):
    chosen, shape = config(tmp_path), published("Qwen3-235B-A22B")
    start = time.process_time()
    list(shortfalls(chosen, shape, H200_NODES))
    assert time.process_time() - start < 1.0


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
    # 36 layers' inputs of 2 x 4096 bytes and one layer, against 36 layers; the last norm's input in both
    norm = 2 * 4096 * 4096
    assert recomputed - norm == pytest.approx((kept - norm) / 36 + 36 * 2 * 4096 * 4096, rel=1e-6)


def test_keys_and_values_of_a_token(tmp_path: Path):
    # 2 x 36 layers x 8 heads x 128 x 2 bytes = 147,456 bytes; 256 requests of 64 tokens.
    parts = by_name(sizes(config(tmp_path), shape_of(QWEN3_8B)).engine)
    assert parts["keys and values"] == 147_456 * 256 * 64


@pytest.mark.parametrize(("overrides", "text"), [
    (["parallel.tp=3"], "parallel.tp = 3: the model has 16 attention heads. Try 2."),
    (["parallel.tp=8", "parallel.pp=3"], "parallel.pp = 3: the model has 28 layers. Try 2."),
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
    assert found.teacher == ()
    # 2 x 4 heads x 128 x 48 layers x 2 bytes, cut over 2 processes; 256 / 3 requests of 96 + 16 tokens
    known = by_name(sizes(config(tmp_path, *expert), shape, expert=published("Qwen3-30B-A3B")).teacher)
    assert known["weights"] == pytest.approx(30.53e9, rel=1e-3)
    assert known["keys and values"] == 2 * 4 * 128 * 48 * 2 / 2 * 86 * 112
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
