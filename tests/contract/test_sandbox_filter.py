"""The system-call filter, walked as the kernel walks it: what is not listed is denied."""

from __future__ import annotations

import errno
import struct

import pytest

from sandbox import linux

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
