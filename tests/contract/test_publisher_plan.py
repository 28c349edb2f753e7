"""Buckets and digests: pure decisions, with expected values from a server and by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_distil.errors import SyncError
from megatron_distil.sync.digest import Digests, first_difference
from megatron_distil.sync.plan import WeightSpec, check_bucket, plan_buckets, weight_spec


def spec(name: str, count: int) -> WeightSpec:
    return WeightSpec(name, (count,), "float32")


def test_a_bucket_is_full_when_the_next_weight_does_not_fit() -> None:
    plan = plan_buckets([spec("a", 2), spec("b", 3), spec("c", 1), spec("big", 100), spec("d", 5)], 20)
    assert [[weight.name for weight in bucket.weights] for bucket in plan] == [["a", "b"], ["c"], ["big"], ["d"]]
    assert [bucket.num_bytes for bucket in plan] == [20, 4, 400, 20]
    assert [bucket.is_last for bucket in plan] == [False, False, False, True]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300))
def test_buckets_hold_every_weight_once_in_order(counts: list[int], limit: int) -> None:
    manifest = [spec(f"w{index}", count) for index, count in enumerate(counts)]
    plan = plan_buckets(manifest, limit)
    assert [weight for bucket in plan for weight in bucket.weights] == manifest
    assert all(bucket.num_bytes <= limit or len(bucket.weights) == 1 for bucket in plan)
    assert [bucket.is_last for bucket in plan] == [*[False] * (len(plan) - 1), True]


def test_the_same_name_twice_is_refused() -> None:
    with pytest.raises(SyncError, match="holds a twice"):
        plan_buckets([spec("a", 1), spec("b", 1), spec("a", 1)], 100)


def test_nothing_to_send_is_refused() -> None:
    with pytest.raises(SyncError, match="no weights"):
        plan_buckets([], 100)


def test_a_dtype_that_no_server_takes_is_refused() -> None:
    with pytest.raises(SyncError, match=r"a \[1\] float64: .* known are float32"):
        plan_buckets([WeightSpec("a", (1,), "float64")], 100)


def test_a_bucket_that_is_the_plan_passes() -> None:
    (bucket,) = plan_buckets([spec("a", 1), spec("b", 2)], 100)
    check_bucket(bucket, [weight_spec("a", [1], torch.float32), weight_spec("b", torch.Size([2]), "float32")])
    with pytest.raises(SyncError, match=r"gave c \[1\] float32, which is not in the manifest"):
        check_bucket(bucket, [spec("a", 1), spec("b", 2), spec("c", 1)])


def test_fused_weights_are_hashed_in_the_order_of_the_fusion() -> None:
    q, k, v = torch.ones(4, 2), torch.full((2, 2), 2.0), torch.full((2, 2), 3.0)
    digests = Digests(torch.float32)
    for part, tensor in (("v", v), ("q", q), ("k", k)):
        digests.add(f"model.layers.3.self_attn.{part}_proj.weight", tensor)
    joined = torch.cat([q, k, v]).numpy().tobytes()
    assert digests.result() == {"model.layers.3.self_attn.qkv_proj.weight": hashlib.sha256(joined).hexdigest()[:16]}


def test_the_vocabulary_is_padded_and_the_precision_is_the_servers() -> None:
    digests = Digests(torch.bfloat16)
    digests.add("lm_head.weight", torch.ones(65, 2))
    digests.add("model.norm.weight", torch.ones(65))
    head = torch.cat([torch.ones(65, 2), torch.zeros(63, 2)]).bfloat16().view(torch.uint8).numpy().tobytes()
    norm = torch.ones(65).bfloat16().view(torch.uint8).numpy().tobytes()
    assert digests.result() == {
        "lm_head.weight": hashlib.sha256(head).hexdigest()[:16],
        "model.norm.weight": hashlib.sha256(norm).hexdigest()[:16],
    }


def test_every_name_of_a_real_server_is_one_of_ours() -> None:
    recorded = json.loads((Path(__file__).parent / "recorded" / "weights_checker.json").read_text())
    digests = Digests(torch.float32)
    for layer in range(3):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            digests.add(f"model.layers.{layer}.self_attn.{part}.weight", torch.zeros(1))
        for part in ("gate_proj", "up_proj", "down_proj"):
            digests.add(f"model.layers.{layer}.mlp.{part}.weight", torch.zeros(1))
        for part in ("input_layernorm", "post_attention_layernorm"):
            digests.add(f"model.layers.{layer}.{part}.weight", torch.zeros(1))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        digests.add(name, torch.zeros(1))
    assert digests.result().keys() == recorded["ranks"][0]["checksums"].keys()


def test_the_first_difference_names_the_weight_and_both_digests() -> None:
    sent = {"a": "1", "b": "2", "c": "3"}
    assert first_difference(sent, sent | {"buffer": "9"}) is None
    assert first_difference(sent, {"a": "1", "b": "5", "c": "4"}) == "b (sent 2, holds 5)"
    assert first_difference(sent, {"a": "1", "b": "2"}) == "c (sent 3, holds no such weight)"
