"""The shift, the weights, the denominators and the layout of microbatches."""

import numpy as np
import pytest
import torch

from megatron_distil.config.schema import Config
from megatron_distil.data.packing import Alignment, BatchPacker, alignment, balanced_bins, split_prompts
from megatron_distil.errors import DataError
from megatron_distil.types import (
    Document,
    Example,
    Feedback,
    FinishReason,
    Outcome,
    Prompt,
    Rollout,
    RolloutId,
    Targets,
    TeacherContext,
)


def config(objective=None, train=None, parallel=None):
    return Config.model_validate(
        {
            "model": "m",
            "task": {"name": "t"},
            "data": {"train": "x"},
            "objective": objective or {"name": "distil", "future": "sum"},
            "train": {"num_steps": 1, "max_microbatch_tokens": 64} | (train or {}),
            "parallel": parallel or {},
        }
    )


def alone(value):
    return [value]


def example(
    prompt="a", sample=0, prompt_ids=(11, 12), response_ids=(21, 22, 23), reward: float | None = 1.0, taught=True
):
    rollout_id = RolloutId(0, prompt, sample)
    ids = np.array(response_ids, dtype=np.int32)
    row = Prompt(prompt_id=prompt, text="", token_ids=np.array(prompt_ids, dtype=np.int32), task={})
    context = TeacherContext(token_ids=row.token_ids, text="", demonstration=None, shows_feedback=True)
    return Example(
        prompt=row,
        rollout=Rollout(
            rollout_id=rollout_id,
            token_ids=ids,
            text="",
            logprobs=-0.5 - np.arange(len(ids), dtype=np.float32),
            finish=FinishReason.STOP,
            oldest_weights=0,
            newest_weights=0,
        ),
        feedback=Feedback(
            rollout_id=rollout_id,
            outcome=Outcome.UNAVAILABLE if reward is None else Outcome.PASSED,
            reward=reward,
            text="",
            duration_s=0.0,
        ),
        context=context if taught else None,
    )


def target(example_, width=2):
    if example_.context is None:
        return None
    r = len(example_.rollout.token_ids)
    return Targets(
        support_ids=np.arange(r * width, dtype=np.int32).reshape(r, width),
        logprobs=np.full((r, width), -1.5, dtype=np.float32),
        entropy=np.arange(r, dtype=np.float32),
        sampled=np.arange(r, dtype=np.float32) - 9.0,
    )


def batches(examples, gather=alone, **tables):
    return BatchPacker(config(**tables), gather=gather).batches(examples, [target(e) for e in examples], 0)


def test_every_vector_lies_where_the_token_before_is_read():
    ((microbatch,),) = (batch.microbatches for batch in batches([example()]))
    assert microbatch.token_ids.tolist() == [11, 12, 21, 22, 23]
    assert microbatch.sampled_ids.tolist() == [12, 21, 22, 23, 0]
    assert microbatch.response_mask.tolist() == [False, True, True, True, False]
    assert microbatch.sampling_logprobs.tolist() == [0.0, -0.5, -1.5, -2.5, 0.0]
    assert microbatch.support_ids.tolist() == [[-1, -1], [0, 1], [2, 3], [4, 5], [-1, -1]]
    assert microbatch.teacher_logprobs[:, 0].tolist() == [-np.inf, -1.5, -1.5, -1.5, -np.inf]
    assert microbatch.teacher_entropy.tolist() == [0.0, 0.0, 1.0, 2.0, 0.0]
    assert microbatch.teacher_sampled.tolist() == [0.0, -9.0, -8.0, -7.0, 0.0]
    torch.testing.assert_close(microbatch.loss_weights, torch.tensor([0, 1, 1, 1, 0]) / 3)
    assert microbatch.positions.tolist() == [0, 1, 2, 3, 4]
    assert microbatch.cu_seqlens.tolist() == [0, 5]


def test_sequences_share_a_row_and_restart_in_it():
    (batch,) = batches([example(), example(sample=1, response_ids=(31,))])
    (row,) = batch.microbatches
    assert row.token_ids.tolist() == [11, 12, 21, 22, 23, 11, 12, 31]
    assert row.sampled_ids.tolist() == [12, 21, 22, 23, 0, 12, 31, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.segment_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert row.cu_seqlens.tolist() == [0, 5, 8]
    assert row.group_ids.tolist() == [0, 0]
    assert batch.denominator == 4


@pytest.mark.parametrize(
    ("reduction", "denominator", "weights"),
    [
        ("token-mean", 4, {0: 1 / 4, 1: 1 / 4}),
        ("seq-mean-token-mean", 3, {0: 1 / 9, 1: 1 / 3}),
        ("seq-mean-token-sum", 3, {0: 1 / 3, 1: 1 / 3}),
    ],
)
def test_a_rollout_without_context_is_a_sequence_and_one_without_verdict_is_nothing(reduction, denominator, weights):
    rows = [
        example(),
        example(sample=1, response_ids=(31,)),
        example(sample=2, taught=False),
        example(sample=3, reward=None),
    ]
    (batch,) = batches(rows, objective={"name": "distil", "future": "sum", "reduction": reduction})
    (row,) = batch.microbatches
    assert batch.denominator == denominator
    for segment, weight in weights.items():
        got = row.loss_weights[(row.segment_ids == segment) & row.response_mask]
        torch.testing.assert_close(got, torch.full_like(got, weight))
    assert set(row.segment_ids.tolist()) == {0, 1}


def test_the_denominator_is_that_of_all_replicas():
    answers = iter([[[("a", 1.0)], [("b", 0.0)]], [[3.0], [5.0]]])
    (batch,) = batches([example()], gather=lambda _: next(answers))
    assert batch.denominator == 8
    torch.testing.assert_close(batch.microbatches[0].loss_weights, torch.tensor([0, 1, 1, 1, 0]) / 8)


def test_advantages_look_at_the_whole_group_wherever_it_is():
    answers = iter([[[("a", 1.0), ("a", None)], [("a", 0.0), ("b", 1.0)]], [[3.0], [5.0]]])
    (batch,) = batches(
        [example(), example(sample=1, reward=None)], gather=lambda _: next(answers), objective={"name": "grpo"}
    )
    (row,) = batch.microbatches
    assert row.advantages.tolist() == [0.0, 0.5, 0.5, 0.5, 0.0]


def test_prompts_are_cut_into_updates_of_equal_size_whoever_asks():
    names = [f"p{i}" for i in range(10)]
    parts = split_prompts(names, 3, (0, 1))
    assert sorted(list(parts.values()).count(i) for i in range(3)) == [3, 3, 4]
    assert split_prompts(names[::-1] * 2, 3, (0, 1)) == parts
    assert split_prompts(names, 3, (0, 2)) != parts
    got = batches([example(prompt=n, sample=s) for n in names for s in range(2)], train={"updates_per_step": 5})
    assert [batch.denominator for batch in got] == [2 * 2 * 3] * 5


def test_a_replica_without_a_loss_still_has_a_microbatch():
    (batch,) = batches([], parallel={"cp": 2, "tp": 2, "sequence_parallel": True})
    (row,) = batch.microbatches
    assert row.loss_weights.shape == (8,)
    assert not row.response_mask.any()
    assert (row.segment_ids == -1).all()
    assert row.cu_seqlens.tolist() == [0, 8]


@pytest.mark.parametrize(
    ("parallel", "sequence", "total"),
    [
        ({}, 1, 1),
        ({"tp": 2}, 1, 1),
        ({"tp": 4, "sequence_parallel": True}, 1, 4),
        ({"cp": 2, "tp": 4}, 4, 1),
        ({"cp": 2, "tp": 2, "sequence_parallel": True}, 8, 1),
    ],
)
def test_lengths_are_padded_to_what_the_layout_needs(parallel, sequence, total):
    tables = config(parallel=parallel)
    assert alignment(tables.parallel) == Alignment(sequence, total)
    (batch,) = batches([example(), example(sample=1, response_ids=(31,))], parallel=parallel)
    (row,) = batch.microbatches
    lengths = row.cu_seqlens.diff()
    assert (lengths % sequence == 0).all()
    assert len(row.token_ids) % total == 0
    assert row.cu_seqlens[-1] == len(row.token_ids) == len(row.teacher_logprobs)
    assert row.response_mask.sum() == 4
    assert (row.segment_ids == -1).sum() == len(row.token_ids) - 8
    assert not row.response_mask[row.segment_ids == -1].any()


def test_microbatches_are_full_and_even():
    bins = balanced_bins([5, 5, 5, 5, 4, 4, 4, 4], 20)
    assert [sum([5, 5, 5, 5, 4, 4, 4, 4][i] for i in bin_) for bin_ in bins] == [18, 18]
    lengths = [7, 6, 5, 4, 3, 3, 2, 1, 1]
    for limit in (7, 9, 12, 40):
        bins = balanced_bins(lengths, limit)
        assert sorted(i for bin_ in bins for i in bin_) == list(range(9))
        assert max(sum(lengths[i] for i in bin_) for bin_ in bins) <= limit
    assert balanced_bins([], 8) == []


def test_a_sequence_that_fits_nowhere_names_itself_and_the_setting():
    with pytest.raises(DataError, match=r"rollout 0/a/3: 8 tokens .*max_microbatch_tokens = 7 to 8 or more"):
        batches(
            [example(sample=3)],
            train={"max_microbatch_tokens": 7},
            parallel={"cp": 2, "tp": 2, "sequence_parallel": True},
        )


def test_narrow_targets_are_padded_with_unused_slots():
    rows = [example(), example(sample=1)]
    packer = BatchPacker(config(), gather=alone)
    (batch,) = packer.batches(rows, [target(rows[0], 1), target(rows[1], 3)], 0)
    (row,) = batch.microbatches
    assert row.support_ids.shape == (10, 3)
    assert row.support_ids[1].tolist() == [0, -1, -1]
    assert row.teacher_logprobs[1].tolist() == [-1.5, -np.inf, -np.inf]
    assert row.support_ids[6].tolist() == [0, 1, 2]


def test_documents_teach_their_response():
    packer = BatchPacker(config(objective={"name": "sft"}), gather=alone)
    ids = np.array([11, 12], dtype=np.int32), np.array([21, 22, 23], dtype=np.int32)
    batch = packer.documents([Document(context_ids=ids[0], response_ids=ids[1])])
    (row,) = batch.microbatches
    assert row.sampled_ids.tolist() == [12, 21, 22, 23, 0]
    torch.testing.assert_close(row.loss_weights, torch.tensor([0, 1, 1, 1, 0]) / 3)
    assert row.support_ids.shape == (5, 0)
