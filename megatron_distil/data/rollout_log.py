"""Every step's rollouts and feedback on disk, before they are trained on.

One file per step and replica, ``rollouts/step_000012.dp0.jsonl``: a header, every prompt once, one line per example, a footer
with the number of examples. Texts are plain; token ids and log-probabilities are the little-endian bytes of their arrays in
base64, so that a step that is read again is the same bit for bit. A file has its name only when all of it is on disk.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_distil.errors import DataError
from megatron_distil.types import (
    Example,
    Feedback,
    FinishReason,
    Floats,
    Ids,
    Outcome,
    Prompt,
    Rollout,
    RolloutId,
    Sums,
    TeacherContext,
)

FORMAT = 1


class LoggedStep(NamedTuple):
    """The contents of one file."""

    step: int
    replica_index: int
    num_replicas: int
    examples: list[Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFiles:
    """Fulfils ``protocols.RolloutLog``.

    A step that another number of replicas has written is read whole and shared anew, prompt by prompt, as the prompts
    themselves are. A file of which the end is missing counts as absent: the step is sampled.
    """

    folder: Path
    replica_index: int
    num_replicas: int
    add: Callable[[Sums], None]
    """Counts ``rollout/replayed_frac``."""
    replay: Path | None = None
    """The ``rollouts`` folder of another run; asked for steps that this run has not logged."""

    def read(self, step: int) -> list[Example] | None:
        """This replica's examples of a step; None: nobody has logged them.

        Raises:
            DataError: a file is corrupt; names file and line.
        """
        for folder in (self.folder, self.replay):
            if folder is None:
                continue
            examples = self._read_from(folder, step)
            if examples is not None:
                self.add(Sums(sums={"rollout/replayed_frac": (len(examples), len(examples))}))
                return examples
        return None

    def write(self, step: int, examples: Sequence[Example]) -> None:
        """Write a step; it is on disk when this returns."""
        path = self.folder / file_name(step, self.replica_index)
        header = {
            "format": FORMAT,
            "step": step,
            "replica_index": self.replica_index,
            "num_replicas": self.num_replicas,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in _lines(header, examples))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(self.folder)
        self.add(Sums(sums={"rollout/replayed_frac": (0, len(examples))}))

    def _read_from(self, folder: Path, step: int) -> list[Example] | None:
        own = read_step_file(folder / file_name(step, self.replica_index))
        if own is not None and own.num_replicas == self.num_replicas:
            return own.examples
        return self._share_of_all(folder, step)

    def _share_of_all(self, folder: Path, step: int) -> list[Example] | None:
        """The replica's share of a step that another number of replicas has logged."""
        first = read_step_file(folder / file_name(step, 0))
        if first is None or first.num_replicas == self.num_replicas:
            return None
        logged = [first]
        for index in range(1, first.num_replicas):
            other = read_step_file(folder / file_name(step, index))
            if other is None or other.num_replicas != first.num_replicas:
                return None
            logged.append(other)
        groups: dict[str, list[Example]] = {}
        for example in (example for file in logged for example in file.examples):
            groups.setdefault(example.prompt.prompt_id, []).append(example)
        own, rest = divmod(len(groups), self.num_replicas)
        if rest:
            raise DataError(
                f"{folder}: step {step} has {len(groups)} prompts, which {self.num_replicas} replicas cannot share"
            )
        mine = list(groups.values())[self.replica_index * own : (self.replica_index + 1) * own]
        return [example for group in mine for example in group]


def file_name(step: int, replica_index: int) -> str:
    """The name of a step's file."""
    return f"step_{step:06d}.dp{replica_index}.jsonl"


def read_step_file(path: Path) -> LoggedStep | None:
    """One file; None: it is not there, or its end is missing.

    Raises:
        DataError: it is corrupt; names file and line.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; delete the file and the step is sampled again") from error
    if len(texts) < 2 or not texts[-1].startswith('{"end": ') or not texts[-1].endswith("}"):
        return None
    line = 0
    try:
        values = []
        for line, text in enumerate(texts, start=1):  # noqa: B007 - the error names it
            values.append(json.loads(text))
        line = 1
        header = _header(values[0])
        prompts: dict[str, Prompt] = {}
        examples: list[Example] = []
        for line, value in enumerate(values[1:-1], start=2):  # noqa: B007 - the error names it
            if "prompt" in value:
                prompt = _read_prompt(value["prompt"])
                prompts[prompt.prompt_id] = prompt
            else:
                examples.append(_read_example(value, prompts))
        line = len(texts)
        _require(values[-1]["end"] == len(examples), f"{len(examples)} examples, and the end says {values[-1]['end']}")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}:{line}: {reason}; delete the file and the step is sampled again") from error
    return header._replace(examples=examples)


def _lines(header: Mapping[str, object], examples: Sequence[Example]) -> Iterator[Mapping[str, object]]:
    yield header
    seen: set[str] = set()
    for example in examples:
        if example.prompt.prompt_id not in seen:
            seen.add(example.prompt.prompt_id)
            yield {"prompt": _prompt(example.prompt)}
        yield _example(example)
    yield {"end": len(examples)}


def _prompt(prompt: Prompt) -> Mapping[str, object]:
    ids = _packed(prompt.token_ids, np.int32)
    return {"prompt_id": prompt.prompt_id, "text": prompt.text, "token_ids": ids, "task": dict(prompt.task)}


def _example(example: Example) -> Mapping[str, object]:
    rollout, feedback, context = example.rollout, example.feedback, example.context
    return {
        "rollout_id": list(rollout.rollout_id),
        "text": rollout.text,
        "token_ids": _packed(rollout.token_ids, np.int32),
        "logprobs": _packed(rollout.logprobs, np.float32),
        "finish": rollout.finish.value,
        "weights": [rollout.oldest_weights, rollout.newest_weights],
        "feedback": {
            "outcome": feedback.outcome.value,
            "reward": feedback.reward,
            "text": feedback.text,
            "duration_s": feedback.duration_s,
            "pass_fraction": feedback.pass_fraction,
            "vote": feedback.vote,
        },
        "context": None
        if context is None
        else {
            "token_ids": _packed(context.token_ids, np.int32),
            "text": context.text,
            "demonstration": None if context.demonstration is None else list(context.demonstration),
            "shows_feedback": context.shows_feedback,
        },
    }


def _header(value: Any) -> LoggedStep:
    _require(value["format"] == FORMAT, f"format {value['format']}, and we read {FORMAT}")
    return LoggedStep(value["step"], value["replica_index"], value["num_replicas"], [])


def _read_prompt(value: Any) -> Prompt:
    return Prompt(
        prompt_id=value["prompt_id"], text=value["text"], token_ids=_ids(value["token_ids"]), task=value["task"]
    )


def _read_example(value: Any, prompts: Mapping[str, Prompt]) -> Example:
    rollout_id = RolloutId(*value["rollout_id"])
    _require(rollout_id.prompt in prompts, f"{rollout_id}: its prompt is not in the file")
    token_ids, logprobs = _ids(value["token_ids"]), _floats(value["logprobs"])
    _require(
        len(token_ids) == len(logprobs), f"{rollout_id}: {len(token_ids)} tokens, {len(logprobs)} log-probabilities"
    )
    oldest, newest = value["weights"]
    rollout = Rollout(
        rollout_id=rollout_id,
        token_ids=token_ids,
        text=value["text"],
        logprobs=logprobs,
        finish=FinishReason(value["finish"]),
        oldest_weights=oldest,
        newest_weights=newest,
    )
    said = value["feedback"]
    feedback = Feedback(
        rollout_id=rollout_id,
        outcome=Outcome(said["outcome"]),
        reward=said["reward"],
        text=said["text"],
        duration_s=said["duration_s"],
        pass_fraction=said.get("pass_fraction"),  # logs of 0.1 have neither
        vote=said.get("vote", ""),
    )
    context = None if value["context"] is None else _read_context(value["context"])
    return Example(prompt=prompts[rollout_id.prompt], rollout=rollout, feedback=feedback, context=context)


def _read_context(value: Any) -> TeacherContext:
    shown = value["demonstration"]
    return TeacherContext(
        token_ids=_ids(value["token_ids"]),
        text=value["text"],
        demonstration=None if shown is None else RolloutId(*shown),
        shows_feedback=value["shows_feedback"],
    )


def _packed(values: Ids | Floats, dtype: type[np.int32] | type[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()).decode(
        "ascii"
    )


def _ids(text: str) -> Ids:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4").astype(np.int32)


def _floats(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _sync_folder(folder: Path) -> None:
    """The new name is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
