"""The catalogue: every metric by its name, ``area/quantity_unit``, with a sentence. An unknown name is a bug."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches

SENTENCE_BY_NAME: Mapping[str, str] = {
    # What the student has still to learn. The surrogate's value is not here: it can fall while nothing is learnt.
    "loss/ce_nats": "Cross-entropy of the student to the teacher (supervised: to the given response), per token.",
    "loss/kl_nats": "The same without the teacher's entropy: what the student could still gain, per token.",
    "loss/divergence_nats": "Divergence from the teacher that is made smaller, per token (sdpo, opsd).",
    "loss/reverse_kl_nats": "Log-probability of the sampled tokens, student less teacher, per token (opd).",
    "loss/credit_nats": "Cost that the sampled token answers for, mean over tokens.",
    "loss/credit_max_nats": "Largest credit of a token.",
    "loss/policy_gain": "Mean of the ratio times the advantage, clipped in grpo (grpo, opd).",
    "loss/tokens": "Tokens that carry a loss, over all replicas and updates of the step.",
    "loss/sequences": "Sequences in the denominators, over all replicas and updates of the step.",
    "loss/without_verdict": "Rollouts left out of loss and denominator: the judge gave no verdict.",
    # What the optimizer did.
    "train/grad_norm": "Norm of the whole gradient before clipping, mean over updates.",
    "train/grad_norm_max": "Largest of them in the step.",
    "train/learning_rate": "Of the last updates, mean over the step.",
    "train/updates": "Optimizer steps of this step.",
    "train/microbatches": "Forward and backward passes of one replica in this step, mean over replicas.",
    "train/padding_frac": "Share of the packed tokens that is padding.",
    "train/entropy_nats": "Entropy of the student at the sampled positions.",
    "train/ratio": "Probability of the sampled token now, over that before the step (opd: when it was sampled); mean.",
    "train/ratio_clipped_frac": "Share of the loss tokens whose ratio was cut.",
    "train/tis_clipped_frac": "Share of the loss tokens whose importance weight was cut.",
    "train/token_clipped_frac": "Share of the loss tokens whose cross-entropy was cut.",
    # The teacher at the student's states.
    "teacher/support_mass_frac": "Teacher's probability on the support; the rest is in the tail.",
    "teacher/student_mass_frac": "Student's probability on the support.",
    "teacher/entropy_nats": "Teacher's entropy over the whole vocabulary, per token.",
    "teacher/has_context_frac": "Share of the rollouts that the teacher had something to say about.",
    "teacher/demonstration_frac": "Share of the rollouts whose teacher read a sibling's solution.",
    "teacher/feedback_frac": "Share of the rollouts whose teacher read the feedback.",
    "teacher/drawn_frac": "Share of the positions at which an expert was heard.",
    "teacher/context_tokens": "Length of the teacher's context.",
    "teacher/shortened_frac": "Share of the contexts of which something was left out.",
    "teacher/too_long_frac": "Share of the rollouts without a context because it did not fit.",
    # What the student did.
    "rollout/response_tokens": "Length of a response, the stop token included.",
    "rollout/response_tokens_max": "Longest response of the step.",
    "rollout/prompt_tokens": "Length of a prompt.",
    "rollout/truncated_frac": "Share of the responses that were cut at rollout.max_response_tokens.",
    "rollout/logprob_nats": "Log-probability of the sampled tokens, as the engine reported it.",
    "rollout/lag_steps_max": "Steps between the oldest weights of a rollout and the step that trains on it.",
    "rollout/retries": "Requests that were sent again, to any server.",
    "rollout/replayed_frac": "Share of the rollouts that were read from the log and not sampled.",
    "rollout/count": "Rollouts of the step, over all replicas.",
    # What the judge said.
    "feedback/passed_frac": "Share of the judged rollouts that passed.",
    "feedback/failed_frac": "Share of the judged rollouts that failed.",
    "feedback/timeout_frac": "Share of the judged rollouts that ran out of time.",
    "feedback/invalid_frac": "Share of the judged rollouts in which there was nothing to judge.",
    "feedback/unavailable_frac": "Share of all rollouts without a verdict: our outage.",
    "feedback/reward": "Mean reward of the judged rollouts.",
    "feedback/solved_frac": "Share of the prompts with at least one rollout that passed.",
    "feedback/mixed_frac": "Share of the prompts with rollouts that passed and rollouts that did not.",
    "feedback/duration_s": "Time of one judgement.",
    "feedback/duration_max_s": "Longest judgement of the step.",
    "feedback/pass_fraction": "Share of a program's tests that passed, mean over the judged rollouts.",
    "feedback/seat_s": "Wait of a program for a free worker of any sandbox, here.",
    "feedback/queue_s": "Wait of a program for a worker in its sandbox.",
    "feedback/run_s": "Run of a program on its tests.",
    "feedback/retries": "Programs that were sent to a sandbox again.",
    "feedback/unavailable": "Requests that a sandbox did not answer with a verdict.",
    # Trainer and engines.
    "sync/logprob_gap_nats": "Trainer against engine on the sampled tokens, mean absolute difference.",
    "sync/logprob_gap_max_nats": "Largest such difference of the step.",
    "sync/bytes": "Sent to the engines in one publication.",
    "sync/buckets": "Collectives of one publication.",
    "sync/admitted": "Servers that came back and were given the weights since the last step.",
    "sync/engines": "Servers that hold the published weights.",
    # The clock of the first head.
    "time/step_s": "From the end of the step before to the end of this one.",
    "time/collect_s": "Sampling, judging and contexts.",
    "time/sample_s": "Sampling.",
    "time/judge_s": "Judging.",
    "time/contexts_s": "Making the teacher's contexts.",
    "time/teach_s": "The teacher's forward passes.",
    "time/pack_s": "Packing into microbatches.",
    "time/update_s": "Packing, forward, backward and optimizer of all updates.",
    "time/follow_s": "Moving the teacher's weights.",
    "time/publish_s": "Bringing the weights into every engine.",
    "time/export_s": "Putting sharded weights together under their public names.",
    "time/send_s": "Moving the weights.",
    "time/verify_s": "Comparing checksums with the engines.",
    "time/release_s": "Engines giving back what they share with the trainer.",
    "time/save_s": "Until the trainer may go on after a checkpoint.",
    "time/eval_s": "Evaluation.",
    "time/tokens_per_s": "Response tokens of the step over its time.",
    "time/tokens_per_s_per_gpu": "The same for each process of the trainer.",
    "memory/peak_bytes": "Largest memory of a head: of the device, on a CPU of the process.",
}

TOTALS = frozenset(
    {
        "loss/sequences",
        "loss/tokens",
        "loss/without_verdict",
        "feedback/retries",
        "feedback/unavailable",
        "rollout/count",
        "rollout/retries",
        "sync/admitted",
    }
)
"""Counted once each and never divided; ``is_total`` knows those of single services as well."""

_SET = r"eval/([a-z0-9]+_)*?"
_AT = r"feedback/at_(?P<name>[a-z0-9_]+)_"
_COUNTED_AT = re.compile(_AT + r"(retries|unavailable)")
PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(_AT + r"queue_s"), "Wait of a program for a worker of {name}."),
    (re.compile(_AT + r"run_s"), "Run of a program on its tests at {name}."),
    (re.compile(_AT + r"retries"), "Programs that were sent to {name} after another attempt."),
    (re.compile(_AT + r"unavailable"), "Requests that {name} did not answer with a verdict."),
    (re.compile(_SET + r"avg_at_(?P<n>\d+)"), "Held-out prompts: share of {n} responses that passed."),
    (re.compile(_SET + r"pass_at_(?P<n>\d+)"), "Held-out prompts: chance that one of {n} responses passes."),
    (
        re.compile(_SET + r"best_at_(?P<n>\d+)"),
        "Held-out prompts: best reward of {n} responses, drawn with replacement.",
    ),
    (re.compile(_SET + r"maj_at_(?P<n>\d+)"), "Held-out prompts: reward of the most frequent of {n} responses."),
    (re.compile(_SET + r"pass_fraction"), "Held-out prompts: share of a program's tests that passed."),
    (re.compile(_SET + r"response_tokens"), "Held-out prompts: length of a response."),
    (re.compile(_SET + r"truncated_frac"), "Held-out prompts: share of the responses that were cut."),
    (re.compile(_SET + r"unavailable_frac"), "Held-out prompts: share of the responses without a verdict."),
    (re.compile(_SET + r"reward"), "Held-out prompts: mean reward."),
    (re.compile(_SET + r"first_road_share"), "Held-out prompts: share of the responses that take the first road."),
    (re.compile(r"eval/[a-z0-9]+(_[a-z0-9]+)*"), "Held-out prompts: a measure of the task, mean over responses."),
)


def is_total(name: str) -> bool:
    """Whether a metric is counted once each and never divided."""
    return name in TOTALS or _COUNTED_AT.fullmatch(name) is not None


def metric_part(name: str) -> str:
    """The name of a service as a part of the name of a metric."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unnamed"


def sentence(name: str) -> str:
    """What a metric means.

    Raises:
        ValueError: there is none of that name.
    """
    if name in SENTENCE_BY_NAME:
        return SENTENCE_BY_NAME[name]
    for pattern, text in PATTERNS:
        if found := pattern.fullmatch(name):
            return text.format(**found.groupdict())
    close = get_close_matches(name, SENTENCE_BY_NAME, n=1)
    hint = f"did you mean {close[0]}?" if close else "add it with a sentence"
    raise ValueError(f"{name}: not in the catalogue metrics/names.py; {hint}")
