"""Where and with what something was measured: the last part of every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any


def described(*packages: str) -> dict[str, Any]:
    """Load, cores, machine, commit, and the versions of ``packages``."""
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "load_1min": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
    }
