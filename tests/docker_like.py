"""Runs a command as Docker's and Kubernetes' default seccomp profile would, without CAP_SYS_ADMIN: no namespaces, no mounts.

python tests/docker_like.py python -m sandbox.probe      level 1
"""

from __future__ import annotations

import errno
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sandbox import linux

DENIED = {  # x86-64, aarch64
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
}
CLONE3 = 435


def profile() -> bytes:
    allow, deny = linux.bpf_return(linux.RET_ALLOW), linux.bpf_return(linux.DENY)
    program = [linux.bpf_load(linux.OFF_NUMBER)]
    for numbers in DENIED.values():
        program += [linux.bpf(linux.BPF_JEQ, 0, 1, numbers[not linux.IS_X86]), deny]
    program += [linux.bpf(linux.BPF_JEQ, 0, 1, CLONE3), linux.bpf_return(linux.RET_ERRNO | errno.ENOSYS)]
    program += [linux.bpf(linux.BPF_JEQ, 0, 4, linux.NUMBERS["clone"]), linux.bpf_argument(0)]
    program += [linux.bpf(linux.BPF_JSET, 0, 1, linux.NEW_NAMESPACE_MASK), deny, allow]
    return b"".join([*program, allow])


if __name__ == "__main__":
    linux.Seccomp(profile()).enforce()
    os.execvp(sys.argv[1], sys.argv[1:])
