"""The configuration of a run: one frozen tree. Recipes are TOML with the same tables; overrides are ``path=value``.

Validation never changes a value; a derived value is a property. Rules over several fields live in ``check.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from megatron_distil.algo.objectives import objective_from_table
from megatron_distil.algo.objectives.objective import Objective

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Identity:
    """Marks a field that says what a run *is*: resuming under another value is refused."""


class Section(BaseModel):
    """Frozen. Knows no other key, takes no value of another type, never changes one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class TaskConfig(Section):
    """What the student is to learn."""

    name: Annotated[str, Identity()]
    """A module of ``megatron_distil.tasks``."""
    tests: str = ""
    """``livecodebench``: folder of the tests that the rows name."""
    profile: Literal["native", "lcb", "sdpo"] = "native"
    """``livecodebench``: whose rules judge; the sandbox's own, or those that published numbers come from."""
    reward: Literal["pass_all", "pass_fraction"] = "pass_all"
    """``livecodebench``: 1 if every test passed, or the share of the tests that did."""
    stop_after: Annotated[int, Field(ge=0)] = 0
    """``livecodebench``: failed tests after which the rest is not run in training; 0: every test is run, as in evaluations."""
    stop_after_timeouts: Count = 3
    """``livecodebench``: the same for tests that ended at a limit of time, and in evaluations too: a program that hangs hangs in all."""
    max_failing: Count = 2
    """``livecodebench``: wrong answers that the feedback shows."""
    max_feedback_chars: Count = 3000
    """``livecodebench``: length of the feedback."""
    show_expected: bool = True
    """``livecodebench``: whether the feedback shows what a test expects; only a teacher reads it."""


class DataConfig(Section):
    """Where prompts come from."""

    train: str
    """A JSON-lines file, or the id of a data set on the hub."""
    split: str = "train"
    """The split of a data set on the hub; a file has one."""
    seed: int = 0
    """Order of the rows."""


class ParallelConfig(Section):
    """How many processes train, and how they share the model."""

    tp: Count = 1
    """Tensor-parallel size."""
    pp: Count = 1
    """Pipeline-parallel size."""
    cp: Count = 1
    """Context-parallel size."""
    dp: Count = 1
    """Data-parallel size: replicas of the model."""
    sequence_parallel: bool = False
    """Cut the activations between the tensor-parallel regions along the sequence."""

    @property
    def world_size(self) -> int:
        """Trainer processes."""
        return self.tp * self.pp * self.cp * self.dp


class RolloutConfig(Section):
    """How the student is sampled."""

    prompts_per_step: Count = 32
    """Over all replicas."""
    samples_per_prompt: Count = 8
    """Size of a group."""
    max_prompt_tokens: Count = 1024
    """A longer prompt is an error in the data."""
    max_response_tokens: Count = 1024
    """Where a response is cut."""
    temperature: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    """Of sampling, and of student and teacher in the loss."""
    num_engines: Count = 1
    """SGLang servers."""
    engine_tp: Count = 1
    """Tensor-parallel size of one server."""
    engine_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the server."""
    concurrency: Count = 256
    """Requests in flight to one server."""
    request_timeout_s: Seconds = 600.0
    """One request; then another server is asked under the same rollout id."""
    budget_s: Seconds = 1800.0
    """All attempts for one rollout."""
    start_timeout_s: Seconds = 600.0
    """Until the servers of a run have registered themselves."""


class FeedbackConfig(Section):
    """How responses are judged."""

    max_unavailable: Fraction = 0.1
    """Largest share of a step without a verdict; above it the run stops with exit 75."""
    concurrency: Count = 64
    """Programs in flight to one sandbox service at most; there are never more than it has workers."""
    request_timeout_s: Seconds = 60.0
    """One request."""
    budget_s: Seconds = 300.0
    """All attempts for one program."""
    test_timeout_s: Seconds = 6.0
    """CPU time of one test of a program."""
    min_isolation: Annotated[int, Field(ge=1, le=4)] = 2
    """Lowest isolation level of the sandbox that this run accepts (``sandbox/README.md``)."""
    num_sandboxes: Annotated[int, Field(ge=0)] = 1
    """Sandbox services; 0 for tasks that run no programs."""
    sandbox_workers: Count = 2
    """Programs that one service runs at a time."""
    token_file: str = ""
    """File (mode 0600) with the bearer token of the services; empty: they ask for none."""


class TeacherConfig(Section):
    """The teacher: the same model, shown the feedback, or a larger one."""

    weights: Literal["ema", "frozen", "live", "trust_region", "expert"] = "ema"
    """Whose: of the student, averaged, as they were or as they are (collapses; for comparison); or those of ``teacher.model``."""
    model: str = ""
    """``expert``: a folder in Hugging Face's format, or an id on the hub, with the student's tokenizer."""
    num_engines: Count = 1
    """``expert``: SGLang servers, in the precision ``rollout.engine_dtype``."""
    engine_tp: Count = 1
    """``expert``: tensor-parallel size of one server."""
    context: Literal["feedback", "prompt"] = "feedback"
    """What it reads before the response: the prompt with feedback and demonstration, or what the student reads (``expert``)."""
    rate: Fraction = 0.01
    """``ema``: share of the student in each step; ``trust_region``: share of the student's logits."""
    support: Literal["teacher", "student", "full"] = "teacher"
    """Whose top-k is kept at each position; ``full``: the whole vocabulary."""
    top_k: Count = 100
    """Tokens kept per position."""
    feedback: Literal["without_solution", "always", "never"] = "without_solution"
    """When the teacher reads the feedback on a failed attempt."""
    demonstration: Literal["sibling", "reference"] = "sibling"
    """Which solution it is shown: another successful rollout of the prompt, or the one in the data."""
    sibling: Literal["first", "random"] = "first"
    """Which of several other successful rollouts."""
    max_context_tokens: Count = 4096
    """Longest context: first the demonstration is shortened, then the feedback, never the template."""


class TrainConfig(Section):
    """The optimizer and its schedule."""

    num_steps: Count
    """Turns of the loop."""
    updates_per_step: Count = 1
    """Optimizer steps of one turn: the prompts of a step are cut into that many mini-batches."""
    seed: int = 0
    """Of everything that is drawn in the trainer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of parameters and activations; main parameters, reductions and statistics are float32."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-6
    """Peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps from 0 to the peak."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    final_rate_frac: Fraction = 0.1
    """What the decay ends at, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Norms and biases are exempt."""
    beta1: Fraction = 0.9
    """Adam."""
    beta2: Fraction = 0.999
    """Adam."""
    clip_grad: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the whole gradient."""
    max_microbatch_tokens: Count = 16384
    """Packed tokens of one forward."""
    is_distributed_optimizer: bool = True
    """Shard the optimizer's state over the replicas."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations are computed again in the backward."""
    head: Literal["auto", "onepass", "composable", "plain"] = "auto"
    """How hidden states become the loss (``docs/head.md``): gradients inside the forward; without kept logits; with logits."""
    collect_timeout_s: Seconds = 3600.0
    """How long the other ranks wait for the head of a replica."""
    collective_timeout_s: Seconds = 600.0
    """How long a rank waits for the others in every other collective."""


class SftConfig(Section):
    """The supervised loop. Its data are ``data.train``, its objective is ``sft``."""

    documents_per_step: Count = 128
    """Over all replicas."""


class SyncConfig(Section):
    """How weights reach the servers."""

    sink: Literal["broadcast", "disk"] = "broadcast"
    """One broadcast of flat buckets (NCCL, gloo on a CPU), or files."""
    bucket_bytes: Count = 512 * 1024 * 1024
    """Largest bucket; a larger tensor is a bucket of its own."""
    verify_every: Count = 1
    """Compare checksums after every so many publications."""
    snapshot: bool = True
    """Every version also lies in the run's ``weights/`` (the last two), so that a restarted server can be admitted alone."""
    idle_engines: Literal["run", "stop"] = "run"
    """What servers do between ``release`` and ``publish``: go on, or be stopped (SIGSTOP; servers on the trainer's CPUs)."""
    timeout_s: Seconds = 300.0
    """Every call of a publication."""


class CheckpointConfig(Section):
    """What survives a crash."""

    every_steps: Count = 10
    """Save after so many steps; the last step is always saved."""
    keep_last: Count = 2
    """Older checkpoints are deleted when a newer one is complete."""
    is_async: bool = True
    """Write in the background."""


class EvalSet(Section):
    """One file of held-out prompts."""

    data: str
    """A JSON-lines file, or the id of a data set on the hub."""
    split: str = "test"
    """The split of a data set on the hub."""
    prefix: str = ""
    """Goes into the metric's name: ``eval/<prefix>avg_at_8``."""


class EvalConfig(Section):
    """Held-out prompts, answered by the engines."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Also before the first and after the last step; 0: never."""
    samples_per_prompt: Count = 8
    """The n of avg@n and pass@n."""
    temperature: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    """Of sampling."""
    sets: tuple[EvalSet, ...] = ()
    """What is evaluated."""


class LogConfig(Section):
    """What is written beside ``metrics.jsonl``, which always is."""

    tensorboard: bool = True
    """Event files in the run's ``tensorboard/``."""
    wandb_project: str = ""
    """A project of Weights & Biases; empty: not used."""
    rollouts_kept: Annotated[int, Field(ge=0)] = 4
    """Examples of each step that the report shows, with feedback and the teacher's view."""


def _objective(value: Any) -> Any:
    return objective_from_table(value)


class Config(Section):
    """One run."""

    model: Annotated[str, Identity()]
    """A folder in Hugging Face's format, or an id on the hub."""
    preset: str = ""
    """A file of ``config/presets`` that the settings were taken from; a record, nothing reads it."""
    task: TaskConfig
    data: DataConfig
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_objective), Identity()]
    """Always stated; its ``name`` picks the class."""
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    teacher: TeacherConfig = TeacherConfig()
    sft: SftConfig = SftConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def has_expert(self) -> bool:
        """Whether the teacher is another model, behind servers of its own."""
        return self.objective.needs_teacher and self.teacher.weights == "expert"
