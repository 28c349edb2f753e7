"""Hostile and cheating programs get nothing but their verdict, at every isolation level that this machine reaches.

A sample runs always. ``--full`` runs all and leaves ``tests/results/sandbox_attacks.json``: per attack its verdicts, how it
succeeded without the mechanisms that it names, and which of them stop it alone.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Callable, Sequence

import pytest

from sandbox import interpreter, probe, walls
from sandbox.executor import Worker
from tests import sandbox_attacks
from tests.attacks.attack import ENVIRONMENT_SECRET, OF_THE_JUDGE, Attack
from tests.sandbox_attacks import ATTACKS, Range, armed
from tests.sandbox_service import RIGHT, TESTS, Service

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "sandbox_attacks.json"
BEST = min(probe.probe().level, 2)  # level 3 needs a delegated directory: test_sandbox_cgroup.py
LEVELS = tuple(range(BEST, 0, -1))
STRIDE = 16
"""One attack of so many is in each sample; no two samples are the same."""
Run = Callable[[Sequence[Attack], int], dict[str, list[str]]]

needs_2 = pytest.mark.skipif(BEST < 2, reason="this machine has no user namespaces (python -m sandbox.probe)")
needs_1 = pytest.mark.skipif(BEST < 1, reason="this machine has no Landlock (python -m sandbox.probe)")


def by_executor(attacks: Sequence[Attack], level: int) -> dict[str, list[str]]:
    """What is wrong, by attack. A worker serves all of them, and a right program after each."""

    async def run(targets: Range) -> dict[str, list[str]]:
        findings: dict[str, list[str]] = {}
        async with await Worker.start(level, interpreter.find()) as worker:
            for attack in attacks:
                aimed = targets.aim(attack)
                found = aimed.findings(await sandbox_attacks.answer_of(worker, aimed), level)
                if level >= attack.level and targets.trace(attack):
                    found.append("something was left on the host")
                if not await sandbox_attacks.is_well(worker):
                    found.append("the program after it fails")
                findings[attack.name] = found
        return findings

    with armed() as targets:
        return asyncio.run(run(targets))


def over_http(attacks: Sequence[Attack], level: int) -> dict[str, list[str]]:
    findings: dict[str, list[str]] = {}
    options = ("--workers", "2", "--level", str(level), "--min-level", "1")
    with Service(*options, PROJECT_TOKEN=ENVIRONMENT_SECRET) as service, armed() as targets:
        for attack in attacks:
            aimed = targets.aim(attack)
            if aimed.before:
                service.post({"code": aimed.before, "tests": TESTS})
            found = aimed.findings(service.post(aimed.body).body, level)
            if level >= attack.level and targets.trace(attack):
                found.append("something was left on the host")
            control = service.post({"code": f"{RIGHT}  # after {attack.name}", "tests": TESTS}).body
            if not control["pass_all"]:
                found.append(f"the program after it: {control}")
            findings[attack.name] = found
        assert service.count("sandbox_faults_total") == 0
    return findings


def successes(attacks: Sequence[Attack], targets: Range, level: int) -> dict[str, str]:
    """How each is seen to succeed without what stops it."""

    async def run() -> dict[str, str]:
        seen: dict[str, str] = {}
        for attack in attacks:
            aimed = targets.aim(attack, is_held=False)
            how = await sandbox_attacks.success_without(aimed, attack.stopped_by, level)
            seen[attack.name] = targets.trace(attack) or how
        return seen

    return asyncio.run(run())


def sufficient(attack: Attack, targets: Range) -> list[str]:
    """The mechanisms of the sandbox that stop it alone, at level 2 or at level 1."""

    async def stops(mechanism: str, level: int) -> bool:
        if mechanism in walls.absent(level, set(attack.stopped_by) - {mechanism}):
            return False
        aimed = targets.aim(attack, is_held=False)
        how = await sandbox_attacks.success_without(aimed, set(attack.stopped_by) - {mechanism}, level)
        return not (targets.trace(attack) or how)

    async def run() -> list[str]:
        names = sorted(sandbox_attacks.mechanisms(attack))
        return [name for name in names if any([await stops(name, level) for level in LEVELS])]

    return asyncio.run(run())


def wrong(findings: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: found for name, found in findings.items() if found}


@pytest.fixture
def secret_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_TOKEN", ENVIRONMENT_SECRET)


def test_every_attack_names_mechanisms_that_exist() -> None:
    known = {*walls.LEVELS, *OF_THE_JUDGE}
    assert {attack.name: attack.stopped_by for attack in ATTACKS if not known.issuperset(attack.stopped_by)} == {}
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert sum(bool(attack.stopped_by) for attack in ATTACKS) >= 200


@needs_2
@pytest.mark.usefixtures("secret_environment")
def test_a_sample_of_the_attacks_gets_nothing_from_a_worker() -> None:
    assert wrong(by_executor(ATTACKS[::STRIDE], 2)) == {}


@needs_1
def test_a_sample_of_the_attacks_gets_nothing_over_http() -> None:
    assert wrong(over_http(ATTACKS[4::STRIDE], 1)) == {}


@needs_2
@pytest.mark.usefixtures("secret_environment")
def test_a_sample_of_the_attacks_succeeds_without_what_stops_it() -> None:
    sample = [attack for attack in ATTACKS[8::STRIDE] if attack.stopped_by]
    with armed() as targets:
        assert [name for name, how in successes(sample, targets, 2).items() if not how] == []


def test_a_mechanism_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without: \['secomp'\] are no mechanisms"):
        walls.absent(2, {"secomp"})


@pytest.mark.full
@needs_2
@pytest.mark.usefixtures("secret_environment")
def test_no_attack_gets_anything_and_each_would_without_what_stops_it() -> None:
    """Twelve minutes on two quiet cores, twice that under load. Leaves its findings in ``tests/results/sandbox_attacks.json``."""
    ways: dict[str, Run] = {"worker": by_executor, "http": over_http}
    findings = {f"{way}, level {level}": run(ATTACKS, level) for way, run in ways.items() for level in LEVELS}
    attacks = [attack for attack in ATTACKS if attack.stopped_by]
    with armed() as targets:
        without = successes(attacks, targets, 2)
        alone = {attack.name: sufficient(attack, targets) for attack in attacks}
    rows = {
        attack.name: {
            "verdicts": list(attack.verdicts),
            "stopped by": list(attack.stopped_by),
            "alone enough": alone.get(attack.name, []),
            "succeeds without them": bool(without.get(attack.name)),
        }
        for attack in ATTACKS
    }
    found = probe.probe()
    differences = {way: wrong(of_way) for way, of_way in findings.items()}
    totals = {"programs": len(ATTACKS), "attacks": len(attacks), "runs": len(findings) * len(ATTACKS)}
    report = {"kernel": found.kernel, "machine": found.machine, "differences": differences, **totals, "list": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    assert not any(differences.values())
    assert [name for name, how in without.items() if not how] == []
    named = {attack.name: sorted(sandbox_attacks.mechanisms(attack)) for attack in attacks}
    assert {
        name: sorted(set(named[name]) - set(enough)) for name, enough in alone.items() if named[name] != enough
    } == {}
