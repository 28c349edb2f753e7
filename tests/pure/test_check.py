from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_distil.config.check import (
    CONFIGURABLE_TASKS,
    PROGRAM_TASKS,
    reference_task_names,
    sequence_multiple,
    task_names,
)
from megatron_distil.config.load import load_config
from megatron_distil.config.schema import ParallelConfig
from megatron_distil.errors import ConfigError
from megatron_distil.tasks import task as tasks
from megatron_distil.types import Program, Prompt
from tests.recipe import write_recipe

SUPERVISED = 'objective={name="sft"}'

# One rule each: what is overridden, and the whole of what is said about it.
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "an unknown task": (
        ["task.name=two_road"],
        ["task.name = 'two_road': not a task. Did you mean two_roads?"],
    ),
    "settings of another task": (
        ["task.profile=sdpo", "task.stop_after=2"],
        [
            "task.profile = 'sdpo': task program_induction has no such setting; livecodebench has. Leave it out.",
            "task.stop_after = 2: task program_induction has no such setting; livecodebench has. Leave it out.",
        ],
    ),
    "LiveCodeBench without its tests": (
        ["task.name=livecodebench"],
        [
            "task.tests = '': the rows name files of tests, and this is their folder. "
            "megatron_distil.tasks.livecodebench_data DIR writes DIR/tests; name that."
        ],
    ),
    "programs without a sandbox": (
        ["feedback.num_sandboxes=0"],
        ["feedback.num_sandboxes = 0: task program_induction runs programs, which needs a sandbox. Try 1."],
    ),
    "a warm-up longer than the run": (
        ["train.warmup_steps=100"],
        [
            "train.warmup_steps = 100: the run has 100 optimizer steps, so the learning rate would never reach its peak. "
            "Try 10."
        ],
    ),
    "a first moment that never decays": (
        ["train.beta1=1.0"],
        ["train.beta1 = 1.0: Adam divides by 1 minus it. Try 0.9."],
    ),
    "a second moment that never decays": (
        ["train.beta2=1.0"],
        ["train.beta2 = 1.0: Adam divides by 1 minus it. Try 0.999."],
    ),
    "sequence parallelism alone": (
        ["parallel.sequence_parallel=true"],
        [
            "parallel.sequence_parallel = True: sequences are cut between tensor-parallel ranks, and parallel.tp = 1. "
            "Set it to false, or parallel.tp to 2."
        ],
    ),
    "a microbatch that context parallelism cannot cut": (
        ["parallel.cp=2", "train.max_microbatch_tokens=4098"],
        [
            "train.max_microbatch_tokens = 4098: not a multiple of 4; with parallel.cp = 2 every rank holds two equal "
            "chunks. Try 4100."
        ],
    ),
    "a microbatch that sequence parallelism cannot cut": (
        ["parallel.tp=4", "parallel.sequence_parallel=true", "train.max_microbatch_tokens=4098"],
        [
            "train.max_microbatch_tokens = 4098: not a multiple of parallel.tp = 4; with sequence parallelism every rank "
            "holds an equal share. Try 4100."
        ],
    ),
    "documents that replicas cannot share": (
        [SUPERVISED, "parallel.dp=3"],
        [
            "sft.documents_per_step = 128: not a multiple of parallel.dp = 3; every replica reads the same number of "
            "documents. Try 129."
        ],
    ),
    "several updates in a supervised step": (
        [SUPERVISED, "train.updates_per_step=4"],
        ["train.updates_per_step = 4: a supervised step is one update. Leave it out."],
    ),
    "prompts that replicas cannot share": (
        ["parallel.dp=4", "rollout.prompts_per_step=30"],
        [
            "rollout.prompts_per_step = 30: not a multiple of parallel.dp = 4; every replica collects the same number of "
            "prompts. Try 32."
        ],
    ),
    "prompts that updates cannot share": (
        ["train.updates_per_step=5"],
        [
            "rollout.prompts_per_step = 32: not a multiple of train.updates_per_step = 5; every update takes the same "
            "number of prompts. Try 35."
        ],
    ),
    "prompts that neither can share": (
        ["parallel.dp=3", "train.updates_per_step=5"],
        [
            "rollout.prompts_per_step = 32: not a multiple of parallel.dp = 3; every replica collects the same number of "
            "prompts. Try 45.",
            "rollout.prompts_per_step = 32: not a multiple of train.updates_per_step = 5; every update takes the same "
            "number of prompts. Try 45.",
        ],
    ),
    "an update without a rollout for every replica": (
        ["parallel.dp=4", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "train.updates_per_step=4"],
        [
            "train.updates_per_step = 4: an update has 2 rollouts for parallel.dp = 4 replicas; some would have none. "
            "Try 2."
        ],
    ),
    "a rollout that fits no microbatch": (
        ["train.max_microbatch_tokens=60", "teacher.max_context_tokens=48", "rollout.max_response_tokens=12",
         "rollout.max_prompt_tokens=49"],
        [
            "train.max_microbatch_tokens = 60: less than a prompt and a response of full length, 49 + 12 tokens; such a "
            "rollout would fit no microbatch. Try 61.",
            "teacher.max_context_tokens = 48: less than rollout.max_prompt_tokens = 49, and every context holds its "
            "prompt. Try 196.",
        ],
    ),
    "a context that fits no microbatch": (
        ["teacher.max_context_tokens=4096"],
        [
            "teacher.max_context_tokens = 4096: with rollout.max_response_tokens = 16 more than "
            "train.max_microbatch_tokens = 4096; the teacher reads both in one forward. Try 4080, or "
            "train.max_microbatch_tokens = 4112."
        ],
    ),
    "a context shorter than its prompt": (
        ["teacher.max_context_tokens=40"],
        [
            "teacher.max_context_tokens = 40: less than rollout.max_prompt_tokens = 48, and every context holds its "
            "prompt. Try 192."
        ],
    ),
    "a request longer than all its attempts": (
        ["rollout.request_timeout_s=1900.0"],
        [
            "rollout.request_timeout_s = 1900.0: one request would outlast all its attempts, rollout.budget_s = 1800.0. "
            "Try 600."
        ],
    ),
    "a judgement longer than all its attempts": (
        ["feedback.request_timeout_s=400.0"],
        [
            "feedback.request_timeout_s = 400.0: one request would outlast all its attempts, feedback.budget_s = 300.0. "
            "Try 100."
        ],
    ),
    "a test longer than its request": (
        ["feedback.test_timeout_s=60.0"],
        [
            "feedback.test_timeout_s = 60.0: a request, feedback.request_timeout_s = 60.0, would end before the test "
            "does. Try 15."
        ],
    ),
    "ranks that do not wait for their head": (
        ["train.collect_timeout_s=600.0"],
        [
            "train.collect_timeout_s = 600.0: the other ranks would give up while sampling and judging still have their "
            "budgets, 2100 s. Try 4200."
        ],
    ),
    "a group of one": (
        ['objective={name="grpo"}', "rollout.samples_per_prompt=1"],
        [
            "rollout.samples_per_prompt = 1: objective grpo compares the rollouts of a prompt with each other. Try 8."
        ],
    ),
    "a tail of nothing": (
        ["teacher.support=full"],
        [
            "objective.tail = 'bucket': with teacher.support = \"full\" there is nothing outside the support. "
            'Write objective.tail = "none".'
        ],
    ),
    "an average that stands still": (
        ["teacher.rate=0.0"],
        [
            "teacher.rate = 0.0: an average with this rate never moves. "
            'Try 0.01, or write teacher.weights = "frozen".'
        ],
    ),
    "a teacher that knows nothing": (
        ["teacher.feedback=never", "rollout.samples_per_prompt=1"],
        [
            "teacher.feedback = 'never': with one sample per prompt there is no sibling to show either; no rollout would "
            'have a teacher. Write "without_solution", or set rollout.samples_per_prompt to 8.'
        ],
    ),
    "a factor without credit": (
        ["objective.future=none", "objective.future_form=reweight"],
        [
            "objective.future_form = 'reweight': with objective.future = \"none\" there is no credit that could weigh "
            'anything. Write "score", or objective.future = "mean".'
        ],
    ),
    "a baseline of nothing": (
        ["objective.future=none", "objective.baseline=loo_batch"],
        [
            "objective.baseline = 'loo_batch': with objective.future = \"none\" there is no credit to take it off. "
            'Write "none", or objective.future = "mean".'
        ],
    ),
    "a baseline of a factor": (
        ["objective.future_form=reweight", "objective.baseline=loo_batch"],
        [
            "objective.baseline = 'loo_batch': with objective.future_form = \"reweight\" credit is a factor, no policy "
            'gradient; a baseline would bias it. Write "none", or objective.future_form = "score".'
        ],
    ),
    "a baseline of nobody": (
        ["objective.baseline=loo_position", "rollout.samples_per_prompt=1"],
        [
            "rollout.samples_per_prompt = 1: objective.baseline = loo_position is what the other rollouts cost, and "
            "there are none. Try 8."
        ],
    ),
    "a divergence between parts": (
        ["objective.name=sdpo", "objective.tail=none"],
        [
            "objective.tail = 'none': between parts of two distributions there is no divergence, and teacher.support = "
            '"teacher". Write "renorm", or teacher.support = "full".'
        ],
    ),
    "references of a task that has none": (
        ["task.name=two_roads", "teacher.demonstration=reference"],
        [
            "teacher.demonstration = 'reference': task two_roads has no reference solutions; program_induction has. "
            'Write "sibling".'
        ],
    ),
    "an expert without a name": (
        ["teacher.weights=expert"],
        [
            "teacher.model = '': teacher.weights = \"expert\" is another model; say which. A folder in Hugging Face's "
            "format works, or an id like Qwen/Qwen3-32B."
        ],
    ),
    "what a server cannot say": (
        ["teacher.weights=expert", "teacher.model=m", "rollout.temperature=0.7", "teacher.support=student"],
        [
            "rollout.temperature = 0.7: a server scores what it is given at temperature 1, and student and teacher must "
            "have the same. Write 1.0, or let the student teach itself.",
            "teacher.support = 'student': a server says which tokens its own model finds most probable, and no others. "
            'Write "teacher".',
        ],
    ),
    "a self-teacher that is somebody else and knows nothing": (
        ["teacher.model=m", "teacher.context=prompt"],
        [
            "teacher.model = 'm': with teacher.weights = \"ema\" the student teaches itself. Leave it out, or write "
            'teacher.weights = "expert".',
            "teacher.context = 'prompt': with teacher.weights = \"ema\" the teacher would know no more than the student. "
            'Write "feedback", or teacher.weights = "expert".',
        ],
    ),
    "an evaluation of nothing": (
        ["eval.every_steps=10"],
        [
            "eval.every_steps = 10: there is nothing to evaluate: eval.sets is empty. "
            'Set it to 0, or write eval.sets = [{ data = "held_out.jsonl" }].'
        ],
    ),
    "two sets under one name": (
        ['eval.sets=[{data="a"}, {data="b"}]'],
        [
            "eval.sets[1].prefix = '': another set has the same prefix, and with it the same names of metrics. "
            'Try "set1_".'
        ],
    ),
    "a prefix that is no name": (
        ['eval.sets=[{data="a", prefix="New Ones"}]'],
        [
            "eval.sets[0].prefix = 'New Ones': part of the name of a metric: lower-case letters, digits and underscores, "
            'one at the end. Try "new_ones_".'
        ],
    ),
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rule_over_several_settings_says_what_would_work(recipe: Path, wrong: str):
    overrides, expected = WRONG[wrong]
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    assert [str(problem) for problem in caught.value.problems] == expected


def test_all_broken_rules_come_at_once(recipe: Path):
    with pytest.raises(ConfigError, match=r"^4 problems in the configuration:") as caught:
        load_config(recipe, ["train.beta2=1.0", "teacher.rate=0.0", "eval.every_steps=5", "parallel.dp=3"])
    assert [problem.path for problem in caught.value.problems] == [
        "train.beta2",
        "rollout.prompts_per_step",
        "teacher.rate",
        "eval.every_steps",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.dp=4", "rollout.prompts_per_step=32", "train.updates_per_step=8"],
        ["parallel.tp=4", "parallel.sequence_parallel=true", "parallel.cp=2"],
        ["teacher.support=full", "objective.tail=none"],
        ["teacher.weights=frozen", "teacher.rate=0.0"],
        ["task.name=two_roads", "feedback.num_sandboxes=0", "train.collect_timeout_s=1800.0"],
        ['objective={name="grpo"}', "teacher.max_context_tokens=40"],
        [SUPERVISED, "rollout.prompts_per_step=31", "parallel.dp=2", "teacher.max_context_tokens=9999"],
        ['eval.sets=[{data="a"}, {data="b", prefix="new_"}]', "eval.every_steps=10"],
        ["rollout.samples_per_prompt=1", "teacher.feedback=always"],
        ["rollout.samples_per_prompt=1", "teacher.feedback=always", "objective.baseline=loo_batch"],
        ["objective.name=sdpo", "objective.tail=none", "teacher.support=full"],
        ["objective.name=opsd", "objective.tail=none", "teacher.support=full"],
        ["objective.name=sdpo", "objective.tail=none", "objective.divergence=rkl_sampled"],
        ["rollout.samples_per_prompt=1", "teacher.feedback=never", "teacher.demonstration=reference"],
        ["teacher.weights=expert", "teacher.model=m", "teacher.max_context_tokens=99999"],
        ["teacher.weights=expert", "teacher.model=m", "teacher.context=prompt", "teacher.max_context_tokens=1"],
    ],
)
def test_what_looks_like_a_broken_rule_and_is_none_is_accepted(recipe: Path, overrides: list[str]):
    load_config(recipe, overrides)


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [
        (ParallelConfig(), 1),
        (ParallelConfig(tp=4), 1),
        (ParallelConfig(tp=4, sequence_parallel=True), 4),
        (ParallelConfig(cp=2), 4),
        (ParallelConfig(cp=2, tp=2, sequence_parallel=True), 8),
    ],
)
def test_sequences_are_padded_for_every_cut(layout: ParallelConfig, multiple: int):
    assert sequence_multiple(layout) == multiple


def test_the_tasks_that_files_show_are_those_that_import():
    assert task_names() == tasks.task_names()


def test_the_tasks_that_files_show_to_have_references_are_those_that_do():
    assert reference_task_names() == [
        name for name in tasks.task_names() if isinstance(tasks.task_by_name(name), tasks.ReferenceTask)
    ]


def test_the_tasks_that_run_programs_are_those_that_say_so():
    empty = np.zeros(0, dtype=np.int32)
    found: set[str] = set()
    for name in tasks.task_names():
        task = tasks.task_by_name(name)
        row = task.example
        prompt = Prompt(prompt_id="p", text=task.prompt_text(row), token_ids=empty, task=row)
        asked = [
            task.program(prompt, tasks.Response(text, is_complete=True)) for text in ("x+1", "```python\nprint(1)\n```")
        ]
        if any(isinstance(entry, Program) for entry in asked):
            found.add(name)
    assert found == PROGRAM_TASKS


def test_the_tasks_with_settings_are_those_that_take_them():
    found = {name for name in tasks.task_names() if isinstance(tasks.task_by_name(name), tasks.ConfigurableTask)}
    assert found == CONFIGURABLE_TASKS
