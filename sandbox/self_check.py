"""What an image or a machine must show before its verdicts count: right programs pass, and each wall stands.

python -m sandbox.self_check [--level N] [--json FILE]      a table; exit status 1 if something does not hold
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from sandbox import interpreter, judge, limits, probe
from sandbox.behaviours import BEHAVIOURS, Behaviour
from sandbox.executor import Task, Worker, WorkerFault

EXIT_DOES_NOT_HOLD, EXIT_REFUSED = 1, 2
_LIMITS = {"cpu_s": 2.0, "idle_s": 4.0}


class Finding(NamedTuple):
    """What was seen of a behaviour."""

    name: str
    level: int
    """Lowest isolation level that promises it."""
    seen: str
    """Empty: this level does not promise it."""
    ok: bool


async def findings(
    level: int, python: interpreter.Interpreter, behaviours: Sequence[Behaviour], *, without: Collection[str] = ()
) -> list[Finding]:
    """Every behaviour, seen at this level; ``without`` as for ``Worker.start``.

    Raises:
        WorkerFault: no worker starts, or it breaks.
    """
    found: list[Finding] = []
    async with await Worker.start(level, python, without=without) as worker:
        for behaviour in behaviours:
            if behaviour.level <= level and level not in behaviour.not_at:
                found.append(await _see(worker, behaviour))
            else:
                found.append(Finding(behaviour.name, behaviour.level, "", True))
    return found


async def failures(level: int, python: interpreter.Interpreter) -> list[str]:
    """What does not hold at this level, of what is seen before the service listens; one line each.

    Raises:
        WorkerFault: no worker starts.
    """
    quick = [behaviour for behaviour in BEHAVIOURS if behaviour.is_quick]
    return [f"{found.name}: {found.seen}" for found in await findings(level, python, quick) if not found.ok]


async def _see(worker: Worker, behaviour: Behaviour) -> Finding:
    mode = "functional" if behaviour.function else "stdin"
    limited = limits.complete({**_LIMITS, **behaviour.limits})
    task = Task(code=behaviour.code, input=behaviour.input, mode=mode, function=behaviour.function, limits=limited)
    record = await worker.run(task)
    verdict, why, got = judge.judge(record, mode, behaviour.expected, limited)
    if verdict in behaviour.verdicts:
        return Finding(behaviour.name, behaviour.level, verdict, True)
    printed = got or record.stdout[:200].decode("utf-8", "replace").strip()
    seen = f"{verdict} in place of {' or '.join(behaviour.verdicts)}: {why or printed!r}, printed {printed!r}"
    return Finding(behaviour.name, behaviour.level, seen, False)


def main() -> None:
    """See every behaviour at one level."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.self_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--level", type=int, choices=range(probe.HIGHEST + 1), help="the best below 4 if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was seen there; -: only to stdout")
    options = parser.parse_args()
    started = time.monotonic()
    reached = probe.probe()
    if options.level == probe.HIGHEST:
        reached = probe.with_gvisor(reached)
    level = reached.level if options.level is None else options.level
    try:
        if level > reached.level:
            sys.exit(_refusal(reached.shortfall(level)))
        python = interpreter.find()
        found = asyncio.run(findings(level, python, BEHAVIOURS))
    except (WorkerFault, interpreter.NoInterpreter) as error:
        sys.exit(_refusal(str(error)))
    is_well = all(finding.ok for finding in found)
    report = {
        "ok": is_well,
        "level": level,
        "name": probe.LEVEL_NAMES[level],
        "missing": dict(reached.missing),
        "python": python.version,
        "kernel": reached.kernel,
        "machine": reached.machine,
        "uid": os.getuid(),
        "seconds": round(time.monotonic() - started, 2),
        "checks": [finding._asdict() for finding in found if finding.seen],
    }
    _write(report, found, options.json)
    sys.exit(0 if is_well else EXIT_DOES_NOT_HOLD)


def _refusal(message: str) -> int:
    print(f"sandbox: {message}", file=sys.stderr)
    return EXIT_REFUSED


def _write(report: dict[str, object], found: Sequence[Finding], file: Path | None) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if file == Path("-"):
        print(text, end="")
        return
    if file:
        file.write_text(text)
    width = max(len(finding.name) for finding in found)
    print(f"{'behaviour':{width}}  level  ok  seen")
    for name, level, seen, ok in found:
        print(f"{name:{width}}  {level:5}  {'yes' if ok else 'NO':3} {seen or 'not promised here'}".rstrip())
    promised = [finding for finding in found if finding.seen]
    kept = sum(finding.ok for finding in promised)
    print(
        f"\nlevel {report['level']} ({report['name']}), Python {report['python']}, kernel {report['kernel']}: "
        f"{kept} of {len(promised)} hold, {report['seconds']} s"
    )


if __name__ == "__main__":
    main()
