"""What the page says of a run: before and after, the prediction, where the time goes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from statistics import fmean, median
from typing import Any, NamedTuple

from megatron_distil.metrics.names import SENTENCE_BY_NAME, sentence
from megatron_distil.report.read import Line, Run
from megatron_distil.tasks.two_roads import first_road_shares

PHASES = ("collect", "teach", "update", "publish")
"""The parts of every step, in order; together with what comes between steps they are the whole."""
BETWEEN = ("save", "eval")

MAX_SAMPLES = 300
"""Rollouts of a run in the page; it stays a few megabytes whatever the length of the run."""

_TABLE = (
    "feedback/passed_frac",
    "loss/ce_nats",
    "loss/credit_nats",
    "rollout/response_tokens",
    "sync/logprob_gap_nats",
    "train/grad_norm",
    "time/tokens_per_s",
    "time/step_s",
)

_CURVES = (
    ("Loss", ("loss/ce_nats", "loss/credit_nats", "loss/kl_nats")),
    ("Feedback", ("feedback/passed_frac", "feedback/solved_frac", "teacher/has_context_frac")),
    ("Rollouts", ("rollout/response_tokens", "rollout/truncated_frac", "teacher/entropy_nats")),
    ("Trainer", ("train/grad_norm", "sync/logprob_gap_nats", "train/tis_clipped_frac")),
    ("Speed", ("time/step_s", "time/tokens_per_s", "memory/peak_bytes")),
)

LOGARITHMIC = frozenset({"sync/logprob_gap_nats", "sync/logprob_gap_max_nats"})


class Change(NamedTuple):
    """A metric at the beginning and at the end of a run."""

    before: float
    after: float


class Prediction(NamedTuple):
    """What theory says of a run, and what came out."""

    metric: str
    predicted: float
    why: str
    measured: float
    """Mean over the second half of the run."""


def series(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by metric; what is not finite is left out. Evaluations count finished steps."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in [*run.steps, *run.evals]:
        for name, value in line.items():
            if name != "step" and isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def changes(run: Run) -> dict[str, Change]:
    """Before and after, the evaluations first."""
    found: dict[str, Change] = {}
    known = series(run)
    for name in table_names([run]):
        values = known[name][1]
        # One step is one draw of prompts: a tenth of the run says more. An evaluation stands for itself.
        width = 1 if name.startswith("eval/") else max(1, len(values) // 10)
        found[name] = Change(before=fmean(values[:width]), after=fmean(values[-width:]))
    return found


def _is_background(name: str) -> bool:
    """Of an evaluation, and neither a result nor a measure: it is among the curves, not in the table."""
    return bool(re.match(r"eval/.*(response_tokens|truncated_frac|unavailable_frac|reward)$", name))


def table_names(runs: Sequence[Run]) -> list[str]:
    """Rows of the table of before and after: of avg@n and pass@k those with the largest n only."""
    known = {name for run in runs for name in series(run)}
    names = [name for name in [*eval_names(runs), *_TABLE] if name in known and not _is_background(name)]
    largest = _largest(names)
    return [name for name in names if not (found := re.search(r"_at_(\d+)$", name)) or int(found[1]) == largest]


def _largest(names: Sequence[str]) -> int:
    return max((int(found[1]) for name in names if (found := re.search(r"avg_at_(\d+)$", name))), default=0)


def eval_names(runs: Sequence[Run]) -> list[str]:
    """Metrics of evaluations: avg@n and pass@n of each set first, then what the tasks measure."""
    names = sorted({name for run in runs for line in run.evals for name in line if name.startswith("eval/")})
    largest = _largest(names)

    def rank(name: str) -> tuple[int, str]:
        if name.endswith(f"avg_at_{largest}"):
            return 0, name
        if name.endswith(f"pass_at_{largest}"):
            return 1, name
        return (3 if re.search(r"pass_at_\d+$", name) or _is_background(name) else 2), name

    return sorted(names, key=rank)


def groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Titles and metrics of the curves, those that some run has; the last group holds all others."""
    known = {name for run in runs for name in series(run)}
    tops = [name for name in eval_names(runs) if not _is_background(name)]
    titled = [("Held-out prompts", tuple(tops[:6])), *_CURVES]
    shown = [{"title": title, "names": [one for one in names if one in known]} for title, names in titled]
    used = {name for group in shown for name in group["names"]}
    rest = {"title": "All other metrics", "names": sorted(known - used)}
    return [group for group in [*shown, rest] if group["names"]]


def prediction(run: Run) -> Prediction | None:
    """For two roads with a fixed teacher: where the share of the first road comes to rest, derived on paper."""
    metric = "eval/first_road_share"
    objective = run.config.get("objective", {})
    steps, values = series(run).get(metric, ([], []))
    is_predicted = (
        run.config.get("task", {}).get("name") == "two_roads"
        and run.config.get("teacher", {}).get("weights") == "frozen"
        and objective.get("name") in ("distil", "ce")
        and objective.get("future_form", "score") == "score"
        and objective.get("future_coef", 1.0) == 1.0
    )
    if not is_predicted or not steps:
        return None
    future = objective.get("future", "none")
    late = [value for step, value in zip(steps, values, strict=True) if 2 * step > max(steps)]
    predicted = first_road_shares()._asdict()[future]
    why = {"sum": "all later cost", "mean": "the mean of later cost", "none": "no credit"}[future]
    return Prediction(metric=metric, predicted=predicted, why=why, measured=fmean(late or values))


class Share(NamedTuple):
    """A part of a steady step."""

    phase: str
    seconds: float
    share: float


def steady_shares(run: Run) -> list[Share]:
    """Medians over the steps that are neither the first nor next to an evaluation or a save; ``other`` is the rest of a step."""
    lines = [line for line in run.steps if line.get("time/step_s", 0.0) > 0.0]
    steady = [line for line in lines[1:] if not any(f"time/{name}_s" in line for name in BETWEEN)] or lines[1:] or lines
    if not steady:
        return []
    whole = median(line["time/step_s"] for line in steady)
    found = [
        Share(name, median(line.get(f"time/{name}_s", 0.0) for line in steady), 0.0)
        for name in PHASES
        if any(f"time/{name}_s" in line for line in steady)
    ]
    found.append(Share("other", median(_other(line) for line in steady), 0.0))
    return [share._replace(share=share.seconds / whole) for share in found]


def _other(line: Line) -> float:
    return max(0.0, line["time/step_s"] - sum(line.get(f"time/{name}_s", 0.0) for name in (*PHASES, *BETWEEN)))


def phases(run: Run) -> dict[str, list[float]]:
    """Seconds of each step by phase, to be stacked."""
    lines = [line for line in run.steps if "time/step_s" in line]
    found: dict[str, list[float]] = {"step": [line["step"] for line in lines]}
    for name in (*PHASES, *BETWEEN):
        values = [line.get(f"time/{name}_s", 0.0) for line in lines]
        if any(values):
            found[name] = values
    found["other"] = [_other(line) for line in lines]
    return found


def samples(run: Run) -> list[Line]:
    """At most ``MAX_SAMPLES``: all of the first and last steps, and of as many in between as fit."""
    by_step: dict[int, list[Line]] = {}
    for line in run.samples:
        by_step.setdefault(line["step"], []).append(line)
    steps = sorted(by_step)
    largest = max((len(lines) for lines in by_step.values()), default=1)
    room = max(2, MAX_SAMPLES // largest)
    if len(steps) > room:
        steps = sorted({steps[round(index * (len(steps) - 1) / (room - 1))] for index in range(room)})
    return [line for step in steps for line in by_step[step]]


def title(run: Run) -> str:
    """What a run is, in a few words."""
    objective = dict(run.config.get("objective", {}))
    if not objective:
        return "no config.json"
    words = [str(objective["name"])]
    if objective.get("future", "none") != "none":
        words.append(f"{objective['future']} credit")
    if objective["name"] in ("distil", "ce"):
        words.append(f"{run.config.get('teacher', {}).get('weights', '?')} teacher")
    return ", ".join(words)


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def meaning(name: str) -> str:
    """A sentence, also for a metric that a later version knows and this one does not."""
    try:
        return sentence(name)
    except ValueError:
        return ""


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page draws."""
    names = sorted({name for run in runs for name in series(run)})
    return {
        "names": {name: meaning(name) for name in names},
        "logarithmic": sorted(LOGARITHMIC),
        "groups": groups(runs),
        "phases": [*PHASES, *BETWEEN, "other"],
        "phaseMeanings": {name: SENTENCE_BY_NAME.get(f"time/{name}_s", "") for name in (*PHASES, *BETWEEN)},
        "table": table_names(runs),
        "runs": [
            {
                "name": run.name,
                "title": title(run),
                "task": run.config.get("task", {}).get("name", ""),
                "numSteps": len(run.steps),
                "plannedSteps": run.config.get("train", {}).get("num_steps"),
                "seconds": sum(line.get("time/step_s", 0.0) for line in run.steps),
                "series": series(run),
                "changes": changes(run),
                "prediction": found._asdict() if (found := prediction(run)) else None,
                "steady": [share._asdict() for share in steady_shares(run)],
                "phases": phases(run),
                "samples": samples(run),
                "config": dict(flat(run.config)),
                "versions": dict(run.versions),
            }
            for run in runs
        ],
    }
