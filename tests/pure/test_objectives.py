"""Objectives reduce to something known; their settings are read without torch."""

import math
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_class, objective_from_table, objective_names
from megatron_distil.algo.objectives.objective import largest
from megatron_distil.metrics.names import SENTENCE_BY_NAME
from tests.tokens import tokens_of

T, VOCAB, K = 12, 9, 4


def case(sampling_gap=0.0, old_gap=0.0, **fields):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(T, VOCAB, generator=draw, dtype=torch.float64).requires_grad_()
    top = algo.top_k(torch.randn(T, VOCAB, generator=draw, dtype=torch.float64), K)
    sampled = torch.randint(0, VOCAB, (T,), generator=draw)
    student = algo.columns(logits, top.ids, sampled)
    weights = (torch.rand(T, generator=draw, dtype=torch.float64) < 0.8) / T
    old = student.sampled.detach() + old_gap
    return logits, tokens_of(
        student, top.logprobs, old_logprobs=old, sampling_logprobs=old + sampling_gap, weights=weights, **fields
    )


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
    got, terms = gradient({"name": "sft"})
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-12)
    nats = torch.nn.functional.cross_entropy(logits[in_loss()], labels[in_loss()], reduction="sum")
    assert terms.counts["loss/ce_nats"].item() == pytest.approx(nats.item(), rel=1e-10)


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


def test_the_ratio_to_the_policy_before_the_step_multiplies_it():
    plain, terms = gradient({"name": "distil", "future": "sum"})
    assert terms.counts["train/ratio_clipped_frac"].item() == 0
    half, _ = gradient({"name": "distil", "future": "sum"}, old_gap=math.log(2.0))
    torch.testing.assert_close(half, plain / 2, rtol=1e-10, atol=1e-15)
    both, terms = gradient({"name": "distil", "future": "sum", "ratio_clip": 3.0}, old_gap=-5.0, sampling_gap=-0.5)
    torch.testing.assert_close(both, plain * 3 * math.exp(0.5), rtol=1e-10, atol=1e-15)
    assert terms.counts["train/ratio_clipped_frac"] == in_loss().sum()
    for table in ({"name": "ce"}, {"name": "sdpo"}):
        got, _ = gradient(table | {"ratio_clip": 3.0}, old_gap=-5.0)
        torch.testing.assert_close(got, 3 * gradient(table)[0], rtol=1e-10, atol=1e-15)
    off, _ = gradient({"name": "distil", "future": "sum", "ratio_clip": "none"}, old_gap=-5.0)
    torch.testing.assert_close(off, plain, rtol=1e-10, atol=1e-15)


def in_loss():
    return case()[1].weights != 0


def test_grpo_takes_its_ratio_to_before_the_step_and_its_weight_from_there_to_the_engine():
    advantages = torch.linspace(-1, 1, T, dtype=torch.float64)
    plain, _ = gradient({"name": "grpo"}, advantages=advantages)
    weighted, terms = gradient({"name": "grpo"}, advantages=advantages, sampling_gap=-0.5)
    torch.testing.assert_close(weighted, plain * math.exp(0.5), rtol=1e-10, atol=1e-15)
    assert terms.counts["train/ratio"].item() == pytest.approx(in_loss().sum().item())
    raised, terms = gradient({"name": "grpo"}, advantages=advantages, old_gap=-0.5)
    is_up = (advantages > 0)[:, None]
    torch.testing.assert_close(raised, torch.where(is_up, 0.0, plain * math.exp(0.5)), rtol=1e-10, atol=1e-15)
    assert terms.counts["train/ratio_clipped_frac"] == ((advantages > 0) & in_loss()).sum()


def test_sdpo_by_forward_kl_is_ce():
    got, terms = gradient({"name": "sdpo", "divergence": "fkl"}, old_gap=0.3, sampling_gap=0.3)
    want, other = gradient({"name": "ce"}, old_gap=0.3, sampling_gap=0.3)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)
    for name in ("loss/ce_nats", "loss/kl_nats", "train/ratio_clipped_frac", "train/tis_clipped_frac"):
        assert terms.counts[name].item() == pytest.approx(other.counts[name].item(), rel=1e-10)
    assert terms.counts["loss/divergence_nats"].item() == pytest.approx(terms.counts["loss/kl_nats"].item(), rel=1e-10)
    assert not torch.allclose(gradient({"name": "sdpo"})[0], want, rtol=1e-3)


def test_opsd_without_a_clip_is_renormalised_ce():
    got, _ = gradient({"name": "opsd", "entry_clip": "none"}, sampling_gap=1.0)
    want, _ = gradient({"name": "ce", "tail": "renorm", "tis_clip": "none"})
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)
    clipped, terms = gradient({"name": "opsd"})
    assert not torch.allclose(clipped, want, rtol=1e-3)
    assert terms.counts["loss/divergence_nats"] < terms.counts["loss/kl_nats"]


def test_sdpo_at_the_sampled_token_counts_the_divergence_in_the_loss():
    teacher = torch.linspace(-4, -1, T, dtype=torch.float64)
    _, terms = gradient({"name": "sdpo", "divergence": "rkl_sampled"}, teacher_sampled=teacher)
    gap = case()[1].student.sampled.detach() - teacher
    assert terms.counts["loss/reverse_kl_nats"].item() == pytest.approx(gap[in_loss()].sum().item())


def test_opd_on_policy_is_grpo_with_the_expert_as_reward():
    teacher = torch.linspace(-4, -1, T, dtype=torch.float64)
    got, terms = gradient({"name": "opd", "coef": 1.5}, teacher_sampled=teacher)
    gap = case()[1].student.sampled.detach() - teacher
    want, _ = gradient({"name": "grpo"}, advantages=-1.5 * gap)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)
    assert terms.counts["loss/reverse_kl_nats"].item() == pytest.approx(gap[in_loss()].sum().item())
    assert terms.counts["loss/policy_gain"].item() == pytest.approx(-1.5 * gap[in_loss()].sum().item())
    assert terms.counts["train/ratio"].item() == in_loss().sum()


def test_the_baseline_is_taken_off_before_factor_and_clip():
    table = {"name": "distil", "future": "sum", "future_coef": 0.5, "future_clip": 0.3}
    baseline = torch.linspace(0.0, 3.0, T, dtype=torch.float64)
    got, terms = gradient(table, baseline=baseline)
    logits, tokens = case()
    ce = algo.topk_cross_entropy(tokens.teacher_logprobs, tokens.student, tail="bucket")
    credit = (0.5 * (future(ce, mean=False, discount=1.0) - baseline)).clamp(max=0.3)
    (tokens.weights * (ce + credit * tokens.student.sampled)).sum().backward()
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-15)
    assert terms.maxima["loss/credit_max_nats"] == credit[in_loss()].max() == 0.3
    assert terms.counts["loss/credit_nats"].item() == pytest.approx(credit[in_loss()].sum().item())
    _, terms = gradient(table, baseline=baseline + 100.0)
    assert terms.maxima["loss/credit_max_nats"] < -20.0  # a token outside the loss is no maximum


def test_a_token_above_its_clip_teaches_nothing_and_is_counted():
    logits, tokens = case()
    ce = algo.topk_cross_entropy(tokens.teacher_logprobs, tokens.student, tail="bucket")
    clip = ce[in_loss()].median().item()
    (tokens.weights * ce * (ce <= clip)).sum().backward()
    got, terms = gradient({"name": "ce", "token_clip": clip})
    torch.testing.assert_close(got, logits.grad, rtol=1e-10, atol=1e-15)
    above = (ce > clip) & in_loss()
    assert 0 < above.sum() < (ce > clip).sum()
    assert terms.counts["train/token_clipped_frac"] == above.sum()
    assert "train/token_clipped_frac" not in gradient({"name": "ce"})[1].counts


def test_only_a_credit_can_have_a_baseline():
    def needs(**settings):
        return objective_from_table({"name": "distil"} | settings).needs_baseline

    assert needs(future="mean", baseline="loo_batch")
    assert not needs(future="none", baseline="loo_batch")
    assert not needs(future="sum")
    assert not any(
        objective_from_table({"name": name}).needs_baseline for name in objective_names() if name != "distil"
    )
    assert gradient({"name": "distil", "future": "none"})[1].maxima == {}


def test_the_largest_is_among_the_tokens_of_the_loss():
    _, tokens = case()
    values = torch.arange(T, dtype=torch.float64).requires_grad_()
    weights = torch.arange(T) < 3
    found = largest(values, tokens._replace(weights=weights.double()))
    assert found == 2.0
    assert not found.requires_grad
    assert largest(values, tokens._replace(weights=torch.zeros(T))) == -math.inf


def test_the_credit_before_a_baseline_is_the_one_in_the_terms():
    _, tokens = case()
    distil = objective_from_table({"name": "distil", "future": "mean", "token_clip": 1.0, "baseline": "loo_position"})
    credit = distil.credit(tokens, future)
    assert not credit.requires_grad
    assert distil.terms(tokens, future).maxima["loss/credit_max_nats"] == credit[in_loss()].max()
    first, second = distil.baselines([credit, credit[:5] + 1.0], [0, 0])
    torch.testing.assert_close(first[:5], credit[:5] + 1.0)
    assert (first[5:] == 0).all()
    torch.testing.assert_close(second, credit[:5])


EVERY = [{"name": name} for name in objective_names() if name != "distil"] + [
    {"name": "distil", "future": "sum", "token_clip": 0.5, "future_clip": 1.0},
    {"name": "distil", "future": "mean", "future_form": "reweight", "cost": "kl"},
    {"name": "sdpo", "divergence": "rkl_sampled"},
    {"name": "sdpo", "divergence": "rkl", "entry_clip": 0.1},
    {"name": "opsd", "divergence": "js"},
    {"name": "opd", "discount": 0.5},
]


@pytest.mark.parametrize("table", EVERY, ids=str)
def test_what_an_objective_counts_has_a_sentence_and_no_gradient(table):
    for rows in (T, 0):  # a rank may have no tokens at all
        logits, tokens = case(advantages=torch.ones(T))
        student = tokens.student._replace(**{name: x[:rows] for name, x in tokens.student._asdict().items()})
        fields = {name: x[:rows] for name, x in tokens._asdict().items() if name != "student"}
        terms = objective_from_table(table).terms(
            tokens._replace(student=student, **fields), lambda cost, *, mean, discount: torch.ones_like(cost.detach())
        )
        found = {**terms.counts, **terms.maxima}
        assert set(found) <= set(SENTENCE_BY_NAME)
        assert all(value.shape == () and not value.requires_grad for value in found.values())
        (terms.imitation + terms.credit).backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", objective_names())
def test_every_setting_says_what_it_does(name):
    assert all(info.description for info in objective_class(name).model_fields.values())


def test_advantages_compare_with_the_group_only():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 1.0]), torch.tensor([7, 7, 7, 3, 7])
    assert algo.group_advantages(rewards, groups, normalise_std=False).tolist() == [0.5, -0.5, -0.5, 0.0, 0.5]
    scaled = algo.group_advantages(rewards, groups, normalise_std=True)
    std = torch.tensor([1.0, 0.0, 0.0, 1.0]).std().item()
    assert scaled.tolist() == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.0, 0.5 / std], rel=1e-5)
    narrow = algo.group_advantages(rewards[:2].double() * 1e-6, groups[:2], normalise_std=True)
    std = 1e-6 * math.sqrt(0.5)
    assert narrow.tolist() == pytest.approx([5e-7 / (std + 1e-6), -5e-7 / (std + 1e-6)])


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
        ({"name": "distil", "future": "sum", "baseline": "mean"}, "'none', 'loo_position' or 'loo_batch'"),
        ({"name": "sdpo", "mix": 1.0}, "less than 1"),
        ({"name": "opsd", "entry_clip": 0.0}, "greater than 0"),
        ({"name": "opsd", "tail": "bucket"}, "'none' or 'renorm'"),
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
