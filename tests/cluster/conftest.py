"""One small Slurm for all tests of this level; each starts with idle nodes and leaves none of its processes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_runs import LAUNCH_PYTHON, Finding, Run, Site, prepare_data, write_cluster
from tests.mini_slurm import MiniSlurm, skip_without_slurm
from tests.server import ROOT, skip_without_server
from tests.supervised import eventually

RESULTS = Path(__file__).parents[1] / "results" / "drills.json"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    skip_without_slurm()
    cluster = MiniSlurm(tmp_path_factory.mktemp("slurm") / "mini", num_nodes=4)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def _prepared(slurm: MiniSlurm, tmp_path_factory: pytest.TempPathFactory) -> Site:
    skip_without_server()
    if not LAUNCH_PYTHON:
        pytest.skip("needs slurm: there is no environment with nemo-run")
    folder = tmp_path_factory.mktemp("cluster")
    shared: Path = folder / "shared"
    shared.mkdir()
    prepare_data(shared)
    code = folder / "it's the $code"
    code.symlink_to(ROOT)
    return Site(slurm, write_cluster(folder, shared, code), shared)


@pytest.fixture
def site(_prepared: Site) -> Iterator[Site]:
    """With all nodes idle; what is left of a job is ended."""
    slurm = _prepared.slurm
    for name in slurm.nodes:
        if slurm.is_gone(name):
            slurm.start_node(name)
    eventually(lambda: set(slurm.states().values()) == {"idle"}, f"nodes idle: {slurm.states()}", timeout_s=60)
    yield _prepared
    subprocess.run(["scancel", "--user", slurm.user], timeout=30, check=False, capture_output=True)


@pytest.fixture
def finding(request: pytest.FixtureRequest) -> Finding:
    """Call it with the run at the end of a drill: what was seen goes to ``tests/results/drills.json``, with ``--full``."""
    began = time.monotonic()

    def note(run: Run, **facts: object) -> None:
        if not request.config.getoption("--full"):
            return
        found = {
            "seen_by_the_user": run.states,
            "steps": run.steps(),
            "lives": [run.reason(restart) for restart in range(run.restarts() + 1)],
            **facts,
            "took_s": round(time.monotonic() - began, 1),
        }
        table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        table[request.node.name.removeprefix("test_")] = found
        text = json.dumps(dict(sorted(table.items())), indent=2)
        RESULTS.write_text(text.replace(str(run.folder), "RUN") + "\n")

    return note
