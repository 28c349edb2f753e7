"""``python -m launchers COMMAND``: the launcher's tools under one name."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

COMMANDS = ("launch", "preflight", "status", "logs", "stop")
"""Modules of this package with a ``main(argv) -> int``."""

_TELLING = ("status", "logs")


def main(argv: list[str]) -> int:
    """Run the command that ``argv`` begins with."""
    there = [name for name in COMMANDS if (Path(__file__).parent / f"{name}.py").exists()]
    if not argv or argv[0] not in there:
        print(f"usage: python -m launchers {{{','.join(there)}}} ... (each with --help)", file=sys.stderr)
        return 2
    if argv[0] in _TELLING:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" ends it without a traceback
    module = importlib.import_module(f"launchers.{argv[0]}")
    return module.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
