"""What the teacher reads in place of the prompt: the prompt, feedback on the attempt, a solution. Pure.

The response is not part of it: its token ids follow the context as they were sampled and are never made from text again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_distil.config.schema import TeacherConfig
from megatron_distil.tasks.task import ReferenceTask, Task
from megatron_distil.types import Feedback, Ids, Outcome, Prompt, Rollout, Sums, TeacherContext

SUCCESS = 0.5  # smallest reward of a demonstration (arXiv:2601.20802, actor.yaml)

_FENCE = re.compile(r"^```(?=\n|\Z)", re.MULTILINE)
_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


class Attempt(NamedTuple):
    """A rollout and what was said of it."""

    rollout: Rollout
    feedback: Feedback


class Shown(NamedTuple):
    """The variable parts of a context."""

    solution: str | None
    feedback: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextBuilder:
    """Fulfils ``protocols.Contexts``."""

    task: Task
    encode: Callable[[str], Ids]
    """Of the task's style: it ends with the generation prompt, as that of the prompts does."""
    defuse: Callable[[str], str]
    """Makes a text that a program or a model wrote spell no special token."""
    config: TeacherConfig
    add: Callable[[Sums], None]
    """Counts contexts that were shortened or did not fit."""

    def build(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], feedback: Sequence[Feedback]
    ) -> list[TeacherContext | None]:
        """One per rollout; None where there is nothing to teach from, no verdict, or it does not fit."""
        prompt_by_id = {prompt.prompt_id: prompt for prompt in prompts}
        groups: dict[str, list[Attempt]] = {prompt_id: [] for prompt_id in prompt_by_id}
        attempts = [Attempt(rollout, said) for rollout, said in zip(rollouts, feedback, strict=True)]
        for attempt in attempts:
            groups[attempt.rollout.rollout_id.prompt].append(attempt)
        contexts: list[TeacherContext | None] = []
        num_shortened = num_too_long = 0
        for attempt in attempts:
            prompt_id = attempt.rollout.rollout_id.prompt
            fitted = self._context(prompt_by_id[prompt_id], attempt, groups[prompt_id])
            contexts.append(fitted.context)
            num_shortened += fitted.how == "shortened"
            num_too_long += fitted.how == "too long"
        num_contexts = sum(context is not None for context in contexts)
        shortened, too_long = (num_shortened, num_contexts), (num_too_long, len(contexts))
        self.add(Sums(sums={"teacher/shortened_frac": shortened, "teacher/too_long_frac": too_long}))
        return contexts

    def _context(self, prompt: Prompt, attempt: Attempt, group: Sequence[Attempt]) -> Fitted:
        if attempt.feedback.outcome is Outcome.UNAVAILABLE:
            return Fitted(None, "whole")
        if self.config.context == "prompt":
            return Fitted(as_the_student(prompt), "whole")
        sibling, solution = self._demonstration(prompt, attempt, group)
        shown = self._shown(prompt, attempt, solution)
        if shown == Shown(None, None):
            return Fitted(None, "whole")
        fitting, reading = shown, self._read(prompt, shown)
        if len(reading.token_ids) > self.config.max_context_tokens:
            fitting = self._cut(prompt, shown)
            if fitting is None:
                return Fitted(None, "too long")
            reading = self._read(prompt, fitting)
        context = TeacherContext(
            token_ids=reading.token_ids,
            text=reading.text,
            demonstration=sibling.rollout.rollout_id if sibling is not None and fitting.solution is not None else None,
            shows_feedback=fitting.feedback is not None,
        )
        return Fitted(context, "whole" if fitting == shown else "shortened")

    def _demonstration(
        self, prompt: Prompt, attempt: Attempt, group: Sequence[Attempt]
    ) -> tuple[Attempt | None, str | None]:
        """The text that is shown, and whose it is, if it is a sibling's."""
        if self.config.demonstration == "reference":
            return None, self.task.reference(prompt) if isinstance(self.task, ReferenceTask) else None
        sibling = choose_sibling(attempt, group, self.config.sibling)
        text = demonstration_text(sibling.rollout.text) if sibling is not None else None
        return sibling, self.defuse(text) if text is not None else None

    def _shown(self, prompt: Prompt, attempt: Attempt, solution: str | None) -> Shown:
        """What the settings allow. A task may not use a part: then the part is not there."""
        plain = self.task.teacher_text(prompt, solution=None, feedback=None)
        if solution is not None and self.task.teacher_text(prompt, solution=solution, feedback=None) == plain:
            solution = None
        feedback = self.defuse(attempt.feedback.text) or None
        match self.config.feedback:
            case "never":
                feedback = None
            case "without_solution" if solution is not None:
                feedback = None
            case _:
                pass
        if feedback is not None and self.task.teacher_text(prompt, solution=None, feedback=feedback) == plain:
            feedback = None
        return Shown(solution, feedback)

    def _cut(self, prompt: Prompt, shown: Shown) -> Shown | None:
        """The most of it that fits: the demonstration is cut first, then the feedback, never the template."""

        def fits(part: Shown) -> bool:
            return len(self._read(prompt, part).token_ids) <= self.config.max_context_tokens

        if shown.solution is not None:
            solution = _longest(shown.solution, lambda text: fits(Shown(text or None, shown.feedback)))
            if solution or (solution is not None and shown.feedback is not None):
                return Shown(solution or None, shown.feedback)
        if shown.feedback is not None:
            feedback = _longest(shown.feedback, lambda text: fits(Shown(None, text or None)))
            feedback = without_open_fence(feedback) if feedback else feedback
            if feedback:
                return Shown(None, feedback)
        return None

    def _read(self, prompt: Prompt, shown: Shown) -> Reading:
        text = self.task.teacher_text(prompt, solution=shown.solution, feedback=shown.feedback)
        return Reading(text, self.encode(text))


class Reading(NamedTuple):
    """A context as text and as tokens."""

    text: str
    token_ids: Ids


class Fitted(NamedTuple):
    """A context, and how it came to fit."""

    context: TeacherContext | None
    how: Literal["whole", "shortened", "too long"]


def as_the_student(prompt: Prompt) -> TeacherContext:
    """What the student reads: for a teacher that knows more by itself."""
    return TeacherContext(token_ids=prompt.token_ids, text=prompt.text, demonstration=None, shows_feedback=False)


def choose_sibling(attempt: Attempt, group: Sequence[Attempt], how: Literal["first", "random"]) -> Attempt | None:
    """Another successful rollout of the prompt; a rollout is never its own sibling.

    ``random`` is a function of the rollout's id: no layout and no replay changes it.
    """
    own = attempt.rollout.rollout_id
    successes = [other for other in group if other.rollout.rollout_id != own and is_success(other.feedback)]
    if not successes:
        return None
    return successes[0] if how == "first" else random.Random(f"sibling of {own}").choice(successes)


def is_success(feedback: Feedback) -> bool:
    """There is a verdict, and it is good."""
    return feedback.reward is not None and feedback.reward >= SUCCESS


def demonstration_text(response: str) -> str | None:
    """A sibling's response without its thoughts; None: nothing else is in it."""
    return _THOUGHTS.sub("", response).strip() or None


def without_open_fence(text: str) -> str:
    """A text that was cut, up to a fence that the cut left open: what follows it would be read as part of the block."""
    marks = [match.start() for match in _FENCE.finditer(text)]
    return text[: marks[-1]].rstrip() if len(marks) % 2 else text


def _longest(text: str, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning that fits; None: not even the empty one does."""
    if not fits(""):
        return None
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[:middle]):
            low = middle
        else:
            high = middle - 1
    return text[:low]
