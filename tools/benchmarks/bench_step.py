"""Where the time of a step goes, with the real engines on this machine: tools/benchmarks/bench_step.py.

One warm start and one base model, then one run per case, each with its own servers. Prints one JSON line: median seconds of
each phase over the steady steps, tokens/s, and each case's time against the recipe's in the same call.

    tools/run python tools/benchmarks/bench_step.py --steps 12 --out tools/benchmarks/results/step_cpu2.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from provenance import described

from launchers import local
from launchers.cluster import load_cluster
from launchers.plan import Places, Training, job_plan, services, training_job
from launchers.quickstart import data_overrides, quickstart_plan
from megatron_distil.config.load import load_config

RECIPE = "program_induction"
MAIN = ("time/sample_s", "time/judge_s", "time/teach_s", "time/update_s")
"""What a step is for: generate, grade, teacher forward, student forward and backward."""
CASES: Mapping[str, tuple[str, ...]] = {
    "recipe": (),
    "engines run while the trainer computes": ('sync.idle_engines="run"',),
    "publication from disk": ('sync.sink="disk"',),
    "one request and one program at a time": ("rollout.concurrency=1", "feedback.concurrency=1"),
    "microbatches of 128 tokens": ("train.max_microbatch_tokens=128",),
}
WARM_UP = 2
"""Steps that are not counted: connections, lazily made buffers."""


def base_model(folder: Path, python: str) -> Path:
    """A short warm start: enough that responses have the length of real ones."""
    places = Places(run=str(folder), cwd=os.getcwd(), server_python=python)
    warm = ("train.num_steps=60", "train.warmup_steps=10")
    plan = quickstart_plan(RECIPE, places, warm_start=warm)
    jobs = [job for job in plan.jobs if job.name in ("prepare", "warm-start")]
    if local.run(job_plan("bench-base", jobs, [], places), folder):
        raise SystemExit("the warm start failed")
    return folder / "base"


def measure(name: str, changes: Sequence[str], base: Path, steps: int, python: str) -> dict[str, float]:
    """Median seconds of each phase of one case."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        run, cluster = Path(scratch), load_cluster("local")
        places = Places(run=str(run), cwd=os.getcwd(), server_python=python)
        moved = data_overrides(load_config(RECIPE), base.parent / "data", base)
        overrides = (*moved, f"train.num_steps={steps}", "eval.every_steps=0", "log.tensorboard=false", *changes)
        config = load_config(RECIPE, overrides)
        training = Training(command="train", recipe=RECIPE, run=str(run), overrides=overrides)
        jobs = [training_job("train", training, config, cluster, places)]
        if local.run(job_plan(f"bench {name}", jobs, services(config, cluster, places, model=str(base)), places), run):
            raise SystemExit(f"the case {name!r} failed")
        lines = (run / "metrics.jsonl").read_text().splitlines()
    steady = [json.loads(line) for line in lines][WARM_UP:]
    names = sorted({key for row in steady for key in row if key.startswith("time/")})
    found = {key: statistics.median(row[key] for row in steady) for key in names}
    found["outside_frac"] = 1.0 - sum(found[key] for key in MAIN) / found["time/step_s"]
    found["spread_s"] = statistics.quantiles([row["time/step_s"] for row in steady], n=4)[2] - found["time/step_s"]
    return {key: round(value, 4) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each case, the first two uncounted  [12]")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these; may be repeated")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    python = os.environ["DISTIL_SERVER_PYTHON"]
    with tempfile.TemporaryDirectory(prefix="bench-base-") as scratch:
        base = base_model(Path(scratch), python)
        cases = {
            name: measure(name, CASES[name], base, options.steps, python)
            for name in CASES
            if name == "recipe" or not options.case or name in options.case
        }
    result = {
        "benchmark": "step",
        "baseline": "recipe",
        "slower_than_recipe": {
            name: round(case["time/step_s"] / cases["recipe"]["time/step_s"], 2) for name, case in cases.items()
        },
        "cases": cases,
        "steps": options.steps,
        **described("torch", "megatron-core"),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
