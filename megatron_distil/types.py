"""The records that flow through a step. Each stage makes the next record and never edits the last one.

Axes, in every comment and docstring: ``P`` prompt tokens, ``R`` response tokens, ``C`` tokens of a teacher's context, ``K``
support size, ``T`` packed tokens of a microbatch, ``S`` sequences in it, ``V`` vocabulary. A sharded axis is a quotient:
``[T/cp, V/tp]``.

Positions. A vector over ``T`` lives at the *predicting* position: entry ``t`` speaks about the token after ``t``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Outcome(StrEnum):
    """What the judge says of a response."""

    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    """No verdict: our outage, not the program's fault. Excluded from loss and denominator."""


class Verdict(StrEnum):
    """What the sandbox says of a program on one test."""

    PASSED = "passed"
    RAN = "ran"
    """It ended well, and nothing was expected of it."""
    WRONG_ANSWER = "wrong_answer"
    COMPILE_ERROR = "compile_error"
    RUNTIME_ERROR = "runtime_error"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    TIME_LIMIT = "time_limit"
    WALL_LIMIT = "wall_limit"


Profile = Literal["native", "lcb", "sdpo"]
"""Whose rules judge a program: the sandbox's own, LiveCodeBench's, or those of SDPO's release (``sandbox/README.md``)."""


class Case(NamedTuple):
    """One test of a program."""

    input: str
    expected: str | None
    """None: run it and judge nothing (``Verdict.RAN``); the task reads the output."""


class CaseFile(NamedTuple):
    """Tests in a file, as the sandbox reads them: a JSON array of ``{"input", "output"}``."""

    path: str
    sha256: str
    """Of its bytes: a service is sent it once and is told its hash from then on."""
    num_tests: int


class FeedbackOptions(NamedTuple):
    """How the sandbox's account of a failure is written. Same defaults as ``sandbox/feedback.py``."""

    max_failing: int = 2
    """Wrong answers that are shown."""
    max_chars: int = 3000
    show_expected: bool = True


DEFAULT_FEEDBACK = FeedbackOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a task wants to be run."""

    code: str
    tests: tuple[Case, ...] = ()
    case_file: CaseFile | None = None
    """In place of ``tests``."""
    mode: Literal["stdin", "functional"] = "stdin"
    function: str = ""
    """Called in ``functional`` mode."""
    has_prelude: bool = False
    """Start with the names of the standard library that LiveCodeBench makes available without an import."""
    test_timeout_s: float | None = None
    """CPU time of one test; None: ``feedback.test_timeout_s``."""
    memory_bytes: int | None = None
    """Of one test; None: the service's default."""
    stop_after: int = 0
    """Failed tests after which the rest is not run; 0: every test is run."""
    stop_after_timeouts: int = 0
    """The same for tests that ended at a limit of time."""
    profile: Profile = "native"
    feedback: FeedbackOptions = DEFAULT_FEEDBACK

    @property
    def num_tests(self) -> int:
        """However they are given."""
        return len(self.tests) if self.case_file is None else self.case_file.num_tests


class CaseResult(NamedTuple):
    """What a program did on one test."""

    verdict: Verdict
    stdout: str
    """From its start, as text; cut where ``stdout_bytes`` says more."""
    stdout_bytes: int
    why: str = ""
    """One line, without measured times."""
    stderr: str = ""
    """The end of it, where a traceback is."""
    exit_code: int = 0
    """Negative: killed by that signal."""
    cpu_s: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What the sandbox says of a program. An outage is ``SandboxUnavailable``, never a result."""

    tests: tuple[CaseResult, ...]
    """In the order of the tests of the program; shorter if the run was stopped early."""
    feedback: str
    """The sandbox's own account of the failures."""
    duration_s: float
    isolation: int = 0
    """Level at which it ran (``sandbox/README.md``)."""
    queue_s: float = 0.0
    """Wait for a worker of the service."""
    outputs_digest: str = ""
    """A hash of all actual outputs: equal for programs that did the same."""


class RolloutId(NamedTuple):
    """In logs, in requests, in error messages, for ever."""

    step: int
    prompt: str
    sample: int

    def __str__(self) -> str:
        return f"{self.step}/{self.prompt}/{self.sample}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the student is given."""

    prompt_id: str
    text: str
    token_ids: Ids
    """[P] the generation prompt included."""
    task: Mapping[str, object]
    """The data row: tests or reference answer; never shown to the student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response. Made by ``rollout/sglang/wire.py``, which checks it."""

    rollout_id: RolloutId
    token_ids: Ids
    """[R] stop token included."""
    text: str
    """The response without its stop token."""
    logprobs: Floats
    """[R] nats, under the policy that sampled, at the sampling temperature."""
    finish: FinishReason
    oldest_weights: int
    newest_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """What the judge says of one rollout."""

    rollout_id: RolloutId
    outcome: Outcome
    reward: float | None
    """[0, 1]; None when there is no verdict."""
    text: str
    """What the teacher may read."""
    duration_s: float
    pass_fraction: float | None = None
    """[0, 1] tests that passed, of all; None: no tests, or no verdict."""
    vote: str = ""
    """What maj@k counts: equal for responses that say the same. Empty: it has no vote."""

    def __post_init__(self) -> None:
        if self.outcome is Outcome.UNAVAILABLE and (self.reward, self.pass_fraction, self.vote) != (None, None, ""):
            raise ValueError(f"{self.rollout_id}: no verdict, and yet a reward, a share or a vote")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherContext:
    """Replaces the prompt when the teacher reads the response."""

    token_ids: Ids
    """[C] ends with the generation prompt, as ``Prompt.token_ids`` does."""
    text: str
    demonstration: RolloutId | None
    shows_feedback: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Everything known before the teacher speaks."""

    prompt: Prompt
    rollout: Rollout
    feedback: Feedback
    context: TeacherContext | None
    """None: nothing to teach from. Weight 0, and still a sequence of the denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The teacher at every response position, on a support of K tokens."""

    support_ids: Ids
    """[R, K] unique in a row; -1 in unused slots."""
    logprobs: Floats
    """[R, K] nats, normalised over the whole vocabulary; -inf in unused slots."""
    entropy: Floats
    """[R] nats, over the whole vocabulary."""
    sampled: Floats
    """[R] nats, at the token that was sampled, inside or outside the support."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A context and the response that supervised training teaches."""

    context_ids: Ids
    response_ids: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One packed row of tensors, before any cut over CP or TP."""

    token_ids: Tensor
    """[T] int64."""
    sampled_ids: Tensor
    """[T] int64, the *next* token of the same sequence; 0 where there is none."""
    cu_seqlens: Tensor
    """[S + 1] int32, padding included."""
    positions: Tensor
    """[T] int64, restart in each sequence."""
    segment_ids: Tensor
    """[T] int32, -1 on padding."""
    response_mask: Tensor
    """[T] bool, True where the *next* token was sampled and carries a loss."""
    loss_weights: Tensor
    """[T] float32, 0 outside the loss; the reduction and the global denominator are in here."""
    advantages: Tensor
    """[T] float32, 0 unless the objective needs rewards."""
    sampling_logprobs: Tensor
    """[T] float32, of the engine that sampled; 0 outside the mask."""
    old_logprobs: Tensor | None = None
    """[T] float32, of the trainer before the first update of the step; None: this is the first."""
    baseline: Tensor | None = None
    """[T] float32, what is taken off the credit; None: nothing."""
    group_ids: Tensor
    """[S] int64, equal for rollouts of one prompt of the step; -1 where there is no rollout."""
    support_ids: Tensor
    """[T, K] int64, -1 in unused slots; K = 0 without a teacher."""
    teacher_logprobs: Tensor
    """[T, K] float32, -inf in unused slots."""
    teacher_entropy: Tensor
    """[T] float32, whole vocabulary."""
    teacher_sampled: Tensor
    """[T] float32, the teacher at the sampled id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One replica's share of one optimizer step."""

    microbatches: tuple[Microbatch, ...]
    denominator: float
    """Global, known before the step. The packer has divided the weights by it; nobody divides again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Metrics before their division: what an update or a stage has counted on this replica.

    ``sums[name] = (sum, count)``; ``maxima[name] = value``. Names are those of ``metrics/names.py``.
    """

    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    maxima: Mapping[str, float] = field(default_factory=dict[str, float])
