"""What launching costs: the plan of a large job, a registry with many members, and a small run on a real Slurm.

    tools/run python tools/benchmarks/bench_launch.py --out tools/benchmarks/results/launch_cpu2.json
    tools/run python tools/benchmarks/bench_launch.py --without-slurm

Named baselines of the same call:

    plan            128 nodes of eight GPUs        its JSON text, written and read again
    registry        1,000 members, live()          the same files opened, read and parsed one after another
    submit          sbatch to the first step       the start of the rollout server, as its supervisor has seen it
    killed server   its death to ready again       likewise, the second start

The run has two trainer nodes, a rollout server and a sandbox, on four slurmd of this machine. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from provenance import described

from launchers.cluster import load_cluster
from launchers.jobplan import cluster_from_json, to_json
from launchers.plan import Run as RunPlaces
from launchers.plan import cluster_plan
from megatron_distil.config.load import load_config
from megatron_distil.registry import Record, Registry
from tests.cluster_runs import Site, prepare_data, write_cluster
from tests.mini_slurm import MiniSlurm, skip_without_slurm
from tests.server import ROOT

NODES, MEMBERS = 128, 1000
SETTINGS = (
    "parallel.tp=8",
    "parallel.dp=96",
    "rollout.prompts_per_step=96",
    "train.updates_per_step=8",
    "rollout.num_engines=128",
    "rollout.engine_tp=2",
)
"""96 nodes of trainers and 32 of servers."""


def best(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Wall clock and processor time in ms, each the median of the rounds."""
    walls, processors = list[float](), list[float]()
    for _ in range(rounds):
        began, worked = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - began)
        processors.append(time.process_time() - worked)
    return round(1e3 * statistics.median(walls), 2), round(1e3 * statistics.median(processors), 2)


def measure_plan(rounds: int) -> dict[str, object]:
    """A job of 128 nodes."""
    config, cluster = load_config("qwen3_32b_livecodebench", SETTINGS), load_cluster("h200")
    places = RunPlaces(
        name="big", folder="/shared/runs/big", recipe="/shared/runs/big/recipe.toml", code="/shared/code"
    )
    plan = cluster_plan(config, cluster, places)
    ours = best(lambda: cluster_plan(config, cluster, places), rounds)
    text = best(lambda: cluster_from_json(to_json(plan)), rounds)
    return {"nodes": plan.nodes, "ms": ours, "baseline_ms": text, "times_of_baseline": round(ours[0] / text[0], 2)}


def measure_registry(rounds: int) -> dict[str, object]:
    """A read of a role with 1,000 members."""
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(folder)
        for index in range(MEMBERS):
            name, url = f"rollout-{index}", f"http://127.0.0.1:{10000 + index}"
            registry.write(
                Record(role="rollout", name=name, url=url, pid=1, pgid=1, state="ready", gen=0, ts=time.time())
            )
        files = sorted(Path(folder, "rollout").glob("*.json"))
        assert len(registry.live("rollout")) == len(files) == MEMBERS
        ours = best(lambda: registry.live("rollout"), rounds)
        bare = best(lambda: [json.loads(path.read_text()) for path in files], rounds)
    return {"members": MEMBERS, "ms": ours, "baseline_ms": bare, "times_of_baseline": round(ours[0] / bare[0], 2)}


def measure_run(folder: Path) -> dict[str, object]:
    """Submission to the first step, and a killed server, in one run."""
    skip_without_slurm()
    slurm = MiniSlurm(folder / "slurm", num_nodes=4)
    shared = folder / "shared"
    shared.mkdir()
    prepare_data(shared)
    site = Site(slurm, write_cluster(folder, shared, ROOT), shared)
    try:
        slurm.start()
        asked = time.monotonic()
        run = site.launch("bench", "train.num_steps=60")
        submitted = time.monotonic()
        run.record("rollout")
        ready = time.monotonic()
        run.until_step(0)
        first_step = time.monotonic()
        run.until_step(2)
        killed = run.kill(run.record("rollout").pid)
        run.record("rollout", gen=1)
        recovered = time.monotonic()
        run.until_step(max(run.steps()) + 2)
        starts = [run.start_s("rollout-0", gen=gen) for gen in (0, 1)]
        run.cancel()
        run.until_over()
    finally:
        slurm.stop()
    return {
        "launch_command_s": round(submitted - asked, 1),
        "submitted_to_server_ready_s": round(ready - submitted, 1),
        "submitted_to_first_step_s": round(first_step - submitted, 1),
        "server_start_s": starts[0],
        "beyond_the_server_s": round(first_step - submitted - starts[0], 1),
        "killed_server_ready_again_s": round(recovered - killed, 1),
        "second_start_s": starts[1],
        "beyond_the_second_start_s": round(recovered - killed - starts[1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of what takes milliseconds  [15]")
    parser.add_argument("--without-slurm", action="store_true", help="leave the run out")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    result: dict[str, object] = {
        "benchmark": "launch",
        "plan": measure_plan(options.rounds),
        "registry": measure_registry(options.rounds),
    }
    if not options.without_slurm:
        with tempfile.TemporaryDirectory() as folder:
            result["run"] = measure_run(Path(folder))
    result |= {
        "unit": "ms: wall clock, processor time",
        **described("torch"),
        "python": platform.python_version(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
