"""The system-call filter, walked as the kernel walks it: what is not listed is denied."""

from __future__ import annotations

import ctypes
import errno
import pathlib
import re
import struct

import pytest

from sandbox import linux, syscalls

DENIED = linux.DENY
NAMES = {number: name for name, number in linux.NUMBERS.items()}


def walk(code: bytes, number: int, *arguments: int, arch: int = linux.AUDIT_ARCH) -> int:
    """The verdict of a program of classic BPF."""
    data = struct.pack("IIQ6Q", number, arch, 0, *(*arguments, *[0] * 6)[:6])
    place, value = 0, 0
    while True:
        operation, if_true, if_false, constant = struct.unpack_from("HBBI", code, 8 * place)
        place += 1
        if operation == linux.BPF_RET:
            return constant
        if operation == linux.BPF_LD:
            (value,) = struct.unpack_from("I", data, constant)
            continue
        holds = {
            linux.BPF_JEQ: value == constant,
            linux.BPF_JSET: bool(value & constant),
            linux.BPF_JGE: value >= constant,
            linux.BPF_JGT: value > constant,
        }[operation]
        place += if_true if holds else if_false


@pytest.mark.parametrize("own_pid", [None, 77])
def test_only_listed_calls_are_allowed(own_pid: int | None) -> None:
    code = linux.build_filter(own_pid)
    signals = {"kill", "tgkill"} if own_pid else {"kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"}
    by_argument = {"clone", "clone3", "fcntl", "prlimit64", "ioctl", "prctl", "socketpair", *signals}
    for number in (*range(1000), 2**31, 2**32 - 1):
        name = NAMES.get(number, "")
        if name not in by_argument:
            allowed = name in linux.ALLOWED
            verdict = walk(code, number)
            assert (verdict == linux.RET_ALLOW) is allowed, (number, name)
            assert verdict in (linux.RET_ALLOW, DENIED, linux.RET_KILL)


def test_foreign_and_x32_calls_kill() -> None:
    code = linux.build_filter()
    assert walk(code, linux.NUMBERS["read"], arch=0x40000003) == linux.RET_KILL
    if linux.IS_X86:
        assert walk(code, 0x40000000 | linux.NUMBERS["read"]) == linux.RET_KILL


@pytest.mark.parametrize(
    ("name", "arguments", "verdict"),
    [
        ("clone", [0x3D0F00], linux.RET_ALLOW),
        ("clone", [0x1200011], linux.RET_ERRNO | errno.EAGAIN),
        ("clone", [0x10000000 | 0x3D0F00], DENIED),
        ("clone3", [0], linux.RET_ERRNO | errno.ENOSYS),
        ("kill", [77], linux.RET_ALLOW),
        ("kill", [1], DENIED),
        ("kill", [2**32 - 1], DENIED),
        ("prlimit64", [0], linux.RET_ALLOW),
        ("prlimit64", [1], DENIED),
        ("fcntl", [0, 3], linux.RET_ALLOW),
        ("fcntl", [0, 8], DENIED),
        ("fcntl", [0, 10], DENIED),
        ("ioctl", [0, 0x5401], linux.RET_ALLOW),
        ("ioctl", [0, 0x5412], linux.RET_ERRNO | errno.ENOTTY),
        ("prctl", [15], linux.RET_ALLOW),
        ("prctl", [22], DENIED),
        ("socketpair", [1], linux.RET_ALLOW),
        ("socketpair", [2], DENIED),
        ("socket", [1], DENIED),
        ("memfd_create", [0], DENIED),
        ("ptrace", [0], DENIED),
    ],
)
def test_arguments_decide_where_a_call_can_reach_others(name: str, arguments: list[int], verdict: int) -> None:
    assert walk(linux.build_filter(77), linux.NUMBERS[name], *arguments) == verdict


@pytest.mark.parametrize("arguments", [[0x1200011], [0x4111]], ids=["fork", "vfork"])
def test_a_compiler_may_start_processes_but_no_namespaces(arguments: list[int]) -> None:
    code = linux.build_filter(may_fork=True)
    assert walk(code, linux.NUMBERS["clone"], *arguments) == linux.RET_ALLOW
    assert walk(code, linux.NUMBERS["execve"]) == linux.RET_ALLOW
    for namespace in (linux.CLONE_NEWUSER, linux.CLONE_NEWNS, linux.CLONE_NEWPID, linux.CLONE_NEWNET):
        assert walk(code, linux.NUMBERS["clone"], arguments[0] | namespace) == DENIED
    for name in ("socket", "ptrace", "unshare", "mount", "memfd_create"):
        assert walk(code, linux.NUMBERS[name]) == DENIED


# ------------------------------------------------------------- machines other than this one
ARCHITECTURES = {"x86-64": (0xC000003E, syscalls.X86_64), "aarch64": (0xC00000B7, syscalls.AARCH64)}
GENERIC = pathlib.Path("/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_are_those_of_libseccomp(machine: str) -> None:
    try:
        libseccomp = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("needs libseccomp: apt-get install libseccomp2")
    architecture, table = ARCHITECTURES[machine]
    theirs = {name: libseccomp.seccomp_syscall_resolve_name_arch(architecture, name.encode()) for name in table}
    assert table == theirs
    every = {name for _, names in ARCHITECTURES.values() for name in names}
    absent = every - table.keys()  # negative: this machine has no such call
    assert all(libseccomp.seccomp_syscall_resolve_name_arch(architecture, name.encode()) < 0 for name in absent)


def test_the_numbers_of_aarch64_are_those_of_the_kernel() -> None:
    """aarch64 has the generic table of the kernel's headers, which are the same on every machine."""
    if not GENERIC.exists():
        pytest.skip("needs the kernel's headers: apt-get install linux-libc-dev")
    numbers = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", GENERIC.read_text(encoding="ascii"))
    }
    renamed = {"newfstatat": "fstatat"}  # one number for both widths of machine
    assert {name: numbers[renamed.get(name, name)] for name in syscalls.AARCH64} == syscalls.AARCH64
    assert (numbers["seccomp"], numbers["pivot_root"]) == (277, 41)
    assert (numbers["pidfd_send_signal"], numbers["pidfd_open"]) == (424, 434)
    assert [numbers[f"landlock_{call}"] for call in ("create_ruleset", "add_rule", "restrict_self")] == [444, 445, 446]


def test_the_filter_of_aarch64_denies_and_allows_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, table = ARCHITECTURES["aarch64"]
    monkeypatch.setattr(linux, "NUMBERS", table)
    monkeypatch.setattr(linux, "IS_X86", False)
    monkeypatch.setattr(linux, "AUDIT_ARCH", architecture)
    code = linux.build_filter()
    names = {number: name for name, number in table.items()}
    for number in range(600):
        verdict = walk(code, number, arch=architecture)
        if names.get(number) in linux.ALLOWED:
            assert verdict == linux.RET_ALLOW, names[number]
    for name in ("socket", "execve", "memfd_create", "ptrace", "unshare", "mount", "fchmod"):
        assert walk(code, table[name], arch=architecture) == DENIED
    assert walk(code, table["clone"], 0x1200011, arch=architecture) == linux.RET_ERRNO | errno.EAGAIN
    assert walk(code, table["read"], arch=0xC000003E) == linux.RET_KILL
