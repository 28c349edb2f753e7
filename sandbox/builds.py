"""Programs that are compiled before they run: once for all tests, and what their ends mean. Trusted side."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from sandbox.foreign import failure
from sandbox.judge import Record
from sandbox.languages import COMPILE_LIMITS, LANGUAGES, Language, run_limits

if TYPE_CHECKING:
    from sandbox.executor import Task

Send = Callable[["Task", Literal["compile", "run"]], Awaitable[Record]]
_STDERR_TAIL = 4096


class Builds:
    """Runs tests of programs that are not Python, and keeps what was compiled last."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._last: tuple[tuple[str, str], str | Record] | None = None

    async def run(self, task: Task) -> Record:
        """One test. Where the program does not compile, the record says so: no test was run.

        Raises:
            WorkerFault: no verdict is possible.
        """
        language = LANGUAGES[task.language]
        program = await self._built(task) if language.compile else task.code
        if isinstance(program, Record):
            return program
        record = await self._send(replace(task, code=program, limits=run_limits(language, task.limits)), "run")
        return _explained(record, language)

    async def _built(self, task: Task) -> str | Record:
        key = task.language, task.code
        if self._last is None or self._last[0] != key:
            record = await self._send(replace(task, input="", limits=COMPILE_LIMITS), "compile")
            is_made = record.exit == 0 and record.stopped_by is None
            self._last = key, base64.b64encode(record.result).decode() if is_made else _refused(record)
        return self._last[1]


def _refused(record: Record) -> Record:
    """An error of compilation, whatever ended the compiler: its limits are not the program's."""
    result = record.result
    if record.stopped_by or record.exit < 0:
        result = failure(
            "the compiler needs too much time" if record.stopped_by else "the compiler needs too much memory"
        )
    stderr = record.stderr[:_STDERR_TAIL]
    return replace(record, exit=1, stopped_by=None, cpu_s=0.0, stdout=b"", stdout_bytes=0, stderr=stderr, result=result)


def _explained(record: Record, language: Language) -> Record:
    """A program that ends for want of memory says so in its own way."""
    tail = record.stderr[-_STDERR_TAIL:].decode("utf-8", "replace")
    if record.exit != 0 and any(mark in tail for mark in language.memory_marks):
        return replace(record, result=b'{"exception": "MemoryError"}')
    return record
