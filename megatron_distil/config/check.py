"""Rules over several settings. Pure; nothing is changed, everything is reported, each with a value that would work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from math import lcm
from pathlib import Path

from megatron_distil.config.schema import Config, ParallelConfig, TaskConfig
from megatron_distil.errors import Problem

PROGRAM_TASKS = frozenset({"livecodebench", "program_induction"})
"""Tasks whose responses are programs. A test holds this to what the tasks say of themselves."""

CONFIGURABLE_TASKS = frozenset({"livecodebench"})
"""Tasks with settings beside their name; held likewise."""

DIVERGENCES = frozenset({"sdpo", "opsd"})
"""Objectives that compare two whole distributions: what lies outside the support has to be somewhere."""


def problems(config: Config) -> Iterator[Problem]:
    """Everything that is wrong with a tree whose settings are right one by one."""
    yield from _task(config)
    yield from _schedule(config)
    yield from _layout(config)
    if is_supervised(config):
        yield from _documents(config)
        return
    yield from _batches(config)
    yield from _lengths(config)
    yield from _waits(config)
    yield from _groups(config)
    yield from _credit(config)
    if config.objective.needs_teacher:
        yield from _teacher(config)
    yield from _evaluation(config)


def is_supervised(config: Config) -> bool:
    """Whether the recipe belongs to ``megatron-distil sft``: given responses, no engines."""
    return config.objective.name == "sft"


def sequence_multiple(parallel: ParallelConfig) -> int:
    """What the padded length of every sequence is a multiple of: two equal chunks for each context-parallel rank, ...

    and with sequence parallelism an equal share of a chunk for each tensor-parallel rank.
    """
    return (2 * parallel.cp if parallel.cp > 1 else 1) * (parallel.tp if parallel.sequence_parallel else 1)


def task_names() -> list[str]:
    """The modules of ``megatron_distil.tasks`` that define ``TASK``, by their text: importing one needs more than this does."""
    return _modules_with(r"^TASK\b")


def reference_task_names() -> list[str]:
    """Those of them that offer reference solutions (``tasks.task.ReferenceTask``)."""
    return [name for name in _modules_with(r"^    def reference\(") if name in task_names()]


def _modules_with(pattern: str) -> list[str]:
    folder = Path(__file__).resolve().parents[1] / "tasks"
    return sorted(
        path.stem for path in folder.glob("*.py") if re.search(pattern, path.read_text("utf-8"), re.MULTILINE)
    )


def _task(config: Config) -> Iterator[Problem]:
    name, names = config.task.name, task_names()
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Tasks: {', '.join(names)}."
        yield Problem("task.name", name, "not a task", hint)
    if name in PROGRAM_TASKS and not config.feedback.num_sandboxes and not is_supervised(config):
        yield Problem("feedback.num_sandboxes", 0, f"task {name} runs programs, which needs a sandbox", "Try 1.")
    if name in names and name not in CONFIGURABLE_TASKS:
        for setting, value in config.task:
            if setting != "name" and value != TaskConfig.model_fields[setting].default:
                owners = ", ".join(sorted(CONFIGURABLE_TASKS))
                yield Problem(
                    f"task.{setting}", value, f"task {name} has no such setting; {owners} has", "Leave it out."
                )
    if name == "livecodebench" and not config.task.tests and not is_supervised(config):
        hint = "megatron_distil.tasks.livecodebench_data DIR writes DIR/tests; name that."
        yield Problem("task.tests", "", "the rows name files of tests, and this is their folder", hint)


def _schedule(config: Config) -> Iterator[Problem]:
    train = config.train
    num_updates = train.num_steps * (1 if is_supervised(config) else train.updates_per_step)
    if train.warmup_steps >= num_updates:
        reason = f"the run has {num_updates} optimizer steps, so the learning rate would never reach its peak"
        yield Problem("train.warmup_steps", train.warmup_steps, reason, f"Try {num_updates // 10}.")
    for name, beta, usual in (("beta1", train.beta1, 0.9), ("beta2", train.beta2, 0.999)):
        if beta == 1.0:
            yield Problem(f"train.{name}", beta, "Adam divides by 1 minus it", f"Try {usual}.")


def _layout(config: Config) -> Iterator[Problem]:
    parallel, train = config.parallel, config.train
    if parallel.sequence_parallel and parallel.tp == 1:
        reason = "sequences are cut between tensor-parallel ranks, and parallel.tp = 1"
        yield Problem("parallel.sequence_parallel", True, reason, "Set it to false, or parallel.tp to 2.")
    multiple = sequence_multiple(parallel)
    if train.max_microbatch_tokens % multiple:
        reason = (
            f"not a multiple of {multiple}; with parallel.cp = {parallel.cp} every rank holds two equal chunks"
            if parallel.cp > 1
            else f"not a multiple of parallel.tp = {multiple}; with sequence parallelism every rank holds an equal share"
        )
        near = _up(train.max_microbatch_tokens, multiple)
        yield Problem("train.max_microbatch_tokens", train.max_microbatch_tokens, reason, f"Try {near}.")


def _documents(config: Config) -> Iterator[Problem]:
    count, dp = config.sft.documents_per_step, config.parallel.dp
    if count % dp:
        reason = f"not a multiple of parallel.dp = {dp}; every replica reads the same number of documents"
        yield Problem("sft.documents_per_step", count, reason, f"Try {_up(count, dp)}.")
    if config.train.updates_per_step != 1:
        reason = "a supervised step is one update"
        yield Problem("train.updates_per_step", config.train.updates_per_step, reason, "Leave it out.")


def _batches(config: Config) -> Iterator[Problem]:
    rollout, parallel, updates = config.rollout, config.parallel, config.train.updates_per_step
    prompts = rollout.prompts_per_step
    near = _up(prompts, lcm(parallel.dp, updates))
    for name, divisor, why in (
        ("parallel.dp", parallel.dp, "every replica collects the same number of prompts"),
        ("train.updates_per_step", updates, "every update takes the same number of prompts"),
    ):
        if prompts % divisor:
            reason = f"not a multiple of {name} = {divisor}; {why}"
            yield Problem("rollout.prompts_per_step", prompts, reason, f"Try {near}.")
    per_update = prompts * rollout.samples_per_prompt // updates
    if per_update < parallel.dp:
        reason = f"an update has {per_update} rollouts for parallel.dp = {parallel.dp} replicas; some would have none"
        largest = max(1, prompts * rollout.samples_per_prompt // parallel.dp)
        yield Problem("train.updates_per_step", updates, reason, f"Try {_divisor(prompts, largest)}.")


def _lengths(config: Config) -> Iterator[Problem]:
    rollout, teacher, largest = config.rollout, config.teacher, config.train.max_microbatch_tokens
    multiple = sequence_multiple(config.parallel)
    whole = _up(rollout.max_prompt_tokens + rollout.max_response_tokens, multiple)
    if whole > largest:
        reason = (
            f"less than a prompt and a response of full length, {rollout.max_prompt_tokens} + "
            f"{rollout.max_response_tokens} tokens; such a rollout would fit no microbatch"
        )
        yield Problem("train.max_microbatch_tokens", largest, reason, f"Try {whole}.")
    if not config.objective.needs_teacher or teacher.context == "prompt":
        return
    if teacher.max_context_tokens < rollout.max_prompt_tokens:
        reason = (
            f"less than rollout.max_prompt_tokens = {rollout.max_prompt_tokens}, and every context holds its prompt"
        )
        yield Problem(
            "teacher.max_context_tokens", teacher.max_context_tokens, reason, f"Try {4 * rollout.max_prompt_tokens}."
        )
    if config.has_expert:  # reads on its own servers
        return
    seen = _up(teacher.max_context_tokens + rollout.max_response_tokens, multiple)
    if seen > largest:
        reason = (
            f"with rollout.max_response_tokens = {rollout.max_response_tokens} more than "
            f"train.max_microbatch_tokens = {largest}; the teacher reads both in one forward"
        )
        room = largest // multiple * multiple - rollout.max_response_tokens
        hint = (
            f"Try {room}, or train.max_microbatch_tokens = {seen}."
            if room > 0
            else (f"Try train.max_microbatch_tokens = {seen}.")
        )
        yield Problem("teacher.max_context_tokens", teacher.max_context_tokens, reason, hint)


def _waits(config: Config) -> Iterator[Problem]:
    rollout, feedback, train = config.rollout, config.feedback, config.train
    for area, request, budget in (
        ("rollout", rollout.request_timeout_s, rollout.budget_s),
        ("feedback", feedback.request_timeout_s, feedback.budget_s),
    ):
        if request > budget:
            reason = f"one request would outlast all its attempts, {area}.budget_s = {budget}"
            yield Problem(f"{area}.request_timeout_s", request, reason, f"Try {budget / 3:g}.")
    if feedback.num_sandboxes and feedback.test_timeout_s >= feedback.request_timeout_s:
        reason = f"a request, feedback.request_timeout_s = {feedback.request_timeout_s}, would end before the test does"
        yield Problem(
            "feedback.test_timeout_s", feedback.test_timeout_s, reason, f"Try {feedback.request_timeout_s / 4:g}."
        )
    longest = rollout.budget_s + (feedback.budget_s if feedback.num_sandboxes else 0.0)
    if train.collect_timeout_s < longest:
        reason = f"the other ranks would give up while sampling and judging still have their budgets, {longest:g} s"
        yield Problem("train.collect_timeout_s", train.collect_timeout_s, reason, f"Try {2 * longest:g}.")


def _groups(config: Config) -> Iterator[Problem]:
    rollout, objective = config.rollout, config.objective
    if objective.needs_rewards and rollout.samples_per_prompt < 2:
        reason = f"objective {objective.name} compares the rollouts of a prompt with each other"
        yield Problem("rollout.samples_per_prompt", rollout.samples_per_prompt, reason, "Try 8.")


def _credit(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    settings: Mapping[str, object] = config.objective.model_dump()
    baseline, future = settings.get("baseline", "none"), settings.get("future", "none")
    is_factor = settings.get("future_form", "score") == "reweight"
    if is_factor and future == "none":
        reason = 'with objective.future = "none" there is no credit that could weigh anything'
        yield Problem("objective.future_form", "reweight", reason, 'Write "score", or objective.future = "mean".')
    if baseline == "none":
        return
    if future == "none":
        reason = 'with objective.future = "none" there is no credit to take it off'
        yield Problem("objective.baseline", baseline, reason, 'Write "none", or objective.future = "mean".')
    elif is_factor:
        reason = (
            'with objective.future_form = "reweight" credit is a factor, no policy gradient; a baseline would bias it'
        )
        yield Problem("objective.baseline", baseline, reason, 'Write "none", or objective.future_form = "score".')
    others = rollout.samples_per_prompt * (rollout.prompts_per_step if baseline == "loo_batch" else 1) - 1
    if others < 1:
        reason = f"objective.baseline = {baseline} is what the other rollouts cost, and there are none"
        yield Problem("rollout.samples_per_prompt", rollout.samples_per_prompt, reason, "Try 8.")


def _teacher(config: Config) -> Iterator[Problem]:
    teacher = config.teacher
    settings: Mapping[str, object] = config.objective.model_dump()
    if (
        teacher.support != "full"
        and config.objective.name in DIVERGENCES
        and settings.get("tail") == "none"
        and settings.get("divergence") != "rkl_sampled"
    ):
        reason = f'between parts of two distributions there is no divergence, and teacher.support = "{teacher.support}"'
        hint = 'Write "renorm", or teacher.support = "full".'
        yield Problem("objective.tail", "none", reason, hint)
    if teacher.support == "full" and settings.get("tail", "none") != "none":
        reason = 'with teacher.support = "full" there is nothing outside the support'
        yield Problem("objective.tail", settings["tail"], reason, 'Write objective.tail = "none".')
    if teacher.weights == "ema" and teacher.rate == 0.0:
        reason = "an average with this rate never moves"
        yield Problem("teacher.rate", teacher.rate, reason, 'Try 0.01, or write teacher.weights = "frozen".')
    has_sibling = teacher.demonstration == "reference" or config.rollout.samples_per_prompt > 1
    if teacher.feedback == "never" and teacher.context == "feedback" and not has_sibling:
        reason = "with one sample per prompt there is no sibling to show either; no rollout would have a teacher"
        yield Problem(
            "teacher.feedback",
            teacher.feedback,
            reason,
            'Write "without_solution", or set rollout.samples_per_prompt to 8.',
        )
    if teacher.demonstration == "reference" and config.task.name not in (names := reference_task_names()):
        reason = f"task {config.task.name} has no reference solutions; {', '.join(names)} has"
        yield Problem("teacher.demonstration", "reference", reason, 'Write "sibling".')
    yield from _expert(config) if teacher.weights == "expert" else _no_expert(config)


def _expert(config: Config) -> Iterator[Problem]:
    teacher, temperature = config.teacher, config.rollout.temperature
    if not teacher.model:
        hint = "A folder in Hugging Face's format works, or an id like Qwen/Qwen3-32B."
        yield Problem("teacher.model", teacher.model, 'teacher.weights = "expert" is another model; say which', hint)
    if temperature != 1.0:
        reason = "a server scores what it is given at temperature 1, and student and teacher must have the same"
        yield Problem("rollout.temperature", temperature, reason, "Write 1.0, or let the student teach itself.")
    if teacher.support != "teacher" and config.objective.needs_support:
        reason = "a server says which tokens its own model finds most probable, and no others"
        yield Problem("teacher.support", teacher.support, reason, 'Write "teacher".')


def _no_expert(config: Config) -> Iterator[Problem]:
    teacher = config.teacher
    if teacher.model:
        reason = f'with teacher.weights = "{teacher.weights}" the student teaches itself'
        yield Problem("teacher.model", teacher.model, reason, 'Leave it out, or write teacher.weights = "expert".')
    if teacher.context == "prompt":
        reason = f'with teacher.weights = "{teacher.weights}" the teacher would know no more than the student'
        yield Problem("teacher.context", "prompt", reason, 'Write "feedback", or teacher.weights = "expert".')


def _evaluation(config: Config) -> Iterator[Problem]:
    evaluation = config.eval
    if evaluation.every_steps and not evaluation.sets:
        reason = "there is nothing to evaluate: eval.sets is empty"
        yield Problem(
            "eval.every_steps",
            evaluation.every_steps,
            reason,
            'Set it to 0, or write eval.sets = [{ data = "held_out.jsonl" }].',
        )
    seen: set[str] = set()
    for index, one in enumerate(evaluation.sets):
        path = f"eval.sets[{index}].prefix"
        if one.prefix in seen:
            reason = "another set has the same prefix, and with it the same names of metrics"
            yield Problem(path, one.prefix, reason, f'Try "set{index}_".')
        elif not re.fullmatch(r"([a-z0-9]+_)*", one.prefix):
            reason = "part of the name of a metric: lower-case letters, digits and underscores, one at the end"
            yield Problem(path, one.prefix, reason, f'Try "{_as_prefix(one.prefix)}".')
        seen.add(one.prefix)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _divisor(value: int, largest: int) -> int:
    return next(candidate for candidate in range(min(value, largest), 0, -1) if value % candidate == 0)


def _as_prefix(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") + "_"
