"""The level that the probe finds, and its reasons, wherever a service may find itself."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sandbox import interpreter, probe
from sandbox.interpreter import UNPRIVILEGED
from tests.sandbox_service import ROOT, command, environment

PYTHON = interpreter.find().path
NAMESPACES = ("user_namespace", "mount_in_userns", "pid_namespace", "nested_pid_namespace", "net_namespace")
PLAIN = ("setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups") if os.getuid() == 0 else ()
DOCKER_LIKE = (PYTHON, f"{ROOT}/tests/docker_like.py")
needs_2 = pytest.mark.skipif(probe.probe().level < 2, reason="this machine has no user namespaces")
needs_landlock = pytest.mark.skipif(probe.probe().level < 1, reason="this machine has no Landlock")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may change its root")


@pytest.fixture(scope="module")
def sources() -> Iterator[str]:
    """The package where every user can read it."""
    with tempfile.TemporaryDirectory(prefix="sandbox-levels-") as folder:
        pathlib.Path(folder).chmod(0o755)
        for name in ("sandbox", "tests/docker_like.py"):
            source, target = pathlib.Path(ROOT) / name, pathlib.Path(folder) / name
            target.parent.mkdir(exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        yield folder


def found_under(wrapper: Sequence[str], sources: str) -> dict[str, Any]:
    run = subprocess.run(
        [*wrapper, PYTHON, "-m", "sandbox.probe"],
        cwd=sources,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": sources, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_2
def test_this_machine_as_it_is(sources: str) -> None:
    found = found_under((), sources)
    assert found["level"] >= 2
    assert all(found["facts"][name][0] for name in NAMESPACES)
    assert found["level"] > 2 or found["missing"]["cgroup_v2"]


@needs_2
def test_a_plain_user_gets_the_same(sources: str) -> None:
    found = found_under(PLAIN, sources)
    assert (found["level"], found["uid"]) == (2, UNPRIVILEGED if PLAIN else os.getuid())
    assert found["missing"]["cgroup_v2"]


@needs_landlock
@pytest.mark.parametrize("user", [(), PLAIN], ids=["root", "plain"])
def test_the_default_profile_of_docker_leaves_level_1(user: Sequence[str], sources: str) -> None:
    found = found_under((*user, PYTHON, "tests/docker_like.py"), sources)
    assert (found["level"], found["name"]) == (1, "confined")
    assert found["missing"].keys() >= set(NAMESPACES)
    assert all(reason.startswith("EPERM: unshare") for reason in found["missing"].values())


@needs_landlock
@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bwrap: apt-get install bubblewrap")
def test_a_host_without_user_namespaces_leaves_level_1(sources: str) -> None:
    without = ("bwrap", "--unshare-user", "--disable-userns", "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc")
    found = found_under((*PLAIN, *without), sources)
    assert found["level"] == 1
    assert found["missing"]["user_namespace"].startswith(("ENOSPC", "EPERM"))


@needs_landlock
@needs_root
def test_a_chroot_leaves_level_1(sources: str) -> None:
    script = f'mount --rbind / "$0" && exec chroot "$0" /bin/sh -c "cd {sources} && exec \\"\\$@\\"" sh "$@"'
    with tempfile.TemporaryDirectory() as root:
        if subprocess.run(["unshare", "-m", "sh", "-c", script, root, "true"], check=False).returncode:
            pytest.skip("this root may not mount")
        found = found_under(("unshare", "-m", "sh", "-c", script, root), sources)
    assert found["level"] == 1
    assert found["missing"]["user_namespace"].startswith("EPERM")


@needs_landlock
def test_a_service_that_would_be_below_its_least_level_refuses_with_one_message() -> None:
    run = subprocess.run(
        [*DOCKER_LIKE, *command("--min-level", "2")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    lines = run.stderr.splitlines()
    assert lines[0] == "sandbox: isolation level 1 (confined) is the best here; at least 2 is required"
    assert "  - user_namespace: EPERM: unshare(0x10000000): Operation not permitted" in lines
    assert any("a seccomp profile that allows unshare, setns, mount" in line for line in lines)
    assert lines[-1] == "Or accept less with --min-level 1."
    assert "Traceback" not in run.stderr


def test_a_mechanism_cannot_be_switched_off_from_outside() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sandbox.server", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--min-level" in run.stdout
    assert "without" not in run.stdout


GVISOR = (*PLAIN, "runsc", "--rootless", "--network=none", "do")


def _no_gvisor() -> str:
    if not shutil.which("runsc"):
        return "needs gvisor: apt-get install runsc"
    trial = subprocess.run([*GVISOR, "/bin/true"], capture_output=True, text=True, timeout=30, check=False)
    return f"needs gvisor: runsc does not run here: {trial.stderr[-200:]}" if trial.returncode else ""


def test_inside_gvisor_nothing_of_ours_holds(sources: str) -> None:
    """gVisor itself is the wall there: whoever starts a service in it states the level."""
    reason = _no_gvisor()
    if reason:
        pytest.skip(reason)
    found = found_under(GVISOR, sources)
    assert found["level"] == 0
    assert "landlock" in found["missing"]
