"""What a node says of itself before a run: GPUs, packages, code, sandbox. Standard library only; every answer is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "numpy",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "sglang",
)
"""What a result depends on; those that are not installed are left out."""
_GPU_QUERY = "name,memory.total,memory.used,driver_version"
_ASK_VERSIONS = """
import importlib.metadata as m, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""
_DEADLINE_S = 60.0
ROOT = Path(__file__).resolve().parents[1]
"""Of these sources."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one node."""

    node: int
    host: str
    kernel: str
    cores: int
    gpus: tuple[str, ...]
    """Names, in the driver's order."""
    gpu_mib: int
    """Memory of the smallest."""
    gpu_used_mib: int
    """Of the fullest, before anything of ours runs."""
    driver: str
    versions: Mapping[str, str]
    """Packages of the interpreters that are asked, as ``trainer torch``."""
    code: str
    """Digest of the sources that this process was started from."""
    sandbox_level: int
    """-1: not asked."""
    wrong: Mapping[str, str] = field(default_factory=dict[str, str])
    """What could not be asked, and why."""


def gather(node: int, pythons: Mapping[str, str], *, asks_sandbox: bool) -> Facts:
    """Ask this node; what does not answer lands in ``wrong``.

    Args:
        node: index of this node.
        pythons: interpreter by role.
        asks_sandbox: whether to try the walls of the sandbox.
    """
    wrong: dict[str, str] = {}
    rows = _gpus(wrong)
    return Facts(
        node=node,
        host=socket.gethostname(),
        kernel=platform.release(),
        cores=len(os.sched_getaffinity(0)),
        gpus=tuple(row[0] for row in rows),
        gpu_mib=min((int(row[1]) for row in rows), default=0),
        gpu_used_mib=max((int(row[2]) for row in rows), default=0),
        driver=rows[0][3] if rows else "",
        versions=_versions(pythons, wrong),
        code=code_digest(),
        sandbox_level=_sandbox_level(wrong) if asks_sandbox else -1,
        wrong=wrong,
    )


def with_sources() -> dict[str, str]:
    """The environment, for a child that imports these sources."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def code_digest(root: Path = ROOT) -> str:
    """Of every Python file of the package and its launcher, the same for the same sources wherever they lie."""
    digest = hashlib.sha256()
    for path in sorted(file for name in ("megatron_distil", "launchers") for file in (root / name).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _gpus(wrong: dict[str, str]) -> list[list[str]]:
    if not os.path.exists("/dev/nvidiactl"):
        return []
    answer = _ask(["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"], "gpus", wrong)
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    if any(len(row) != 4 or not row[1].isdigit() or not row[2].isdigit() for row in rows):
        wrong["gpus"] = f"nvidia-smi answers {answer.strip()[:200]!r}"
        return []
    return rows


def _versions(pythons: Mapping[str, str], wrong: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for role, python in pythons.items():
        answer = _ask([python, "-c", _ASK_VERSIONS, *PACKAGES], f"packages of {role}", wrong)
        if answer:
            found |= {f"{role} {name}": version for name, version in json.loads(answer).items()}
    return found


def _sandbox_level(wrong: dict[str, str]) -> int:
    answer = _ask([sys.executable, "-m", "sandbox.probe"], "sandbox", wrong)
    return int(json.loads(answer)["level"]) if answer else -1


def _ask(command: Sequence[str], what: str, wrong: dict[str, str]) -> str:
    """Its output; empty where it failed, which is noted."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE_S, env=with_sources(), check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong[what] = str(error)
        return ""
    if done.returncode:
        wrong[what] = f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-200:]}"
        return ""
    return done.stdout
