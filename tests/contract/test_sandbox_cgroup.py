"""The boxes of level 3: on a folder that makes files as cgroupfs does, and in a booted kernel that has the real one."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess

import pytest

from sandbox import box, cgroup, limits
from sandbox.box import Box
from sandbox.cgroup import Group

HERE = pathlib.Path(__file__).resolve().parents[1]
FILES = {
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cgroup.kill": "",
    "memory.max": "",
    "memory.oom.group": "",
    "memory.peak": "1234\n",
    "pids.max": "",
    "cpu.max": "",
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n",
}


class Pretender:
    """A folder whose sub-folders are born with files and go although they hold them."""

    def __init__(self, root: pathlib.Path, files: dict[str, str]) -> None:
        self.root, self.files = root, files
        self._mkdir, self._rmdir = os.mkdir, os.rmdir
        self._fill(str(root))

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        full = path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
        self._mkdir(full, mode)
        self._fill(full)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        full = pathlib.Path(path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}")
        if any(entry.is_dir() for entry in full.iterdir()):
            raise OSError(16, "Device or resource busy", str(full))
        for entry in full.iterdir():
            entry.unlink()
        self._rmdir(full)

    def _fill(self, folder: str) -> None:
        for name, text in self.files.items():
            (pathlib.Path(folder) / name).write_text(text)


@pytest.fixture
def pretend(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Pretender:
    pretender = Pretender(tmp_path, dict(FILES))
    monkeypatch.setattr(os, "mkdir", pretender.mkdir)
    monkeypatch.setattr(os, "rmdir", pretender.rmdir)
    return pretender


def test_a_box_and_its_groups_come_and_go(pretend: Pretender) -> None:
    made = Box(str(pretend.root))
    assert (pretend.root / "cgroup.subtree_control").read_text() == box.CONTROLLERS
    made.adopt(123)
    assert pathlib.Path(made.path, "worker/cgroup.procs").read_text() == "123"
    fd = made.open()
    every = limits.complete({"memory_bytes": 64 << 20, "tmp_bytes": 1 << 20, "output_bytes": 1 << 20, "pids": 9})
    group = Group(fd, "test", every)
    folder = pathlib.Path(made.path, "test")
    written = {name: (folder / name).read_text() for name in ("memory.max", "memory.oom.group", "pids.max", "cpu.max")}
    assert written == {
        "memory.max": str(68 << 20),  # 64 for the program, 1 for /tmp, 3 for the outputs
        "memory.oom.group": "1",
        "pids.max": "9",
        "cpu.max": "100000 100000",
    }
    group.add(456)
    assert (folder / "cgroup.procs").read_text() == "456"
    assert (group.cpu_s(), group.peak_bytes()) == (2.5, 1234)
    group.close()
    assert not folder.exists()
    os.close(fd)
    made.remove()
    assert not os.path.exists(made.path)


def test_a_directory_without_a_controller_is_refused_and_nothing_stays(pretend: Pretender) -> None:
    del pretend.files["pids.max"], pretend.files["cgroup.kill"]
    with pytest.raises(OSError, match=r"offers no cgroup\.kill, pids\.max"):
        Box(str(pretend.root))
    assert [entry for entry in pretend.root.iterdir() if entry.is_dir()] == []


def test_a_kernel_without_a_peak_says_none(pretend: Pretender) -> None:
    del pretend.files["memory.peak"]
    fd = Box(str(pretend.root)).open()
    assert Group(fd, "test", limits.complete({})).peak_bytes() is None
    os.close(fd)


def test_a_group_that_does_not_empty_is_a_fault(pretend: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_EMPTY_S", 0.05)
    fd = Box(str(pretend.root)).open()
    group = Group(fd, "test", limits.complete({}))
    path = pathlib.Path(os.readlink(f"/proc/self/fd/{fd}"), "test")
    (path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    (path / "busy").mkdir()
    with pytest.raises(OSError, match="busy"):
        group.close()
    os.close(fd)


def test_a_named_directory_is_used_and_root_looks_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(box.VARIABLE, "/somewhere")
    assert box.delegated() == "/somewhere"
    monkeypatch.delenv(box.VARIABLE)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    with pytest.raises(OSError, match="as root only a directory that SBX_CGROUP_ROOT names is touched"):
        box.delegated()


@pytest.mark.full
@pytest.mark.skipif(
    not all(map(shutil.which, ("qemu-system-x86_64", "mmdebstrap", "mke2fs"))),
    reason="needs vm: apt-get install qemu-system-x86 mmdebstrap e2fsprogs",
)
def test_level_3_in_a_booted_kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four minutes on a busy machine. Leaves ``tests/results/sandbox_cgroup_v2.json``."""
    folder = os.environ.get("DISTIL_VM", str(tmp_path_factory.mktemp("vm")))
    run = subprocess.run(
        [HERE / "boot_cgroup_v2.sh", folder], capture_output=True, text=True, timeout=900, check=False, errors="replace"
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"case"')]
    cases = {line.pop("case"): line for line in lines}
    assert cases, run.stdout[-2000:] + run.stderr[-2000:]
    results = HERE / "results" / "sandbox_cgroup_v2.json"
    results.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    assert cases.pop("probe")["level"] == 3
    assert {name: case.get("error") for name, case in cases.items() if "error" in case} == {}
    assert {(case["control"], case["processes_left"], case["boxes_left"]) for case in cases.values()} == {("2\n", 0, 0)}
    assert cases["right"]["verdict"] == "passed"
    assert (cases["memory bomb"]["verdict"], cases["memory bomb"]["peak_bytes"] <= 68 << 20) == ("memory_limit", True)
    assert 10 <= int(cases["threads"]["stdout"]) <= 16
    assert 10 <= int(cases["fork bomb"]["stdout"]) <= 16
    assert cases["CPU of children"]["verdict"] == "time_limit"
    assert cases["CPU of children"]["cpu_s"] < 3.0  # an emulated core is coarse; the program would take 20
    assert cases["the file system of the groups"]["verdict"] == "runtime_error"
