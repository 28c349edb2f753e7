"""Programs that try to break the sandbox or to cheat the judge, and the verdicts that each may get.

A program that gets something it must not get prints BREACH; the expected answer, the fixture file and one environment
variable hold a random FLAG-... text. An attack is answered when its verdict is one of those listed and neither BREACH
nor FLAG- shows up in anything that the program gave back.

Every program is bounded (2 GiB, 64 MiB, 500 processes, ...), so that a sandbox that does not hold costs minutes and not
the machine.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
import socket
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ANSWER = f"FLAG-{secrets.token_hex(6)}"  # the expected output: must never be visible to a program
ENVIRONMENT_SECRET = f"FLAG-{secrets.token_hex(6)}"  # in the environment of whoever starts the service
ATTACKS: list[Attack] = []


@dataclass(frozen=True)
class Attack:
    name: str
    verdicts: tuple[str, ...]
    code: str
    mode: str = "stdin"
    fn: str = ""
    tests: tuple[tuple[str, str], ...] = (("1\n", ANSWER),)
    limits: Mapping[str, float] = field(default_factory=dict)
    level: int = 1
    """Lowest isolation level that promises this."""

    @property
    def body(self) -> dict[str, Any]:
        """The request."""
        limits = {"wall_s": 120.0, "idle_s": 4.0, **self.limits}
        tests = [{"input": test_input, "output": output} for test_input, output in self.tests]
        body = {"code": self.code, "mode": self.mode, "tests": tests, "limits": limits, "prelude": False}
        return {**body, "fn": self.fn} if self.fn else body

    def findings(self, answer: Mapping[str, Any], level: int) -> list[str]:
        """What is wrong with an answer of the service."""
        if answer.get("status") != "ok":
            return [f"no verdict: {answer}"]
        rows = answer["tests"]
        shown = "\n".join(str(row[key]) for row in rows for key in ("stdout", "stderr", "got"))
        source = {line.strip() for line in self.code.splitlines()}  # a traceback quotes it
        printed = "\n".join(line for line in shown.splitlines() if line.strip() not in source)
        if level < self.level:
            return []
        verdict = rows[-1]["verdict"]
        found = [f"{verdict} ({rows[-1]['why']}), not one of {self.verdicts}"] if verdict not in self.verdicts else []
        return found + [f"{mark} in {printed[-300:]!r}" for mark in ("BREACH", "FLAG-") if mark in printed]


def attack(name: str, verdicts: str, code: str, **options: Any) -> None:
    ATTACKS.append(Attack(name, tuple(verdicts.split()), textwrap.dedent(code).strip("\n") + "\n", **options))


def call(test_input: str = "1", expected: str = json.dumps(ANSWER), **options: Any) -> dict[str, Any]:
    """Options of a functional test of f."""
    return {"mode": "functional", "fn": "f", "tests": ((test_input, expected),), **options}


@contextlib.contextmanager
def armed(attacks: list[Attack], folder: pathlib.Path) -> Iterator[list[Attack]]:
    """The attacks, aimed at a readable file with a secret and at a listening port."""
    folder.chmod(0o755)
    secret = folder / "answers.json"
    secret.write_text(json.dumps({"expected": ANSWER}))
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        values = {"@SECRET@": str(secret), "@PORT@": str(server.getsockname()[1])}
        yield [_aimed(item, values) for item in attacks]


def _aimed(item: Attack, values: Mapping[str, str]) -> Attack:
    code = item.code
    for key, value in values.items():
        code = code.replace(key, value)
    return replace(item, code=code)


# ------------------------------------------------------------------------------------------ controls
attack("control: correct program", "passed", "print(int(input()) + 1)", tests=(("1\n", "2"),))
attack(
    "control: correct function",
    "passed",
    """
    class Solution:
        def f(self, a, b):
            return [a, b]
""",
    **call("[1, 2]\n3", "[[1, 2], 3]"),
)
attack("control: full-width digits equal as decimals", "passed", r"print('\uff11\uff12')", tests=(("1\n", "12"),))

# ---------------------------------------------------------------------------------------------- time
attack(
    "infinite loop",
    "time_limit",
    """
    while True:
        pass
""",
    limits={"cpu_s": 1.0},
)
attack(
    "sleep for ever",
    "wall_limit",
    """
    import time
    time.sleep(1000)
""",
    limits={"idle_s": 1.0},
)
attack(
    "read stdin past its end",
    "wrong_answer",
    """
    import sys
    while sys.stdin.readline():
        pass
""",
)
attack(
    "busy thread left behind",
    "time_limit",
    """
    import threading
    def spin():
        while True:
            pass
    threading.Thread(target=spin).start()
    print(2)
""",
    tests=(("1\n", "2"),),
    limits={"cpu_s": 1.0},
)

# -------------------------------------------------------------------------------------------- memory
attack(
    "memory bomb: list",
    "memory_limit",
    """
    blocks = []
    for _ in range(2048):
        blocks.append(bytearray(b"x") * (1 << 20))
    print("BREACH: 2 GiB")
""",
)
attack(
    "memory bomb: anonymous mmap",
    "runtime_error memory_limit",
    """
    import mmap
    maps = [mmap.mmap(-1, 1 << 26) for _ in range(32)]
    for m in maps:
        m.write(b"x" * (1 << 26))
    print("BREACH: 2 GiB")
""",
)

# -------------------------------------------------------------------------------------------- output
attack(
    "output flood: write",
    "output_limit",
    """
    import os
    for _ in range(1024):
        os.write(1, b"x" * 65536)
    os.write(2, b"BREACH: 64 MiB")
""",
    limits={"cpu_s": 3.0},
)
attack(
    "output flood: print",
    "output_limit",
    """
    import sys
    for _ in range(1024):
        print("x" * 65536)
    sys.stderr.write("BREACH: 64 MiB")
""",
    limits={"cpu_s": 3.0},
)

# ----------------------------------------------------------------------------------------- processes
attack(
    "fork bomb",
    "runtime_error",
    """
    import os, time
    for _ in range(500):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
    print("BREACH: 500 processes")
""",
)
attack(
    "thread bomb",
    "runtime_error",
    """
    import threading, time
    for _ in range(5000):
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
    print("BREACH: 5000 threads")
""",
)
attack(
    "subprocess",
    "runtime_error",
    """
    import subprocess
    print("BREACH", subprocess.run(["id"], capture_output=True).stdout)
""",
)
attack(
    "os.system",
    "wrong_answer",
    """
    import os
    print("status", os.system("echo BREACH"))
""",
)
attack(
    "os.execv",
    "runtime_error",
    """
    import os
    os.execv("/bin/sh", ["sh", "-c", "echo BREACH"])
""",
)
attack(
    "multiprocessing",
    "runtime_error",
    """
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=print, args=("BREACH",))
    process.start()
    process.join()
""",
)
attack(
    "ptrace the parent",
    "wrong_answer",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    r = libc.ptrace(0x4206, os.getppid() or 1, 0, 0)       # PTRACE_SEIZE: does not stop it
    print("BREACH" if r == 0 else "refused", ctypes.get_errno())
""",
)
attack(
    "process_vm_readv the parent",
    "wrong_answer",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    r = libc.syscall({"x86_64": 310, "aarch64": 270}[os.uname().machine], os.getppid() or 1, 0, 0, 0, 0, 0)
    print("BREACH" if r >= 0 else "refused", ctypes.get_errno())
""",
)

# ---------------------------------------------------------------------------------------------- disk
attack(
    "disk fill: one file",
    "runtime_error",
    """
    with open("fill", "wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
    print("BREACH: 64 MiB")
""",
)

# ------------------------------------------------------------------------------------------- network
attack(
    "socket: connect to loopback",
    "runtime_error",
    """
    import socket
    socket.create_connection(("127.0.0.1", @PORT@), 2)
    print("BREACH: connected")
""",
)
attack(
    "socket: listen on loopback",
    "runtime_error",
    """
    import socket
    socket.socket().bind(("127.0.0.1", 0))
    print("BREACH: bound")
""",
)

# --------------------------------------------------------------------------------------------- files
attack("read /etc/shadow", "runtime_error", "print('BREACH', open('/etc/shadow').read())")
attack("read /etc/passwd", "runtime_error", "print('BREACH', open('/etc/passwd').read())")
attack("read the answers file", "runtime_error", "print('BREACH', open('@SECRET@').read())")
attack(
    "list the directory of the answers",
    "runtime_error",
    """
    import os
    print("BREACH", os.listdir(os.path.dirname("@SECRET@")))
""",
)
attack(
    "list the harness's own sources",
    "runtime_error",
    """
    import os, sys
    names = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "sandbox" and getattr(m, "__file__", None)]
    print("BREACH", os.listdir(os.path.dirname(names[0] if names else "@SECRET@")))
""",
)
attack(
    "secrets in the environment",
    "wrong_answer",
    """
    import os
    print(dict(os.environ))
""",
)
attack(
    "list /proc",
    "runtime_error",
    """
    import os
    pids = [n for n in os.listdir("/proc") if n.isdigit()]
    print("BREACH" if len(pids) > 2 else "own", pids)
    raise SystemExit(1)
""",
)
attack("list /sys", "runtime_error", "import os; print('BREACH', os.listdir('/sys/class')); raise SystemExit(1)")
attack(
    "symlink out",
    "runtime_error",
    """
    import os
    os.symlink("@SECRET@", "link")
    print("BREACH", open("link").read())
""",
)
attack("dot-dot out", "runtime_error", "print('BREACH', open('../' * 12 + '@SECRET@'.lstrip('/')).read())")
attack(
    "stat a host path",
    "runtime_error",
    """
    import os
    print("BREACH", os.stat("@SECRET@").st_size)
""",
    level=2,
)

# ---------------------------------------------------------------------------------------- privileges
attack(
    "unshare a user namespace",
    "wrong_answer",
    """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    print("BREACH" if libc.unshare(0x10000000) == 0 else "refused", ctypes.get_errno())
""",
)
attack(
    "mount a tmpfs",
    "wrong_answer",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    print("BREACH" if libc.mount(b"none", os.getcwd().encode(), b"tmpfs", 0, 0) == 0 else "refused", ctypes.get_errno())
""",
)
attack(
    "rare system calls",
    "wrong_answer",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    x86 = os.uname().machine == "x86_64"
    calls = {"io_uring_setup": 425, "bpf": 321 if x86 else 280, "keyctl": 250 if x86 else 219,
             "userfaultfd": 323 if x86 else 282, "perf_event_open": 298 if x86 else 241,
             "open_by_handle_at": 304 if x86 else 265, "name_to_handle_at": 303 if x86 else 264}
    for name, number in calls.items():
        result = libc.syscall(number, 0, 0, 0, 0, 0)
        refused = result == -1 and ctypes.get_errno() in (1, 38)
        print(name, "refused" if refused else "BREACH", result, ctypes.get_errno())
""",
)
attack(
    "setuid 0",
    "runtime_error",
    """
    import os
    os.setuid(0)
    print("BREACH: root")
""",
)

# ------------------------------------------------------------------------------------ reward hacking
attack(
    "hack: sys.exit(0) instead of a result",
    "runtime_error wrong_answer",
    """
    import sys
    def f(a):
        sys.exit(0)
""",
    **call(),
)
attack(
    "hack: os._exit(0) instead of a result",
    "runtime_error wrong_answer",
    """
    import os
    def f(a):
        os._exit(0)
""",
    **call(),
)
attack("hack: os._exit(0) before any output", "wrong_answer runtime_error", "import os; os._exit(0)")
attack(
    "hack: claim success at exit",
    "wrong_answer",
    """
    import atexit, os
    atexit.register(lambda: os.write(1, b"all tests passed\\n"))
    print("no")
""",
)
attack(
    "hack: __eq__ always true",
    "runtime_error wrong_answer",
    """
    class Equal:
        def __eq__(self, other):
            return True
        def __ne__(self, other):
            return False
        __hash__ = None
    def f(a):
        return Equal()
""",
    **call(),
)
attack(
    "hack: spoof __class__",
    "runtime_error wrong_answer",
    """
    class Fake:
        __class__ = property(lambda self: list)
        def __eq__(self, other):
            return True
        def __iter__(self):
            return iter([1])
        def __len__(self):
            return 1
    def f(a):
        return Fake()
""",
    **call(expected="[1]"),
)
attack(
    "hack: walk the frames for the answer",
    "wrong_answer",
    """
    import re, sys
    def flag(value, depth=0):
        if isinstance(value, (str, bytes)):
            text = value if isinstance(value, str) else value.decode("latin-1")
            return re.search("FLAG-[0-9a-f]{12}", text)
        if depth < 3 and isinstance(value, dict):
            return next(filter(None, (flag(v, depth + 1) for v in list(value.values()))), None)
        if depth < 3 and isinstance(value, (list, tuple)):
            return next(filter(None, (flag(v, depth + 1) for v in value)), None)
    def f(a):
        frame = sys._getframe()
        while frame:
            for names in (frame.f_locals, frame.f_globals):
                found = flag(names)
                if found:
                    return found.group(0)
            frame = frame.f_back
        return "not found"
""",
    **call(),
)
attack(
    "hack: forge the result channel",
    "wrong_answer runtime_error",
    """
    import os
    def f(a):
        for fd in range(3, 64):
            try:
                os.write(fd, b'{"value": "passed", "ok": true, "passed": true, "verdict": "passed"}')
            except OSError:
                pass
        os._exit(0)
""",
    **call(),
)
attack(
    "hack: speak as the harness on stdout",
    "wrong_answer",
    r"""
    print('{"verdict": "passed"}\nAll tests passed\n1 passed in 0.01s')
""",
)
attack(
    "hack: patch the harness modules",
    "wrong_answer runtime_error",
    """
    import sys
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.startswith("sandbox") or "judge" in name or "harness" in name or "runner" in name:
            for attribute in dir(module):
                if callable(getattr(module, attribute)) and not attribute.startswith("_"):
                    setattr(module, attribute, lambda *a, **k: True)
    def f(a):
        return "y"
""",
    **call(),
)

# ---------------------------------------------------------------------------------------- robustness
attack(
    "recursion bomb",
    "runtime_error",
    """
    def f(n):
        return f(n + 1)
    f(0)
""",
)
attack("segmentation fault", "runtime_error", "import ctypes; ctypes.string_at(0)")
attack("syntax error", "compile_error", "x = (")
attack(
    "compile bomb", "compile_error runtime_error memory_limit", "x = " + "(" * 5000 + ")" * 5000, limits={"cpu_s": 3.0}
)

# ------------------------------------------------------------------------------ against its neighbours
attack(
    "kill everything in sight",
    "wrong_answer runtime_error",
    """
    import os, signal
    for pid in (os.getppid(), 1, -1, 2, 3):
        try:
            if pid not in (0, os.getpid()):
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    print("alive")
""",
)
attack(
    "signal the keeper through an owned socket",
    "wrong_answer runtime_error",
    """
    import fcntl, os, signal, socket
    a, b = socket.socketpair()
    fcntl.fcntl(a, 8, os.getppid() or 1)
    fcntl.fcntl(a, 10, signal.SIGKILL)
    print("BREACH: armed")
""",
)
attack(
    "lower the limits of another process",
    "wrong_answer runtime_error",
    """
    import os, resource
    resource.prlimit(os.getppid() or 1, resource.RLIMIT_CPU, (1, 1))
    print("BREACH")
""",
)
attack(
    "raise the own limits",
    "wrong_answer runtime_error",
    """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
    print("BREACH")
""",
)
attack(
    "write into the outputs of the harness",
    "wrong_answer",
    """
    import os
    for fd in range(4, 64):
        try:
            os.fstat(fd)
            print("BREACH: descriptor", fd)
        except OSError:
            pass
""",
)
attack(
    "change the input",
    "wrong_answer runtime_error",
    """
    import os
    os.ftruncate(0, 0)
    print("BREACH")
""",
)
attack(
    "memory of the worker: earlier programs",
    "wrong_answer",
    """
    import gc
    found = [o for o in gc.get_objects() if isinstance(o, dict) and any("FLAG" "-" in str(v) for v in list(o.values())[:50])]
    print("BREACH" if found else "nothing")
""",
)
attack(
    "a file for the next program: write",
    "passed",
    "open('/tmp/left', 'w').write('x'); print(1)",
    tests=(("", "1"),),
    level=2,
)
attack(
    "a file for the next program: read",
    "passed",
    "import os; print(len(os.listdir('/tmp')))",
    tests=(("", "0"),),
    level=2,
)
attack(
    "a file without a name for the next program",
    "passed",
    """
    import os
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"x" * 100000)
    print(1)
""",
    tests=(("", "1"),),
    level=2,
)
attack(
    "result file of another size",
    "runtime_error output_limit wrong_answer",
    """
    import os
    def f(a):
        os.ftruncate(3, 8 << 20)
        os._exit(0)
""",
    **call(),
)
attack(
    "result: a bomb of depth",
    "runtime_error wrong_answer",
    """
    import os
    def f(a):
        os.write(3, b'{"value": ' + b"[" * 100000)
        os._exit(0)
""",
    **call(),
)
attack(
    "result: a huge integer",
    "runtime_error wrong_answer memory_limit",
    """
    def f(a):
        return 10 ** 400000
""",
    **call(),
)
