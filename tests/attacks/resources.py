"""Time, memory, output and disk without end, and the limits themselves."""

from __future__ import annotations

from tests.attacks.attack import Attacks

attack = ATTACKS = Attacks()

# ---------------------------------------------------------------------------------------------- time
CPU, IDLE = {"cpu_s": 0.5}, {"idle_s": 0.5}
SPIN = """
import os, time
def spin(seconds=2.5):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    os.write(1, b"BREACH: seconds of CPU")
"""
attack("infinite loop", "time_limit", SPIN + "spin()", "clocks.cpu rlimits.cpu", limits=CPU)
attack(
    "ignore SIGXCPU and every exception",
    "time_limit",
    SPIN
    + """
import faulthandler, signal
faulthandler.unregister(signal.SIGXCPU)
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        spin()
        break
    except BaseException:
        pass
""",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "block every signal",
    "time_limit",
    SPIN + "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nspin()",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "take SIGXCPU through a signalfd",
    "time_limit",
    SPIN
    + """
import ctypes, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])
mask = (ctypes.c_ulong * 1)(1 << signal.SIGXCPU - 1)
ctypes.CDLL(None).syscall({"x86_64": 289, "aarch64": 74}[os.uname().machine], -1, mask, 8, 0)
spin()
""",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "loop at exit", "time_limit", SPIN + "import atexit\natexit.register(spin)", "clocks.cpu rlimits.cpu", limits=CPU
)
attack(
    "loop in a finaliser",
    "time_limit",
    SPIN + "class A:\n    def __del__(self):\n        spin()\na = A()\ndel a",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "loop in a callback of the collector",
    "time_limit",
    SPIN + "import gc\ngc.callbacks.append(lambda *_: spin())\ngc.collect()",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "loop in a trace function",
    "time_limit",
    SPIN + "import sys\nsys.settrace(lambda *_: spin())\n(lambda: 0)()",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "an exception that never finishes its text",
    "time_limit",
    SPIN + "class E(Exception):\n    def __str__(self):\n        spin()\n        return ''\nraise E",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "a stdout that never finishes its flush",
    "time_limit",
    SPIN
    + "import sys\nclass Out:\n    def write(self, text): pass\n    def flush(self):\n        spin()\nsys.stdout = Out()",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "an import hook that never finishes",
    "time_limit",
    SPIN
    + """
import sys
class Finder:
    def find_spec(self, *_):
        spin()
sys.meta_path.insert(0, Finder())
import a_module_that_is_not_there
""",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "one long call in C",
    "time_limit",
    "import itertools\nsum(itertools.repeat(1, 800_000_000))\nprint('BREACH: it was never interrupted')",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "a regular expression that backtracks",
    "time_limit",
    "import re\nre.match('(a+)+$', 'a' * 26 + 'b')\nprint('BREACH: it was never interrupted')",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "colliding hashes",
    "time_limit",
    "d = {i * (2**61 - 1): i for i in range(20000)}\nprint('BREACH: it was never interrupted')",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "busy thread left behind",
    "time_limit",
    SPIN + "import threading\nthreading.Thread(target=spin).start()\nprint(2)",
    "clocks.cpu rlimits.cpu",
    tests=(("1\n", "2"),),
    limits=CPU,
)
attack(
    "clocks of its own",
    "time_limit",
    SPIN
    + """
end = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) + 2.5
real, time.process_time = time.clock_gettime, lambda: 0.0
time.time = time.monotonic = time.perf_counter = time.process_time
while real(time.CLOCK_PROCESS_CPUTIME_ID) < end:
    pass
print("BREACH: seconds of CPU")
""",
    "clocks.cpu rlimits.cpu",
    limits=CPU,
)
attack(
    "sleep for ever",
    "wall_limit",
    "import time\ntime.sleep(2.5)\nprint('BREACH: it slept')",
    "clocks.idle",
    limits=IDLE,
)
attack(
    "sleep between small computations",
    "wall_limit",
    "import time\nfor _ in range(25):\n    time.sleep(0.1)\n    sum(range(1000))\nprint('BREACH: it slept')",
    "clocks.idle",
    limits=IDLE,
)
attack(
    "wait for a lock",
    "wall_limit",
    "import threading\na = threading.Lock()\na.acquire()\na.acquire(timeout=2.5)\nprint('BREACH: it waited')",
    "clocks.idle",
    limits=IDLE,
)
attack(
    "wait for input that never comes",
    "wall_limit",
    "import os, select\nr, w = os.pipe()\nselect.select([r], [], [], 2.5)\nprint('BREACH: it waited')",
    "clocks.idle",
    limits=IDLE,
)
attack(
    "outlast the wall clock",
    "wall_limit",
    "import time\ntime.sleep(2.5)\nprint('BREACH: it slept')",
    "clocks.wall",
    limits={"wall_s": 0.5, "idle_s": 60.0},
)

# -------------------------------------------------------------------------------------------- memory
SMALL = {"memory_bytes": 160 << 20}
attack(
    "memory bomb: list",
    "memory_limit",
    """
    blocks = []
    for _ in range(256):
        blocks.append(bytearray(b"x") * (1 << 20))
    print("BREACH: 256 MiB")
""",
    "rlimits.as",
    limits=SMALL,
)
attack(
    "memory bomb: anonymous mmap",
    "runtime_error memory_limit",
    """
    import mmap
    maps = [mmap.mmap(-1, 1 << 26) for _ in range(4)]
    for m in maps:
        m.write(b"x" * (1 << 20))
    print("BREACH: 256 MiB")
""",
    "rlimits.as",
    limits=SMALL,
)
attack(
    "memory bomb: swallow MemoryError",
    "wrong_answer",
    """
    blocks = []
    for _ in range(1000):
        try:
            blocks.append(bytearray(1 << 20))
        except MemoryError:
            pass
        if len(blocks) == 256:
            print("BREACH: 256 MiB")
            break
""",
    "rlimits.as",
    limits=SMALL,
)
attack(
    "memory bomb: one string",
    "memory_limit",
    "text = 'x' * (256 << 20)\nprint('BREACH: 256 MiB')",
    "rlimits.as",
    limits=SMALL,
)
attack(
    "memory bomb: grow a mapping",
    "wrong_answer runtime_error memory_limit",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int
    start = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
    grown = libc.mremap(start, 4096, 256 << 20, 1)
    print("refused" if grown in (None, 2**64 - 1) else "BREACH: 256 MiB")
""",
    "rlimits.as",
    limits=SMALL,
)
attack(
    "memory that the limit does not see: memfd_create",
    "runtime_error",
    """
    import os
    files = [os.memfd_create("hidden") for _ in range(4)]
    for fd in files:
        os.write(fd, b"x" * (1 << 20))
    print("BREACH: memory outside of the address space")
""",
    "seccomp",
)
attack(
    "memory that the limit does not see: System V segment",
    "wrong_answer",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0, 1 << 20, 0o1600)
    if segment >= 0:
        libc.shmctl(segment, 0, None)
        print("BREACH: a segment")
""",
    "seccomp",
)
attack(
    "memory that the limit does not see: message queue",
    "wrong_answer",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    x86 = os.uname().machine == "x86_64"
    name = f"sandbox-{os.getpid()}".encode()
    queue = libc.syscall(240 if x86 else 180, name, 0o102, 0o600, None)
    if queue >= 0:
        libc.syscall(241 if x86 else 181, name)
        print("BREACH: a queue")
""",
    "seccomp rlimits.msgqueue landlock",
)
attack(
    "locked memory",
    "wrong_answer",
    """
    import ctypes, mmap
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1 << 20)
    print("BREACH: locked" if libc.mlock(buffer, ctypes.c_size_t(1 << 20)) == 0 else "refused")
""",
    "rlimits.memlock",
)
attack(
    "lock all memory to come",
    "wrong_answer",
    """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    print("BREACH: locked" if libc.mlockall(2) == 0 else "refused")
    libc.munlockall()
""",
    "seccomp rlimits.memlock",
)
attack(
    "shared memory in /dev/shm",
    "runtime_error",
    """
    import os
    path = f"/dev/shm/sandbox-{os.getpid()}-{os.urandom(4).hex()}"
    open(path, "wb").write(b"x" * (1 << 20))
    os.unlink(path)
    print("BREACH: shared memory")
""",
    "landlock namespaces.mount",
)
attack(
    "a thousand descriptors",
    "runtime_error",
    "import os\nfds = [os.dup(0) for _ in range(1000)]\nprint('BREACH: descriptors')",
    "rlimits.nofile",
)

# -------------------------------------------------------------------------------------------- output
attack(
    "output flood: write",
    "output_limit",
    """
    import os
    for _ in range(256):
        os.write(1, b"x" * 65536)
    os.write(2, b"BREACH: 16 MiB")
""",
    "rlimits.fsize",
)
attack(
    "output flood: print",
    "output_limit",
    """
    import sys
    for _ in range(256):
        print("x" * 65536)
    sys.stderr.write("BREACH: 16 MiB")
""",
    "rlimits.fsize",
)
attack(
    "output flood: standard error",
    "output_limit",
    """
    import os
    for _ in range(256):
        os.write(2, b"x" * 65536)
    os.write(1, b"BREACH: 16 MiB")
""",
    "rlimits.fsize",
)
attack(
    "output flood: result",
    "runtime_error",
    """
    import os
    for _ in range(256):
        os.write(3, b"x" * 65536)
    os.write(1, b"BREACH: 16 MiB")
""",
    "rlimits.fsize",
)
attack(
    "output flood: a hole of a terabyte",
    "runtime_error",
    "import os\nos.ftruncate(1, 1 << 40)\nos.write(2, b'BREACH: a terabyte')\nos.ftruncate(1, 0)",
    "rlimits.fsize",
)
attack(
    "output flood: a far offset",
    "runtime_error",
    "import os\nos.pwrite(1, b'x', 1 << 40)\nos.write(2, b'BREACH: a terabyte')\nos.ftruncate(1, 0)",
    "rlimits.fsize",
)

# ---------------------------------------------------------------------------------------------- disk
attack(
    "disk fill: one file",
    "runtime_error",
    """
    with open("fill", "wb") as file:
        for _ in range(32):
            file.write(b"x" * (1 << 20))
    print("BREACH: 32 MiB")
""",
    "landlock rlimits.fsize tmpfs.size",
    level=1,
)
attack(
    "disk fill: files below the limit of one",
    "runtime_error",
    """
    for number in range(8):
        with open(f"fill{number}", "wb") as file:
            file.write(b"x" * (4 << 20))
    print("BREACH: 32 MiB")
""",
    "landlock tmpfs.size",
)
attack(
    "disk fill: many files",
    "runtime_error",
    "for n in range(2000):\n    open(f'{n}', 'w').close()\nprint('BREACH: 2000 files')",
    "landlock tmpfs.inodes",
)
attack(
    "disk fill: many folders",
    "runtime_error",
    "import os\nfor n in range(2000):\n    os.mkdir(f'{n}')\nprint('BREACH: 2000 folders')",
    "landlock tmpfs.inodes",
)
attack(
    "disk fill: allocate without writing",
    "runtime_error",
    "import os\nos.posix_fallocate(os.open('fill', os.O_CREAT | os.O_RDWR), 0, 32 << 20)\nprint('BREACH: 32 MiB')",
    "landlock rlimits.fsize tmpfs.size",
)
attack(
    "disk fill: files without a name",
    "runtime_error",
    """
    import os
    for _ in range(8):
        os.write(os.open(".", os.O_TMPFILE | os.O_RDWR), b"x" * (4 << 20))
    print("BREACH: 32 MiB")
""",
    "landlock tmpfs.size",
)

# -------------------------------------------------------------------------------- the limits themselves
attack(
    "raise the own limits: memory",
    "runtime_error",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\nprint('BREACH: raised')",
    "rlimits.as",
)
attack(
    "raise the own limits: files",
    "runtime_error",
    "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))\nprint('BREACH: raised')",
    "rlimits.fsize",
)
attack(
    "raise the own limits: CPU time",
    "runtime_error",
    "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))\nprint('BREACH: raised')",
    "rlimits.cpu",
)
attack(
    "a core file",
    "runtime_error",
    "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))\nprint('BREACH: core files')",
    "rlimits.core",
)
