"""A worker by itself: what ordinary programs may do, and that each wall is there because of its own mechanism."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox import executor, interpreter, judge, limits, probe
from sandbox.executor import Task, Worker
from tests.sandbox_service import children, descendants

BEST = probe.probe().level
T = TypeVar("T")
needs_2 = pytest.mark.skipif(BEST < 2, reason="this machine has no user namespaces (python -m sandbox.probe)")
needs_1 = pytest.mark.skipif(BEST < 1, reason="this machine has no Landlock (python -m sandbox.probe)")

IDIOMS = {
    "threading.stack_size(128 MB) and deep recursion": (
        """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(1 << 27)
def f(n): return 0 if n == 0 else 1 + f(n - 1)
t = threading.Thread(target=lambda: print(f(100000))); t.start(); t.join()""",
        "100000",
    ),
    "RLIMIT_STACK unlimited": (
        """
import resource
resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY,) * 2)
print(1)""",
        "1",
    ),
    "recursion in the main thread": (
        """
import sys, functools
sys.setrecursionlimit(10**6)
@functools.lru_cache(None)
def f(n): return n if n < 2 else f(n - 1) + f(n - 2)
print(f(20000) % 1000)""",
        "125",
    ),
    "asyncio": ("import asyncio\nasync def main(): await asyncio.sleep(.01); print(1)\nasyncio.run(main())", "1"),
    "thread pool": (
        "from concurrent.futures import ThreadPoolExecutor as T\nwith T(4) as e: print(*e.map(abs, [-1, 2]))",
        "1 2",
    ),
    "decimal, fractions": (
        "import decimal, fractions\nprint(decimal.Decimal(1) / 4, fractions.Fraction(1, 3))",
        "0.25 1/3",
    ),
    "tempfile, hashlib, uuid, secrets": (
        """
import uuid, secrets, hashlib, tempfile
t = tempfile.TemporaryFile(); t.write(b'x')
print(len(hashlib.sha256(b'').hexdigest()))""",
        "64",
    ),
    "exit() and quit()": ("print(1)\nif input() == '1': exit()\nquit()", "1"),
    "sys.exit() after output": ("import sys\nprint(1)\nsys.exit()", "1"),
    "end of input": ("input()\ntry: input()\nexcept EOFError: print('eof')", "eof"),
    "for line in sys.stdin": ("import sys\nprint(sum(int(line) for line in sys.stdin))", "1"),
    "sys.stdin.buffer, os.read": ("import os, sys\nprint(int(sys.stdin.buffer.readline()), os.read(0, 9))", "1 b''"),
    "os.write, sys.stdout.buffer": (
        "import os, sys\nsys.stdout.buffer.write(b'1')\nsys.stdout.flush()\nos.write(1, b'2')",
        "12",
    ),
    "from __future__": ("from __future__ import annotations\nprint(1)", "1"),
    "thread without join": (
        "import threading, time\ndef f():\n  time.sleep(.1); print(1)\nthreading.Thread(target=f).start()",
        "1",
    ),
    "atexit": ("import atexit\natexit.register(print, 1)", "1"),
    "os._exit after a flush": ("import os, sys\nprint(1)\nsys.stdout.flush()\nos._exit(0)", "1"),
    "__main__ guard": ("def main(): print(1)\nif __name__ == '__main__':\n  main()", "1"),
    "integers of 20,000 digits": ("print(10**20000 % 7, len(str(10**20000)))", "2 20001"),
}


def with_worker(work: Callable[[Worker], Awaitable[T]], level: int = BEST, without: Collection[str] = ()) -> T:
    async def run() -> T:
        async with await Worker.start(level, interpreter.find(), without=without) as worker:
            return await work(worker)

    return asyncio.run(run())


def run(task: Task, expected: str, level: int = BEST, without: Collection[str] = ()) -> judge.Judgement:
    record = with_worker(lambda worker: worker.run(task), level, without)
    return judge.judge(record, task.mode, expected, task.limits)


@needs_2
def test_idioms_of_contest_programs_work() -> None:
    async def all_of_them(worker: Worker) -> dict[str, judge.Judgement]:
        verdicts: dict[str, judge.Judgement] = {}
        for name, (code, expected) in IDIOMS.items():
            record = await worker.run(Task(code=code, input="1\n"))
            verdicts[name] = judge.judge(record, "stdin", expected, limits.complete({}))
        return verdicts

    verdicts = with_worker(all_of_them)
    assert {name: said for name, said in verdicts.items() if said.verdict != "passed"} == {}


def test_a_long_output_is_judged_in_whole() -> None:
    lines = [f"{i} {i * i}" for i in range(200_000)]
    task = Task(code="for i in range(200000): print(i, i * i)", input="")
    assert run(task, "\n".join(lines)).verdict == "passed"
    assert run(task, "\n".join([*lines[:-1], "0"])).why == "line 200000 differs"


def test_the_usual_imports_are_there_when_asked_for() -> None:
    code = "print(gcd(4, 6), defaultdict(int)['x'], pow(2, 5, 7), len(list(permutations([1, 2, 3]))), math.pi > 3)"
    assert run(Task(code=code, input="", has_prelude=True), "2 0 4 6 True").verdict == "passed"
    assert run(Task(code=code, input=""), "").verdict == "runtime_error"


FORK = "import os\nif os.fork() == 0: os._exit(0)\nprint(1)"
READ = "print(len(open('/etc/passwd').read()) > 0 and 1)"
STAT = "import os\nprint(os.stat('/etc/passwd').st_size > 0 and 1)"


@needs_1
@pytest.mark.parametrize(
    ("code", "level", "mechanism"),
    [(FORK, 1, "seccomp"), (READ, 1, "landlock"), (STAT, 2, "namespaces.user")],
    ids=["seccomp", "landlock", "namespaces"],
)
def test_each_wall_stands_because_of_its_mechanism(code: str, level: int, mechanism: str) -> None:
    if level > BEST:
        pytest.skip("this machine has no user namespaces (python -m sandbox.probe)")
    task = Task(code=code, input="")
    assert run(task, "1", level).verdict == "runtime_error"
    without = {mechanism, *({"landlock"} if level == 2 else ())}
    assert run(task, "1", level, without).verdict == "passed"


@needs_2
def test_no_process_that_later_programs_inherit_from_ever_holds_a_payload() -> None:
    marks = [b"MARK-" + os.urandom(12).hex().encode() for _ in range(3)]
    in_code, in_input, in_output = (mark.decode() for mark in marks)
    hidden_output = in_output.encode().hex()

    async def search(worker: Worker) -> list[str]:
        code = f"x = {in_code!r}\nprint(bytes.fromhex({hidden_output!r}).decode(), input())\n1 / 0"
        record = await worker.run(Task(code=code, input=in_input))
        assert marks[2] in record.stdout
        assert marks[1] in record.stdout
        found: list[str] = []
        for pid in (worker.process.pid, *descendants(worker.process.pid)):
            memory = memory_of(pid)
            assert b"sandbox" in memory  # it can be read at all
            found += [f"{pid}: {mark!r}" for mark in marks if mark in memory]
        return found

    try:
        assert with_worker(search) == []
    except PermissionError:
        pytest.skip("reading the memory of an undumpable process needs CAP_SYS_PTRACE")


def memory_of(pid: int) -> bytes:
    parts: list[bytes] = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if rights.startswith("rw"):
                start, end = (int(number, 16) for number in span.split("-"))
                memory.seek(start)
                try:
                    parts.append(memory.read(end - start))
                except OSError:
                    continue
    return b"".join(parts)


@needs_2
def test_threads_of_one_worker_do_not_count_against_another() -> None:
    """RLIMIT_NPROC counts per user namespace since Linux 5.14: workers must not share one."""
    code = """
import threading, time
n = 0
for _ in range(45): threading.Thread(target=time.sleep, args=(1.0,)).start(); n += 1
print(n)"""

    async def together() -> list[bytes]:
        python = interpreter.find()
        workers = [await Worker.start(2, python) for _ in range(3)]
        task = Task(code=code, input="", limits=limits.complete({"memory_bytes": 2 << 30}))
        try:
            records = await asyncio.gather(*(worker.run(task) for worker in workers))
        finally:
            for worker in workers:
                await worker.stop()
        return [record.stdout for record in records]

    assert asyncio.run(together()) == [b"45\n"] * 3


@needs_2
def test_correct_programs_on_a_busy_machine_are_not_stopped() -> None:
    """In a thread too: the main thread only waits, so the delay of the working one must count."""
    code = """
import threading
def work(): print(sum(i * i % 7 for i in range(1500000)))
t = threading.Thread(target=work); t.start(); t.join()"""

    async def together() -> list[str | None]:
        python = interpreter.find()
        workers = [await Worker.start(2, python) for _ in range(8)]
        task = Task(code=code, input="", limits=limits.complete({"cpu_s": 6.0, "idle_s": 0.9, "wall_s": 120.0}))
        try:
            records = await asyncio.gather(*(worker.run(task) for worker in workers))
        finally:
            for worker in workers:
                await worker.stop()
        return [record.stopped_by for record in records]

    assert asyncio.run(together()) == [None] * 8


@needs_2
def test_many_tests_leave_no_descriptor_mount_or_process_behind() -> None:
    def state(zygote: int) -> tuple[list[int], int, int]:
        family = descendants(zygote)
        with open(f"/proc/{family[0]}/mountinfo") as file:
            mounts = len(file.readlines())
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in family], mounts, len(os.listdir("/proc/self/fd"))

    codes = (
        "print(1)",
        "open('f', 'w').write('x')",
        "import os\nos.fork()",
        "1 / 0",
        "import ctypes; ctypes.string_at(0)",
    )

    async def many(worker: Worker) -> list[tuple[list[int], int, int]]:
        states = []
        for _ in range(2):
            for code in codes * 4:
                await worker.run(Task(code=code, input=""))
            await asyncio.sleep(0.5)  # the keeper closes its descriptors after it has answered
            states.append(state(worker.process.pid))
        return states

    before, after = with_worker(many)
    assert before == after


def mounts_of(pid: int) -> int:
    return len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())


@needs_2
def test_a_new_keeper_takes_away_what_the_one_before_has_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "RUNS_PER_KEEPER", 2)

    async def mounts(worker: Worker) -> list[int]:
        seen = []
        for _ in range(3):
            for _ in range(2):
                await worker.run(Task(code="open('f', 'w').write('x')", input=""))
            (zygote,) = children(worker.process.pid)
            seen.append(mounts_of(zygote))
        return seen

    seen = with_worker(mounts)
    assert seen == seen[:1] * 3
