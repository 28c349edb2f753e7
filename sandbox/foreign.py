"""Compiles and runs programs that are not Python. Runs inside, behind the walls: the compiler reads untrusted source too."""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
from collections.abc import Callable

from sandbox.languages import LANGUAGES, Language

PROGRAM = "program"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "TMPDIR": "/tmp", "UV_USE_IO_URING": "0"}
_SAID = "said"
_MESSAGE_CHARS = 300


def compile_program(name: str, code: str, emit: Callable[[bytes], None]) -> int:
    """Make the program and emit it; what the compiler says goes to stderr, and the first error is emitted."""
    language = LANGUAGES[name]
    _write(language.source, code.encode("utf-8", "surrogateescape"), 0o600)
    status = _spawn(language.compile)
    with open(_SAID, "rb") as file:
        said = file.read(16384)
    os.write(2, said)
    if status == 0:
        with open(PROGRAM, "rb") as file:
            emit(file.read())
        return 0
    lines = said.decode("utf-8", "replace").splitlines()
    message = next((line for line in lines if "error" in line), f"the compiler ended with {status}")
    emit(failure(message))
    return 1


def _spawn(command: tuple[str, ...]) -> int:
    files = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, _SAID, os.O_WRONLY | os.O_CREAT, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        (os.POSIX_SPAWN_CLOSE, 3),
    ]
    pid = os.posix_spawn(command[0], command, ENVIRONMENT, file_actions=files)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def failure(message: str) -> bytes:
    """A result that is judged as an error of compilation."""
    said = {"exception": "CompileError", "message": message[:_MESSAGE_CHARS], "phase": "compile"}
    return json.dumps(said).encode()


def execute(name: str, program: str, result: int) -> None:
    """Become the program; returns only if that fails. ``program``: the source, or what was compiled, as base64."""
    language = LANGUAGES[name]
    if language.compile:
        _write(PROGRAM, base64.b64decode(program), 0o700)
    else:
        _write(language.source, program.encode("utf-8", "surrogateescape"), 0o600)
    _limit_stack(language)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a program would inherit that
        signal.signal(number, signal.SIG_DFL)
    os.set_inheritable(result, False)
    os.execve(language.run[0], language.run, ENVIRONMENT)


def _limit_stack(language: Language) -> None:
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    size = language.stack_bytes if hard == resource.RLIM_INFINITY else min(language.stack_bytes, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (size, hard))


def _write(path: str, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(fd, "wb") as file:
        file.write(data)
