"""What programs must see at each isolation level: small programs, and the verdict that each gets.

A program that tries what it must not prints 42, the expected answer, if it was refused, and what happened if it was not:
a wall that is there and a program that failed for another reason do not look the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from sandbox import judge

ANSWER = "42"
_REFUSED = """
import ctypes, os, signal, socket, time
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def syscall(x86, arm, *arguments):
    call("syscall", x86 if os.uname().machine == "x86_64" else arm, *arguments)
def attempt():
{}
try:
    print("not refused:", attempt())
except OSError as error:
    print(42 if error.errno in (1, 2, 11, 13, 30, 38) else error)
"""
"""Refusals: EPERM, ENOENT, EAGAIN, EACCES, EROFS, ENOSYS."""


class Behaviour(NamedTuple):
    """A program, and what must come of it."""

    name: str
    code: str
    verdicts: tuple[str, ...] = (judge.PASSED,)
    """Any of them; ``passed`` if the program sees for itself."""
    level: int = 0
    """Lowest isolation level that promises it."""
    not_at: tuple[int, ...] = ()
    """Higher levels that do not."""
    input: str = "41\n"
    expected: str | None = ANSWER
    function: str = ""
    """Of a functional test."""
    limits: Mapping[str, float] = {}
    is_quick: bool = False
    """Seen before the service listens, not only on request."""


def _refused(name: str, attempt: str, level: int = 1, *, is_quick: bool = False) -> Behaviour:
    return Behaviour(name, _REFUSED.format(textwrap.indent(attempt, "    ")), level=level, is_quick=is_quick)


def _stopped(name: str, code: str, *, is_quick: bool = False) -> Behaviour:
    return Behaviour(name, code, (judge.TIME_LIMIT,), limits={"cpu_s": 0.1}, is_quick=is_quick)


def _function(name: str, code: str, *verdicts: str, input: str = "[1, 2]", expected: str = "[1, 2]") -> Behaviour:
    return Behaviour(name, code, verdicts, input=input, expected=expected, function="f")


_JUDGING = (
    Behaviour("a right program passes", "print(int(input()) + 1)", is_quick=True),
    Behaviour("a wrong program fails", "print(0)", (judge.WRONG_ANSWER,), is_quick=True),
    Behaviour("numbers are compared as numbers", "print('4.20e1')"),
    Behaviour("a missing line is wrong", "print(42)", (judge.WRONG_ANSWER,), expected="42\n42"),
    Behaviour("without an expected output it is only run", "print(1)", (judge.RAN,), expected=None),
    Behaviour("an exit status outweighs the right output", "print(42)\nraise SystemExit(1)", (judge.RUNTIME_ERROR,)),
    Behaviour("exit() after the output is a normal end", "print(42)\nexit()"),
    Behaviour("an exception is a runtime error", "1 / 0", (judge.RUNTIME_ERROR,)),
    Behaviour("a syntax error is a compile error", "x = (", (judge.COMPILE_ERROR,)),
    Behaviour("end of input is seen", "input()\ntry: input()\nexcept EOFError: print(42)"),
    Behaviour("atexit functions run", "import atexit\natexit.register(print, 42)"),
    Behaviour("hashes do not vary", "import sys\nprint(0 if sys.flags.hash_randomization else 42)"),
    _function("a function is called and compared as data", "def f(a): return (1, 2)", judge.PASSED),
    _function("a method of Solution is called", "class Solution:\n  def f(self, a): return a", judge.PASSED),
    _function("another value is wrong", "def f(a): return [1]", judge.WRONG_ANSWER),
)
_FORGERY = (
    _function("exit before a result is no pass", "import os\ndef f(a): os._exit(0)", judge.RUNTIME_ERROR),
    _function(
        "an object that equals everything is no result",
        "class E:\n  def __eq__(self, o): return True\n  __hash__ = None\ndef f(a): return E()",
        judge.RUNTIME_ERROR,
    ),
    _function(
        "an object that claims to be a list is no list",
        "class F:\n  __class__ = property(lambda s: list)\n  def __eq__(self, o): return True\ndef f(a): return F()",
        judge.RUNTIME_ERROR,
    ),
    _function(
        "no expected value in any frame",
        "import re, sys\ndef f(a):\n  frame = sys._getframe()\n  while frame:\n"
        "    for value in (*frame.f_locals.values(), *frame.f_globals.values()):\n"
        "      found = re.search('FLAG-[0-9]{4}', repr(value))\n      if found: return found.group(0)\n"
        "    frame = frame.f_back",
        judge.WRONG_ANSWER,
        input="1",
        expected='"FLAG-1234"',
    ),
    _function(
        "a forged result file states a value and no verdict",
        'import os\ndef f(a):\n  os.write(3, b\'{"value": "passed", "verdict": "passed"}\')\n  os._exit(0)',
        judge.WRONG_ANSWER,
    ),
    _function(
        "a result of endless depth is malformed",
        "import os\ndef f(a):\n  os.write(3, b'{\"value\": ' + b'[' * 100000)\n  os._exit(0)",
        judge.RUNTIME_ERROR,
    ),
    Behaviour("'all tests passed' is an output", "print('All tests passed')", (judge.WRONG_ANSWER,)),
)
_LIMITS = (
    _stopped("a loop is stopped", "while True: pass", is_quick=True),
    _stopped(
        "a loop that catches everything is stopped",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ),
    _stopped(
        "a loop in a thread is stopped",
        "import threading\ndef f():\n  while True: pass\nthreading.Thread(target=f).start()\nprint(42)",
    ),
    _stopped("a loop at exit is stopped", "import atexit\ndef f():\n  while True: pass\natexit.register(f)\nprint(42)"),
    _stopped("one long call is stopped", "x = 7 ** 10 ** 8"),
    Behaviour("a sleeper is stopped", "import time\ntime.sleep(60)", (judge.WALL_LIMIT,), limits={"idle_s": 0.2}),
    Behaviour(
        "a waiter is stopped",
        "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
        (judge.WALL_LIMIT,),
        limits={"idle_s": 0.2},
    ),
    Behaviour(
        "memory is bounded",
        "blocks = []\nfor _ in range(256): blocks.append(bytearray(1 << 20))",
        (judge.MEMORY_LIMIT,),
        limits={"memory_bytes": 128 << 20},
    ),
    Behaviour(
        "mapped memory is bounded",
        "import mmap\ntry: mmap.mmap(-1, 256 << 20)\nexcept OSError as error: print(42 if error.errno == 12 else error)",
        limits={"memory_bytes": 128 << 20},
    ),
    Behaviour("a program may recover from MemoryError", "try: bytearray(1 << 40)\nexcept MemoryError: print(42)"),
    Behaviour(
        "output is bounded", "while True: print('x' * 65536)", (judge.OUTPUT_LIMIT,), limits={"output_bytes": 1 << 20}
    ),
    Behaviour(
        "output of errors is bounded",
        "import os\nwhile True: os.write(2, b'x' * 65536)",
        (judge.OUTPUT_LIMIT, judge.RUNTIME_ERROR),
        limits={"output_bytes": 1 << 20},
    ),
    Behaviour("descriptors are bounded", "import os\nfor _ in range(200): os.dup(0)", (judge.RUNTIME_ERROR,)),
    Behaviour(
        "limits cannot be raised",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 41, 1 << 41))",
        (judge.RUNTIME_ERROR,),
    ),
    Behaviour("the input cannot be changed", "import os\nos.ftruncate(0, 0)", (judge.RUNTIME_ERROR,)),
    Behaviour("endless recursion is an error", "def f(): f()\nf()", (judge.RUNTIME_ERROR,)),
    Behaviour("a crash is an error", "import ctypes\nctypes.string_at(0)", (judge.RUNTIME_ERROR,)),
    Behaviour("what a program leaves in its interpreter ...", "import builtins\nbuiltins.left = 1\nprint(42)"),
    Behaviour("... the next one does not find", "import builtins\nprint(0 if hasattr(builtins, 'left') else 42)"),
    Behaviour(
        "nothing of ours in the environment",
        "import os\nprint(42 if set(os.environ) <= set('PATH LANG HOME OMP_NUM_THREADS OPENBLAS_NUM_THREADS'.split()) else dict(os.environ))",
    ),
    Behaviour(
        "no open file of ours",
        "import os\nfound = []\nfor fd in range(4, 1024):\n  try: os.fstat(fd); found.append(fd)\n  except OSError: pass\nprint(found or 42)",
    ),
)
_PROCESSES = (
    _refused("no other process", "if os.fork() == 0: os._exit(0)", is_quick=True),
    _refused("no other program", "os.execv('/bin/true', ['true'])", is_quick=True),
    Behaviour("no shell", "import os\nprint(0 if os.system('exit 0') == 0 else 42)", level=1),
    _refused("no subprocess", "import subprocess; return subprocess.run(['true'])"),
    _refused(
        "no multiprocessing", "import multiprocessing as m; p = m.get_context('fork').Process(); p.start(); p.join()"
    ),
    _refused("no tracing of its parent", "call('ptrace', 0x4206, os.getppid() or 1, 0, 0)"),
    _refused("no reading of its parent's memory", "syscall(310, 270, os.getppid() or 1, 0, 0, 0, 0, 0)"),
    _refused(
        "no limits for others", "import resource; resource.prlimit(os.getppid() or 2, resource.RLIMIT_CPU, (1, 1))"
    ),
    _refused(
        "no signal through an owned socket",
        "import fcntl; a, b = socket.socketpair(); fcntl.fcntl(a, 8, os.getppid() or 1)",
    ),
    Behaviour(
        "no signal reaches anybody else",
        "import os, signal\nfor pid in {os.getppid() or 2, -1} - {os.getpid()}:\n"
        "  try: os.kill(pid, signal.SIGKILL)\n  except OSError: pass\nprint(42)",
        level=1,
    ),
    Behaviour(
        "threads are bounded",
        "import threading, time\ntry:\n  for _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "except RuntimeError: print(42)",
        level=1,
    ),
    Behaviour(
        "threads work",
        "import threading\nn = []\nt = [threading.Thread(target=n.append, args=(i,)) for i in range(12)]\n"
        "for x in t: x.start()\nfor x in t: x.join()\nprint(sum(n) - 24)",
        level=2,
    ),
    Behaviour("a process tree of its own", "import os\nprint(42 if os.getpid() == 1 else os.getpid())", level=2),
)
_FILES = (
    _refused("no files of the host", "return open('/etc/passwd').read()", is_quick=True),
    _refused("no folders of the host", "return os.listdir('/home')"),
    _refused("no other processes in sight", "return os.listdir('/proc')", is_quick=True),
    _refused("no devices in sight", "return os.listdir('/sys')"),
    _refused("nothing written to the system", "return os.open('/usr/x', os.O_CREAT | os.O_WRONLY)"),
    _refused("nothing written to shared memory", "return os.open('/dev/shm/x', os.O_CREAT | os.O_WRONLY)"),
    _refused("no way out by dots", "return open('../' * 9 + 'etc/passwd').read()"),
    _refused("no way out by a link", "os.symlink('/etc/passwd', 'link'); return open('link').read()"),
    _refused("no change of rights", "os.chmod('/tmp', 0o777)"),
    _refused("no change of times", "os.utime('/tmp')"),
    _refused("no code in memory files", "return os.memfd_create('x')"),
    _refused("no trace of the host's tree", "return os.stat('/etc/passwd')", 2, is_quick=True),
    Behaviour("a private /tmp", "open('/tmp/x', 'w').write('x')\nprint(42)", level=2, is_quick=True),
    Behaviour(
        "nothing left of the last test", "import os\nprint(42 if not os.listdir() else 0)", level=2, is_quick=True
    ),
    Behaviour(
        "/tmp is bounded",
        "data = b'x' * (1 << 20)\ntry:\n  for n in range(8): open(f'/tmp/{n}', 'wb').write(data)\n"
        "except OSError as error: print(42 if error.errno == 28 else error)",
        level=2,
        limits={"tmp_bytes": 4 << 20},
    ),
    Behaviour(
        "files in /tmp are bounded",
        "try:\n  for n in range(300): open(f'/tmp/{n}', 'w').close()\n"
        "except OSError as error: print(42 if error.errno == 28 else error)",
        level=2,
        not_at=(4,),  # gVisor's tmpfs counts bytes, not files
        limits={"tmp_files": 100},
    ),
    Behaviour(
        "files are bounded",
        "try:\n  with open('/tmp/x', 'wb') as f: f.write(b'x' * (4 << 20))\nexcept OSError as error: print(42 if error.errno == 27 else error)",
        level=2,
        limits={"output_bytes": 1 << 20},
    ),
)
_PRIVILEGES = (
    _refused("no network", "return socket.socket()", is_quick=True),
    _refused("no sockets of the host", "return socket.socket(socket.AF_UNIX)"),
    _refused("no network interfaces in sight", "return socket.if_nameindex()"),
    _refused("no further namespaces", "call('unshare', 0x10000000)"),
    _refused("no mounts", "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)"),
    _refused("no other user", "os.setuid(0)"),
    _refused("no other root", "os.chroot('/')"),
    _refused("no other personality", "call('personality', 0x40000)"),
    _refused("no io_uring", "syscall(425, 425, 1, 0)"),
    _refused("no bpf", "syscall(321, 280, 0, 0, 0)"),
    _refused("no keys of the kernel", "syscall(250, 219, 0, 0, 0, 0, 0)"),
    _refused("no userfaultfd", "syscall(323, 282, 0)"),
    _refused("no performance counters", "syscall(298, 241, 0, 0, 0, 0, 0)"),
    _refused("no handles of files", "syscall(304, 265, 0, 0, 0)"),
    Behaviour(
        "no way to new privileges",
        "import ctypes\nprint(42 if ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1 else 0)",
        level=1,
    ),
)
BEHAVIOURS = (*_JUDGING, *_FORGERY, *_LIMITS, *_PROCESSES, *_FILES, *_PRIVILEGES)
