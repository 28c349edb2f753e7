"""How LiveCodeBench's and SDPO's harnesses run a program, for numbers that are compared with theirs. Runs inside.

LiveCodeBench (``lcb_runner/evaluation/testing_util.py``) makes the program the body of a function and calls it with
stand-ins for stdin, stdout and open, so that some correct programs fail; a profile must let them fail too.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib
import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WRAPPER = "wrapped_function"
_GUARD = "__name__ == '__main__'"
_TAKEN_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")
_TAKEN_OF_OS = """kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate
replace unlink fchmod fchown chmod chown chroot lchown getcwd chdir""".split()  # noqa: SIM905 - a list of words

_dup, _dup2, _lseek, _pwrite, _read = os.dup, os.dup2, os.lseek, os.pwrite, os.read

Call = tuple[Callable[..., object], list[Any]]


# --------------------------------------------------------------------------------------- LiveCodeBench
def lcb_program(code: str, filename: str) -> types.CodeType:
    """Imports first, everything else as the body of one function; a last ``__main__`` guard is unwrapped.

    Raises:
        SyntaxError: the program is none, or its body would be empty.
    """
    body = ast.parse(code, filename).body
    if body and isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == _GUARD:
        body = [*body[:-1], *body[-1].body]
    imports = [row for row in body if isinstance(row, (ast.Import, ast.ImportFrom))]
    rest = [row for row in body if row not in imports]
    _refuse_future(imports)
    if not rest:
        raise SyntaxError("nothing but imports: the body of the function would be empty")
    tree = ast.parse(f"def {WRAPPER}(): pass")
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    function.body = rest
    tree.body = [*imports, function]
    return compile(tree, filename, "exec", dont_inherit=True)


def lcb_module(code: str, filename: str) -> types.CodeType:
    """A program with a function to call: it follows the prelude, so that no ``__future__`` import can come first.

    Raises:
        SyntaxError: the program is none.
    """
    _refuse_future(ast.parse(code, filename).body)
    return compile(code, filename, "exec", dont_inherit=True)


def _refuse_future(body: Sequence[ast.stmt]) -> None:
    if any(isinstance(row, ast.ImportFrom) and row.module == "__future__" for row in body):
        raise SyntaxError("from __future__ imports must occur at the beginning of the file")


def run_lcb(module: types.ModuleType, compiled: Callable[[], types.CodeType]) -> None:
    """Run a program on descriptor 0 and leave on descriptor 1 what it printed through ``sys.stdout``, and nothing else."""
    text = _whole_input()
    output = _dup(1)
    _dup2(2, 1)  # what goes past sys.stdout is not captured
    module.__dict__.update(__name__="tmp_sol", quit=None, stdin=_imported_stdin(text))
    _take_away()
    early, sys.stdin = sys.stdin, module.__dict__["stdin"]
    exec(compiled(), module.__dict__)
    sys.stdin = early
    with _captured(text, output):  # an exit ends it as well, with whatever status
        module.__dict__[WRAPPER]()


def _whole_input() -> str:
    """All of descriptor 0, of which nothing is left for those who read it past the stand-in."""
    with open(0, "rb", closefd=False) as file:
        data = file.read()
    _lseek(0, 0, os.SEEK_END)
    return data.decode("utf-8", "surrogateescape")


@contextmanager
def _captured(text: str, output: int) -> Iterator[None]:
    kept = sys.stdin, sys.stdout, builtins.open
    buffer = io.StringIO()
    sys.stdin, sys.stdout = Stdin(text), buffer
    builtins.open = lambda *_, **__: io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, builtins.open = kept
        data = memoryview(buffer.getvalue().encode("utf-8", "backslashreplace"))
        done = 0
        while done < len(data):
            done += _pwrite(output, data[done : done + (1 << 20)], done)


class Stdin:
    """LiveCodeBench's stand-in: cannot be iterated; read and readlines start anew each time, lines have no end."""

    def __init__(self, text: str) -> None:
        self._text, self._lines = text, io.StringIO(text)
        self.buffer = _Buffer(text.encode("utf-8", "surrogateescape"))

    def read(self, *_: object) -> str:
        """All of it."""
        return self._text

    def readline(self, *arguments: int) -> str:
        """The next line."""
        return self._lines.readline(*arguments)

    def readlines(self, *_: object) -> list[str]:
        """All lines, without their ends."""
        return self._text.split("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lines, name)


class _Buffer:
    """Has two methods, and no place: every line is the first."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, *_: object) -> bytes:
        return self._data

    def readline(self, *_: object) -> bytes:
        return self._data.split(b"\n")[0] + b"\n"


def _imported_stdin(text: str) -> io.TextIOWrapper:
    """What ``from sys import stdin`` gives: an empty file, three methods of which are replaced."""
    stdin = io.TextIOWrapper(io.BytesIO())
    lines = iter(text.split("\n"))
    for name, method in (
        ("read", lambda *_: text),
        ("readline", lambda *_: next(lines)),
        ("readlines", lambda *_: text.split("\n")),
    ):
        setattr(stdin, name, method)
    return stdin


def _take_away() -> None:
    """What LiveCodeBench sets to None before it runs a program."""
    for name in _TAKEN_OF_OS:
        setattr(os, name, None)
    builtins.quit = None  # pyright: ignore[reportAttributeAccessIssue]
    for module, name in (("subprocess", "Popen"), ("shutil", "rmtree"), ("shutil", "move"), ("shutil", "chown")):
        setattr(importlib.import_module(module), name, None)
    for name in _TAKEN_MODULES:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType] - that is how an import is made to fail


def lcb_call(code: str, module: types.ModuleType, function: str, input: str) -> Call:
    """The function of ``Solution`` if the source says that there is such a class; an argument per line."""
    _lseek(0, 0, os.SEEK_END)
    owner = module.__dict__["Solution"]() if "class Solution" in code else module
    return getattr(owner, function), [json.loads(line) for line in input.split("\n")]


def refuse_arrays(value: object) -> None:
    """LiveCodeBench compares with ``==``, which arrays answer element by element.

    Raises:
        ValueError: there is one.
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            refuse_arrays(item)
    elif type(value).__module__ == "numpy" and getattr(value, "size", 1) != 1:
        raise ValueError("the truth value of an array with more than one element is ambiguous")


# ------------------------------------------------------------------------------------------------ SDPO
def sdpo_module(code: str, filename: str) -> types.CodeType:
    """Annotations are not evaluated."""
    return compile(code, filename, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)


def sdpo_call(code: str, module: types.ModuleType, function: str, input: str) -> Call:
    """The named function of the module, else the first; an argument per word.

    Raises:
        KeyError: there is no function.
        ValueError: a word is no JSON, such as the halves of ``[1, 2]``.
    """
    names = module.__dict__
    defined = [row.name for row in ast.parse(code).body if isinstance(row, ast.FunctionDef)]
    name = function if callable(names.get(function)) else next(iter(defined), function)
    return names[name], [json.loads(word) for word in input.split()]


def debug_print(*values: object, sep: str = " ", end: str = "\n") -> None:
    """A name that programs may use under SDPO: what it prints is shown to the teacher and not judged."""
    print(*values, sep=sep, end=end, file=sys.stderr)
