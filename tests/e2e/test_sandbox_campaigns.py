"""Campaigns against the service: a sample always, the whole with ``--full``, which leaves ``tests/results/sandbox_*.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox import probe
from tests.sandbox_campaigns import CONSTANT, determinism, kills, soak

RESULTS = Path(__file__).resolve().parents[1] / "results"
BACK_S = 2.0
pytestmark = pytest.mark.skipif(
    probe.probe().level < 1, reason="this machine has no Landlock (python -m sandbox.probe)"
)


def keep(name: str, report: dict[str, Any]) -> None:
    (RESULTS / f"sandbox_{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def check_soak(report: dict[str, Any]) -> None:
    assert report["wrong"] == []
    assert set(report["answers"]) <= {"200 ok", "429"}
    assert sum(report["kinds"].values()) == report["jobs"] == report["answers"]["200 ok"]
    states = [{name: state[name] for name in CONSTANT} for state in report["states"]]
    assert states == states[:1] * len(states)
    assert states[0]["zombies"] == 0
    assert (report["exit_code"], report["survivors"], report["temporary_left"]) == (0, 0, 0)


def check_kills(report: dict[str, Any], number: int) -> None:
    assert sum(report["kills"].values()) == number
    killed = sum(count for ending, count in report["ended"].items() if ending.endswith(": memory_limit"))
    assert killed <= report["kills"]["program"]  # the kernel's own verdict on a killed program
    right = {"right: passed", "right: memory_limit", "wrong: wrong_answer", "wrong: memory_limit"}
    assert set(report["ended"]) <= right
    assert set(report["answers"]) <= {"200 ok", "200 sandbox_error", "429", "503", "no answer"}
    assert report["answers"]["200 ok"] == report["jobs"] == sum(report["ended"].values())
    assert report["survivors"] == 0


def test_a_sample_of_the_soak() -> None:
    check_soak(soak(240, workers=1, segments=3))  # more than a keeper's 200 runs


def test_a_sample_of_the_kills(tmp_path: Path) -> None:
    check_kills(kills(10, tmp_path), 10)


def test_a_sample_of_the_repetitions() -> None:
    assert determinism(20, 2, at_once=8)["flipped"] == []


@pytest.mark.full
def test_twenty_thousand_mixed_jobs_at_overload() -> None:
    report = soak(20_000)
    keep("soak", report)
    check_soak(report)
    assert report["rss_drift"] is not None
    assert report["rss_drift"] <= 0.05


@pytest.mark.full
def test_two_hundred_kills(tmp_path: Path) -> None:
    report = kills(200, tmp_path)
    keep("kills", report)
    check_kills(report, 200)
    assert max(times["max"] for times in report["back_after_s"].values()) <= BACK_S


@pytest.mark.full
def test_three_hundred_programs_twenty_times_at_sixteenfold_load() -> None:
    report = determinism(300, 20, at_once=16 * len(os.sched_getaffinity(0)))
    keep("determinism", report)
    assert report["flipped"] == []
