"""Cheating the judge, and breaking it."""

from __future__ import annotations

from tests.attacks.attack import BOUNDS, HARNESS, LIMITS, PROCESS, Attacks, call

attack = ATTACKS = Attacks()
LOSES = "wrong_answer runtime_error"
RIGHT = (("1\n", "2"),)

# ------------------------------------------------------------------------------ an end before the check
attack("hack: sys.exit(0) instead of a result", LOSES, "import sys\ndef f(a):\n    sys.exit(0)", HARNESS, **call())
attack("hack: os._exit(0) instead of a result", LOSES, "import os\ndef f(a):\n    os._exit(0)", HARNESS, **call())
attack("hack: os._exit(0) before any output", LOSES, "import os\nos._exit(0)", HARNESS)
attack("hack: leave at import", LOSES, "raise SystemExit(0)\ndef f(a):\n    return a", HARNESS, **call())
attack("hack: KeyboardInterrupt", LOSES, "def f(a):\n    raise KeyboardInterrupt", PROCESS, **call())
attack("hack: an exit status that is 0 in eight bits", LOSES, "raise SystemExit(256)", HARNESS)
attack(
    "hack: an exit status with an opinion",
    LOSES,
    "class Zero(int):\n    def __and__(self, other):\n        return 0\nraise SystemExit(Zero(1))",
)
attack(
    "hack: an alarm that ends it",
    LOSES,
    """
    import os, signal
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    def f(a):
        signal.raise_signal(signal.SIGALRM)
""",
    HARNESS,
    **call(),
)
attack(
    "hack: a thread that ends it",
    LOSES,
    """
    import os, threading, time
    def f(a):
        threading.Thread(target=os._exit, args=(0,)).start()
        time.sleep(1)
""",
    HARNESS,
    **call(),
)
attack(
    "hack: claim success at exit",
    LOSES,
    'import atexit, os\natexit.register(lambda: os.write(1, b"all tests passed\\n"))\nprint("no")',
    HARNESS,
)

# ------------------------------------------------------------------------------------ objects that lie
EQUAL = """
class Equal{base}:
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    def __hash__(self):
        return 0
"""
attack("hack: __eq__ always true", LOSES, EQUAL.format(base="") + "def f(a):\n    return Equal()", HARNESS, **call())
for base in ("str", "int", "float", "list", "tuple", "dict", "set", "bytes"):
    attack(
        f"hack: a {base} with its own __eq__",
        LOSES,
        EQUAL.format(base=f"({base})") + "def f(a):\n    return Equal()",
        HARNESS,
        **call(),
    )
attack(
    "hack: elements with their own __eq__",
    LOSES,
    EQUAL.format(base="(int)") + "def f(a):\n    return [Equal(7)] * 3",
    HARNESS,
    **call(expected="[1, 2, 3]"),
)
attack(
    "hack: keys with their own __eq__",
    LOSES,
    EQUAL.format(base="(dict)") + "def f(a):\n    return {'a': Equal()}",
    HARNESS,
    **call(expected='{"a": 1}'),
)
attack(
    "hack: spoof __class__",
    LOSES,
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
    HARNESS,
    **call(expected="[1]"),
)
attack(
    "hack: say that it is numpy's",
    LOSES,
    EQUAL.format(base="")
    + "    def item(self):\n        return self\nEqual.__module__ = 'numpy'\ndef f(a):\n    return Equal()",
    HARNESS,
    **call(),
)
attack(
    "hack: a metaclass that equals everything",
    LOSES,
    "class Meta(type):\n    def __eq__(self, other):\n        return True\n    __hash__ = type.__hash__\n"
    "class A(metaclass=Meta): pass\ndef f(a):\n    return A",
    HARNESS,
    **call(),
)
attack(
    "hack: code in a pickled result",
    LOSES,
    """
    import sys
    class Loot:
        def __reduce__(self):
            return eval, ("__import__('sys').modules['judge'].EXPECTED",)
    def f(a):
        return Loot()
""",
    HARNESS,
    **call(),
)

# ----------------------------------------------------------------------------------- look for the answer
FLAG = """
import gc, re, sys
def flag(value, depth=0):
    if isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("latin-1")
        found = re.search("FLAG-[0-9a-f]{12}", text)
        return found and found.group(0)
    if depth < 3 and isinstance(value, dict):
        return next(filter(None, (flag(v, depth + 1) for v in list(value.values()))), None)
    if depth < 3 and isinstance(value, (list, tuple)):
        return next(filter(None, (flag(v, depth + 1) for v in value)), None)
def walk(frame):
    while frame:
        for names in (frame.f_locals, frame.f_globals):
            if flag(names):
                return flag(names)
        frame = frame.f_back
    return "not found"
"""
attack(
    "hack: walk the frames for the answer",
    "wrong_answer",
    FLAG + "def f(a):\n    return walk(sys._getframe())",
    HARNESS,
    **call(),
)
attack("hack: walk the frames, to stdout", "wrong_answer", FLAG + "print(walk(sys._getframe()))", HARNESS)
attack(
    "hack: walk the frames of a traceback",
    "wrong_answer",
    FLAG
    + """
def f(a):
    try:
        1 / 0
    except ZeroDivisionError as error:
        return walk(error.__traceback__.tb_frame)
""",
    HARNESS,
    **call(),
)
attack(
    "hack: walk the frames of a generator",
    "wrong_answer",
    FLAG + "def f(a):\n    g = (walk(g.gi_frame.f_back) for _ in '1')\n    return next(g)",
    HARNESS,
    **call(),
)
attack(
    "hack: walk the frames of other threads",
    "wrong_answer",
    FLAG
    + """
import threading
def f(a):
    found = []
    thread = threading.Thread(target=lambda: found.extend(map(walk, sys._current_frames().values())))
    thread.start()
    thread.join()
    return next((x for x in found if x != "not found"), "not found")
""",
    HARNESS,
    **call(),
)
attack(
    "hack: ask the collector for the answer",
    "wrong_answer",
    FLAG + "def f(a):\n    return next(filter(None, map(flag, gc.get_objects())), 'not found')",
    HARNESS,
    **call(),
)
attack(
    "hack: trace the callers",
    "wrong_answer",
    FLAG
    + """
found = []
def trace(frame, event, argument):
    found.append(walk(frame))
    return trace
def f(a):
    frame = sys._getframe()
    sys.settrace(trace)
    (lambda: 0)()
    sys.settrace(None)
    return next((x for x in found if x != "not found"), "not found")
""",
    HARNESS,
    **call(),
)
attack(
    "memory of the worker: earlier programs",
    "wrong_answer",
    """
    import gc
    found = [o for o in gc.get_objects() if isinstance(o, dict) and any("FLAG" "-" in str(v) for v in list(o.values())[:50])]
    print("BREACH" if found else "nothing")
""",
    HARNESS,
)
attack(
    "hack: the answer in the lines of other sources",
    "wrong_answer",
    FLAG
    + "import linecache\nprint(next(filter(None, (flag(list(e[2])) for e in linecache.cache.values() if len(e) > 2 and e[3] != 'solution.py')), 'not found'))",
)

# --------------------------------------------------------------------------------------- patch the judge
attack(
    "hack: patch the harness modules",
    LOSES,
    """
    import sys
    names = [n for n in sys.modules if "judge" in n or "harness" in n or "runner" in n]
    for name in names or [n for n in sys.modules if n.startswith("sandbox")]:
        module = sys.modules[name]
        for attribute in dir(module):
            if callable(getattr(module, attribute)) and not attribute.startswith("_"):
                setattr(module, attribute, lambda *a, **k: True)
    def f(a):
        return "y"
""",
    HARNESS,
    **call(),
)
attack(
    "hack: replace json.dumps",
    LOSES,
    "import json\njson.dumps = lambda *_, **__: '1'\ndef f(a):\n    return 'no'",
    HARNESS,
    **call(),
)
attack(
    "hack: replace Decimal",
    LOSES,
    EQUAL.format(base="") + "import decimal\nEqual.__init__ = lambda *_: None\ndecimal.Decimal = Equal\nprint('no')",
    HARNESS,
)
attack("hack: replace all", LOSES, "import builtins\nbuiltins.all = lambda *_: True\nprint('no')", HARNESS)
attack(
    "hack: replace __import__",
    LOSES,
    """
    import builtins, types
    real = builtins.__import__
    def hook(name, *rest, **more):
        module = real(name, *rest, **more)
        return types.SimpleNamespace(Decimal=lambda *_: 1) if name == "decimal" else module
    builtins.__import__ = hook
    print("no")
""",
    HARNESS,
)
attack(
    "hack: a module of its own in sys.modules",
    LOSES,
    "import sys, types\nsys.modules['decimal'] = types.SimpleNamespace(Decimal=lambda *_: 1)\nprint('no')",
    HARNESS,
)
attack(
    "hack: replace print and the exit",
    LOSES,
    "import builtins, os, sys\nbuiltins.print = lambda *_, **__: os.write(1, b'passed\\n')\nsys.exit = os._exit\nbuiltins.print('no')",
    HARNESS,
)
attack(
    "hack: replace os.write and os._exit",
    LOSES,
    'import os\nreal = os.write\nos.write = lambda fd, data: real(fd, b\'{"value": "passed"}\') and len(data)\nos._exit = lambda *_: None\n'
    "def f(a):\n    real(1, b'passed')\n    return 'no'",
    HARNESS,
    **call(),
)
attack(
    "hack: forge the result channel",
    LOSES,
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
    HARNESS,
    **call(),
)
attack(
    "hack: forge the record",
    LOSES,
    """
    import os
    def f(a):
        os.write(3, b'{"value": 1, "exit": 0, "stopped_by": null, "cpu_s": 0, "verdict": "passed", "error": null}')
        os._exit(0)
""",
    HARNESS,
    **call(),
)
attack(
    "hack: faulthandler into the result channel",
    LOSES,
    "import ctypes, faulthandler, os\nos.write(1, b'passed')\nfaulthandler.enable(3)\nctypes.string_at(0)",
    HARNESS,
)
attack(
    "hack: speak as the harness on stdout",
    "wrong_answer",
    'print(\'{"verdict": "passed"}\\nAll tests passed\\n1 passed in 0.01s\')',
    HARNESS,
)

# --------------------------------------------------------------------------- right, but over a limit
attack(
    "hack: right, then over the CPU limit",
    "time_limit",
    "print(2, flush=True)\nwhile True: pass",
    LIMITS,
    tests=RIGHT,
    limits={"cpu_s": 0.3},
)
attack(
    "hack: right, then asleep",
    "wall_limit",
    "import time\nprint(2, flush=True)\ntime.sleep(9)",
    LIMITS,
    tests=RIGHT,
    limits={"idle_s": 0.3},
)
attack(
    "hack: right, and an exit in the handler of SIGXCPU",
    "time_limit",
    """
    import faulthandler, os, signal
    faulthandler.unregister(signal.SIGXCPU)
    signal.signal(signal.SIGXCPU, lambda *_: os._exit(0))
    print(2, flush=True)
    while True:
        pass
""",
    LIMITS,
    tests=RIGHT,
    limits={"cpu_s": 0.3},
)
attack(
    "hack: right, then blanks without end",
    "output_limit",
    """
    import os
    print(2, flush=True)
    try:
        while True:
            os.write(1, b" " * 65536)
    except OSError:
        pass
""",
    LIMITS,
    tests=RIGHT,
)

# -------------------------------------------------------------------------------- break the process
attack("segmentation fault", "runtime_error", "import ctypes; ctypes.string_at(0)", PROCESS)
attack("abort", "runtime_error", "import os; os.abort()", PROCESS)
attack("kill itself", "memory_limit", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", PROCESS, level=3)
attack(
    "recursion in C",
    "runtime_error memory_limit time_limit",
    "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self):\n        return repr(self)\nrepr(A())",
    PROCESS,
    limits={"cpu_s": 1.0},
)
attack(
    "a null pointer in the interpreter",
    "runtime_error",
    "import ctypes\nctypes.memset(id(int), 0, 64)\nint(1)",
    PROCESS,
)
attack("recursion bomb", "runtime_error", "def f(n):\n    return f(n + 1)\nf(0)")
attack("syntax error", "compile_error", "x = (")
attack("NUL in the source", "compile_error", "x = 1\0")
attack(
    "compile bomb", "compile_error runtime_error memory_limit", "x = " + "(" * 5000 + ")" * 5000, limits={"cpu_s": 3.0}
)
attack("read stdin past its end", "wrong_answer", "import sys\nwhile sys.stdin.readline():\n    pass")
attack("close every descriptor", LOSES, "import os\nos.closerange(0, 64)\nprint('passed')")

# ---------------------------------------------------------------------------------- break the decoder


def _result(name: str, data: str, verdicts: str = LOSES, stopped_by: str = BOUNDS) -> None:
    attack(
        f"result: {name}",
        verdicts,
        f"import os\ndef f(a):\n    os.write(3, {data})\n    os._exit(0)",
        stopped_by,
        **call(),
    )


_result("a bomb of depth", """b'{"value": ' + b"[" * 100000""")
_result("a huge integer", """b'{"value": {"i": "0x' + b"f" * 400000 + b'"}}'""")
_result("a huge decimal integer", """b'{"value": ' + b"9" * 400000 + b'}'""")
_result("an unknown tag", """b'{"value": {"x": 1}}'""")
_result("two tags", """b'{"value": {"t": [1], "d": []}}'""")
_result("a tag without a body", """b'{"value": {"i": null}}'""")
_result("a key that cannot be hashed", """b'{"value": {"d": [[{"d": []}, 1]]}}'""")
_result("bytes that are no text", """b'\\xff\\xfe\\x00'""")
_result("no object", """b'[1]'""", stopped_by="")
_result("an empty file", """b''""", stopped_by="")
_result("a lone surrogate", """b'{"value": "\\\\ud800"}'""", stopped_by="")
_result("not a number", """b'{"value": NaN}'""", stopped_by="")
attack(
    "result file of another size",
    "runtime_error output_limit wrong_answer",
    "import os\ndef f(a):\n    os.ftruncate(3, 8 << 20)\n    os._exit(0)",
    BOUNDS,
    **call(),
)
attack(
    "result: ten to the four hundred thousand",
    f"{LOSES} memory_limit",
    "def f(a):\n    return 10 ** 400000",
    BOUNDS,
    **call(),
)
attack(
    "result: a list of itself",
    "runtime_error",
    "def f(a):\n    a = []\n    a.append(a)\n    return a",
    **call(),
)
