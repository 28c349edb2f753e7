"""What must hold before the service listens: a right program passes, and each wall stands. Takes about a second.

python -m sandbox.self_check      a table; exit status 1 if something does not hold
"""

from __future__ import annotations

import asyncio
import sys
from typing import NamedTuple

from sandbox import interpreter, judge, limits, probe
from sandbox.executor import Task, Worker, WorkerFault

_LIMITS = limits.complete({"cpu_s": 2.0, "idle_s": 4.0})
_ANSWER = "42"


class Check(NamedTuple):
    """A program, and what must come of it."""

    name: str
    code: str
    verdict: str
    level: int = 0
    """Lowest isolation level that promises it."""


CHECKS = (
    Check("a right program passes", "print(int(input()) + 1)", judge.PASSED),
    Check("a wrong program fails", "print(0)", judge.WRONG_ANSWER),
    Check("a loop is stopped", "while True: pass", judge.TIME_LIMIT),
    Check("no other process", "import os\nos.fork()\nprint(42)", judge.RUNTIME_ERROR, 1),
    Check("no other program", "import os\nos.execv('/bin/true', ['true'])", judge.RUNTIME_ERROR, 1),
    Check("no network", "import socket\nsocket.socket()\nprint(42)", judge.RUNTIME_ERROR, 1),
    Check("no files of the host", "open('/etc/passwd')\nprint(42)", judge.RUNTIME_ERROR, 1),
    Check("no other processes in sight", "import os\nos.listdir('/proc')\nprint(42)", judge.RUNTIME_ERROR, 1),
    Check("no trace of the host's tree", "import os\nos.stat('/etc/passwd')\nprint(42)", judge.RUNTIME_ERROR, 2),
    Check("a private /tmp", "open('/tmp/x', 'w').write('x')\nprint(42)", judge.PASSED, 2),
    Check("nothing left of the last test", "import os\nprint(42 if not os.listdir() else 0)", judge.PASSED, 2),
)


async def failures(level: int, python: interpreter.Interpreter) -> list[str]:
    """What does not hold at this level; one line each.

    Raises:
        WorkerFault: no worker starts.
    """
    problems: list[str] = []
    async with await Worker.start(level, python) as worker:
        for check in CHECKS:
            if check.level > level:
                continue
            limited = {**_LIMITS, "cpu_s": 0.2} if check.verdict == judge.TIME_LIMIT else _LIMITS
            record = await worker.run(Task(code=check.code, input="41\n", limits=limited))
            verdict, why, _ = judge.judge(record, "stdin", _ANSWER, limited)
            if verdict != check.verdict:
                problems.append(f"{check.name}: {verdict} ({why}) in place of {check.verdict}")
    return problems


def main() -> None:
    """Check every level that the probe promises."""
    found = probe.probe()
    python = interpreter.find()
    is_well = True
    for level in range(found.level, -1, -1):
        try:
            problems = asyncio.run(failures(level, python))
        except WorkerFault as error:
            problems = [str(error)]
        print(f"level {level} ({probe.LEVEL_NAMES[level]}): {'; '.join(problems) or 'everything holds'}")
        is_well &= not problems
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
