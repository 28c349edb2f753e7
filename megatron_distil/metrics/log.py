"""The log of a run: times its phases, counts what it is given, writes one line per step."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_distil.metrics.names import sentence
from megatron_distil.metrics.reduce import Totals
from megatron_distil.metrics.sinks import JsonLines, Sink
from megatron_distil.types import Example, FinishReason, Outcome, Sums, Targets


def host_peak_bytes() -> float:
    """Largest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB


def _same(totals: Totals) -> Totals:
    return totals


def _no_phase(name: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Where a log writes. Ranks other than the first head have none."""

    sinks: Sequence[Sink] = ()
    samples: JsonLines | None = None
    """Some rollouts of each step, for the report."""
    num_samples: int = 0
    decode: Callable[[int], str] | None = None
    """Text of one token, for the samples."""
    phase: Callable[[str], AbstractContextManager[None]] = _no_phase
    """Told what is going on."""


@dataclass(kw_only=True)
class RunLog:
    """Fulfils ``protocols.Log``."""

    reduce: Callable[[Totals], Totals] = _same
    """Adds the totals of all replicas. Collective; with one replica there is nothing to add."""
    outlets: Outlets = field(default_factory=Outlets)
    num_processes: int = 1
    """Of the trainer; speed is also given for each of them."""
    clock: Callable[[], float] = time.monotonic
    peak_bytes: Callable[[], float] = host_peak_bytes
    _pending: Totals = field(default_factory=Totals, init=False)
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float), init=False)
    _started: float | None = field(default=None, init=False)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times a phase: ``time/<name>_s``, summed over the step. Spans may lie in each other; each counts whole."""
        metric = f"time/{name}_s"
        sentence(metric)
        begin = self.clock()
        if self._started is None:
            self._started = begin
        try:
            with self.outlets.phase(name):
                yield
        finally:
            self._seconds[metric] += self.clock() - begin

    def add(self, sums: Sums) -> None:
        """Counts something that belongs to the current step."""
        self._pending.merge(sums)

    def write(
        self, step: int, examples: Sequence[Example], targets: Sequence[Targets | None], updates: Sequence[Sums]
    ) -> None:
        """One line of metrics: reduces over replicas, divides once. Collective."""
        counted = Totals([*updates, self._pending.as_sums()])
        counted.peak("train/updates", float(len(updates)))
        counted.peak("memory/peak_bytes", self.peak_bytes())
        _count_examples(counted, step, examples)
        _count_targets(counted, examples, targets)
        values = dict(self.reduce(counted).means()) | self._times()
        if "time/step_s" in values and values["time/step_s"] > 0.0:
            values |= self._speed(values)
        self._emit(step, dict(sorted(values.items())))
        if self.outlets.samples is not None and examples:
            for record in _samples(examples, targets, self.outlets.num_samples, self.outlets.decode):
                self.outlets.samples.append(step, record)
        self._pending, self._started = Totals(), self.clock()
        self._seconds.clear()

    def write_eval(self, step: int, totals: Totals) -> Mapping[str, float]:
        """One line of an evaluation after ``step`` steps; the means are returned."""
        values = totals.means()
        self._emit(step, values)
        return values

    def close(self) -> None:
        """Everything was written."""
        for sink in self.outlets.sinks:
            sink.close()

    def _emit(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.outlets.sinks:
            sink.write(step, values)

    def _times(self) -> dict[str, float]:
        # The clock of the rank that writes: phases end together, and parts of one rank add up to its step.
        whole = {} if self._started is None else {"time/step_s": self.clock() - self._started}
        return dict(self._seconds) | whole

    def _speed(self, values: Mapping[str, float]) -> dict[str, float]:
        if "rollout/count" in values:
            tokens = values["rollout/count"] * values["rollout/response_tokens"]
        else:
            tokens = values.get("loss/tokens", 0.0)
        speed = tokens / values["time/step_s"]
        return {"time/tokens_per_s": speed, "time/tokens_per_s_per_gpu": speed / self.num_processes}


def _count_examples(totals: Totals, step: int, examples: Sequence[Example]) -> None:
    passed_by_prompt: dict[str, list[bool]] = defaultdict(list)
    for example in examples:
        rollout, feedback, context = example.rollout, example.feedback, example.context
        length = float(len(rollout.token_ids))
        totals.add("rollout/count", 1.0)
        totals.add("rollout/response_tokens", length)
        totals.peak("rollout/response_tokens_max", length)
        totals.add("rollout/prompt_tokens", float(len(example.prompt.token_ids)))
        totals.add("rollout/truncated_frac", float(rollout.finish is FinishReason.LENGTH))
        totals.add("rollout/logprob_nats", float(rollout.logprobs.sum()), length)
        totals.peak("rollout/lag_steps_max", float(step - rollout.oldest_weights))

        is_judged = feedback.outcome is not Outcome.UNAVAILABLE
        totals.add("feedback/unavailable_frac", float(not is_judged))
        totals.add("feedback/duration_s", feedback.duration_s)
        totals.peak("feedback/duration_max_s", feedback.duration_s)
        if is_judged:
            passed_by_prompt[example.prompt.prompt_id].append(feedback.outcome is Outcome.PASSED)
            for outcome in (Outcome.PASSED, Outcome.FAILED, Outcome.TIMEOUT, Outcome.INVALID):
                totals.add(f"feedback/{outcome}_frac", float(feedback.outcome is outcome))
        if feedback.reward is not None:
            totals.add("feedback/reward", feedback.reward)
        if feedback.pass_fraction is not None:
            totals.add("feedback/pass_fraction", feedback.pass_fraction)

        totals.add("teacher/has_context_frac", float(context is not None))
        totals.add("teacher/demonstration_frac", float(context is not None and context.demonstration is not None))
        totals.add("teacher/feedback_frac", float(context is not None and context.shows_feedback))
        if context is not None:
            totals.add("teacher/context_tokens", float(len(context.token_ids)))
    for passed in passed_by_prompt.values():
        totals.add("feedback/solved_frac", float(any(passed)))
        totals.add("feedback/mixed_frac", float(any(passed) and not all(passed)))


def _count_targets(totals: Totals, examples: Sequence[Example], targets: Sequence[Targets | None]) -> None:
    known = [one for one in targets if one is not None]
    if not known:
        return
    # An update that has counted the same over exactly the tokens of its loss knows better.
    entropies = not totals.has("teacher/entropy_nats")
    masses = not totals.has("teacher/support_mass_frac")
    for one in known:
        if entropies:
            totals.add("teacher/entropy_nats", float(one.entropy.sum()), float(len(one.entropy)))
        if masses:
            totals.add("teacher/support_mass_frac", float(np.exp(one.logprobs).sum()), float(len(one.logprobs)))


def _samples(
    examples: Sequence[Example],
    targets: Sequence[Targets | None],
    count: int,
    decode: Callable[[int], str] | None,
) -> Iterator[dict[str, Any]]:
    """Records of ``count`` examples, evenly spaced, so that they belong to different prompts."""
    for index in range(min(count, len(examples))):
        at = index * len(examples) // min(count, len(examples))
        example, target = examples[at], targets[at] if at < len(targets) else None
        rollout, feedback, context = example.rollout, example.feedback, example.context
        record: dict[str, Any] = {
            "rollout": str(rollout.rollout_id),
            "version": rollout.newest_weights,
            "prompt": example.prompt.text,
            "response": rollout.text,
            "finish": str(rollout.finish),
            "outcome": str(feedback.outcome),
            "reward": feedback.reward,
            "feedback": feedback.text,
            "context": None if context is None else context.text,
            "demonstration": None if context is None or context.demonstration is None else str(context.demonstration),
        }
        if decode is not None:
            record["tokens"] = _tokens(example, target, decode)
        yield record


def _tokens(example: Example, target: Targets | None, decode: Callable[[int], str]) -> list[dict[str, Any]]:
    """Each token of the response: log-probabilities of student and teacher, and what the teacher would have said."""
    tokens: list[dict[str, Any]] = []
    for at, token in enumerate(example.rollout.token_ids):
        entry: dict[str, Any] = {"text": decode(int(token)), "student": round(float(example.rollout.logprobs[at]), 4)}
        if target is not None and at < len(target.support_ids):
            entry |= _said(target, at, int(token), decode)
        tokens.append(entry)
    return tokens


def _said(target: Targets, at: int, token: int, decode: Callable[[int], str]) -> dict[str, Any]:
    """What the teacher says of a token; without a support, of the sampled one alone."""
    ids, logprobs = target.support_ids[at], target.logprobs[at]
    if not len(ids):
        return {"teacher": round(float(target.sampled[at]), 4)}
    inside = np.flatnonzero(ids == token)
    said: dict[str, Any] = {"teacher": round(float(logprobs[inside[0]]), 4) if len(inside) else None}
    best = int(np.argmax(logprobs))
    if ids[best] >= 0:
        said |= {"best": decode(int(ids[best])), "best_prob": round(float(np.exp(logprobs[best])), 4)}
    return said
