"""The real service in a process of its own, asked over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from tests import sandbox_openapi

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START_S, STOP_S = 60.0, 30.0
T = TypeVar("T")

TESTS = [{"input": "1\n", "output": "2"}]
RIGHT, WRONG = "print(int(input()) + 1)", "print(7)"
SLOW = "import time\ntime.sleep(1)\nprint(2)"
SPIN = "while True: pass"


class Answer(NamedTuple):
    status: int
    body: Any


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "sandbox.server", "--port", "0", *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, **more}


class Service:
    """``python -m sandbox.server`` on a port of its own choice, in a process group of its own."""

    def __init__(self, *options: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            command(*options), stdout=subprocess.PIPE, text=True, env=environment(**variables), start_new_session=True
        )
        assert self.process.stdout
        timer = threading.Timer(START_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert "http://" in line, f"the service did not start: {line!r}, {self.process.poll()}"
        self.url = line.split()[-1]

    def get(self, path: str) -> Answer:
        return self.ask("GET", path, timeout=60)

    def post(self, body: object, timeout: float = 120, path: str = "/v1/run") -> Answer:
        return self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), timeout=timeout)

    def batch(self, *lines: object) -> list[Any]:
        """The answers, in order of completion."""
        data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        body = self.ask("POST", "/v1/batch", data).body
        said = [json.loads(line) for line in body.splitlines()] if isinstance(body, str) else [body]
        for line in said:
            sandbox_openapi.check_schema("BatchLine", line)
        return said

    def ask(
        self, method: str, path: str, data: bytes | None = None, *, timeout: float = 120, token: str = ""
    ) -> Answer:
        """An answer that is as ``openapi.json`` says."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = _ask(urllib.request.Request(self.url + path, data, headers, method=method), timeout)
        sandbox_openapi.check(method, path, answer.status, answer.body)
        return answer

    def count(self, name: str) -> float:
        """A line of /metrics; 0 if there is none."""
        lines = self.get("/metrics").body.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split()[0] == name)

    def stop(self) -> int:
        """Ask to end, and wait."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _ask(request: urllib.request.Request, timeout: float) -> Answer:
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            status, data = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            status, data = error.code, error.read()
    try:
        return Answer(status, json.loads(data))
    except ValueError:  # text, or many lines of JSON
        return Answer(status, data.decode())


def at_once(work: Iterable[Callable[[], T]]) -> list[T | Exception]:
    """Run all in threads; results in order, errors in their place."""
    calls = list(work)
    results: list[T | Exception] = [RuntimeError("did not run")] * len(calls)

    def run(index: int, action: Callable[[], T]) -> None:
        try:
            results[index] = action()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[index] = error

    threads = [threading.Thread(target=run, args=(index, action)) for index, action in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Wait, but not for ever; whether it came true."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        return _read(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
