"""From nothing to a student that has learnt: data, warm start, servers, DistIL, report, in one supervised plan.

``tools/quickstart`` starts it in the right environment. A second start with the same folder goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launchers import local
from launchers.cluster import load_cluster
from launchers.jobplan import Job, JobPlan
from launchers.plan import Places, Training, job_plan, services, training_job
from megatron_distil.config.load import RECIPES, load_config
from megatron_distil.config.schema import Config
from megatron_distil.errors import ConfigError

WARM_START = "_sft"
"""A recipe's warm start is the recipe of that name with this ending."""


def known_recipes() -> list[str]:
    """Recipes that a quickstart can run: those with a warm start."""
    return sorted(path.stem.removesuffix(WARM_START) for path in RECIPES.glob(f"*{WARM_START}.toml"))


def data_overrides(config: Config, data: Path, model: Path) -> list[str]:
    """Puts files that a recipe looks for in ``data/`` into another folder."""
    overrides = [f"model={json.dumps(str(model))}", f"data.train={json.dumps(_moved(config.data.train, data))}"]
    if config.eval.sets:
        sets = [_inline({**dict(entry), "data": _moved(entry.data, data)}) for entry in config.eval.sets]
        overrides.append(f"eval.sets=[{', '.join(sets)}]")
    return overrides


def _moved(path: str, data: Path) -> str:
    return str(data / path.removeprefix("data/")) if path.startswith("data/") else path


def _inline(table: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }"


def quickstart_plan(
    recipe: str, places: Places, *, overrides: Sequence[str] = (), warm_start: Sequence[str] = ()
) -> JobPlan:
    """The plan of a quickstart: prepare, warm start, train, report.

    Raises:
        ConfigError: a recipe or an override is wrong.
    """
    cluster, run = load_cluster("local"), Path(places.run)
    data, base = run / "data", run / "base"
    untrained = data / "model"
    supervised = load_config(recipe + WARM_START)
    supervised_overrides = (*data_overrides(supervised, data, untrained), *warm_start)
    supervised = load_config(recipe + WARM_START, supervised_overrides)
    config = load_config(recipe)
    all_overrides = (*data_overrides(config, data, base), *overrides)
    config = load_config(recipe, all_overrides)

    warm = Training(
        command="sft",
        recipe=recipe + WARM_START,
        run=str(run / "sft"),
        export=str(base),
        overrides=supervised_overrides,
    )
    training = Training(command="train", recipe=recipe, run=places.run, export=str(run / "hf"), overrides=all_overrides)
    python = places.trainer_python
    prepare = _once(
        Job(
            name="prepare",
            command=(python, "-m", "megatron_distil.tasks.prepare", config.task.name, str(data)),
            cwd=places.cwd,
            log=places.log("prepare"),
        ),
        run,
    )
    jobs = (
        prepare,
        _once(training_job("warm-start", warm, supervised, cluster, places), run),
        training_job("train", training, config, cluster, places),
        Job(name="report", command=(python, "-m", "megatron_distil", "report", places.run), cwd=places.cwd),
        Job(name="result", command=(python, "-m", "launchers.quickstart", "--result", places.run), cwd=places.cwd),
    )
    servers = services(config, cluster, places, model=str(untrained), start_servers_after=prepare.name)
    return job_plan(f"quickstart-{recipe}", jobs, servers, places)


def _once(job: Job, run: Path) -> Job:
    return replace(job, done_marker=str(run / "done" / f"{job.name}.json"))


def result_lines(run: Path) -> Iterator[str]:
    """The held-out numbers before and after, from ``metrics.jsonl``."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    steps = 0
    for row in _rows(run / "metrics.jsonl"):
        steps = max(steps, int(row.get("step", 0)))
        for name, value in row.items():
            if name.startswith("eval/") and isinstance(value, (int, float)):
                first.setdefault(name, value)
                last[name] = value
    width = max((len(name) for name in first), default=0)
    if first:
        yield f"{'':{width}}    before     after"
    for name, before in sorted(first.items()):
        yield f"{name:{width}}  {before:8.3f}  {last[name]:8.3f}"
    yield f"after step {steps}"
    yield f"model     {run / 'hf'}"
    yield f"report    {run / 'report.html'}"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_intermixed_args(arguments)
    if options.result is not None:
        print("\n" + "\n".join(result_lines(options.result)))
        return 0
    words = options.words or []
    recipe, overrides = (words[0], words[1:]) if words and "=" not in words[0] else ("program_induction", words)
    if recipe not in known_recipes():
        print(f"quickstart: no recipe {recipe!r}; there are: {', '.join(known_recipes())}", file=sys.stderr)
        return 2
    run = (options.out or Path("quickstart") / recipe).resolve()
    places = Places(run=str(run), cwd=os.getcwd(), server_python=os.environ["DISTIL_SERVER_PYTHON"])
    try:
        plan = quickstart_plan(recipe, places, overrides=overrides, warm_start=options.warm_start)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    names = ", ".join(job.name for job in plan.jobs)
    print(f"{recipe}: {names}; everything lies in {run}. Ctrl-C saves; the same command goes on.", file=sys.stderr)
    return local.become(plan, run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/quickstart",
        description="Trains a tiny model with DistIL on this machine, with the real engines, and shows what it learnt.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | KEY=VALUE",
        help=f"one of {', '.join(known_recipes())}, the first if not given; then settings that replace the recipe's",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything lies  [quickstart/RECIPE]")
    parser.add_argument(
        "--warm-start",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the warm start, e.g. train.num_steps=50; may be repeated",
    )
    parser.add_argument("--result", type=Path, metavar="DIR", help="only show what a finished run has learnt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
