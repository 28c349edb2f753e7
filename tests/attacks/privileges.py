"""Rights, namespaces, and the corners of the system-call filter."""

from __future__ import annotations

from tests.attacks.attack import Attacks
from tests.attacks.processes import LIBC

attack = ATTACKS = Attacks()
CAPABLE = "seccomp capabilities"


def _call(name: str, expression: str, stopped_by: str = "seccomp", verdicts: str = "wrong_answer") -> None:
    """A call that must not return success."""
    attack(name, verdicts, f"{LIBC}\nr = {expression}\nprint('BREACH' if r >= 0 else 'refused', r)", stopped_by)


# ---------------------------------------------------------------------------------------- namespaces
_call("unshare a user namespace", "libc.unshare(0x10000000)")
_call("unshare a network namespace", "libc.unshare(0x40000000)", CAPABLE)
_call("unshare file descriptors", "libc.unshare(0x400)")
attack(
    "be root in an own user namespace and mount",
    "wrong_answer",
    LIBC
    + """
r = libc.unshare(0x10000000 | 0x20000)
if r == 0:
    r = libc.mount(b"none", os.getcwd().encode(), b"tmpfs", 0, 0)
print("BREACH: mounted" if r == 0 else "refused", r)
""",
    "seccomp landlock",
)
_call("mount a tmpfs", "libc.mount(b'none', os.getcwd().encode(), b'tmpfs', 0, 0)", f"{CAPABLE} landlock")
_call("mount the new way: fsopen", "syscall(430, 430, b'tmpfs', 0)", CAPABLE)
_call("copy a mount: open_tree", "syscall(428, 428, -100, b'/usr', 1)", CAPABLE)
_call("detach /tmp", "libc.umount2(b'/tmp', 2)", f"{CAPABLE} landlock")
_call("change the root", "libc.chroot(b'/tmp')", CAPABLE)
_call("another name for the host", "libc.sethostname(b'x', 1)", CAPABLE)
_call("enter a namespace by a pidfd", "libc.setns(syscall(434, 434, os.getpid(), 0), 0x04000000)", CAPABLE)

# ------------------------------------------------------------------------------------ rights and filter
attack(
    "setuid 0", "runtime_error", "import os\nos.setuid(0)\nprint('BREACH: root')", "seccomp identity namespaces.user"
)
attack(
    "capabilities of its own",
    "wrong_answer",
    LIBC
    + """
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(header, sets)
print("BREACH" if any(sets) else "none", *sets)
""",
    "capabilities",
)
_call("switch the randomisation of addresses off", "libc.personality(0x0040000)")
_call(
    "a filter of its own",
    """-1
allow = ctypes.create_string_buffer(bytes((6, 0, 0, 0, 0, 0, 255, 127)))
r = syscall(317, 277, 1, 0, (ctypes.c_uint64 * 2)(1, ctypes.addressof(allow)))""",
)
_call("a Landlock domain of its own", "syscall(444, 444, (ctypes.c_uint64 * 1)(1), 8, 0)")
_call("io_uring", "syscall(425, 425, 4, (ctypes.c_char * 120)())", "seccomp rlimits.memlock")
_call("userfaultfd", "syscall(323, 282, 1)")
_call("the session keyring", "syscall(250, 219, 1, 0)")
_call("a new key", "syscall(248, 217, b'user', b'sandbox', b'x', 1, -1)")
_call("fanotify", "syscall(300, 262, 0x200, 0)")
_call("inotify", "libc.inotify_init1(0)")
_call("move pages of memory", "syscall(279, 239, 0, 0, 0, 0, 0, 0)")
_call("compare with another process: kcmp", "syscall(312, 272, os.getpid(), os.getpid(), 2, 0, 0)")
_call("splice memory into a pipe", "syscall(278, 75, os.pipe()[1], (ctypes.c_uint64 * 2)(id(None), 16), 1, 0)")
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
    "seccomp",
)
attack(
    "a call of the x32 interface",
    "runtime_error",
    """
    import ctypes, os
    number = 0x40000000 | 39 if os.uname().machine == "x86_64" else 0x40000000
    print("BREACH: it came back", ctypes.CDLL(None).syscall(number))
""",
    "seccomp",
)
attack(
    "a call of the 32-bit interface",
    "runtime_error",
    """
    import ctypes, mmap, os
    if os.uname().machine != "x86_64":
        raise RuntimeError("another machine")
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(bytes.fromhex("53b814000000cd805bc3"))              # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    getpid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    print("BREACH: it came back", getpid())
""",
    "seccomp",
)
attack(
    "a number above all calls",
    "wrong_answer",
    """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(1000)
    print("refused" if ctypes.get_errno() == 1 else "BREACH: it reached the kernel", ctypes.get_errno())
""",
    "seccomp",
)
attack(
    "a number with its upper half set",
    "wrong_answer runtime_error",
    LIBC
    + "r = libc.syscall(ctypes.c_long(1 << 32 | (41 if os.uname().machine == 'x86_64' else 198)), 1, 1, 0)\nprint('BREACH' if r >= 0 else 'refused')",
    "seccomp",
)
attack(
    "an argument with its upper half set",
    "wrong_answer runtime_error",
    LIBC
    + """
syscall(53, 199, 1 << 32 | 2, 1, 0, (ctypes.c_int * 2)())
print("refused" if ctypes.get_errno() == 1 else "BREACH: it reached the kernel")
""",
    "seccomp",
)
attack(
    "type into the terminal",
    "runtime_error wrong_answer",
    "import fcntl, os\nr = fcntl.ioctl(os.open('/dev/null', 0), 0x5412, b'x')\nprint('BREACH', r)",
)
attack(
    "no-new-privileges is set",
    "wrong_answer",
    LIBC + "print('BREACH' if libc.prctl(39, 0, 0, 0, 0) != 1 else 'set')",
)
