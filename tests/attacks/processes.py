"""Processes, signals, and whoever else runs: the keeper, the service, the host."""

from __future__ import annotations

from tests.attacks.attack import Attacks

attack = ATTACKS = Attacks()
LIBC = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
def syscall(x86, arm, *arguments):
    number = x86 if os.uname().machine == "x86_64" else arm
    return libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
"""
KEEPER = "seccomp landlock namespaces.pid"
"""A signal to another process: Landlock scopes them from ABI 6 on."""
MEMORY = f"{KEEPER} undumpable capabilities"
"""The keeper has capabilities in its namespace that a program lacks: then it may not touch it."""
SCHEDULER = "seccomp namespaces.pid capabilities"

# ------------------------------------------------------------------------------------ more processes
attack(
    "fork bomb",
    "runtime_error",
    """
    import os, time
    for _ in range(20):
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
    print("BREACH: 20 processes")
""",
    "seccomp",
)
attack(
    "fork by the bare system call",
    "wrong_answer",
    LIBC
    + "pid = syscall(56, 220, 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nprint('BREACH: forked' if pid > 0 else 'no')",
    "seccomp",
)
attack(
    "clone3 with its flags behind a pointer",
    "wrong_answer",
    LIBC
    + """
arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
pid = syscall(435, 435, arguments, 88)
if pid == 0: os._exit(0)
print("BREACH: forked" if pid > 0 else "refused")
""",
    "seccomp",
)
attack(
    "clone into a user namespace",
    "wrong_answer",
    LIBC
    + "pid = syscall(56, 220, 0x10000011, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nprint('BREACH' if pid > 0 else 'no')",
    "seccomp",
)
attack(
    "posix_spawn, which is vfork",
    "runtime_error",
    "import os\npid = os.posix_spawn('/bin/echo', ['echo', 'BREACH'], {})\nos.waitpid(pid, 0)",
    "seccomp landlock",
)
attack(
    "fork a terminal",
    "runtime_error",
    "import os, pty\npid, _ = pty.fork()\nif pid == 0: os._exit(0)\nprint('BREACH: forked')",
    "seccomp landlock namespaces.mount",
)
attack(
    "double fork and setsid",
    "runtime_error",
    """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.4)
            open("@TRACE@", "w").close()
        os._exit(0)
    os.wait()
""",
    "seccomp namespaces.pid orphans landlock namespaces.mount",
    lag_s=0.8,
)
attack(
    "thread bomb",
    "runtime_error",
    """
    import threading, time
    for _ in range(300):
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
    print("BREACH: 300 threads", flush=True)
""",
    "rlimits.nproc rlimits.as",
)
attack(
    "subprocess",
    "runtime_error",
    "import subprocess\nprint('BREACH', subprocess.run(['id'], capture_output=True).stdout)",
    "seccomp landlock",
)
attack("os.system", "wrong_answer", "import os\nprint('status', os.system('echo BREACH'))", "seccomp landlock")
attack("os.popen", "runtime_error wrong_answer", "import os\nprint(os.popen('echo BREACH').read())", "seccomp landlock")
attack("os.execv", "runtime_error", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo BREACH'])", "seccomp landlock")
attack(
    "execveat of a descriptor",
    "runtime_error",
    """
    import os
    fd = os.open("/bin/echo", os.O_RDONLY)
    os.execve(fd, ["echo", "BREACH"], {})
""",
    "seccomp landlock",
)
attack(
    "run a file of its own",
    "runtime_error",
    """
    import os, shutil
    shutil.copyfile("/bin/echo", "tool")
    os.fchmod(os.open("tool", os.O_RDONLY), 0o755)
    os.execv("./tool", ["tool", "BREACH"])
""",
    "seccomp landlock",
)
attack(
    "run the dynamic loader",
    "runtime_error",
    """
    import glob, os
    loader = (glob.glob("/lib64/ld-linux*") + glob.glob("/lib/ld-linux*"))[0]
    os.execv(loader, [loader, "/bin/echo", "BREACH"])
""",
    "seccomp landlock",
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
    "seccomp",
)
attack(
    "a pool of processes",
    "runtime_error",
    """
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2) as pool:
        print("BREACH", *pool.map(abs, [1, 2]))
""",
    "seccomp landlock namespaces.mount",
)

# ---------------------------------------------------------------------------------------- the keeper
attack(
    "ptrace the parent",
    "wrong_answer",
    LIBC + "r = libc.ptrace(0x4206, os.getppid() or 1, 0, 0)\nprint('BREACH' if r == 0 else 'refused')",
    MEMORY,
)
attack(
    "process_vm_readv the parent",
    "wrong_answer",
    LIBC
    + """
buffer = ctypes.create_string_buffer(16)
here = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 16)
there = (ctypes.c_uint64 * 2)(id(None), 16)
r = syscall(310, 270, os.getppid() or 2, here, 1, there, 1, 0)
print("BREACH: its memory" if r > 0 else "refused")
""",
    MEMORY,
)
attack(
    "process_vm_writev the parent",
    "wrong_answer",
    LIBC
    + """
buffer = ctypes.create_string_buffer(ctypes.string_at(id(None), 8), 8)
here = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
there = (ctypes.c_uint64 * 2)(id(None), 8)
r = syscall(311, 271, os.getppid() or 2, here, 1, there, 1, 0)
print("BREACH: its memory" if r > 0 else "refused")
""",
    MEMORY,
)
attack(
    "read /proc of the parent",
    "runtime_error",
    "import os\nfd = os.open(f'/proc/{os.getppid()}/mem', os.O_RDONLY)\nprint('BREACH', os.pread(fd, 16, id(None)))",
    "landlock namespaces.mount namespaces.pid undumpable capabilities",
)
attack(
    "steal the parent's descriptors",
    "wrong_answer runtime_error",
    LIBC
    + """
pidfd = syscall(434, 434, os.getppid() or 2, 0)
stolen = [fd for fd in range(16) if syscall(438, 438, pidfd, fd, 0) >= 0]
print("BREACH" if stolen else "refused", stolen)
""",
    MEMORY,
)
attack(
    "open the parent's descriptors through /proc",
    "runtime_error",
    "import os\nprint('BREACH', os.listdir(f'/proc/{os.getppid()}/fd'))",
    "landlock namespaces.mount namespaces.pid undumpable",
)
attack(
    "kill everything in sight",
    "wrong_answer runtime_error",
    """
    import os, signal
    for pid in (os.getppid(), @EVERYONE@):
        try:
            if pid not in (0, os.getpid()):
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    print("alive")
""",
    KEEPER,
)
attack(
    "tkill the parent",
    "wrong_answer runtime_error",
    LIBC + "print(syscall(200, 130, os.getppid() or 2, signal.SIGKILL))\nimport time\ntime.sleep(0.2)",
    KEEPER,
)
attack(
    "queue a signal to the parent",
    "wrong_answer runtime_error",
    LIBC
    + """
info = (ctypes.c_int * 32)(signal.SIGKILL, 0, -1)
print(syscall(129, 138, os.getppid() or 2, signal.SIGKILL, info))
import time
time.sleep(0.2)
""",
    KEEPER,
)
attack(
    "signal the parent through a pidfd",
    "wrong_answer runtime_error",
    LIBC
    + """
pidfd = syscall(434, 434, os.getppid() or 2, 0)
print(syscall(424, 424, pidfd, signal.SIGKILL, 0, 0))
import time
time.sleep(0.2)
""",
    KEEPER,
)
attack(
    "signal the keeper through an owned socket",
    "wrong_answer runtime_error",
    """
    import fcntl, os, signal, socket, time
    a, b = socket.socketpair()
    fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid() or 2)
    fcntl.fcntl(a, 10, signal.SIGKILL)
    fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    b.send(b"x")
    time.sleep(0.2)
""",
    KEEPER,
)
attack(
    "stop itself",
    "wall_limit wrong_answer",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "namespaces.pid clocks.idle",
    limits={"idle_s": 0.5},
)
attack(
    "lower the limits of another process",
    "wrong_answer runtime_error",
    """
    import os, resource
    pid = os.getppid() or 2
    resource.prlimit(pid, resource.RLIMIT_CORE, resource.prlimit(pid, resource.RLIMIT_CORE))
    print("BREACH")
""",
    "seccomp namespaces.pid",
)
attack(
    "slow the keeper down",
    "wrong_answer runtime_error",
    "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid() or 2, 5)\nprint('BREACH: nice')",
    SCHEDULER,
)
attack(
    "slow everything down that has its user",
    "wrong_answer",
    LIBC + "r = libc.setpriority(2, 0, 0)\nprint('BREACH: whole user' if r == 0 else 'refused')",
    "seccomp",
)
attack(
    "pin the keeper to one core",
    "wrong_answer runtime_error",
    "import os\nos.sched_setaffinity(os.getppid() or 2, os.sched_getaffinity(0))\nprint('BREACH: pinned')",
    SCHEDULER,
)
attack(
    "another class of scheduling",
    "wrong_answer runtime_error",
    "import os\nos.sched_setscheduler(os.getppid() or 2, os.SCHED_BATCH, os.sched_param(0))\nprint('BREACH: batch')",
    SCHEDULER,
)
attack(
    "another class of input and output",
    "wrong_answer",
    LIBC + "print('BREACH' if syscall(251, 30, 1, os.getppid() or 2, 0x4007) == 0 else 'refused')",
    SCHEDULER,
)
attack(
    "see who else is there",
    "wrong_answer runtime_error",
    "import os\nprint('BREACH: a process', os.getpgid(os.getppid() or 2))",
    "namespaces.pid",
    level=2,
)
attack(
    "outlive the keeper",
    "wrong_answer",
    LIBC + "print('BREACH: no parent-death signal' if libc.prctl(1, 0, 0, 0, 0) == 0 else 'refused')",
    "seccomp",
)
attack(
    "adopt orphans",
    "wrong_answer",
    LIBC + "print('BREACH: a subreaper' if libc.prctl(36, 1, 0, 0, 0) == 0 else 'refused')",
    "seccomp",
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
    "descriptors",
)
attack(
    "speak to the service over the keeper's socket",
    "wrong_answer runtime_error",
    """
    import os, socket, stat
    for fd in range(4, 256):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                socket.socket(fileno=os.dup(fd)).send(b'{"error": "BREACH"}')
        except OSError:
            pass
""",
    "descriptors",
)
attack(
    "change the input",
    "wrong_answer runtime_error",
    "import os\nos.ftruncate(0, 0)\nprint('BREACH')",
    "seals",
)
attack(
    "write over the input",
    "wrong_answer runtime_error",
    "import os\nos.pwrite(0, b'2', 0)\nprint('BREACH')",
    "seals",
)
attack(
    "map the input for writing",
    "wrong_answer runtime_error",
    "import mmap\nm = mmap.mmap(0, 2)\nm[0] = 50\nprint('BREACH')",
    "seals",
)
attack(
    "the host's message queue",
    "wrong_answer",
    LIBC
    + "print('BREACH: it is there' if libc.msgctl(@QUEUE@, 2, ctypes.create_string_buffer(512)) == 0 else 'refused')",
    "seccomp namespaces.ipc",
)
attack(
    "the host's shared memory",
    "wrong_answer",
    LIBC
    + """
libc.shmat.restype = ctypes.c_void_p
at = libc.shmat(@SEGMENT@, None, 0o10000)
print("refused" if at == 2**64 - 1 else ctypes.string_at(at, 32))
""",
    "seccomp namespaces.ipc",
)
attack(
    "a file for the next program",
    "passed",
    "import os\nprint('BREACH' if os.path.exists('/tmp/left') else 1)",
    "tmpfs.fresh",
    tests=(("", "1"),),
    level=2,
    before="open('/tmp/left', 'w').write('x')",
)
attack(
    "a hidden file for the next program",
    "passed",
    "import os\nprint('BREACH' if os.listdir('/tmp') else 1)",
    "tmpfs.fresh",
    tests=(("", "1"),),
    level=2,
    before="import os\nos.makedirs('/tmp/.a/b')\nos.symlink('x', '/tmp/.a/c')",
)
attack(
    "no room for the next program",
    "passed",
    "open('fill', 'wb').write(b'x' * (6 << 20))\nprint(1)",
    tests=(("", "1"),),
    level=2,
    before="import os\nfor _ in range(3):\n  os.write(os.open('/tmp', os.O_TMPFILE | os.O_RDWR), b'x' * (4 << 20))",
)
