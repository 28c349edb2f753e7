"""Hostile and cheating programs get nothing but their verdict, at every isolation level that this machine reaches."""

from __future__ import annotations

import pathlib

import pytest

from sandbox import probe
from tests.sandbox_attacks import ATTACKS, ENVIRONMENT_SECRET, Attack, armed
from tests.sandbox_service import RIGHT, TESTS, Service

LEVELS = [level for level in (2, 1) if level <= probe.probe().level]
REPEATED_EVERY = 4
"""At the lower level one attack of so many runs; all with the marker ``full``."""


def run(attacks: list[Attack], level: int, folder: pathlib.Path) -> list[str]:
    findings: list[str] = []
    options = ("--workers", "2", "--level", str(level), "--min-level", "1")
    with Service(*options, PROJECT_TOKEN=ENVIRONMENT_SECRET) as service, armed(attacks, folder) as aimed:
        for item in aimed:
            answer = service.post(item.body)
            findings += [f"{item.name}: {what}" for what in item.findings(answer.body, level)]
            control = service.post({"code": f"{RIGHT}  # after {item.name}", "tests": TESTS}).body
            if not control["pass_all"]:
                findings.append(f"{item.name}: the program after it: {control}")
        if service.count("sandbox_faults_total"):
            findings.append("a worker broke")
    return findings


@pytest.mark.skipif(2 not in LEVELS, reason="this machine has no user namespaces (python -m sandbox.probe)")
def test_no_attack_gets_anything_at_level_2(tmp_path: pathlib.Path) -> None:
    assert run(ATTACKS, 2, tmp_path) == []


@pytest.mark.skipif(1 not in LEVELS, reason="this machine has no Landlock (python -m sandbox.probe)")
def test_a_sample_of_the_attacks_gets_nothing_at_level_1(tmp_path: pathlib.Path) -> None:
    assert run(ATTACKS[::REPEATED_EVERY], 1, tmp_path) == []


@pytest.mark.full
@pytest.mark.skipif(1 not in LEVELS, reason="this machine has no Landlock (python -m sandbox.probe)")
def test_no_attack_gets_anything_at_level_1(tmp_path: pathlib.Path) -> None:
    assert run(ATTACKS, 1, tmp_path) == []
