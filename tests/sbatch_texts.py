"""Batch scripts of many launches in one process: ``python -m tests.sbatch_texts``, in an environment with nemo-run.

Reads a JSON list of [recipe, cluster, overrides], writes a JSON list of lists of [path, text].
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from launchers import slurm
from launchers.launch import prepare

if __name__ == "__main__":
    found = []
    with tempfile.TemporaryDirectory() as home:
        for recipe, cluster, overrides in json.load(sys.stdin):
            found.append(slurm.scripts(prepare(recipe, cluster, overrides).plan, Path(home)))
    json.dump(found, sys.stdout)
