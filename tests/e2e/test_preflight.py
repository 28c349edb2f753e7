"""Two processes as two nodes of one machine: the real probes, a real all-reduce over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _node(folder: Path, index: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launchers", "preflight", str(folder), "--nodes", "2", "--node", str(index)]
    command += ["--run", "one", "--host-ip", "127.0.0.1", "--file-mib", "4", *options]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_nodes_pass_and_say_the_same(tmp_path: Path):
    started = [_node(tmp_path, index, "--min-level", "0", "--timeout-s", "60") for index in range(2)]
    said = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    text = said[0][0]
    assert "gloo, 2 ranks, 16 MiB" in text
    assert "ports" in text
    assert "checks passed" in text
    assert "trainer torch" in text
    assert said[1][0] == ""
    assert list((tmp_path / "one").glob("*.bin")) == []


def test_a_node_that_never_comes_is_named(tmp_path: Path):
    alone = _node(tmp_path, 0, "--min-level", "0", "--timeout-s", "1")
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert "node 1 wrote no address within 1 s" in errors
