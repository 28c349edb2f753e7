"""What the batch shell does on the nodes of a job before its first step, where the cluster file asks for it: modules, preflight.

Follows ``life.py`` in the batch script, whose variables it uses. Either failure is ``fatal``: the next life would find the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

PREFLIGHT_S = 900
"""Seconds after which a preflight that hangs counts as failed."""

_MODULES = r"""
if ! command -v module >/dev/null; then
  for distil_file in /etc/profile.d/*modules.sh /etc/profile.d/*lmod*.sh; do
    if [ -r "$distil_file" ]; then . "$distil_file"; fi
  done
fi
if ! module load @MODULES@; then
  echo "distil: the modules of the cluster file cannot be loaded"
  echo "fatal modules cannot be loaded: "@MODULES@ >"$distil_life/REASON"
  exit 1
fi
"""
_PREFLIGHT = r"""
if @WHEN@; then
  distil_log=$distil_run/logs/$SLURM_JOB_ID.$distil_restart/preflight.log
  mkdir -p "${distil_log%/*}"
  if ! timeout @SECONDS@ @COMMAND@ >"$distil_log" 2>&1; then
    echo "distil: the preflight failed: $distil_log"
    cat "$distil_log"
    distil_said=$(grep ' checks failed$' "$distil_log" || tail -n 1 "$distil_log") # srun has the last word
    echo "fatal preflight: $distil_said; $distil_log" >"$distil_life/REASON"
    exit 1
  fi
fi
"""
_WHEN = {"first": '[ "$distil_restart" = 0 ]', "every": "true"}


def modules_text(modules: Sequence[str]) -> str:
    """Shell text that loads environment modules, by Lmod or Tcl; empty without any."""
    return _MODULES.replace("@MODULES@", shlex.join(modules)) if modules else ""


def preflight_text(command: Sequence[str], when: str) -> str:
    """Shell text that runs a preflight before the ``first`` or ``every`` life; empty for ``never``."""
    if when == "never":
        return ""
    words = {"@WHEN@": _WHEN[when], "@SECONDS@": str(PREFLIGHT_S), "@COMMAND@": shlex.join(command)}
    text = _PREFLIGHT
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
