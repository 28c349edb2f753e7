"""What level 3 promises, tried in a booted machine (``boot_cgroup_v2.sh``). One JSON line per case."""

from __future__ import annotations

import asyncio
import json
import os

from sandbox import box, interpreter, judge, limits, probe
from sandbox.executor import Task, Worker

LIMITS = limits.complete(
    {
        "cpu_s": 20.0,
        "idle_s": 40.0,
        "memory_bytes": 64 << 20,
        "pids": 16,
        "output_bytes": 1 << 20,
        "tmp_bytes": 1 << 20,
    }
)
CASES = {
    "right": ("print(int(input()) + 1)", ()),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 20))", ("rlimits.as",)),
    "threads": (
        """
import threading, time, os
n = 0
try:
    for _ in range(100): threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); n += 1
except RuntimeError: print(n, flush=True)
os._exit(0)""",
        ("rlimits.nproc", "rlimits.as"),
    ),
    "fork bomb": (
        """
import os, time
n = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60); os._exit(0)
        n += 1
except OSError: print(n)""",
        ("rlimits.nproc", "seccomp"),
    ),
    "CPU of children": (
        """
import os, time
if os.fork() == 0:
    while True: pass
time.sleep(60)""",
        ("seccomp",),
    ),
    "orphans": (
        "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint(2)",
        ("seccomp", "namespaces.pid", "orphans"),
    ),
    "the file system of the groups": ("import os\nprint(os.listdir('/sys/fs/cgroup'))", ()),
}


async def case(name: str) -> dict[str, object]:
    code, without = CASES[name]
    every = {**LIMITS, "cpu_s": 1.0} if name == "CPU of children" else LIMITS
    async with await Worker.start(3, interpreter.find(), without=without) as worker:
        record = await worker.run(Task(code=code, input="1\n", limits=every))
        left = groups()
        control = await worker.run(Task(code=CASES["right"][0], input="1\n"))
    said = judge.judge(record, "stdin", "2", every)
    return {
        "case": name,
        "verdict": said.verdict,
        "why": said.why,
        "stdout": record.stdout[:200].decode("utf-8", "replace"),
        "cpu_s": record.cpu_s,
        "wall_s": record.wall_s,
        "peak_bytes": record.max_rss_bytes,
        "processes_left": left,
        "control": control.stdout.decode(),
        "boxes_left": len([entry for entry in os.listdir(box.delegated()) if entry.startswith("sandbox-")]),
    }


def groups() -> int:
    """Processes in the groups of tests."""
    pids: list[str] = []
    for folder, _, _ in os.walk(box.delegated()):
        if "/test-" in folder:
            with open(f"{folder}/cgroup.procs") as file:
                pids += file.read().split()
    return len(pids)


def main() -> None:
    found = probe.probe()
    print(json.dumps({"case": "probe", "level": found.level, "missing": dict(found.missing), "kernel": found.kernel}))
    for name in CASES:
        try:
            print(json.dumps(asyncio.run(case(name))), flush=True)
        except Exception as error:  # noqa: BLE001 - the machine is gone after this: say what happened
            print(json.dumps({"case": name, "error": repr(error)}), flush=True)


if __name__ == "__main__":
    main()
