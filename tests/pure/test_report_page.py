from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_distil.config.load import load_config, to_json
from megatron_distil.errors import DataError
from megatron_distil.report import write_report
from megatron_distil.report.digest import (
    MAX_SAMPLES,
    Change,
    changes,
    eval_names,
    groups,
    page_data,
    phases,
    prediction,
    samples,
    steady_shares,
    table_names,
)
from megatron_distil.report.page import page
from megatron_distil.report.read import Run, read_runs
from tests.finished_run import ATTACK, write_run


def run_of(**parts) -> Run:
    return Run(**({"name": "r", "config": {}, "versions": {}, "steps": [], "evals": [], "samples": []} | parts))


def embedded(text: str) -> dict:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


# read


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss/ce')
    (run,) = read_runs([tmp_path])
    assert [line["step"] for line in run.steps] == list(range(20))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path):
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "{oops", *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: line 3 is not JSON"):
        read_runs([tmp_path])


def test_a_folder_without_metrics_is_no_run(tmp_path: Path):
    with pytest.raises(DataError, match=r"no metrics.jsonl, so this is no run directory"):
        read_runs([tmp_path])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        write_run(folder)
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([folders[0]] * 2)] == ["run (1)", "run (2)"]


def test_evaluations_and_steps_are_told_apart(tmp_path: Path):
    write_run(tmp_path)
    (run,) = read_runs([tmp_path])
    assert [line["step"] for line in run.evals] == [0, 10, 20]
    assert len(run.steps) == 20


# digest


def test_before_and_after_are_tenths_of_a_run_and_whole_evaluations():
    run = run_of(
        steps=[{"step": step, "loss/ce_nats": float(step)} for step in range(20)],
        evals=[{"step": step, "eval/avg_at_8": step / 20} for step in (0, 10, 20)],
    )
    assert changes(run) == {"eval/avg_at_8": Change(0.0, 1.0), "loss/ce_nats": Change(0.5, 18.5)}


def test_what_is_not_finite_is_not_drawn():
    run = run_of(steps=[{"step": 0, "loss/ce_nats": float("nan")}, {"step": 1, "loss/ce_nats": 2.0}])
    assert page_data([run])["runs"][0]["series"] == {"loss/ce_nats": ([1], [2.0])}


def test_the_largest_n_comes_first_and_alone_into_the_table():
    line = dict.fromkeys(
        [
            "eval/pass_at_2",
            "eval/avg_at_8",
            "eval/new_avg_at_8",
            "eval/pass_at_8",
            "eval/first_road_share",
            "eval/reward",
        ],
        0.5,
    )
    run = run_of(evals=[{"step": 0, **line}])
    names = ["eval/avg_at_8", "eval/new_avg_at_8", "eval/pass_at_8", "eval/first_road_share"]
    assert eval_names([run]) == [*names, "eval/pass_at_2", "eval/reward"]
    assert table_names([run]) == names


def test_every_metric_is_drawn_once():
    names = ["loss/ce_nats", "train/learning_rate", "eval/avg_at_8", "eval/reward", "time/judge_s"]
    run = run_of(steps=[{"step": 0, **dict.fromkeys(names, 1.0)}], evals=[{"step": 0, "eval/avg_at_8": 1.0}])
    drawn = [name for group in groups([run]) for name in group["names"]]
    assert sorted(drawn) == sorted(names)


@pytest.mark.parametrize(("objective", "share"), [
    ({"name": "distil", "future": "sum"}, 0.933),
    ({"name": "distil", "future": "mean"}, 0.788),
    ({"name": "distil", "future": "none"}, 0.5),
    ({"name": "ce"}, 0.5),
])  # fmt: skip
def test_two_roads_with_a_fixed_teacher_has_a_prediction(objective: dict, share: float):
    evals = [
        {"step": step, "eval/first_road_share": value} for step, value in [(0, 0.4), (20, 0.8), (30, 0.9), (40, 1.0)]
    ]
    config = {"task": {"name": "two_roads"}, "teacher": {"weights": "frozen"}, "objective": objective}
    found = prediction(run_of(config=config, evals=evals))
    assert found is not None
    assert round(found.predicted, 3) == share
    assert found.measured == pytest.approx(0.95)


@pytest.mark.parametrize("change", [
    {"task": {"name": "program_induction"}},
    {"teacher": {"weights": "ema"}},
    {"objective": {"name": "grpo"}},
    {"objective": {"name": "distil", "future": "sum", "future_form": "reweight"}},
    {"objective": {"name": "distil", "future": "sum", "future_coef": 0.5}},
])  # fmt: skip
def test_nothing_is_predicted_where_the_derivation_does_not_hold(change: dict):
    config = {
        "task": {"name": "two_roads"},
        "teacher": {"weights": "frozen"},
        "objective": {"name": "distil", "future": "sum"},
    }
    assert prediction(run_of(config=config | change, evals=[{"step": 1, "eval/first_road_share": 0.5}])) is None


def test_a_steady_step_is_no_first_one_and_has_no_evaluation():
    usual = {"time/collect_s": 2.0, "time/update_s": 1.0, "time/step_s": 4.0}
    steps = [
        {"step": 0, "time/collect_s": 90.0, "time/update_s": 1.0, "time/step_s": 100.0},
        {"step": 1, **usual},
        {"step": 2, **usual, "time/eval_s": 50.0, "time/step_s": 54.0},
    ]
    found = {share.phase: (share.seconds, share.share) for share in steady_shares(run_of(steps=steps))}
    assert found == {"collect": (2.0, 0.5), "update": (1.0, 0.25), "other": (1.0, 0.25)}


def test_stacked_phases_are_the_whole_step():
    steps = [{"step": 0, "time/collect_s": 2.0, "time/eval_s": 3.0, "time/sample_s": 1.5, "time/step_s": 6.0}]
    assert phases(run_of(steps=steps)) == {"step": [0], "collect": [2.0], "eval": [3.0], "other": [1.0]}


def test_a_long_run_keeps_the_rollouts_of_its_first_and_last_step():
    kept = samples(run_of(samples=[{"step": step, "k": k} for step in range(1000) for k in range(4)]))
    assert len(kept) == MAX_SAMPLES
    assert [line["step"] for line in (kept[0], kept[-1])] == [0, 999]


# page


def test_a_page_holds_everything_and_asks_for_nothing(tmp_path: Path):
    write_run(tmp_path / "run")
    write_report([tmp_path / "run"], out := tmp_path / "out" / "page.html")
    text = out.read_text()
    assert embedded(text)["runs"][0]["numSteps"] == 20
    assert not re.search(r"<(link|img|iframe|script[^>]+src)|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'; style-src 'sha256-" in text
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}


def test_a_rollout_cannot_leave_its_place(tmp_path: Path):
    write_run(tmp_path)
    text = page(read_runs([tmp_path]))
    assert ATTACK not in text
    assert text.count("</script>") == 2
    assert embedded(text)["runs"][0]["samples"][0]["response"] == ATTACK


def test_a_supervised_run_has_a_page_too(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss/ce_nats": 1.5, "time/step_s": 1.0, "time/update_s": 0.9}\n'
    )
    (tmp_path / "config.json").write_text(to_json(load_config("two_roads_sft")))
    (run,) = embedded(page(read_runs([tmp_path])))["runs"]
    assert run["title"] == "sft"
    assert run["prediction"] is None
    assert run["steady"] == [
        {"phase": "update", "seconds": 0.9, "share": 0.9},
        {"phase": "other", "seconds": pytest.approx(0.1), "share": pytest.approx(0.1)},
    ]


@pytest.mark.parametrize(("count", "title"), [(1, "r0"), (4, "r0, r1, r2, r3"), (6, "r0, r1, r2, r3 and 2 more")])
def test_the_title_names_a_few_runs_and_counts_the_others(count: int, title: str):
    runs = [run_of(name=f"r{i}", evals=[{"step": 0, "eval/reward": 1.0}]) for i in range(count)]
    assert f'<h1 id="title">{title}</h1>' in page(runs)
