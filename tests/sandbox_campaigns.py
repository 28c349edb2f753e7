"""Long runs against the real service: many mixed hostile jobs, random kills, and the same programs again and again."""

from __future__ import annotations

import asyncio
import collections
import io
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from launchers.process import free_port
from sandbox import interpreter, probe
from tests.sandbox_programs import Program, programs
from tests.sandbox_service import RIGHT, TESTS, Service, children, command, descendants, environment, is_alive
from tests.supervised import Supervised, eventually, service, shell, supervised

Job = dict[str, Any]
REQUEST_S = 300.0


class Ended(NamedTuple):
    """How a job ended."""

    answer: dict[str, Any]
    status: int
    tries: int


class Client:
    """Asks until there is a verdict, as a trainer does: the same id, after every refusal and every fault."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int = 0) -> None:
        self.seen: collections.Counter[str] = collections.Counter()
        """Answers by kind: ``200 ok``, ``200 sandbox_error``, other statuses, ``no answer``."""
        self._session, self._url, self._rng = session, url, random.Random(seed)

    async def judged(self, body: Job) -> Ended:
        for tries in itertools.count(1):
            status, answer = await self._ask(body)
            kind = f"{status} {answer['status']}" if status == 200 else str(status) if status else "no answer"
            self.seen[kind] += 1
            if kind == "200 ok" or (400 <= status < 500 and status != 429):
                return Ended(answer, status, tries)
            await asyncio.sleep(self._rng.uniform(0.02, 0.1))
        raise AssertionError

    async def _ask(self, body: Job) -> tuple[int, dict[str, Any]]:
        try:
            data = io.BytesIO(json.dumps(body).encode())
            async with self._session.post(f"{self._url}/v1/run", data=data) as reply:
                return reply.status, await reply.json()
        except (aiohttp.ClientError, ConnectionError):
            return 0, {}


@asynccontextmanager
async def client(url: str, seed: int = 0) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(REQUEST_S)) as session:
        yield Client(session, url, seed)


async def in_flight(limit: int, calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """All of them, so many at a time; the first error ends all."""
    todo = iter(calls)

    async def work() -> None:
        for call in todo:
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(limit):
            group.create_task(work())


def machine() -> dict[str, Any]:
    """Where it was run."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "machine": os.uname().machine,
        "kernel": os.uname().release,
        "level": probe.probe().level,
        "python": interpreter.find().version,
        "load_1min": round(os.getloadavg()[0], 1),
    }


# ---------------------------------------------------------------------------------------------- soak
class Kind(NamedTuple):
    weight: int
    verdicts: str
    code: str
    limits: dict[str, float] = {}


_MIB = 1 << 20
KINDS = {
    "right": Kind(38, "passed", RIGHT),
    "right function": Kind(8, "passed", "class Solution:\n  def f(self, a): return sorted(a)"),
    "wrong": Kind(16, "wrong_answer", "print(7)"),
    "exception": Kind(6, "runtime_error", "1 / 0"),
    "syntax": Kind(3, "compile_error", "x = ("),
    "segfault": Kind(4, "runtime_error", "import ctypes; ctypes.string_at(0)"),
    "abort": Kind(3, "runtime_error", "import os; os.abort()"),
    "loop": Kind(3, "time_limit", "while True: pass", {"cpu_s": 0.15, "idle_s": 8.0}),
    "loop in a thread": Kind(
        2,
        "time_limit",
        "import threading\ndef f():\n  while True: pass\nthreading.Thread(target=f).start()",
        {"cpu_s": 0.15, "idle_s": 8.0},
    ),
    "sleep": Kind(2, "wall_limit", "import time; time.sleep(99)", {"idle_s": 0.2}),
    "fork bomb": Kind(3, "runtime_error", "import os\nwhile True: os.fork()"),
    "daemon": Kind(2, "runtime_error", "import os\nif os.fork() == 0:\n  os.setsid()\n  os.fork()\nprint(2)"),
    "threads": Kind(
        3,
        "passed",
        "import threading, time\n"
        "for _ in range(20): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nprint(2)",
    ),
    "memory bomb": Kind(
        3, "memory_limit", "x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory_bytes": 96 * _MIB}
    ),
    "output bomb": Kind(2, "output_limit", "while True: print('x' * 65536)", {"output_bytes": _MIB}),
    "files": Kind(2, "passed runtime_error", "open('f', 'w').write('x' * 100000)\nprint(2)"),
}
"""What jobs are made of; weights in percent. ``files``: below level 2 nothing is writable."""
OVERLOAD = 4


def soak_body(kind: str, number: int) -> Job:
    """No two are equal: an equal one would be replayed."""
    chosen = KINDS[kind]
    body: Job = {"id": f"soak-{number}", "code": f"{chosen.code}\n# {number}", "tests": TESTS, "limits": chosen.limits}
    if "function" in kind:
        body |= {"mode": "functional", "fn": "f", "tests": [{"input": "[2, 1]", "output": "[1, 2]"}] * 2}
    return body


def _still(segment: int, number: int) -> Job:
    return {"code": f"import time; time.sleep(0.5); print(2) # {segment} {number}", "tests": TESTS}


def soak(jobs: int, *, workers: int = 2, queue: int = 6, segments: int = 10, seed: int = 0) -> dict[str, Any]:
    """Run mixed jobs at ``OVERLOAD`` times of what the service takes, and look at what is left after each segment."""
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), [kind.weight for kind in KINDS.values()], k=jobs)
    wrong: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    statuses: collections.Counter[str] = collections.Counter()
    states: list[dict[str, int]] = []
    started = time.monotonic()
    options = ("--workers", str(workers), "--queue", str(queue), "--min-level", "1")
    with tempfile.TemporaryDirectory() as temporary, Service(*options, TMPDIR=temporary) as running:

        async def run(segment: int) -> None:
            numbers = range(segment * jobs // segments, (segment + 1) * jobs // segments)
            async with client(running.url, segment) as asker:
                await in_flight(OVERLOAD * (workers + queue), [lambda n=number: one(asker, n) for number in numbers])
                statuses.update(asker.seen)
                # a worker that was just replaced has mounted nothing yet
                await asyncio.gather(*(asker.judged(_still(segment, n)) for n in range(workers)))

        async def one(asker: Client, number: int) -> None:
            ended = await asker.judged(soak_body(kinds[number], number))
            seen = {row["verdict"] for row in ended.answer.get("tests", ())} or {str(ended.status)}
            counts[kinds[number]] += 1
            if not seen <= set(KINDS[kinds[number]].verdicts.split()):
                wrong.append(f"{number} {kinds[number]}: {seen} {ended.answer}"[:400])

        for segment in range(segments):
            asyncio.run(run(segment))
            settled = _settled(running.process.pid, states[0] if states else None)
            states.append({"jobs": sum(counts.values()), **settled})
        seconds = time.monotonic() - started
        recycled, faults = running.count("sandbox_recycled_total"), running.count("sandbox_faults_total")
        family = descendants(running.process.pid)
        exit_code = running.stop()
        left = os.listdir(temporary)
    return {
        "jobs": jobs,
        "wrong_verdicts": len(wrong),
        "wrong": wrong[:10],
        "answers": dict(sorted(statuses.items())),
        "kinds": dict(sorted(counts.items())),
        "states": states,
        "rss_drift": _drift(states),
        "workers_recycled": int(recycled),
        "workers_broken": int(faults),
        "exit_code": exit_code,
        "survivors": len(_survivors(family)),
        "temporary_left": len(left),
        "seconds": round(seconds, 1),
        "settings": {"workers": workers, "queue": queue, "in_flight": OVERLOAD * (workers + queue), "seed": seed},
        **machine(),
    }


_CACHED_ANSWERS = 4096
"""Up to there the service grows by what it remembers; twice that for the ids."""


def _drift(states: Sequence[dict[str, int]]) -> float | None:
    """Largest change of the service's memory against the first state with a full cache; None: it never was full."""
    sizes = [state["rss_kib"] for state in states if state["jobs"] >= 2 * _CACHED_ANSWERS]
    return round(max(abs(size / sizes[0] - 1) for size in sizes), 4) if len(sizes) > 1 else None


def _settled(pid: int, like: Mapping[str, int] | None, timeout_s: float = 15.0) -> dict[str, int]:
    """What is there when nothing is on its way any more: as before, or else for two seconds the same."""
    seen, end = _state(pid), time.monotonic() + timeout_s
    while time.monotonic() < end and not (like and _same(seen, like)):
        time.sleep(0.5 if like else 2.0)
        before, seen = seen, _state(pid)
        if like is None and _same(seen, before):
            break
    return seen


def _same(state: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return all(state[name] == other[name] for name in CONSTANT)


CONSTANT = ("descriptors", "worker_descriptors", "processes", "mounts", "zombies")
"""Without work and clients."""


def _state(pid: int) -> dict[str, int]:
    family = descendants(pid)
    zygote = next(found for found in family if children(found))  # a launcher, or the zygote itself
    return {
        "rss_kib": _memory(pid),
        "workers_rss_kib": sum(map(_memory, family)),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "worker_descriptors": sum(len(os.listdir(f"/proc/{found}/fd")) for found in family),
        "processes": len(family),
        "zombies": sum(not is_alive(found) for found in family),
        "mounts": len(Path(f"/proc/{children(zygote)[0]}/mountinfo").read_text().splitlines()),
    }


def _memory(pid: int) -> int:
    """Resident KiB."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def _survivors(family: Iterable[int], timeout_s: float = 5.0) -> list[int]:
    watched, end = list(family), time.monotonic() + timeout_s
    while any(map(is_alive, watched)) and time.monotonic() < end:
        time.sleep(0.05)
    return [pid for pid in watched if is_alive(pid)]


# --------------------------------------------------------------------------------------------- kills
_VICTIMS = ("launcher", "zygote", "keeper", "program", "server")[0 if probe.probe().level >= 2 else 1 :]
"""A worker from the top to the bottom, and all of them at once. Below level 2 there is no launcher."""
PAUSE_S = 0.05


def kills(number: int, folder: Path, *, workers: int = 2, load: int = 6, seed: int = 0) -> dict[str, Any]:
    """SIGKILL somebody ``number`` times while jobs run; a supervisor keeps the server alive."""
    port = free_port()
    options = ("--workers", str(workers), "--min-level", "1", "--die-with-parent")
    plan = service(
        folder,
        "sandbox-0",
        role="sandbox",
        command=tuple(str(port) if word == "0" else word for word in command(*options)),
        env={"PYTHONPATH": environment()["PYTHONPATH"]},
        port=port,
        health_path="/readyz",
        max_restarts=number + 1,
    )
    started = time.monotonic()
    with supervised(folder, shell(folder, "exec sleep 86400"), services=(plan,)) as running:
        eventually(lambda: bool(running.registry.live("sandbox")), "the sandbox is ready", timeout_s=60.0)
        report = asyncio.run(_kill(running, f"http://127.0.0.1:{port}", number, load, seed))
        family = [_server(running), *descendants(_server(running))]
        running.process.send_signal(signal.SIGTERM)
        exit_code, _ = running.finished(60.0)
    return {
        **report,
        "supervisor_exit_code": exit_code,
        "survivors": len(_survivors(family)),
        "seconds": round(time.monotonic() - started, 1),
        "settings": {"workers": workers, "load": load, "seed": seed},
        **machine(),
    }


def _server(running: Supervised) -> int:
    (record,) = running.registry.live("sandbox", state=None)
    return record.pid


async def _kill(running: Supervised, url: str, number: int, load: int, seed: int) -> dict[str, Any]:
    rng, stop = random.Random(seed), asyncio.Event()
    ended: collections.Counter[str] = collections.Counter()
    killed: collections.Counter[str] = collections.Counter()
    back: dict[str, list[float]] = {victim: [] for victim in _VICTIMS}

    async def jobs(asker: Client, which: int) -> None:
        for index in itertools.count():
            if stop.is_set():
                return
            code = f"import time\ntime.sleep(0.05)\nprint(int(input()) + {1 + index % 2}) # {which} {index}"
            answer = (await asker.judged({"id": f"k-{which}-{index}", "code": code, "tests": TESTS})).answer
            ended[f"{'right' if index % 2 == 0 else 'wrong'}: {' '.join(r['verdict'] for r in answer['tests'])}"] += 1

    async with client(url, seed) as asker, client(url, seed + 1) as control, asyncio.TaskGroup() as group:
        for which in range(load):
            group.create_task(jobs(asker, which))
        try:
            for count in range(number):
                victim = _VICTIMS[count % len(_VICTIMS)]
                await _kill_one(_server(running), victim, rng)
                killed[victim] += 1
                begun = time.monotonic()
                await control.judged({"id": f"c-{count}", "code": f"{RIGHT} # control {count}", "tests": TESTS})
                back[victim].append(time.monotonic() - begun)
                await asyncio.sleep(rng.uniform(0, 4 * PAUSE_S))
        finally:
            stop.set()
    return {
        "kills": dict(killed),
        "jobs": sum(ended.values()),
        "ended": dict(sorted(ended.items())),
        "answers": dict(sorted(asker.seen.items())),
        "back_after_s": {
            victim: {"median": round(statistics.median(times), 3), "max": round(max(times), 3)}
            for victim, times in back.items()
            if times
        },
    }


async def _kill_one(server: int, victim: str, rng: random.Random) -> None:
    """Wait until there is such a process, and kill it."""
    while True:
        alive = [server] if victim == "server" else [p for p in _of_kind(server, victim) if is_alive(p)]
        with suppress(ProcessLookupError):
            if alive:
                os.kill(rng.choice(alive), signal.SIGKILL)
                return
        await asyncio.sleep(0.005)


def _of_kind(server: int, victim: str) -> list[int]:
    found = [server]
    for generation in _VICTIMS[:-1]:
        found = [child for pid in found for child in children(pid)]
        if generation == victim:
            break
    return found


# --------------------------------------------------------------------------------------- determinism
_TIGHT = {"cpu_s": 2.0, "idle_s": 1.0}
"""The report says how many programs a wall clock with the first would stop."""


def determinism(count: int, repetitions: int, *, at_once: int, seed: int = 0) -> dict[str, Any]:
    """The same accepted programs again and again, ``at_once`` at a time. A flip is any answer that differs."""
    chosen = programs(count)
    expected = _expected(chosen)
    order = [(index, repetition) for index in range(count) for repetition in range(repetitions)]
    random.Random(seed).shuffle(order)
    flips: list[str] = []
    cpu: dict[int, list[float]] = collections.defaultdict(list)
    wall: list[float] = []
    started = time.monotonic()
    with Service("--workers", str(at_once), "--queue", str(2 * at_once), "--min-level", "1") as running:

        async def run() -> collections.Counter[str]:
            async with client(running.url, seed) as asker:
                await in_flight(
                    at_once, [lambda i=index, r=repetition: one(asker, i, r) for index, repetition in order]
                )
                return asker.seen

        async def one(asker: Client, index: int, repetition: int) -> None:
            program = chosen[index]
            tests = [{"input": program.input, "output": expected[index]}]
            code = f"{program.code}\n# {repetition}"  # an equal one would be replayed
            body = {"id": f"d-{index}-{repetition}", "code": code, "tests": tests, "limits": _TIGHT}
            answer = (await asker.judged(body)).answer
            (row,) = answer["tests"]
            cpu[index].append(row["cpu_s"])
            wall.append(row["wall_s"])
            if row["verdict"] != "passed" or row["stdout"] != expected[index][: len(row["stdout"])]:
                flips.append(f"{program.name} #{index}, repetition {repetition}: {row}"[:500])

        statuses = asyncio.run(run())
    return {
        "programs": count,
        "repetitions": repetitions,
        "runs": sum(map(len, cpu.values())),
        "flips": len(flips),
        "flipped": flips[:10],
        "answers": dict(statuses),
        "cpu_s": {
            "median": round(statistics.median(itertools.chain(*cpu.values())), 3),
            "max": max(map(max, cpu.values())),
        },
        "largest_ratio_of_cpu_times": round(max(max(times) / max(min(times), 0.01) for times in cpu.values()), 1),
        "wall_s_max": max(wall),
        "a_wall_limit_of_2_s_would_stop": sum(seconds > 2 for seconds in wall),
        "at_once": at_once,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        **machine(),
    }


def _expected(chosen: Sequence[Program]) -> list[str]:
    """What the same Python prints outside of any sandbox."""
    python = interpreter.find().path
    variables = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONINTMAXSTRDIGITS": "50000"}

    def run(program: Program) -> str:
        done = subprocess.run(
            [python, "-s", "-S", "-c", program.code],
            input=program.input,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, chosen))
