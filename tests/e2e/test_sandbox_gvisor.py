"""A worker under gVisor (level 4) gives the verdicts of the others, stops what they stop, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import pytest

from sandbox import gvisor, interpreter, judge, limits, probe
from sandbox.executor import Task, Worker, WorkerFault
from tests import sandbox_attacks
from tests.attacks.attack import ENVIRONMENT_SECRET, Attack
from tests.sandbox_attacks import ATTACKS, Range, armed
from tests.sandbox_service import RIGHT, TESTS, Service, command, descendants, environment

SAMPLE = 10
NOT_STOPPED = {
    # gVisor's tmpfs counts bytes, not files
    "disk fill: many files",
    "disk fill: many folders",
    # it is a call of the 64-bit interface there, and the filter judges it as one
    "a call of the 32-bit interface",
}
LIMITED: Mapping[str, float] = {"cpu_s": 1.0, "idle_s": 1.0, "memory_bytes": 128 << 20, "output_bytes": 1 << 20}
ENDS = [
    ("print(int(input()) + 1)", judge.PASSED),
    ("print(int(input()) + 2)", judge.WRONG_ANSWER),
    ("while True: pass", judge.TIME_LIMIT),
    ("import time\ntime.sleep(60)", judge.WALL_LIMIT),
    ("bytearray(1 << 30)", judge.MEMORY_LIMIT),
    ("print('x' * (2 << 20))", judge.OUTPUT_LIMIT),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV) or 1 / 0", judge.RUNTIME_ERROR),
    ("print(", judge.COMPILE_ERROR),
]


@pytest.fixture(scope="module")
def runsc() -> str:
    fact = probe.with_gvisor(probe.probe()).facts["gvisor"]
    if not fact.works:
        pytest.skip(f"needs gVisor (Debian: apt-get install runsc): {fact.detail}")
    return fact.detail


def attacks() -> list[Attack]:
    """Short ones: the clocks are the same for all."""
    chosen = [attack for attack in ATTACKS if attack.name not in NOT_STOPPED and not attack.lag_s and attack.stopped_by]
    chosen = [attack for attack in chosen if not any(name.startswith("clocks.") for name in attack.stopped_by)]
    return chosen[:: len(chosen) // SAMPLE][:SAMPLE]


async def differences(worker: Worker, targets: Range, attacks: Sequence[Attack]) -> dict[str, list[str]]:
    """What is wrong, by attack."""
    wrong: dict[str, list[str]] = {}
    for attack in attacks:
        aimed = targets.aim(attack)
        found = aimed.findings(await sandbox_attacks.answer_of(worker, aimed), 4)
        if targets.trace(attack):
            found.append("something was left on the host")
        if not await sandbox_attacks.is_well(worker):
            found.append("the program after it fails")
        if found:
            wrong[attack.name] = found
    return wrong


@pytest.mark.usefixtures("runsc")
def test_verdicts_are_those_of_other_levels_and_a_sample_of_the_attacks_gets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROJECT_TOKEN", ENVIRONMENT_SECRET)
    every = limits.complete(LIMITED)

    async def run() -> tuple[list[str], dict[str, list[str]]]:
        async with await Worker.start(4, interpreter.find()) as worker:
            records = [await worker.run(Task(code=code, input="41\n", limits=every)) for code, _ in ENDS]
            wrong = await differences(worker, targets, attacks())
        return [judge.judge(record, "stdin", "42", every).verdict for record in records], wrong

    with armed() as targets:
        verdicts, wrong = asyncio.run(run())
    assert verdicts == [verdict for _, verdict in ENDS]
    assert wrong == {}
    assert len(attacks()) == SAMPLE


@pytest.mark.full
@pytest.mark.usefixtures("runsc")
def test_all_attacks_but_those_named_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes."""
    monkeypatch.setenv("PROJECT_TOKEN", ENVIRONMENT_SECRET)

    async def run() -> dict[str, list[str]]:
        async with await Worker.start(4, interpreter.find()) as worker:
            return await differences(worker, targets, ATTACKS)

    with armed() as targets:
        assert asyncio.run(run()).keys() == NOT_STOPPED


@pytest.mark.usefixtures("runsc")
def test_a_service_states_the_level_and_nothing_outlives_it() -> None:
    (attack,) = [attack for attack in attacks() if "seccomp" in attack.stopped_by][:1]
    with Service("--workers", "1", "--min-level", "4") as service, armed() as targets:
        answer = service.post({"code": RIGHT, "tests": TESTS}).body
        assert answer["pass_all"]
        assert answer["isolation"] == {"level": 4, "name": "gvisor", "missing": []}
        aimed = targets.aim(attack)
        assert aimed.findings(service.post(aimed.body).body, 4) == []
        assert service.get("/v1/capabilities").body["languages"] == ["python"]
        started = descendants(service.process.pid)
        (folder,) = {word[9:] for pid in started for word in _command_line(pid).split("\0") if "--bundle=" in word}
        assert pathlib.Path(folder, "config.json").exists()
        service.process.kill()
        _wait(lambda: not [pid for pid in started if "runsc" in _command_line(pid)])
        _wait(lambda: not pathlib.Path(folder).exists())


@pytest.mark.usefixtures("runsc")
def test_a_worker_that_is_stopped_while_a_program_runs_ends_with_all_of_its_processes() -> None:
    async def run() -> list[int]:
        worker = await Worker.start(4, interpreter.find())
        started = [worker.process.pid, *descendants(worker.process.pid)]
        running = asyncio.create_task(worker.run(Task(code="while True: pass", input="")))
        await asyncio.sleep(0.3)
        await worker.stop()
        running.cancel()
        return started

    started = asyncio.run(run())
    assert len(started) > 3
    _wait(lambda: not [pid for pid in started if "runsc" in _command_line(pid)])


@pytest.mark.usefixtures("runsc")
def test_the_end_of_gvisor_is_a_fault_and_no_verdict() -> None:
    async def run() -> None:
        async with await Worker.start(4, interpreter.find()) as worker:
            (boot,) = [pid for pid in descendants(worker.process.pid) if _command_line(pid).startswith("runsc-sandbox")]
            running = asyncio.create_task(worker.run(Task(code="while True: pass", input="")))
            await asyncio.sleep(0.3)
            os.kill(boot, signal.SIGKILL)
            with pytest.raises(WorkerFault, match="died"):
                await asyncio.wait_for(running, 10)

    asyncio.run(run())


def test_a_signal_while_the_bundle_is_removed_does_not_stop_that(tmp_path: pathlib.Path) -> None:
    """A service that is killed closes its socket a moment before the signal of its death arrives."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    program = tmp_path / "worker.py"
    program.write_text(
        "import os, shutil, signal\n"
        "from sandbox import gvisor\n"
        "remove = shutil.rmtree\n"
        "def removed_under_a_signal(*args, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    remove(*args, **kwargs)\n"
        "shutil.rmtree = removed_under_a_signal\n"
        "gvisor.RUNSC = ('/bin/false',)\n"
        "gvisor.main()\n"
    )
    given = {"folder": str(folder), "python": sys.executable, "settings": {"read_only": []}}
    service, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with service, worker:
        line = [sys.executable, str(program), str(worker.fileno()), json.dumps(given)]
        paths = {"PYTHONPATH": str(pathlib.Path(gvisor.__file__).parents[1])}
        ran = subprocess.run(line, env=paths, pass_fds=[worker.fileno()], capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert not folder.exists()


def test_where_there_is_no_runsc_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gvisor, "RUNSC", ("/nowhere/runsc",))
    plain = probe.probe()
    found = probe.with_gvisor(plain)
    assert found.level == plain.level
    text = found.shortfall(4).splitlines()
    assert text[0].endswith("is the best here; at least 4 is required")
    assert text[1] == "  - gvisor: ENOENT: no runsc at /nowhere/runsc"
    assert text[2].startswith("Level 4 needs runsc")
    assert text[3] == f"Or accept less with --min-level {plain.level}."


def test_a_lower_level_than_the_least_is_refused() -> None:
    line = command("--level", "2", "--min-level", "4")
    run = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def _command_line(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
