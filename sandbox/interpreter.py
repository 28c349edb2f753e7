"""Which Python runs programs: one that the unprivileged user of the sandbox can read, tried for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

READ_ONLY = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
CANDIDATES = ("/usr/bin/python3", "/usr/local/bin/python3")
UNPRIVILEGED = 65534
OLDEST = (3, 10)
_TIMEOUT_S = 20.0
_TRIAL = """
import sys, os, json, ctypes, faulthandler, socket, resource, threading, traceback, zipimport
print(json.dumps([sys.version_info[:3], sys.base_prefix, os.path.realpath(sys.executable), os.getresuid()]))
"""


class NoInterpreter(Exception):
    """No Python can run programs here; the text says why each candidate cannot."""


@dataclass(frozen=True)
class Interpreter:
    """A Python that the sandbox can use."""

    path: str
    version: str
    read_only: tuple[str, ...]
    """What programs may read: the system's libraries and this Python's own."""


def identity() -> dict[str, object]:
    """Arguments of ``subprocess.Popen`` that make a process unprivileged."""
    if os.getuid() != 0:
        return {}
    return {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []}


def find(path: str | None = None) -> Interpreter:
    """The Python at ``path``, or the first that works of the system's and the service's own.

    Raises:
        NoInterpreter: none can be used.
    """
    paths = [path] if path else [*CANDIDATES, os.path.realpath(sys.executable)]
    reasons: list[str] = []
    for candidate in dict.fromkeys(paths):
        found = _attempt(candidate)
        if isinstance(found, Interpreter):
            return found
        reasons.append(f"{candidate}: {found}")
    advice = "Name one that every user can read and run with --python PATH (Debian: apt-get install python3)."
    raise NoInterpreter("\n  - ".join(["no Python for the programs:", *reasons]) + f"\n{advice}")


def _attempt(path: str) -> Interpreter | str:
    """The interpreter, or the reason why it is none."""
    who = f"user {UNPRIVILEGED}" if os.getuid() == 0 else "this user"
    try:
        trial = subprocess.run(  # pyright: ignore[reportCallIssue] - identity() holds three of its arguments
            [path, "-I", "-S", "-c", _TRIAL],
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            **identity(),  # pyright: ignore[reportArgumentType]
        )
    except PermissionError:
        return f"{who} may not run it (a folder above it is closed to others?)"
    except FileNotFoundError:
        return "does not exist"
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot be started: {error}"
    if trial.returncode:
        lines = trial.stderr.strip().splitlines()
        return f"as {who} it fails: {lines[-1] if lines else f'exit status {trial.returncode}'}"
    version, prefix, real, uids = json.loads(trial.stdout)
    if os.getuid() == 0 and 0 in uids:
        return "the user could not be dropped: setuid had no effect here"
    if tuple(version[:2]) < OLDEST:
        return f"is Python {version[0]}.{version[1]}; {OLDEST[0]}.{OLDEST[1]} or later is needed"
    is_system = os.path.realpath(prefix) == "/usr" or prefix.startswith("/usr/")
    more = () if is_system else (os.path.realpath(prefix),)
    return Interpreter(real, ".".join(map(str, version)), (*READ_ONLY, *more))
