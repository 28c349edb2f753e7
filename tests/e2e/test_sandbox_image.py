"""The image of the sandbox, built without an image registry: what it shows inside a container, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from launchers.process import free_port

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("mmdebstrap", "buildah", "skopeo", "mksquashfs", "podman", "runc")
MISSING = [tool for tool in NEEDED if not shutil.which(tool)]
LOCKED = """--cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp --network host
--ulimit nofile=1024:1024 --ulimit nproc=1024:1024""".split()  # noqa: SIM905 - a command line
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"needs images: apt-get install {' '.join(MISSING)}"),
]


def run(*command: str, timeout_s: float = 120.0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, with the image in a store of its own."""
    folder = tmp_path_factory.mktemp("image")
    run(str(ROOT / "sandbox" / "build_image"), str(folder), timeout_s=1800)
    assert (folder / "sandbox.sqsh").stat().st_size > 10 << 20
    store = ["--root", str(folder / "root"), "--runroot", str(folder / "run")]
    command = ["podman", *store, "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
    run(*command, "load", "-q", "-i", str(folder / "sandbox.oci.tar"))
    return command


def test_the_image_shows_everything_at_level_2_without_any_rights(podman: list[str]) -> None:
    check = ["--entrypoint", "python3", "localhost/sandbox", "-m", "sandbox.self_check", "--json", "-"]
    report = json.loads(run(*podman, "run", "--rm", *LOCKED, *check))
    assert (report["ok"], report["level"], report["uid"]) == (True, 2, 65534)
    assert report["seconds"] < 60


def test_the_service_listens_and_a_stop_drains_it(podman: list[str]) -> None:
    port = str(free_port())
    name = run(*podman, "run", "-d", *LOCKED, "localhost/sandbox", "--port", port, "--workers", "1").strip()
    try:
        deadline = time.monotonic() + 60
        while "http://" not in run(*podman, "logs", name):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        body = json.dumps({"code": "print(int(input()) + 1)", "tests": [{"input": "1\n", "output": "2"}]}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/run", body, timeout=60) as reply:
            answer = json.load(reply)
        assert (answer["pass_all"], answer["isolation"]["level"]) == (True, 2)
        started = time.monotonic()
        run(*podman, "stop", "-t", "30", name)
        assert time.monotonic() - started < 15
        assert run(*podman, "inspect", name, "--format", "{{.State.ExitCode}}").strip() == "0"
    finally:
        run(*podman, "rm", "-f", name)
