from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_distil.errors import ConfigError
from megatron_distil.metrics.log import Outlets, RunLog
from megatron_distil.metrics.names import PATTERNS, SENTENCE_BY_NAME, TOTALS, sentence
from megatron_distil.metrics.reduce import Totals
from megatron_distil.metrics.sinks import JsonLines, JsonLinesSink, TensorBoardSink, WandbSink, step_line
from megatron_distil.types import FinishReason, Outcome, Sums
from tests.recipe import write_recipe
from tests.records import example, targets


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.is_closed = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append((step, values))

    def close(self) -> None:
        self.is_closed = True


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# names


def test_every_name_is_an_area_and_a_quantity():
    areas = {"loss", "teacher", "rollout", "feedback", "sync", "train", "eval", "time", "memory"}
    assert {name.split("/")[0] for name in SENTENCE_BY_NAME} <= areas
    assert [name for name, text in SENTENCE_BY_NAME.items() if not text.endswith(".")] == []
    assert set(SENTENCE_BY_NAME) >= TOTALS
    assert all(text.endswith(".") for _, text in PATTERNS)


def test_an_unknown_name_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ValueError, match=r"loss/ce_nat: not in the catalogue.*did you mean loss/ce_nats\?"):
        Totals().add("loss/ce_nat", 1.0)
    with pytest.raises(ValueError, match="add it with a sentence"):
        Totals().peak("zzz/qqq", 1.0)


@pytest.mark.parametrize("name", ["eval/avg_at_8", "eval/new_pass_at_16", "eval/first_road_share", "eval/new_reward"])
def test_evaluations_name_their_own_metrics(name: str):
    assert sentence(name).startswith("Held-out prompts")


@pytest.mark.parametrize("name", ["eval/", "eval/Avg", "eval/a/b", "eval/_x", "loss/avg_at_8"])
def test_a_pattern_is_no_hole_in_the_catalogue(name: str):
    with pytest.raises(ValueError, match="not in the catalogue"):
        sentence(name)


# reduce


def test_a_mean_is_divided_once_over_everything_that_was_counted():
    # Means of means would be (1 + 4) / 2 = 2.5 here.
    totals = Totals([Sums(sums={"loss/ce_nats": (9.0, 9.0)}), Sums(sums={"loss/ce_nats": (4.0, 1.0)})])
    assert totals.means() == {"loss/ce_nats": 1.3}


def test_totals_are_not_divided_and_maxima_are_not_added():
    totals = Totals(
        [
            Sums(sums={"loss/tokens": (10.0, 1.0)}, maxima={"memory/peak_bytes": 5.0}),
            Sums(sums={"loss/tokens": (20.0, 1.0)}, maxima={"memory/peak_bytes": 3.0}),
        ]
    )
    assert totals.means() == {"loss/tokens": 30.0, "memory/peak_bytes": 5.0}


def test_a_maximum_below_zero_stays_below_zero():
    totals = Totals()
    totals.peak("sync/logprob_gap_max_nats", -2.0)
    totals.peak("sync/logprob_gap_max_nats", -3.0)
    assert totals.means() == {"sync/logprob_gap_max_nats": -2.0}


def test_what_was_never_counted_has_no_mean():
    assert Totals([Sums(sums={"loss/ce_nats": (0.0, 0.0)})]).means() == {}


def test_replicas_add_up_in_any_order():
    one = Sums(sums={"loss/ce_nats": (1.0, 2.0)}, maxima={"memory/peak_bytes": 1.0})
    two = Sums(sums={"loss/ce_nats": (5.0, 2.0)}, maxima={"memory/peak_bytes": 2.0})
    assert Totals([one, two]).means() == Totals([two, one]).means() == {"loss/ce_nats": 1.5, "memory/peak_bytes": 2.0}


# log


def run_log(*, reduce=lambda totals: totals, **outlets) -> tuple[RunLog, Kept, Clock]:
    kept, clock = Kept(), Clock()
    log = RunLog(
        reduce=reduce, outlets=Outlets(sinks=[kept], **outlets), num_processes=2, clock=clock, peak_bytes=lambda: 7.0
    )
    return log, kept, clock


def test_a_step_counts_its_rollouts():
    log, kept, clock = run_log()
    examples = [
        example("a", 0, Outcome.PASSED, tokens=2),
        example("a", 1, Outcome.FAILED, tokens=4, finish=FinishReason.LENGTH),
        example("b", 0, Outcome.TIMEOUT, tokens=6, version=3, has_context=False),
        example("b", 1, Outcome.UNAVAILABLE, tokens=8, has_context=False),
    ]
    with log.span("collect"):
        clock.now += 4.0
    log.write(5, examples, [targets(2), targets(4), None, None], [])
    ((step, values),) = kept.lines
    assert step == 5
    assert values == pytest.approx(
        {
            "rollout/count": 4.0,
            "rollout/response_tokens": 5.0,
            "rollout/response_tokens_max": 8.0,
            "rollout/prompt_tokens": 4.0,
            "rollout/truncated_frac": 0.25,
            "rollout/logprob_nats": -0.5,
            "rollout/lag_steps_max": 2.0,
            "feedback/unavailable_frac": 0.25,
            "feedback/duration_s": 0.25,
            "feedback/duration_max_s": 0.25,
            "feedback/passed_frac": 1 / 3,
            "feedback/failed_frac": 1 / 3,
            "feedback/timeout_frac": 1 / 3,
            "feedback/invalid_frac": 0.0,
            "feedback/reward": 1 / 3,
            "feedback/solved_frac": 0.5,
            "feedback/mixed_frac": 0.5,
            "teacher/has_context_frac": 0.5,
            "teacher/demonstration_frac": 0.0,
            "teacher/feedback_frac": 0.5,
            "teacher/context_tokens": 6.0,
            "teacher/entropy_nats": 1.25,
            "teacher/support_mass_frac": 0.75,
            "train/updates": 0.0,
            "memory/peak_bytes": 7.0,
            "time/collect_s": 4.0,
            "time/step_s": 4.0,
            "time/tokens_per_s": 5.0,
            "time/tokens_per_s_per_gpu": 2.5,
        }
    )


def test_a_prompt_that_always_passes_is_solved_and_not_mixed():
    log, kept, _ = run_log()
    log.write(5, [example("a", sample, Outcome.PASSED) for sample in range(2)], [None, None], [])
    values = kept.lines[0][1]
    assert (values["feedback/solved_frac"], values["feedback/mixed_frac"]) == (1.0, 0.0)


def test_spans_add_up_within_a_step_and_lie_in_each_other():
    log, kept, clock = run_log()
    with log.span("update"):
        clock.now += 1.0
        with log.span("pack"):
            clock.now += 2.0
    with log.span("update"):
        clock.now += 4.0
    clock.now += 8.0
    log.write(0, [], [], [])
    clock.now += 16.0
    with log.span("update"):
        clock.now += 32.0
    log.write(1, [], [], [])
    (_, first), (_, second) = kept.lines
    assert (first["time/update_s"], first["time/pack_s"], first["time/step_s"]) == (7.0, 2.0, 15.0)
    assert (second["time/update_s"], second["time/step_s"]) == (32.0, 48.0)
    assert "time/pack_s" not in second


def test_a_span_of_an_unknown_name_is_refused_before_it_begins():
    log, _, _ = run_log()
    with pytest.raises(ValueError, match="time/colect_s: not in the catalogue"), log.span("colect"):
        raise AssertionError("the span began")


def test_a_failed_phase_is_timed_too():
    log, kept, clock = run_log()

    def fail() -> None:
        with log.span("collect"):
            clock.now += 3.0
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - ours, two lines above
        fail()
    log.write(0, [], [], [])
    assert kept.lines[0][1]["time/collect_s"] == 3.0


def test_what_a_step_was_given_belongs_to_that_step_only():
    log, kept, _ = run_log()
    log.add(Sums(sums={"sync/logprob_gap_nats": (1.0, 4.0)}))
    log.write(0, [], [], [Sums(sums={"loss/ce_nats": (2.0, 1.0)}), Sums(sums={"loss/ce_nats": (4.0, 3.0)})])
    log.write(1, [], [], [])
    (_, first), (_, second) = kept.lines
    assert (first["sync/logprob_gap_nats"], first["loss/ce_nats"], first["train/updates"]) == (0.25, 1.5, 2.0)
    assert "sync/logprob_gap_nats" not in second


def test_the_totals_of_all_replicas_are_divided_and_not_their_means():
    other = Totals([Sums(sums={"loss/ce_nats": (100.0, 1.0)})])

    def reduce(totals: Totals) -> Totals:
        totals.merge(other)
        return totals

    log, kept, _ = run_log(reduce=reduce)
    log.write(0, [], [], [Sums(sums={"loss/ce_nats": (0.0, 99.0)})])
    assert kept.lines[0][1]["loss/ce_nats"] == 1.0


def test_an_update_that_counted_the_teacher_itself_is_believed():
    log, kept, _ = run_log()
    log.write(5, [example("a", 0, Outcome.PASSED)], [targets(3)], [Sums(sums={"teacher/entropy_nats": (0.5, 1.0)})])
    assert kept.lines[0][1]["teacher/entropy_nats"] == 0.5


def test_supervised_steps_have_a_speed_too():
    log, kept, clock = run_log()
    with log.span("update"):
        clock.now += 2.0
    log.write(0, [], [], [Sums(sums={"loss/tokens": (60.0, 1.0)})])
    assert kept.lines[0][1]["time/tokens_per_s"] == 30.0


def test_a_rank_without_outlets_writes_nothing(tmp_path: Path):
    log = RunLog()
    log.write(5, [example("a", 0, Outcome.PASSED)], [None], [])
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_some_rollouts_are_kept_with_what_the_teacher_saw(tmp_path: Path):
    samples = JsonLines(tmp_path / "samples.jsonl")
    log, _, _ = run_log(samples=samples, num_samples=2, decode=lambda token: f"<{token}>")
    examples = [example(name, sample, Outcome.FAILED) for name in "ab" for sample in range(4)]
    log.write(5, examples, [targets(3), *[None] * 7], [])
    first, second = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert (first["rollout"], second["rollout"]) == ("5/a/0", "5/b/0")
    assert first["context"] == "a?hint>"
    assert first["tokens"][0] == {"text": "<0>", "student": -0.5, "teacher": -0.6931, "best": "<0>", "best_prob": 0.5}
    assert second["tokens"][0] == {"text": "<0>", "student": -0.5}


def test_a_teacher_that_was_asked_for_the_sampled_token_alone_is_shown_with_it(tmp_path: Path):
    samples = JsonLines(tmp_path / "samples.jsonl")
    log, _, _ = run_log(samples=samples, num_samples=1, decode=lambda token: f"<{token}>")
    none, sampled = np.zeros((3, 0)), np.array([-0.25, -1.0, -2.0], dtype=np.float32)
    target = replace(targets(3), support_ids=none.astype(np.int32), logprobs=none.astype(np.float32), sampled=sampled)
    log.write(5, [example("a", 0, Outcome.FAILED)], [target], [])
    (kept,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [token["teacher"] for token in kept["tokens"][:3]] == [-0.25, -1.0, -2.0]
    assert "best" not in kept["tokens"][0]


def test_closing_a_log_closes_its_sinks():
    log, kept, _ = run_log()
    log.close()
    assert kept.is_closed


# sinks


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_cuts_its_metrics_and_keeps_the_tail(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesSink(path)
    for step in range(5):
        first.write(step, {"loss/ce_nats": 1.0})
    with path.open("a") as file:
        file.write('{"step": 5, "loss/ce_na')  # torn by a crash
    second = JsonLinesSink(path)
    for step in (3, 4):
        second.write(step, {"loss/ce_nats": 2.0})
    assert steps(path) == [0, 1, 2, 3, 4]
    assert [json.loads(line)["loss/ce_nats"] for line in path.read_text().splitlines()] == [1.0, 1.0, 1.0, 2.0, 2.0]
    tail = (tmp_path / "metrics.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in tail[:-1]] == [3, 4]
    assert tail[-1] == '{"step": 5, "loss/ce_na'

    third = JsonLinesSink(path)
    third.write(0, {})
    assert steps(path) == [0]
    assert steps(tmp_path / "metrics.2.jsonl") == [0, 1, 2, 3, 4]


def test_a_run_that_goes_on_where_it_ended_cuts_nothing(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    JsonLinesSink(path).write(0, {})
    JsonLinesSink(path).write(1, {})
    assert steps(path) == [0, 1]
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_and_a_step_of_one_number_are_two_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.write(3, {"eval/avg_at_8": 0.5})
    sink.write(3, {"loss/ce_nats": 1.0})
    assert steps(path) == [3, 3]


def test_what_is_no_number_stays_readable_json(tmp_path: Path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    sink.write(0, {"loss/ce_nats": float("nan"), "train/grad_norm": float("inf")})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 0, "loss/ce_nats": "nan", "train/grad_norm": "inf"}


def test_weights_and_biases_that_are_asked_for_and_missing_are_named(tmp_path: Path):
    try:
        import wandb  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        pytest.skip("wandb is installed")
    from megatron_distil.config.load import load_config

    config = load_config(write_recipe(tmp_path), ["log.wandb_project=distil"])
    with pytest.raises(ConfigError, match=r"log.wandb_project = 'distil': Weights & Biases is not installed\. Run pip"):
        WandbSink("distil", tmp_path, config)


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    pytest.importorskip("torch")
    sink = TensorBoardSink(tmp_path)
    sink.write(0, {"loss/ce_nats": 2.0})
    sink.write(1, {"loss/ce_nats": 1.0})
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss/ce_nats")] == [(0, 2.0), (1, 1.0)]


def test_a_step_is_one_line_in_a_log_file():
    values = {"loss/ce_nats": 0.12345, "feedback/passed_frac": 0.5, "time/step_s": 2.04, "memory/peak_bytes": 1.0}
    assert step_line(11, 40, values) == "step 12/40  ce 0.1235  passed 50.0%  2.0 s"
