"""What the sandbox costs: tools/run python tools/benchmarks/bench_sandbox.py [--out FILE].

Trivial tests a second and processor time of each, against a fresh process for each test in the same call; latency and requests a
second of the service over HTTP, client and service on the same cores. Prints a table and, as the last line, one JSON object.

    level N    tests of jobs of 8, run and judged by as many workers as there are cores; 0: rlimits, 1: and seccomp and Landlock,
               2: and namespaces
    over HTTP  the same at the best level, sent to the service
    bwrap      a fresh bubblewrap (all namespaces, private /tmp, no capabilities) and Python for each test; apt-get install bubblewrap
    python     a fresh Python for each test, no isolation: the baseline where bubblewrap is missing

Each round runs every variant once, so that a change of the load hits all of them; a ratio is the median of those of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from sandbox import interpreter, judge, limits, probe
from sandbox.executor import Task, Worker
from sandbox.interpreter import identity

ROOT = Path(__file__).resolve().parents[2]
CODE, INPUT, OUTPUT = "print(int(input()) + 1)", "1\n", "2"
ONE_MS = (
    "import time\nend = time.perf_counter() + 0.001\nwhile time.perf_counter() < end: pass\nprint(int(input()) + 1)"
)
TESTS_OF_A_JOB = 8
BWRAP = """--unshare-all --unshare-user --disable-userns --die-with-parent --cap-drop ALL --new-session
--ro-bind /usr /usr --symlink usr/lib /lib --symlink usr/lib64 /lib64 --symlink usr/bin /bin --dev /dev
--size 16777216 --tmpfs /tmp""".split()  # noqa: SIM905 - a command line
CORES = len(os.sched_getaffinity(0))


class Cost(NamedTuple):
    """Of one variant in one round."""

    per_s: float
    cpu_ms: float | None
    """Processor time of a test: ours, the worker's and the program's. None: of processes that nobody here waits for."""


# ------------------------------------------------------------------------------------ a test at a time
async def in_workers(level: int, jobs: int) -> Cost:
    """Jobs of ``TESTS_OF_A_JOB`` tests in warm workers, judged."""
    limited, python = limits.complete({}), interpreter.find()
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(await Worker.start(level, python)) for _ in range(CORES)]
        own: list[float] = []

        async def work(worker: Worker, count: int) -> None:
            for job in range(count):
                for _ in range(TESTS_OF_A_JOB):
                    record = await worker.run(Task(code=f"{CODE} # {job}", input=INPUT, limits=limited))
                    assert judge.judge(record, "stdin", OUTPUT, limited).verdict == judge.PASSED, record
                    own.append(record.cpu_s)

        await asyncio.gather(*(work(worker, 1) for worker in workers))
        own.clear()
        before, started = time.process_time() + on_cpu(workers), time.perf_counter()
        await asyncio.gather(*(work(worker, jobs // CORES) for worker in workers))
        wall = time.perf_counter() - started
        cpu = time.process_time() + on_cpu(workers) - before + sum(own)
    return Cost(len(own) / wall, cpu / len(own) * 1e3)


def on_cpu(workers: Sequence[Worker]) -> float:
    """Seconds that the processes of these have run, but for keepers that have ended: a keeper serves 200 tests."""
    return sum(map(seconds_of, (pid for worker in workers for pid in tree(worker.process.pid))))


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(found for child in children for found in tree(int(child)))]
    return []


def seconds_of(pid: int) -> float:
    """How long it has run; 0 if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    return 0.0


def in_fresh_processes(command: Sequence[str], number: int, *, is_counted: bool) -> Cost:
    """A process for each test, as many at a time as there are cores."""

    def run(_: int) -> None:
        done = subprocess.run(
            command,
            input=INPUT.encode(),
            capture_output=True,
            check=True,
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            **identity(),  # type: ignore[arg-type]
        )
        assert done.stdout == b"2\n"

    before, started = processor_time(), time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(run, range(number)))
    wall, cpu = time.perf_counter() - started, processor_time() - before
    return Cost(number / wall, cpu / number * 1e3 if is_counted else None)


def processor_time() -> float:
    """Ours and that of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def per_test(rounds: int, jobs: int) -> dict[str, list[Cost]]:
    """Every variant, once in each round."""
    python = [interpreter.find().path, "-I", "-S", "-c", CODE]
    bwrap = shutil.which("bwrap")
    number = jobs * TESTS_OF_A_JOB // 4  # fresh processes take several times as long
    variants: dict[str, Callable[[], Cost]] = {
        f"level {level}": lambda level=level: asyncio.run(in_workers(level, jobs))
        for level in range(min(probe.probe().level, 2), -1, -1)
    }
    variants["over HTTP"] = lambda: asyncio.run(of_jobs_over_http(jobs))
    if bwrap:
        variants["bwrap"] = lambda: in_fresh_processes([bwrap, *BWRAP, *python], number, is_counted=False)
    variants["python"] = lambda: in_fresh_processes(python, number, is_counted=True)
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            costs[name].append(run())
    return costs


# ------------------------------------------------------------------------------------------ over HTTP
@asynccontextmanager
async def service() -> AsyncIterator[Callable[[str, int], Awaitable[float]]]:
    """A service; yields: send a program with so many tests, get the seconds that the answer took."""
    command = [sys.executable, "-m", "sandbox.server", "--port", "0", "--min-level", "0", "--die-with-parent"]
    process = subprocess.Popen(  # noqa: ASYNC220 - the service ends with the thread that started it
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout
        url = process.stdout.readline().split()[-1]
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(code: str, tests: int) -> float:
                body = {"code": code, "tests": [{"input": INPUT, "output": OUTPUT}] * tests}
                started = time.perf_counter()
                async with session.post(f"{url}/v1/run", json=body) as reply:
                    answer = await reply.json()
                assert answer["passed"] == tests, answer
                assert not answer["replayed"]
                return time.perf_counter() - started

            yield ask
    finally:
        process.terminate()
        process.wait(60)
        if process.stdout:
            process.stdout.close()


async def rate(ask: Callable[[str, int], Awaitable[float]], requests: int, tests: int) -> float:
    """Requests a second of so many tests, a few at a time."""
    todo = iter(range(requests))

    async def work() -> None:
        for index in todo:
            await ask(f"{CODE} # {tests} {index}", tests)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(4 * CORES)))
    return requests / (time.perf_counter() - started)


async def of_jobs_over_http(jobs: int) -> Cost:
    """Jobs of ``TESTS_OF_A_JOB`` tests, sent to the service."""
    async with service() as ask:
        await ask(CODE, TESTS_OF_A_JOB)
        return Cost(TESTS_OF_A_JOB * await rate(ask, jobs, TESTS_OF_A_JOB), None)


async def over_http(requests: int) -> dict[str, float]:
    """Latency of an idle service, and what a busy one gets through."""
    async with service() as ask:
        for index in range(20):
            await ask(f"{ONE_MS} # warm-up {index}", 1)
        added = sorted([await ask(f"{ONE_MS} # idle {index}", 1) - 0.001 for index in range(requests)])
        per_s = await rate(ask, requests, 1)
    return {
        "added_ms_p50": round(added[len(added) // 2] * 1e3, 2),
        "added_ms_p99": round(added[int(0.99 * len(added))] * 1e3, 2),
        "requests_per_s": round(per_s, 1),
    }


# --------------------------------------------------------------------------------------------- results
def results(rounds: int, jobs: int, requests: int) -> dict[str, Any]:
    """Figures of a call; prints the table that they come from."""
    costs = per_test(rounds, jobs)
    http = asyncio.run(over_http(requests))
    baseline = "bwrap" if "bwrap" in costs else "python"
    best = next(iter(costs))
    print(f"{'':10} {'tests/s':>8} {'CPU ms':>7}   times of {baseline}")
    variants = {}
    for name, rows in costs.items():
        faster = statistics.median(row.per_s / other.per_s for row, other in zip(rows, costs[baseline], strict=True))
        per_s = statistics.median(row.per_s for row in rows)
        counted = [row.cpu_ms for row in rows if row.cpu_ms is not None]
        cpu = round(statistics.median(counted), 2) if counted else None
        variants[name] = {
            "tests_per_s": round(per_s, 1),
            "cpu_ms": cpu,
            f"times_of_{baseline}": round(faster, 2),
        }
        print(f"{name:10} {per_s:8.0f} {cpu or '-':>7}   {faster:.2f}")
    for name, value in http.items():
        print(f"{name:26} {value}")
    return {
        "baseline": f"a fresh {baseline} for each test",
        "level": probe.probe().level,
        f"speedup_vs_{baseline}": variants[best][f"times_of_{baseline}"],
        f"http_speedup_vs_{baseline}": variants["over HTTP"][f"times_of_{baseline}"],
        "cpu_ms_per_test": variants[best]["cpu_ms"],
        **http,
        "variants": variants,
    }


def described() -> dict[str, Any]:
    """Where and with what it was measured."""
    commit = ["git", "rev-parse", "--short", "HEAD"]
    bwrap = shutil.which("bwrap")
    said = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout if bwrap else "none"
    return {
        "load_1min": os.getloadavg()[0],
        "cores": CORES,
        "machine": platform.machine(),
        "kernel": platform.release(),
        "versions": {"python": interpreter.find().version, "bwrap": said.removeprefix("bubblewrap").strip()},
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of every variant  [5]")
    parser.add_argument("--jobs", type=int, default=60, help="of 8 tests, in a round  [60]")
    parser.add_argument("--requests", type=int, default=600, help="over HTTP  [600]")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    where = described()  # the load before, not ours
    found = {"benchmark": "sandbox", **results(options.rounds, options.jobs, options.requests), **where}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
