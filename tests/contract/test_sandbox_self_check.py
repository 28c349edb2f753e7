"""The self-check sees the walls of this machine stand, and sees each of them missing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import interpreter, probe
from sandbox.behaviours import BEHAVIOURS
from sandbox.self_check import failures, findings
from tests.sandbox_service import environment

BEST = probe.probe().level
needs_2 = pytest.mark.skipif(BEST < 2, reason="this machine has no user namespaces (python -m sandbox.probe)")


def test_everything_that_the_best_level_promises_holds(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "sandbox.self_check", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert (report["ok"], report["level"], report["name"]) == (True, BEST, probe.LEVEL_NAMES[BEST])
    assert len(report["checks"]) >= (60 if BEST else 40)
    assert len(done.stdout.splitlines()) == len(BEHAVIOURS) + 3


def test_names_are_different_and_the_quick_ones_hold_at_level_0() -> None:
    assert len({behaviour.name for behaviour in BEHAVIOURS}) == len(BEHAVIOURS)
    assert asyncio.run(failures(0, interpreter.find())) == []


@needs_2
@pytest.mark.parametrize(
    ("mechanism", "names"),
    [
        ("seccomp", ["no other process", "no network", "no code in memory files", "no change of rights"]),
        ("namespaces.mount", ["no trace of the host's tree", "a private /tmp"]),
        ("namespaces.pid", ["a process tree of its own"]),
        ("tmpfs.size", ["/tmp is bounded"]),
        ("tmpfs.inodes", ["files in /tmp are bounded"]),
        ("rlimits.as", ["memory is bounded", "mapped memory is bounded"]),
        ("rlimits.nofile", ["descriptors are bounded"]),
        ("rlimits.fsize", ["files are bounded"]),
        ("descriptors", ["no open file of ours"]),
    ],
)
def test_a_mechanism_that_is_missing_is_seen(mechanism: str, names: list[str]) -> None:
    chosen = [behaviour for behaviour in BEHAVIOURS if behaviour.name in names]
    assert len(chosen) == len(names)
    assert all(found.ok for found in asyncio.run(findings(2, interpreter.find(), chosen)))
    found = asyncio.run(findings(2, interpreter.find(), chosen, without=[mechanism]))
    assert [(one.name, one.ok) for one in found] == [(behaviour.name, False) for behaviour in chosen]


def test_a_level_that_is_out_of_reach_is_one_clear_message() -> None:
    if BEST + 1 == probe.HIGHEST:
        pytest.skip("this machine reaches every level but gVisor's")
    command = [sys.executable, "-m", "sandbox.self_check", "--level", str(BEST + 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 2
    assert "is required" in done.stderr
    assert "Traceback" not in done.stderr
