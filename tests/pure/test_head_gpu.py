"""The benchmark of the head, as far as a CPU can run it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.world import run_ranks
from tools.benchmarks import head_gpu

TINY = ("--device", "cpu", "--rows", "70", "--hidden", "16", "--vocab", "90", "--slots", "4", "--chunk", "32")


def in_a_child(test: Callable[..., None]) -> Callable[..., None]:
    """Megatron's variants start gloo, whose threads would be dead in every world forked from here afterwards."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        run_ranks(lambda _: test(**fixtures), 1)

    return run


@in_a_child
def test_every_variant_computes_the_gradients_of_the_baseline() -> None:
    problem = head_gpu.make_problem(head_gpu.parsed(TINY))
    for column in head_gpu.COLUMNS:
        found = head_gpu.variants(column, "cpu")
        found.pop("megatron, fused", None)  # rounds them to bfloat16
        results = head_gpu.tried(problem, found)
        assert len(results) >= 6
        for name, result in results.items():
            assert max(result["rows_error"], result["weight_error"]) < 2e-6, (column, name)


@in_a_child
def test_a_wrong_gradient_is_told() -> None:
    problem = head_gpu.make_problem(head_gpu.parsed(TINY))
    found = head_gpu.variants("labels", "cpu")
    baseline = found[head_gpu.BASELINE]
    results = head_gpu.tried(problem, {head_gpu.BASELINE: baseline, "half": lambda p: 0.5 * baseline(p)})
    assert results["half"]["rows_error"] == pytest.approx(0.5, abs=1e-6)
    assert results["half"]["weight_error"] == pytest.approx(0.5, abs=1e-6)


@in_a_child
def test_what_does_not_fit_is_told_and_the_others_go_on() -> None:
    def too_large(_: head_gpu.Problem) -> None:
        raise torch.OutOfMemoryError("allocating")

    problem = head_gpu.make_problem(head_gpu.parsed(TINY))
    found = head_gpu.variants("labels", "cpu")
    results = head_gpu.tried(problem, {head_gpu.BASELINE: too_large, "one pass": found["one pass"]})
    assert results[head_gpu.BASELINE] == {"failed": "out of memory"}
    assert results["one pass"]["rows_error"] is None


@in_a_child
def test_a_whole_run_prints_a_table_and_one_line(tmp_path, capsys) -> None:
    out = tmp_path / "head.json"
    few = ("--warm-up", "1", "--calls", "3", "--shards", "2", "--variant", "one pass", "--out", str(out))
    head_gpu.main([*TINY, *few])
    text = capsys.readouterr().out.splitlines()
    told = json.loads(text[-1])
    assert told == json.loads(out.read_text())
    assert [list(told["columns"][name]) for name in head_gpu.COLUMNS] == [["eager float32", "one pass"]] * 2
    assert told["columns"]["labels"]["one pass"]["times_floor"] > 0.0
    assert set(told["rates"]) >= {"logits_tflops", "rows_tflops", "weight_tflops", "exp_stats_gbs", "block_stats_gbs"}
    assert sum("one pass" in line for line in text[:-1]) == 2


def test_the_table_tells_times_memory_and_errors() -> None:
    row = {"ms": 170.5, "p10": 170.0, "p90": 181.25, "times_floor": 1.1}
    results = {
        "eager float32": {"failed": "out of memory"},
        "one pass": {**row, "extra_gib": 1.5, "rows_error": None, "weight_error": 2e-3},
    }
    lines = head_gpu.table({"labels": results}, 155.0).splitlines()
    assert lines[0] == "three bare products: 155.00 ms"
    assert lines[3].split() == ["eager", "float32", "out", "of", "memory"]
    assert lines[4].split() == ["one", "pass", "170.50", "170.00", "181.25", "1.100", "1.500", "-", "2.0e-03"]
    assert len(lines[2]) == len(lines[4])


def test_percentiles_and_the_floor() -> None:
    assert head_gpu.summary([float(n) for n in range(11, 0, -1)]) == {"ms": 6.0, "p10": 2.0, "p90": 10.0}
    products = {"logits": {"ms": 3.0}, "logits, wide": {"ms": 2.0}, "rows": {"ms": 5.0}, "weight": {"ms": 7.0}}
    assert head_gpu.floor_of(products) == 14.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--device", "cpu", "--vocab", "101", "--shards", "2"), "--vocab 100 is"),
        (("--device", "cpu", "--vocab", "64", "--shards", "8", "--slots", "9"), "more than the 8 ids of a rank"),
    ],
)
def test_sizes_that_cannot_work_are_refused(arguments: tuple[str, ...], text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        head_gpu.parsed(arguments)
    assert text in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_what_it_can_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        head_gpu.parsed(())
    assert "--device cpu" in capsys.readouterr().err
