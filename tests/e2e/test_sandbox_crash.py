"""Whoever is killed: every request has exactly one verdict or one clear error, nothing survives, the next request works."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

import pytest

from sandbox import probe
from tests.sandbox_service import (
    RIGHT,
    SLOW,
    SPIN,
    TESTS,
    Service,
    at_once,
    children,
    command,
    descendants,
    environment,
    is_alive,
    until,
)

LEVELS = [level for level in (2, 1) if level <= probe.probe().level]
BUSY = {"code": SPIN, "tests": TESTS, "limits": {"cpu_s": 20.0}}
GONE_S = 5.0


def survivors(pids: Iterable[int]) -> list[int]:
    watched = list(pids)
    until(lambda: not any(map(is_alive, watched)), GONE_S)
    return [pid for pid in watched if is_alive(pid)]


def service_at(level: int) -> Service:
    return Service("--workers", "1", "--level", str(level), "--min-level", "1")


class Busy:
    """A service of one worker whose program spins, and the processes of that worker from the top to the program."""

    def __init__(self, service: Service, body: dict[str, object] = BUSY) -> None:
        self.answers: list[object] = []
        self._idle = len(descendants(service.process.pid))
        self._thread = threading.Thread(target=lambda: self.answers.extend(at_once([lambda: service.post(body)])))
        self._thread.start()
        assert until(lambda: len(descendants(service.process.pid)) > self._idle)
        time.sleep(0.3)
        self.chain = descendants(service.process.pid)

    def answer(self) -> object:
        self._thread.join(60)
        assert not self._thread.is_alive()
        (answer,) = self.answers
        return answer


@pytest.mark.parametrize("level", LEVELS)
def test_a_killed_program_is_its_own_fault(level: int) -> None:
    with service_at(level) as service:
        busy = Busy(service)
        os.kill(busy.chain[-1], signal.SIGKILL)
        status, body = busy.answer()  # pyright: ignore[reportGeneralTypeIssues] - an error fails here
        assert (status, body["status"], body["tests"][0]["verdict"]) == (200, "ok", "memory_limit")
        assert service.post({"code": RIGHT, "tests": TESTS}).body["pass_all"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_job_outlives_the_death_of_its_keeper_or_zygote_once(level: int) -> None:
    with service_at(level) as service:
        length = 4 if level == 2 else 3  # launcher and zygote, keeper, program; or zygote, keeper, program
        for depth in range(length - 1):
            busy = Busy(service, {"code": f"{SLOW} # {depth}", "tests": TESTS})
            assert len(busy.chain) == length
            os.kill(busy.chain[depth], signal.SIGKILL)
            assert not survivors(busy.chain[depth:])
            status, body = busy.answer()  # pyright: ignore[reportGeneralTypeIssues]
            assert (status, body["status"], body["passed"]) == (200, "ok", 1)
        assert service.count("sandbox_faults_total") > 0


@pytest.mark.parametrize("level", LEVELS)
def test_a_worker_that_dies_again_and_again_gives_an_error_and_no_verdict(level: int) -> None:
    with service_at(level) as service:
        busy = Busy(service)
        (zygote,) = children(service.process.pid)
        os.kill(zygote, signal.SIGKILL)
        assert until(lambda: not is_alive(zygote) and len(descendants(service.process.pid)) == len(busy.chain))
        (zygote,) = children(service.process.pid)
        os.kill(zygote, signal.SIGKILL)
        status, body = busy.answer()  # pyright: ignore[reportGeneralTypeIssues]
        assert (status, body["status"], body["tests"]) == (200, "sandbox_error", [])
        assert "pass_all" not in body
        assert service.post({"code": RIGHT, "tests": TESTS}).body["pass_all"]
        assert service.get("/readyz").status == 200


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_survives_the_service(level: int) -> None:
    with service_at(level) as service:
        busy = Busy(service)
        service.process.kill()
        service.process.wait()
        assert not survivors(busy.chain)
        assert isinstance(busy.answer(), Exception)


def test_the_service_dies_with_its_parent() -> None:
    script = f"import subprocess, time; p = subprocess.Popen({command('--die-with-parent', '--min-level', '0', '--workers', '1')!r}); print(p.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert "http://" in parent.stdout.readline()
        family = [pid, *descendants(pid)]
        assert len(family) > 2
    finally:
        parent.kill()
        parent.wait()
    parent.stdout.close()
    assert not survivors(family)


def test_a_client_that_hangs_up_finds_its_answer_later() -> None:
    with Service("--workers", "1", "--min-level", "0") as service:
        body = {"id": "h", "code": SLOW, "tests": TESTS}
        with pytest.raises(TimeoutError):
            service.post(body, timeout=0.3)
        assert service.post(body).body["pass_all"]
        assert service.count("sandbox_jobs_total") == 1


def random_kills(seconds: float, seed: int) -> None:
    rng = random.Random(seed)
    with Service("--workers", "2", "--min-level", "0") as service:
        end = time.monotonic() + seconds
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(rng.uniform(0.05, 0.4)):
                victims = descendants(service.process.pid)
                if victims:
                    try:
                        os.kill(rng.choice(victims), signal.SIGKILL)
                    except ProcessLookupError:
                        continue

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            number = 0
            while time.monotonic() < end:
                number += 8
                bodies = [
                    {"code": f"import time\ntime.sleep(0.1)\n{RIGHT} # {number + i}", "tests": TESTS} for i in range(8)
                ]
                for answer in at_once([lambda b=body: service.post(b) for body in bodies]):
                    status, body = answer  # pyright: ignore[reportGeneralTypeIssues]
                    assert status == 200
                    if body["status"] == "ok":  # a killed program counts as one that the kernel killed
                        assert [row["verdict"] for row in body["tests"]] in (["passed"], ["memory_limit"])
                    else:
                        assert (body["status"], body["tests"]) == ("sandbox_error", [])
        finally:
            stop.set()
            killer.join()
        assert until(lambda: service.get("/readyz").status == 200, 30)
        assert service.post({"code": RIGHT, "tests": TESTS}).body["pass_all"]
        family = descendants(service.process.pid)
        assert service.stop() == 0
        assert not survivors(family)


def test_random_kills_lose_no_request() -> None:
    random_kills(4.0, seed=1)


@pytest.mark.full
def test_random_kills_lose_no_request_for_a_minute() -> None:
    random_kills(60.0, seed=2)
