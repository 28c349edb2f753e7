"""Hugging Face -> shards -> Hugging Face, bit for bit, and what is said of a folder that does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_distil.errors import CheckpointError, ConfigError, DataError
from megatron_distil.trainer.export import TensorSpec, hf_weights, manifest, save_hf
from megatron_distil.trainer.groups import Groups, make_groups
from megatron_distil.trainer.model import Student, build_student
from megatron_distil.trainer.names import ModelDims
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.trainer_config import trainer_config
from tests.world import run_ranks


def student_of(folder: Path, *, dtype: str = "float32", **parallel: Any) -> Student:
    config = trainer_config(parallel=parallel, train={"dtype": dtype})
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    return build_student(folder, config, groups)


def round_trip(rank: int, folder: Path, *, bucket_bytes: int, **parallel: Any) -> None:
    student = student_of(folder, **parallel)
    want = load_file(folder / "model.safetensors")
    stream = list(hf_weights(student, bucket_bytes=bucket_bytes))
    assert [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in stream] == manifest(student.dims, torch.float32)
    got = dict(stream)
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), f"{name} changed on rank {rank}"


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_dp2": {"tp": 2, "dp": 2},
}


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_stream_equals_what_was_loaded_bit_for_bit(layout: dict[str, int], is_tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path, is_tied=is_tied, vocab_size=255)  # TP fills the vocabulary up
    world = torch.tensor(list(layout.values()) or [1]).prod().item()
    run_ranks(round_trip, world, folder, bucket_bytes=40_000, **layout)


def export(rank: int, source: Path, target: Path, **options: Any) -> None:
    save_hf(student_of(source, **options), target, source)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_an_export_with_the_same_logits(is_tied: bool, tmp_path: Path) -> None:
    source = write_tiny_qwen3(tmp_path / "source", is_tied=is_tied)
    (source / "tokenizer.json").write_text('{"a": 1}')
    run_ranks(export, 2, source, tmp_path / "target", tp=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target", attn_implementation="eager")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_qwen3(is_tied=is_tied)(ids).logits)
    assert (tmp_path / "target" / "tokenizer.json").read_text() == '{"a": 1}'


def test_an_export_names_its_own_dtype(tmp_path: Path) -> None:
    source = write_tiny_qwen3(tmp_path / "source")
    run_ranks(export, 1, source, tmp_path / "target", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").dtype == torch.bfloat16


def export_into_a_file(rank: int, source: Path, target: Path) -> None:
    with pytest.raises(CheckpointError, match="FileExistsError") as caught:
        save_hf(student_of(source, tp=2), target, source)
    assert str(target) in str(caught.value)


def test_an_export_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    source = write_tiny_qwen3(tmp_path / "source")
    (tmp_path / "target").write_text("a file")
    run_ranks(export_into_a_file, 2, source, tmp_path / "target")


def load_error(rank: int, folder: Path, parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        student_of(folder)
    for part in [str(folder), *parts]:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def test_all_tensors_that_do_not_fit_are_named_in_one_error(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.9.extra"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    run_ranks(
        load_error,
        1,
        folder,
        [
            "model.norm.weight: is missing, expected [64]",
            "model.layers.0.mlp.up_proj.weight: expected [128, 64], found [3, 4]",
            "model.layers.9.extra: is not of this model, found [2]",
        ],
    )


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    run_ranks(load_error, 1, folder, ["model.safetensors: cannot be read"])


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    (folder / "model.safetensors").unlink()
    run_ranks(load_error, 1, folder, ["model.safetensors"])


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "one")
    split = tmp_path / "several"
    tiny_qwen3().save_pretrained(split, max_shard_size="200KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    (split / "model.safetensors").unlink(missing_ok=True)
    run_ranks(equal_students, 1, folder, split)


def equal_students(rank: int, one: Path, other: Path) -> None:
    first = student_of(one)
    config = trainer_config()
    second = build_student(other, config, first.groups)
    for (entry, a), (_, b) in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), entry.name


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "llama", "model_type = 'llama', and it must be 'qwen3'"),
        ("num_hidden_layers", None, "num_hidden_layers = None, and it must be a positive integer"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "rope_type = 'yarn', and it must be 'default'"),
        ("rope_parameters", {"rope_type": "default"}, "rope_theta = None"),
        ("attention_bias", True, "attention_bias = True, and it must be False"),
    ],
)
def test_a_model_that_is_not_built_is_refused_with_its_field(key: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    table = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(DataError) as caught:
        ModelDims.from_hf(folder)
    assert said in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_the_old_place_of_rope_theta_is_read(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    table = json.loads((folder / "config.json").read_text())
    del table["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(table | {"rope_theta": 5e5, "rope_scaling": None}))
    assert ModelDims.from_hf(folder).rope_theta == 5e5


def test_sizes_that_do_not_divide_the_model_are_all_named(tmp_path: Path) -> None:
    dims = ModelDims.from_hf(write_tiny_qwen3(tmp_path))
    with pytest.raises(ConfigError) as caught:
        dims.check_layout(trainer_config(parallel={"tp": 4, "pp": 3}).parallel)
    assert [problem.path for problem in caught.value.problems] == ["parallel.tp", "parallel.pp"]
    assert "2 key/value heads" in str(caught.value)


def wrong_world(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"torchrun started 2 trainer processes\. Start 3 processes"):
        make_groups(trainer_config(parallel={"tp": 3}).parallel, collective_timeout_s=60, collect_timeout_s=60)


def test_sizes_that_do_not_fit_the_number_of_processes_are_refused() -> None:
    run_ranks(wrong_world, 2)


def grouped(rank: int, **parallel: int) -> None:
    sizes = trainer_config(parallel=parallel).parallel
    groups: Groups = make_groups(sizes, collective_timeout_s=60, collect_timeout_s=60)
    # by hand: tp is the fastest axis, then cp, dp, pp
    assert rank == groups.tp_rank + 2 * (groups.cp_rank + 1 * (groups.dp_rank + 2 * groups.pp_rank))
    replicas = [[0, 1, 4, 5], [2, 3, 6, 7]]
    mine = next(ranks for ranks in replicas if rank in ranks)
    assert groups.replica.rank() == mine.index(rank)
    assert groups.is_head == (rank in (0, 2))
    assert groups.replica_index == replicas.index(mine)


def test_a_replica_holds_all_stages_and_shards_of_one_copy() -> None:
    run_ranks(grouped, 8, tp=2, pp=2, dp=2)
