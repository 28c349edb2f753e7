"""Every method through the whole stack from one warm start: tools/run python tools/benchmarks/compare_methods.py TASK.

TASK is program_induction (accuracy, on trained functions and on others) or two_roads (the share of the first road, held to its
prediction on paper, for every objective, credit, head and layout). Each case is a run of the quickstart's recipe with servers of its
own. What is finished in --runs is not run again. Prints a table and, as the last line, one JSON object.

    tools/run python tools/benchmarks/compare_methods.py two_roads --runs /tmp/roads --out tools/benchmarks/results/two_roads.json
    tools/run megatron-distil report /tmp/roads/* --out methods.html          all of them in one picture
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from launchers import local
from launchers.cluster import load_cluster
from launchers.plan import Places, Training, job_plan, services, training_job
from launchers.quickstart import data_overrides, quickstart_plan
from megatron_distil.config.load import load_config
from megatron_distil.tasks.two_roads import first_road_shares

STEPS, SETTLED = 40, 20
FULL = ('teacher.support="full"', 'objective.tail="none"')
"""As a divergence between distributions is meant."""


class Case(NamedTuple):
    """One run."""

    name: str
    settings: tuple[str, ...]
    predicted: float | None = None


def seeded(name: str, seeds: int, *settings: str) -> list[Case]:
    """The same with other prompts and other draws."""
    return [
        Case(f"{name}, seed {seed}", (*settings, f"train.seed={seed}", f"data.seed={seed}")) for seed in range(seeds)
    ]


def sdpo(divergence: str) -> tuple[str, ...]:
    """Self-distillation by a divergence over the whole vocabulary."""
    return ("objective.name=sdpo", f"objective.divergence={divergence}", *FULL)


GRPO = ("objective.name=grpo", "objective.normalise_std=true")
SHARES = first_road_shares()
CASES: Mapping[str, list[Case]] = {
    "program_induction": [
        *seeded("DistIL, mean credit", 3, "objective.future=mean"),
        *seeded("local CE", 3, "objective.name=ce"),
        *seeded("GRPO", 3, *GRPO),
        *seeded("DistIL, summed credit", 1, "objective.future=sum"),
        *seeded("SDPO, JS", 1, *sdpo("js")),
        *seeded("SDPO, reverse KL", 1, *sdpo("rkl")),
    ],
    "two_roads": [
        Case("DistIL, summed credit", (), SHARES.sum),
        Case("DistIL, mean credit", ("objective.future=mean",), SHARES.mean),
        Case("local CE", ("objective.name=ce",), SHARES.none),
        Case("CE (1 + credit)", ("objective.future_form=reweight",), SHARES.none),
        Case("summed credit, other rollouts as baseline", ("objective.baseline=loo_position",), SHARES.sum),
        Case("SDPO, JS", sdpo("js"), SHARES.none),
        Case("SDPO, reverse KL", sdpo("rkl"), SHARES.none),
        Case("GRPO", GRPO, 1.0),
        Case("composable head", ("train.head=composable",), SHARES.sum),
        Case("plain head", ("train.head=plain",), SHARES.sum),
        Case("one rank", ("parallel.tp=1",), SHARES.sum),
        Case("cp 2", ("parallel.tp=1", "parallel.cp=2"), SHARES.sum),
        Case("tp 2, sequence parallel", ("parallel.sequence_parallel=true",), SHARES.sum),
        Case("two updates in a step", ("train.updates_per_step=2",), SHARES.sum),
    ],
}
MEASURES = {
    "program_induction": ("eval/avg_at_8", "eval/pass_at_8", "eval/new_avg_at_8", "eval/new_pass_at_8"),
    "two_roads": ("eval/first_road_share", "eval/avg_at_8"),
}


def warm_start(task: str, runs: Path, python: str) -> Path:
    """The model that every case starts from."""
    folder = runs.parent / f"{runs.name}-base"
    places = Places(run=str(folder), cwd=os.getcwd(), server_python=python)
    plan = quickstart_plan(task, places)
    jobs = [job for job in plan.jobs if job.name in ("prepare", "warm-start")]
    if local.run(job_plan(f"{task} base", jobs, [], places), folder):
        raise SystemExit("the warm start failed")
    return folder


def run(case: Case, task: str, base: Path, runs: Path, python: str) -> Path:
    """One training run, unless it is finished."""
    folder = runs / case.name.replace(", ", "-").replace(" ", "_")
    if (folder / "finished").exists():
        return folder
    places, cluster = Places(run=str(folder), cwd=os.getcwd(), server_python=python), load_cluster("local")
    moved = data_overrides(load_config(task), base / "data", base / "base")
    overrides = (*moved, f"train.num_steps={STEPS}", "log.tensorboard=false", *case.settings)
    config = load_config(task, overrides)
    jobs = [
        training_job(
            "train",
            Training(command="train", recipe=task, run=str(folder), overrides=overrides),
            config,
            cluster,
            places,
        )
    ]
    servers = services(config, cluster, places, model=str(base / "base"))
    if local.run(job_plan(case.name, jobs, servers, places), folder):
        raise SystemExit(f"{case.name}: failed, see {folder}")
    (folder / "finished").touch()
    return folder


def measured(folder: Path, task: str) -> dict[str, float]:
    """What a run reached: its last evaluation, and for two roads the mean since it has settled."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = {}
    for name in MEASURES[task]:
        values = [(row["step"], row[name]) for row in rows if name in row]
        found[f"{name} before"], found[name] = values[0][1], values[-1][1]
    if task == "two_roads":
        shares = [
            row["eval/first_road_share"] for row in rows if "eval/first_road_share" in row and row["step"] >= SETTLED
        ]
        found["eval/first_road_share"] = mean(shares)
    found["step_s"] = mean(row["time/step_s"] for row in rows if "time/step_s" in row)
    found["gap_nats_max"] = max(row["sync/logprob_gap_nats"] for row in rows if "sync/logprob_gap_nats" in row)
    return {name: round(value, 7 if name == "gap_nats_max" else 4) for name, value in found.items()}


def print_table(task: str, found: Sequence[tuple[Case, Mapping[str, float]]]) -> None:
    """Markdown."""
    names = MEASURES[task]
    print("| case | " + ("predicted | " if task == "two_roads" else "") + " | ".join(names) + " |")
    print("|---" * (1 + len(names) + (task == "two_roads")) + "|")
    for case, values in found:
        predicted = f"{case.predicted:.3f} | " if case.predicted is not None else ""
        print(f"| {case.name} | {predicted}" + " | ".join(f"{values[name]:.3f}" for name in names) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(CASES))
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", action="append", metavar="CASE", help="only these; may be repeated")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    python, runs = os.environ["DISTIL_SERVER_PYTHON"], options.runs.resolve()
    base = warm_start(options.task, runs, python)
    found = [
        (case, measured(run(case, options.task, base, runs, python), options.task))
        for case in CASES[options.task]
        if not options.only or case.name in options.only
    ]
    print_table(options.task, found)
    commit = ["git", "rev-parse", "--short", "HEAD"]
    result = {
        "benchmark": f"methods on {options.task}",
        "steps": STEPS,
        "cases": {case.name: {"predicted": case.predicted, "settings": case.settings, **v} for case, v in found},
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
