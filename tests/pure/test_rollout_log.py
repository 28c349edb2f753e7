import dataclasses
import json
import math

import numpy as np
import pytest

from megatron_distil.data.rollout_log import StepFiles
from megatron_distil.errors import DataError
from megatron_distil.types import (
    Example,
    Feedback,
    FinishReason,
    Outcome,
    Prompt,
    Rollout,
    RolloutId,
    TeacherContext,
)
from tests.task_records import Counts


def example(prompt, sample, step=12):
    rng = np.random.default_rng([prompt, sample])
    rollout_id = RolloutId(step, f"p{prompt}", sample)
    logprobs = -rng.exponential(size=5).astype(np.float32)
    # Values whose shortest decimal forms are easily lost: smallest positive, next after 1, minus zero, largest.
    logprobs[:4] = [np.float32(1e-45), np.nextafter(np.float32(1), np.float32(2)), -0.0, np.finfo(np.float32).min]
    outcome = (Outcome.PASSED, Outcome.FAILED, Outcome.UNAVAILABLE)[sample % 3]
    context = TeacherContext(
        token_ids=np.arange(3, dtype=np.int32),
        text="c\u2028\n\x85",
        demonstration=RolloutId(step, f"p{prompt}", 0) if sample else None,
        shows_feedback=not sample,
    )
    return Example(
        prompt=Prompt(
            prompt_id=f"p{prompt}",
            text=f"prompt {prompt} \u00e9\U0001f600",
            token_ids=np.asarray([prompt, 2**31 - 1], dtype=np.int32),
            task={"id": f"p{prompt}", "expected": [1, None, 2.5], "nested": {"a": [True]}},
        ),
        rollout=Rollout(
            rollout_id=rollout_id,
            token_ids=rng.integers(0, 150_000, 5).astype(np.int32),
            text='two\nlines "quoted"',
            logprobs=logprobs,
            finish=FinishReason.LENGTH,
            oldest_weights=step - 1,
            newest_weights=step,
        ),
        feedback=Feedback(
            rollout_id=rollout_id,
            outcome=outcome,
            reward=None if outcome is Outcome.UNAVAILABLE else 1 / 3,
            text="said",
            duration_s=0.1 + 0.2,
        ),
        context=context if sample % 2 == 0 else None,
    )


def group(prompt, step=12):
    return [example(prompt, sample, step) for sample in range(4)]


def log(folder, replica_index=0, num_replicas=1, replay=None, add=None):
    return StepFiles(
        folder=folder, replica_index=replica_index, num_replicas=num_replicas, add=add or Counts(), replay=replay
    )


def plain(record):
    """The record with arrays as bytes, so that comparison is bit by bit."""
    if dataclasses.is_dataclass(record):
        return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, np.ndarray):
        return str(record.dtype), record.shape, record.tobytes()
    return [plain(entry) for entry in record] if isinstance(record, list) else record


def test_a_step_is_read_as_it_was_written_bit_by_bit(tmp_path):
    examples = group(1) + group(2)
    log(tmp_path / "rollouts").write(12, examples)
    assert plain(log(tmp_path / "rollouts").read(12)) == plain(examples)
    assert (tmp_path / "rollouts" / "step_000012.dp0.jsonl").exists()


def test_a_step_that_nobody_wrote_is_absent(tmp_path):
    assert log(tmp_path).read(12) is None
    log(tmp_path).write(12, group(1))
    assert log(tmp_path).read(13) is None


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.99])
def test_a_torn_file_is_absent_and_is_written_anew(tmp_path, kept):
    log(tmp_path).write(12, group(1))
    path = tmp_path / "step_000012.dp0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert log(tmp_path).read(12) is None
    log(tmp_path).write(12, group(1))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("lines", range(7))
def test_a_file_that_ends_after_a_whole_line_too_early_is_absent(tmp_path, lines):
    log(tmp_path).write(12, group(1))
    path = tmp_path / "step_000012.dp0.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    assert len(whole) == 7
    path.write_text("".join(whole[:lines]))
    assert log(tmp_path).read(12) is None
    path.write_text("".join(whole))
    assert plain(log(tmp_path).read(12)) == plain(group(1))


def test_a_file_that_was_not_finished_is_ignored(tmp_path):
    (tmp_path / "step_000012.dp0.tmp").write_text('{"format": 1}\n')
    assert log(tmp_path).read(12) is None


def corrupt(path, line, change):
    texts = path.read_text().splitlines()
    texts[line - 1] = change(texts[line - 1])
    path.write_text("\n".join(texts) + "\n")


def without_a_token(text):
    value = json.loads(text)
    return json.dumps({**value, "token_ids": value["token_ids"][:16]})


@pytest.mark.parametrize(
    ("line", "change", "reason"),
    [
        (3, lambda text: text[:-1], "Expecting"),
        (3, lambda text: text.replace('"failed"', '"lost"').replace('"passed"', '"lost"'), "lost"),
        (4, lambda text: text.replace('"logprobs"', '"lp"'), "no 'logprobs'"),
        (4, lambda text: text.replace('"p1"', '"p9"'), "12/p9/1: its prompt is not in the file"),
        (4, without_a_token, "12/p1/1: 3 tokens, 5 log-probabilities"),
        (1, lambda text: text.replace('"format": 1', '"format": 9'), "format 9"),
        (7, lambda text: text.replace("4", "5"), "4 examples, and the end says 5"),
    ],
)
def test_a_corrupt_file_is_refused_by_file_and_line(tmp_path, line, change, reason):
    log(tmp_path).write(12, group(1))
    path = tmp_path / "step_000012.dp0.jsonl"
    corrupt(path, line, change)
    with pytest.raises(DataError) as raised:
        log(tmp_path).read(12)
    assert f"{path}:{line}: " in str(raised.value)
    assert reason in str(raised.value)


def test_what_is_no_number_is_never_written(tmp_path):
    bad = dataclasses.replace(example(1, 0), feedback=dataclasses.replace(example(1, 0).feedback, reward=math.nan))
    with pytest.raises(ValueError, match="JSON"):
        log(tmp_path).write(12, [bad])
    assert log(tmp_path).read(12) is None


@pytest.mark.parametrize("num_replicas", [1, 3, 6])
def test_another_number_of_replicas_shares_a_step_anew_by_prompt(tmp_path, num_replicas):
    for index in range(2):
        own = [entry for prompt in range(3 * index, 3 * index + 3) for entry in group(prompt)]
        log(tmp_path, index, 2).write(12, own)
    shared = [log(tmp_path, index, num_replicas).read(12) for index in range(num_replicas)]
    assert all(len(share) == 24 // num_replicas for share in shared)
    everything = [entry for prompt in range(6) for entry in group(prompt)]
    assert plain([entry for share in shared for entry in share]) == plain(everything)


def test_a_step_of_another_number_of_replicas_with_a_file_missing_is_absent_for_all(tmp_path):
    log(tmp_path, 0, 2).write(12, group(0))
    assert [log(tmp_path, index, 3).read(12) for index in range(3)] == [None] * 3
    assert log(tmp_path, 0, 1).read(12) is None
    assert log(tmp_path, 1, 2).read(12) is None
    assert plain(log(tmp_path, 0, 2).read(12)) == plain(group(0))


def test_files_of_different_numbers_of_replicas_are_not_mixed(tmp_path):
    log(tmp_path, 0, 2).write(12, group(0))
    log(tmp_path, 1, 4).write(12, group(1))
    assert [log(tmp_path, index, 1).read(12) for index in range(1)] == [None]
    assert log(tmp_path, 1, 2).read(12) is None


def test_another_run_is_asked_for_what_this_one_has_not_logged(tmp_path):
    log(tmp_path / "old").write(12, group(1))
    log(tmp_path / "old").write(13, group(1, 13))
    log(tmp_path / "new").write(13, group(2, 13))
    counts = Counts()
    replaying = log(tmp_path / "new", replay=tmp_path / "old", add=counts)
    assert plain(replaying.read(12)) == plain(group(1))
    assert counts.sums == {"rollout/replayed_frac": (4, 4)}
    assert plain(replaying.read(13)) == plain(group(2, 13))
    assert replaying.read(14) is None
