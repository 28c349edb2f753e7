"""The kernel primitives of the sandbox, by ctypes: namespaces, capabilities, Landlock, seccomp. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Iterable, Sequence

from sandbox import syscalls

libc = ctypes.CDLL(None, use_errno=True)

IS_X86 = platform.machine() == "x86_64"
NUMBERS = syscalls.X86_64 if IS_X86 else syscalls.AARCH64
AUDIT_ARCH = 0xC000003E if IS_X86 else 0xC00000B7
SYS_SECCOMP = 317 if IS_X86 else 277
SYS_PIVOT_ROOT = 155 if IS_X86 else 41
SYS_PIDFD_SEND_SIGNAL, SYS_PIDFD_OPEN = 424, 434
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x20000000, 0x40000000, 0x10000
NEW_NAMESPACE_MASK = 0x7E020080  # every CLONE_NEW* flag, time namespace included

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME = 1, 2, 4, 1024
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38


def check(result: int, what: str) -> int:
    """Turn a -1 return into OSError with the name of the call."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _bytes(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def prctl(option: int, argument: int = 0) -> int:
    """The system call of this name, with one argument."""
    zero = ctypes.c_ulong(0)
    return check(libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero), f"prctl({option})")


def unshare(flags: int) -> None:
    """The system call of this name."""
    check(libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """The system call of this name."""
    check(libc.setns(fd, kind), "setns")


def mount(source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """The system call of this name."""
    result = libc.mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data))
    check(result, f"mount({source}, {target}, {fstype}, {flags:#x})")


def umount_detach(path: str) -> None:
    """umount2(2) with MNT_DETACH."""
    check(libc.umount2(os.fsencode(path), MNT_DETACH), f"umount({path})")


def pivot_root(new: str, old: str) -> None:
    """The system call of this name."""
    check(libc.syscall(SYS_PIVOT_ROOT, os.fsencode(new), os.fsencode(old)), "pivot_root")


def pidfd_open(pid: int) -> int:
    """The system call of this name."""
    return check(libc.syscall(SYS_PIDFD_OPEN, pid, 0), "pidfd_open")


def pidfd_send_signal(pidfd: int, signum: int) -> None:
    """The system call of this name."""
    check(libc.syscall(SYS_PIDFD_SEND_SIGNAL, pidfd, signum, None, 0), "pidfd_send_signal")


def process_cpu_clock(pid: int) -> int:
    """Clock id of another process's CPU time. Kernel ABI: (~pid << 3) | CPUCLOCK_SCHED."""
    return ((~pid) << 3) | 2


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


_CAP_VERSION_3 = ctypes.byref(_CapHeader(0x20080522, 0))
_NO_CAPABILITIES = ctypes.byref((ctypes.c_uint32 * 6)())


def drop_bounding_set() -> None:
    """No process below can gain a capability again; the ones held stay."""
    for capability in range(64):
        result = libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
        if result < 0 and ctypes.get_errno() == errno.EINVAL:  # beyond the last one of this kernel
            return


def drop_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets."""
    check(libc.capset(_CAP_VERSION_3, _NO_CAPABILITIES), "capset")


# ------------------------------------------------------------------------------------------ Landlock
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}


def landlock_abi() -> int:
    """Version of Landlock in this kernel; 0: none."""
    return max(0, libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1))


class Landlock:
    """A rule set that denies every file, TCP port, abstract socket and outside signal but what is allowed.

    It may be built in one process and enforced in its children.
    """

    def __init__(self, abi: int) -> None:
        self._files = _ALL_BY_ABI[min(abi, 5)]
        net = 3 if abi >= 4 else 0  # bind and connect over TCP
        scoped = 3 if abi >= 6 else 0  # abstract unix sockets, signals
        attributes = struct.pack("QQQ", self._files, net, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
        size = len(attributes)
        self._fd = check(libc.syscall(SYS_LANDLOCK_CREATE, attributes, size, 0), "landlock_create_ruleset")

    def allow_read(self, path: str) -> None:
        """Files below ``path`` may be read, and directories listed."""
        self._allow(path, _READ_FILE | _READ_DIR)

    def allow_write(self, path: str) -> None:
        """Everything but running a program is allowed below ``path``."""
        self._allow(path, self._files & ~_EXECUTE)

    def allow_execute(self, path: str) -> None:
        """Programs below ``path`` may be run."""
        self._allow(path, _EXECUTE)

    def enforce(self) -> None:
        """On this process and its children, for ever."""
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        check(libc.syscall(SYS_LANDLOCK_RESTRICT, self._fd, 0), "landlock_restrict_self")

    def move_up(self, lowest: int) -> None:
        """Give the descriptor a number of at least ``lowest``."""
        self._fd = fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, lowest)

    def close(self) -> None:
        """Release the descriptor; what was enforced stays."""
        os.close(self._fd)

    def _allow(self, path: str, access: int) -> None:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir(path):
                access &= _FILE_ONLY
            rule = struct.pack("=Qi", access & self._files, fd)
            check(libc.syscall(SYS_LANDLOCK_ADD, self._fd, 1, rule, 0), f"landlock_add_rule({path})")
        finally:
            os.close(fd)


# ------------------------------------------------------------------------------------------- seccomp
RET_KILL, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
DENY = RET_ERRNO | errno.EPERM

# Not here on purpose: chmod, utime, flock (Landlock does not cover them), memfd_create, socket, ptrace.
ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 open openat creat close close_range
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat lseek getdents getdents64
getcwd chdir fchdir dup dup2 dup3 pipe pipe2 fsync fdatasync ftruncate fallocate fadvise64 copy_file_range sendfile
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat umask
mmap munmap mprotect mremap madvise mlock munlock mlock2 msync mincore brk membarrier get_mempolicy mbind set_mempolicy
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack signalfd4 pause alarm
futex futex_waitv set_robust_list set_tid_address rseq gettid getpid getppid getuid geteuid getgid getegid getgroups
getresuid getresgid getpgid getpgrp getsid
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getitimer setitimer
timer_create timer_settime timer_gettime timer_delete timer_getoverrun timerfd_create timerfd_settime timerfd_gettime
getrlimit setrlimit sysinfo uname getrandom getcpu sched_getaffinity sched_yield sched_getparam sched_getscheduler
sched_get_priority_max sched_get_priority_min getpriority
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
exit exit_group arch_prctl wait4 waitid restart_syscall capget
recvfrom sendto recvmsg sendmsg shutdown getsockname getpeername getsockopt setsockopt
""".split()  # noqa: SIM905 - a list of words
# A linker makes what it writes executable by chmod.
OF_PROCESSES = "fork vfork execve execveat setsid setpgid chmod fchmod fchmodat".split()  # noqa: SIM905
IOCTL_ALLOWED = (0x5401, 0x5421, 0x5450, 0x5451, 0x541B)  # TCGETS FIONBIO FIONCLEX FIOCLEX FIONREAD
PRCTL_ALLOWED = (15, 16, 3, 39, 0x53564D41)  # SET_NAME GET_NAME GET_DUMPABLE GET_NO_NEW_PRIVS SET_VMA
FCNTL_DENIED = (8, 10, 15, 1024, 1026)  # F_SETOWN F_SETSIG F_SETOWN_EX F_SETLEASE F_NOTIFY

BPF_LD, BPF_JEQ, BPF_JSET, BPF_JGT, BPF_JGE, BPF_RET = 0x20, 0x15, 0x45, 0x25, 0x35, 0x06
OFF_NUMBER, OFF_ARCH, OFF_ARG0 = 0, 4, 16


def bpf(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
    """One instruction of classic BPF."""
    return struct.pack("HBBI", code, jump_true, jump_false, value & 0xFFFFFFFF)


def bpf_load(offset: int) -> bytes:
    """Load a word of the call's description."""
    return bpf(BPF_LD, 0, 0, offset)


def bpf_argument(index: int) -> bytes:
    """Load the lower half of an argument."""
    return bpf_load(OFF_ARG0 + 8 * index)


def bpf_return(value: int) -> bytes:
    """End with a verdict."""
    return bpf(BPF_RET, 0, 0, value)


class _Rules:
    """What happens to each call that is not denied. Every path of a call's body returns."""

    def __init__(self) -> None:
        self._bodies: dict[int, list[bytes]] = {}

    def on(self, name: str, body: Sequence[bytes]) -> None:
        """A call that this machine does not have needs no rule."""
        if name in NUMBERS:
            self._bodies[NUMBERS[name]] = list(body)

    def allow(self, names: Iterable[str]) -> None:
        for name in names:
            self.on(name, _ALLOW)

    def allow_if(self, name: str, argument: int, values: Iterable[int], otherwise: int = DENY) -> None:
        body = [bpf_argument(argument)]
        for value in values:
            body += [bpf(BPF_JEQ, 0, 1, value), bpf_return(RET_ALLOW)]
        self.on(name, [*body, bpf_return(otherwise)])

    def deny_if(self, name: str, argument: int, values: Iterable[int]) -> None:
        body = [bpf_argument(argument)]
        for value in values:
            body += [bpf(BPF_JEQ, 0, 1, value), bpf_return(DENY)]
        self.on(name, [*body, bpf_return(RET_ALLOW)])

    def program(self) -> bytes:
        """A search tree over the call's number: the kernel walks it for every number when a filter is loaded."""
        spans: list[tuple[int, int, list[bytes]]] = []
        for number, body in sorted(self._bodies.items()):
            if spans and spans[-1][1] == number - 1 and spans[-1][2] == body == _ALLOW:
                spans[-1] = spans[-1][0], number, body
            else:
                spans.append((number, number, body))
        head = [bpf_load(OFF_ARCH), bpf(BPF_JEQ, 1, 0, AUDIT_ARCH), bpf_return(RET_KILL), bpf_load(OFF_NUMBER)]
        if IS_X86:  # the x32 ABI shares the arch value
            head += [bpf(BPF_JGE, 0, 1, 0x40000000), bpf_return(RET_KILL)]
        return b"".join(head + _search(spans))


_ALLOW = [bpf_return(RET_ALLOW)]


def _search(spans: Sequence[tuple[int, int, list[bytes]]]) -> list[bytes]:
    if len(spans) == 1:
        ((first, last, body),) = spans
        inside = [bpf(BPF_JGE, 0, len(body) + 1, first), bpf(BPF_JGT, len(body), 0, last)]
        return [*inside, *body, bpf_return(DENY)]
    middle = len(spans) // 2
    below, above = _search(spans[:middle]), _search(spans[middle:])
    return [bpf(BPF_JGE, len(below), 0, spans[middle][0]), *below, *above]


def build_filter(own_pid: int | None = None, *, may_fork: bool = False) -> bytes:
    """The allowlist as classic BPF. A program is exactly one process: threads only.

    Args:
        own_pid: the only process that kill and tgkill may name, where no pid namespace bounds them.
        may_fork: processes and programs too, for compilers and what they make. Only on a file system of its own.
    """
    rules = _Rules()
    rules.allow([*ALLOWED, *OF_PROCESSES] if may_fork else ALLOWED)
    rules.on("clone3", [bpf_return(RET_ERRNO | errno.ENOSYS)])  # glibc falls back to clone, whose flags BPF can read
    full = bpf_return(RET_ERRNO | errno.EAGAIN)  # what a program expects of a full process table
    clone = [bpf_argument(0), bpf(BPF_JSET, 0, 1, NEW_NAMESPACE_MASK), bpf_return(DENY)]
    threads = [bpf(BPF_JSET, 0, 1, CLONE_THREAD), bpf_return(RET_ALLOW), full]
    rules.on("clone", [*clone, bpf_return(RET_ALLOW)] if may_fork else [*clone, *threads])
    if own_pid is None:
        rules.allow(["kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"])
    else:
        rules.allow_if("kill", 0, [own_pid])
        rules.allow_if("tgkill", 0, [own_pid])
    # F_SETOWN + F_SETSIG delivers any signal to any process of the same uid; prlimit(pid) edits another process
    rules.deny_if("fcntl", 1, FCNTL_DENIED)
    rules.allow_if("prlimit64", 0, [0] if own_pid is None else [0, own_pid])
    rules.allow_if("ioctl", 1, IOCTL_ALLOWED, RET_ERRNO | errno.ENOTTY)
    rules.allow_if("prctl", 0, PRCTL_ALLOWED)
    rules.allow_if("socketpair", 0, [1])  # AF_UNIX pairs only: asyncio needs them
    return rules.program()


class _FilterProgram(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class Seccomp:
    """A filter. It may be built in one process and enforced in its children."""

    def __init__(self, code: bytes) -> None:
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = _FilterProgram(len(code) // 8, ctypes.cast(self._code, ctypes.c_void_p))

    def enforce(self) -> None:
        """On this process and its children, for ever."""
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        check(libc.syscall(SYS_SECCOMP, 1, 0, ctypes.byref(self._program)), "seccomp")
