"""Runs attacks: against the sandbox, and with the mechanisms that stop them switched off."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

from sandbox import interpreter, judge, limits, walls, wire
from sandbox.executor import Task, Worker, WorkerFault
from sandbox.interpreter import UNPRIVILEGED
from tests.attacks import controls, files, hacks, naive, privileges, processes, resources
from tests.attacks.attack import (
    ANSWER,
    BOUNDS,
    HARNESS,
    LIMITS,
    OF_THE_JUDGE,
    PROCESS,
    SEALS,
    Attack,
)

ATTACKS: list[Attack] = [
    *controls.ATTACKS,
    *resources.ATTACKS,
    *processes.ATTACKS,
    *files.ATTACKS,
    *privileges.ATTACKS,
    *hacks.ATTACKS,
]
SILENCE_S = 20.0
"""A program that is not back by then, and that nothing stopped, never comes."""
_RIGHT = "print(int(input()) + 1)"
_IPC_NEW, _IPC_REMOVE = 0o1666, 0


class Range:
    """What attacks are aimed at: files, sockets, a queue and a segment of the host."""

    def __init__(self, folder: pathlib.Path, values: Mapping[str, str]) -> None:
        self._traces, self._values = folder / "traces", values

    def aim(self, attack: Attack, *, is_held: bool = True) -> Attack:
        """The attack on these targets. One that nothing holds must not reach further than its keeper."""
        values = {**self._values, "@EVERYONE@": "1, -1, 2, 3" if is_held else "1", "@TRACE@": str(self._trace(attack))}
        code, before = attack.code, attack.before
        for key, value in values.items():
            code, before = code.replace(key, value), before.replace(key, value)
        return replace(attack, code=code, before=before)

    def trace(self, attack: Attack) -> str:
        """What the attack left on the host; taken away."""
        path = self._trace(attack)
        if not path.exists():
            return ""
        path.rmdir() if path.is_dir() else path.unlink()
        return f"{path.name} on the host"

    def _trace(self, attack: Attack) -> pathlib.Path:
        return self._traces / "".join(filter(str.isalnum, attack.name))


@contextlib.contextmanager
def armed() -> Iterator[Range]:
    """Targets that every user of this machine may read."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sandbox-range-"))  # pytest's folders are closed to others
    libc = ctypes.CDLL(None, use_errno=True)
    queue, segment = libc.msgget(0, _IPC_NEW), libc.shmget(0, 4096, _IPC_NEW)
    libc.shmat.restype = ctypes.c_void_p
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(libc.msgctl, queue, _IPC_REMOVE, None)
        stack.callback(libc.shmctl, segment, _IPC_REMOVE, None)
        at = ctypes.c_void_p(libc.shmat(segment, None, 0))
        ctypes.memmove(at, ANSWER.encode() + b"\0", len(ANSWER) + 1)
        libc.shmdt(at)
        (folder / "traces").mkdir()
        (folder / "traces").chmod(0o1777)
        (folder / "answers.json").write_text(json.dumps({"expected": ANSWER}))
        (folder / "open").mkdir()
        victim = folder / "open" / "victim"
        victim.write_text(f"{ANSWER} and more")
        for path, mode in ((folder, 0o755), (folder / "open", 0o777), (victim, 0o666)):
            path.chmod(mode)
            if os.getuid() == 0:
                os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=16))
        stack.enter_context(_datagrams(server.getsockname()[1]))
        abstract = f"sandbox-range-{os.getpid()}"
        stack.enter_context(_listener(f"\0{abstract}"))
        stack.enter_context(_listener(str(folder / "socket")))
        (folder / "socket").chmod(0o777)
        values = {
            "@SECRET@": str(folder / "answers.json"),
            "@VICTIM@": str(victim),
            "@PORT@": str(server.getsockname()[1]),
            "@ABSTRACT@": abstract,
            "@UNIX@": str(folder / "socket"),
            "@QUEUE@": str(queue),
            "@SEGMENT@": str(segment),
            "@HOST@": os.uname().nodename,
        }
        yield Range(folder, values)


def _listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    return listener


def _datagrams(port: int) -> socket.socket:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", port))
    return receiver


# --------------------------------------------------------------------------- with everything in place
async def answer_of(worker: Worker, attack: Attack) -> dict[str, Any]:
    """The answer of the service, as far as an attack can show in it.

    Raises:
        WorkerFault: the worker broke.
    """
    every = limits.complete(attack.every_limit)
    if attack.before:
        await worker.run(Task(code=attack.before, input="", limits=every))
    rows: list[dict[str, Any]] = []
    for given, expected in attack.tests:
        record = await worker.run(_task(attack, given, every))
        said = judge.judge(record, attack.mode, expected, every)
        texts = {"stdout": record.stdout[:2000].decode("utf-8", "replace")}
        texts |= {"stderr": record.stderr[-2000:].decode("utf-8", "replace"), "got": str(said.got)}
        rows.append({"verdict": said.verdict, "why": said.why, **texts})
    await asyncio.sleep(attack.lag_s)
    return {"status": "ok", "tests": rows}


def _task(attack: Attack, given: str, every: Mapping[str, float]) -> Task:
    return Task(code=attack.code, input=given, mode=attack.mode, function=attack.fn, limits=every)


async def is_well(worker: Worker) -> bool:
    """Whether a right program passes in this worker."""
    record = await worker.run(Task(code=_RIGHT, input="1\n"))
    return judge.judge(record, "stdin", "2", limits.complete({})).verdict == judge.PASSED


# ------------------------------------------------------------------- with its mechanisms switched off
async def success_without(attack: Attack, off: Collection[str], level: int) -> str:
    """How the attack is seen to succeed while the mechanisms ``off`` are off; empty if it is not."""
    of_the_judge = set(off) & set(OF_THE_JUDGE)
    if of_the_judge & {HARNESS, PROCESS}:
        return await _success_against_naive_judge(attack, is_about_process=PROCESS in of_the_judge)
    with _no_seals() if SEALS in of_the_judge else contextlib.nullcontext():
        try:
            async with (
                await Worker.start(level, interpreter.find(), without=set(off) - of_the_judge) as worker,
                asyncio.timeout(SILENCE_S + attack.every_limit.get("cpu_s", 0.0)),
            ):
                return await _success(worker, attack, of_the_judge)
        except TimeoutError:
            return "nothing stops it"
        except WorkerFault as error:
            return f"the worker broke: {error}"


async def _success(worker: Worker, attack: Attack, off: Collection[str]) -> str:
    every = limits.complete(attack.every_limit)
    if attack.before:
        await worker.run(Task(code=attack.before, input="", limits=every))
    ((given, expected),) = attack.tests
    record = await worker.run(_task(attack, given, every))
    if BOUNDS in off:
        return _failure_of_an_unbounded_decoder(record.result)
    if LIMITS in off:
        with mock.patch.object(judge, "_over_limit", return_value=None):
            said = judge.judge(replace(record, exit=max(record.exit, 0)), attack.mode, expected, every)
        return "a stopped run passes" if said.verdict == judge.PASSED else ""
    loot = attack.loot([_text(record.stdout), _text(record.stderr), _returned(record.result)])
    await asyncio.sleep(attack.lag_s)
    if loot or await is_well(worker):
        return loot
    return "the program after it fails"


async def _success_against_naive_judge(attack: Attack, *, is_about_process: bool) -> str:
    async with await Worker.start(0, interpreter.find()) as worker:
        record = await worker.run(Task(code=naive.program(attack), input="", limits=limits.complete({"cpu_s": 10.0})))
    if is_about_process:
        return "the judge goes down with it" if naive.is_dead(record) else ""
    loot = attack.loot([_text(record.stdout), _text(record.stderr)])
    return "it passes" if naive.is_fooled(record) else loot


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _returned(data: bytes) -> str:
    """What a function returned; a traceback in the result would quote its source."""
    try:
        return str(json.loads(data).get("value"))
    except (ValueError, AttributeError):
        return ""


def _failure_of_an_unbounded_decoder(data: bytes) -> str:
    before = sys.get_int_max_str_digits()
    try:
        repr(_decode(json.loads(data)["value"]))
    except Exception as error:  # noqa: BLE001 - any of them would have ended the judge
        return f"{type(error).__name__} in the judge"
    finally:
        sys.set_int_max_str_digits(before)
    return ""


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        ((tag, body),) = value.items()
        decoders = {"i": lambda: int(body, 16), "d": lambda: {_decode(k): _decode(v) for k, v in body}}
        return decoders[tag]()
    return [_decode(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _no_seals() -> Iterator[None]:
    def unsealed(data: bytes) -> int:
        fd = os.memfd_create("in")
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    with mock.patch.object(wire, "sealed_file", unsealed):
        yield


def mechanisms(attack: Attack) -> set[str]:
    """Those of the sandbox itself that it names."""
    return set(attack.stopped_by) & walls.LEVELS.keys()
