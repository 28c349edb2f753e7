"""Objectives reduce to something known; their settings are read without torch."""

import math
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_from_table, objective_names
from tests.tokens import tokens_of

T, VOCAB, K = 12, 9, 4


def case(sampling_gap=0.0, advantages=None):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(T, VOCAB, generator=draw, dtype=torch.float64).requires_grad_()
    top = algo.top_k(torch.randn(T, VOCAB, generator=draw, dtype=torch.float64), K)
    sampled = torch.randint(0, VOCAB, (T,), generator=draw)
    student = algo.columns(logits, top.ids, sampled)
    weights = (torch.rand(T, generator=draw, dtype=torch.float64) < 0.8) / T
    tokens = tokens_of(
        student,
        top.logprobs,
        sampling_logprobs=student.sampled.detach() + sampling_gap,
        advantages=torch.zeros(T) if advantages is None else advantages,
        weights=weights,
    )
    return logits, tokens


def future(cost, *, mean, discount):
    mask, segments = torch.ones(T, dtype=torch.bool), torch.arange(T) // 5
    return algo.future_credit(cost, mask, segments, mean=mean, discount=discount)


def gradient(table, **options):
    logits, tokens = case(**options)
    terms = objective_from_table(table).terms(tokens, future)
    (terms.imitation + terms.credit).backward()
    return logits.grad, terms


def test_the_names_are_those_of_the_files():
    assert objective_names() == ["ce", "distil", "grpo", "opd", "opsd", "sdpo", "sft"]


def test_distil_without_weight_on_the_credit_is_ce():
    got, _ = gradient({"name": "distil", "future": "sum", "future_coef": 0.0})
    want, _ = gradient({"name": "ce"})
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    other, _ = gradient({"name": "distil", "future": "sum"})
    assert not torch.allclose(other, want, rtol=1e-3)


def test_ce_has_the_gradient_of_the_divergence():
    logits, tokens = case()
    teacher = torch.cat([tokens.teacher_logprobs.exp(), 1 - tokens.teacher_logprobs.exp().sum(-1, keepdim=True)], -1)
    student = torch.cat([tokens.student.support, tokens.student.tail[:, None]], -1)
    kl = torch.nn.functional.kl_div(student, teacher, reduction="none").sum(-1)
    (tokens.weights * kl).sum().backward()
    got, terms = gradient({"name": "ce"})
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-12)
    assert terms.counts["loss/kl_nats"].item() == pytest.approx((kl * (tokens.weights != 0)).sum().item(), rel=1e-10)


def test_sft_is_the_cross_entropy_of_torch():
    logits, tokens = case()
    draw = torch.Generator().manual_seed(0)
    torch.randn(T, VOCAB, generator=draw, dtype=torch.float64)
    torch.randn(T, VOCAB, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (T,), generator=draw)
    (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * tokens.weights).sum().backward()
    got, _ = gradient({"name": "sft"})
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-12)


def test_grpo_on_policy_is_the_plain_policy_gradient():
    advantages = torch.linspace(-1, 1, T, dtype=torch.float64)
    logits, tokens = case(advantages=advantages)
    (-(tokens.weights * advantages * tokens.student.sampled).sum()).backward()
    got, terms = gradient({"name": "grpo"}, advantages=advantages)
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-12)
    assert terms.counts["train/ratio_clipped_frac"].item() == 0


def test_the_importance_weight_is_truncated_and_counted():
    half, _ = gradient({"name": "ce"}, sampling_gap=math.log(2.0))
    plain, terms = gradient({"name": "ce"})
    torch.testing.assert_close(half, plain / 2, rtol=1e-10, atol=1e-15)
    assert terms.counts["train/tis_clipped_frac"].item() == 0
    capped, terms = gradient({"name": "ce"}, sampling_gap=-5.0)
    torch.testing.assert_close(capped, plain * 2, rtol=1e-10, atol=1e-15)
    _, tokens = case()
    assert terms.counts["train/tis_clipped_frac"].item() == (tokens.weights != 0).sum()
    off, _ = gradient({"name": "ce", "tis_clip": "none"}, sampling_gap=-5.0)
    torch.testing.assert_close(off, plain, rtol=1e-10, atol=1e-15)


def test_advantages_compare_with_the_group_only():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 1.0]), torch.tensor([7, 7, 7, 3, 7])
    assert algo.group_advantages(rewards, groups, normalise_std=False).tolist() == [0.5, -0.5, -0.5, 0.0, 0.5]
    scaled = algo.group_advantages(rewards, groups, normalise_std=True)
    std = torch.tensor([1.0, 0.0, 0.0, 1.0]).std().item()
    assert scaled.tolist() == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.0, 0.5 / std], rel=1e-5)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"name": "dist"}, "'dist' is not an objective; there are ce, distil, grpo, opd, opsd, sdpo, sft"),
        ({"name": "objective"}, "'objective' is not an objective"),
        ({}, "must be a table with a name"),
        ("distil", "must be a table with a name"),
        ({"name": "distil"}, "future\n  Field required"),
        ({"name": "ce", "future": "sum"}, "Extra inputs are not permitted"),
        ({"name": "grpo", "clip_low": "0.2"}, "valid number"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(table, text):
    with pytest.raises((ValueError, ValidationError), match=text):
        objective_from_table(table)


def test_settings_are_read_without_torch():
    code = (
        "import sys; from megatron_distil.algo.objectives import objective_from_table as o, objective_names as n;"
        "[o({'name': x} | ({'future': 'sum'} if x == 'distil' else {})) for x in n()];"
        "assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
