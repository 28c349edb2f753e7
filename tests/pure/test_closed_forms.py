"""The logit gradient of every preset, against its formula written out in numpy token by token."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_from_table
from tests.tokens import tokens_of

PRESETS = Path(__file__).resolve().parents[2] / "megatron_distil" / "config" / "presets"
LENGTHS, VOCAB, K = (7, 4, 1, 5), 11, 4
TAUGHT = (True, True, True, False)
"""The last sequence has no teacher: no loss, and no cost, but it is a sequence."""
T = sum(LENGTHS)
SEQUENCES = [range(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]


class Case:
    """Raw logits, and what all distributions are after the temperature."""

    def __init__(self, temperature):
        source = np.random.default_rng(4)
        raw, teacher = source.normal(0.0, 1.2, (T, VOCAB)), source.normal(0.0, 1.5, (T, VOCAB))
        for t in (0, 2, 3, 8):  # here both are sure, so that little is left to learn
            raw[t, 5], teacher[t, 5] = 6.0, 7.0
        self.raw, self.temperature = raw, temperature
        self.pi, self.p = softmax(raw / temperature), softmax(teacher / temperature)
        self.sampled = source.integers(0, VOCAB, T)
        self.now = np.log(self.pi[np.arange(T), self.sampled])
        self.old = self.now + source.normal(0.0, 0.8, T)
        self.sampling = self.old + source.normal(0.0, 0.8, T)
        self.advantage = np.repeat([0.5, -0.5, 0.25, 0.0], LENGTHS)
        self.mask = np.repeat(TAUGHT, LENGTHS)

    def gradient(self, objective, teacher):
        """[T, V] of the objective, as the trainer calls it, and its terms."""
        leaf = torch.tensor(self.raw, requires_grad=True)
        sampled, mask = torch.from_numpy(self.sampled), torch.from_numpy(self.mask)
        ids = torch.from_numpy(self.support(teacher)) if objective.needs_support else torch.zeros(T, 0).long()
        if not objective.needs_teacher:
            ids = ids[:, :0]
        columns = algo.columns(leaf / self.temperature, ids, sampled)
        segments = torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
        denominator = self.mask.sum() if objective.reduction == "token-mean" else len(LENGTHS)
        tokens = tokens_of(
            columns,
            torch.from_numpy(np.log(self.p)).gather(-1, ids),
            teacher_sampled=torch.from_numpy(np.log(self.p)).gather(-1, sampled[:, None])[:, 0],
            sampling_logprobs=torch.from_numpy(self.sampling),
            old_logprobs=torch.from_numpy(self.old),
            advantages=torch.from_numpy(self.advantage),
            weights=algo.token_weights(mask, segments, reduction=objective.reduction, denominator=denominator),
        )

        def future(cost, *, mean, discount):
            return algo.future_credit(cost, mask, segments, mean=mean, discount=discount)

        terms = objective.terms(tokens, future)
        (terms.imitation + terms.credit).backward()
        return leaf.grad.numpy(), terms

    def support(self, teacher):
        """[T, K] ids; all of them where the support is the whole vocabulary."""
        if teacher.get("support") == "full":
            return np.tile(np.arange(VOCAB), (T, 1))
        return np.argsort(-(self.pi if teacher.get("support") == "student" else self.p), axis=-1)[:, :K]

    # ---- pieces of the formulas, one token at a time

    def inside(self, t, whose):
        found = np.zeros(VOCAB)
        found[np.argsort(-whose[t])[:K]] = 1.0
        return found

    def future(self, cost, t, *, mean):
        later = [cost[i] for one in SEQUENCES if t in one for i in one if i > t and self.mask[i]]
        return sum(later) / (max(1, len(later)) if mean else 1)

    def score(self, t):
        return np.eye(VOCAB)[self.sampled[t]] - self.pi[t]

    def truncated(self, t):
        """The release's two weights, both at most 2."""
        return min(np.exp(self.now[t] - self.old[t]), 2.0) * min(np.exp(self.old[t] - self.sampling[t]), 2.0)

    def bucket_cost(self, t, whose):
        s, p, pi = self.inside(t, whose), self.p[t], self.pi[t]
        return -(s * p * np.log(pi)).sum() - (1 - (s * p).sum()) * np.log(1 - (s * pi).sum())

    def bucket_pull(self, t, whose):
        s, p, pi = self.inside(t, whose), self.p[t], self.pi[t]
        return pi - s * p - (1 - s) * (1 - (s * p).sum()) * pi / (1 - (s * pi).sum())

    def bucketed(self, t, values, whose):
        s = self.inside(t, whose)
        return np.append(values[t][s > 0], 1 - (s * values[t]).sum())

    def spread(self, t, g, whose):
        """From derivatives by the log-probability of each class to the logits."""
        s, pi = self.inside(t, whose), self.pi[t]
        dz = -g.sum() * pi + g[-1] * (1 - s) * pi / (1 - (s * pi).sum())
        dz[s > 0] += g[:-1]
        return dz

    # ---- the presets: [V] of token t, by its logits after the temperature, before the reduction

    def paper_eq1(self, t):
        cost = -(self.p * np.log(self.pi)).sum(-1)
        return self.pi[t] - self.p[t] + self.future(cost, t, mean=False) * self.score(t)

    def release(self, t):
        cost = [self.bucket_cost(i, self.pi) for i in range(T)]
        whole = self.bucket_pull(t, self.pi) + self.future(cost, t, mean=True) * self.score(t)
        return self.truncated(t) * whole

    def paper_maths(self, t):
        cost = [self.bucket_cost(i, self.p) for i in range(T)]
        return self.bucket_pull(t, self.p) + self.future(cost, t, mean=True) * self.score(t)

    def release_maths(self, t):
        def both(i):
            s = self.inside(i, self.p)
            return s * self.p[i] / (s * self.p[i]).sum(), s * self.pi[i] / (s * self.pi[i]).sum()

        cost = np.array([-sum(p * np.log(q) for p, q in zip(*both(i), strict=True) if p) for i in range(T)])
        p, q = both(t)
        return (cost[t] < 0.05) * (1 + self.future(cost.clip(max=0.05), t, mean=True)) * (q - p)

    def sdpo_science(self, t):
        s, p = self.bucketed(t, self.pi, self.pi), self.bucketed(t, self.p, self.pi)
        return self.truncated(t) * self.spread(t, 0.5 * s * np.log(2 * s / (s + p)), self.pi)

    def sdpo_coding(self, t):
        s, p = self.bucketed(t, self.pi, self.pi), self.bucketed(t, self.p, self.pi)
        return self.truncated(t) * self.spread(t, s * np.log(s / p), self.pi)

    def opsd(self, t):
        s = self.inside(t, self.p)
        p, q = s * self.p[t] / (s * self.p[t]).sum(), s * self.pi[t] / (s * self.pi[t]).sum()
        kept = np.array([bool(a) and a * np.log(a / b) <= 0.05 for a, b in zip(p, q, strict=True)])
        return (kept * p).sum() * q - kept * p

    def grpo(self, t):
        ratio, a = np.exp(self.now[t] - self.old[t]), self.advantage[t]
        is_cut = ratio > 1.28 if a > 0 else ratio < 0.8 or ratio > 3.0
        return -min(np.exp(self.old[t] - self.sampling[t]), 2.0) * ratio * a * (not is_cut) * self.score(t)

    def opd(self, t):
        gain = np.log(self.p[t, self.sampled[t]]) - self.sampling[t]
        return -np.exp(self.now[t] - self.sampling[t]) * gain * self.score(t)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


# preset: (formula, temperature, denominators of a token of sequence i)
FORMULAS = {
    "paper-eq1": (Case.paper_eq1, 1.0, "sequences"),
    "release-science": (Case.release, 1.0, "sequences and tokens"),
    "release-coding": (Case.release, 1.0, "sequences and tokens"),
    "paper-maths": (Case.paper_maths, 0.7, "tokens"),
    "release-maths": (Case.release_maths, 0.7, "tokens"),
    "sdpo-science": (Case.sdpo_science, 1.0, "sequences and tokens"),
    "sdpo-coding": (Case.sdpo_coding, 1.0, "sequences and tokens"),
    "opsd": (Case.opsd, 0.7, "tokens"),
    "grpo-on-policy": (Case.grpo, 1.0, "sequences and tokens"),
    "grpo-off-policy": (Case.grpo, 1.0, "sequences and tokens"),
    "opd": (Case.opd, 1.0, "tokens"),
}
DENOMINATORS = {
    "sequences": [4.0] * 4,
    "sequences and tokens": [4.0 * length for length in LENGTHS],
    "tokens": [7.0 + 4.0 + 1.0] * 4,
}


def preset(name):
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def test_every_preset_has_a_formula():
    assert {path.stem for path in PRESETS.glob("*.toml")} == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_of_a_preset_is_its_formula(name):
    formula, temperature, reduction = FORMULAS[name]
    table = preset(name)
    assert table["rollout"]["temperature"] == temperature
    case = Case(temperature)
    got, _ = case.gradient(objective_from_table(table["objective"]), table.get("teacher", {}))
    for denominator, is_taught, sequence in zip(DENOMINATORS[reduction], TAUGHT, SEQUENCES, strict=True):
        for t in sequence:
            want = is_taught * formula(case, t) / denominator / temperature
            np.testing.assert_allclose(got[t], want, rtol=0, atol=1e-13)


def test_every_clip_cuts_some_tokens_and_leaves_others():
    """Or the comparisons above would say nothing about them."""
    case = Case(1.0)
    for ratio in (np.exp(case.now - case.old), np.exp(case.old - case.sampling)):
        assert 0 < (ratio[case.mask] > 2.0).sum() < case.mask.sum()
    cut = [not np.abs(case.grpo(t)).any() for t in range(T) if case.advantage[t]]
    assert 0 < sum(cut) < len(cut)
    case = Case(0.7)
    silent = [not np.abs(case.release_maths(t)).any() for t in range(T)]
    assert 0 < sum(silent) < T
    table = preset("opsd")
    clipped, _ = case.gradient(objective_from_table(table["objective"]), table["teacher"])
    whole, _ = case.gradient(objective_from_table(table["objective"] | {"entry_clip": "none"}), table["teacher"])
    assert 0 < (np.abs(clipped - whole).max(-1) > 1e-6)[case.mask].sum() < case.mask.sum()


@pytest.mark.parametrize(
    "name", ["paper-eq1", "release-science", "sdpo-science", "sdpo-coding", "grpo-off-policy", "opd"]
)
def test_rows_of_the_gradient_sum_to_zero(name):
    table = preset(name)
    got, _ = Case(1.0).gradient(objective_from_table(table["objective"]), table.get("teacher", {}))
    assert np.abs(got.sum(-1)).max() < 1e-14


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_token_weights_reduce_as_their_name_says(reduction):
    source = np.random.default_rng(1)
    values, mask = source.normal(size=T), np.repeat(TAUGHT, LENGTHS) & (source.random(T) < 0.8)
    means = [values[list(s)][mask[list(s)]].mean() if mask[list(s)].any() else 0.0 for s in SEQUENCES]
    sums = [values[list(s)][mask[list(s)]].sum() for s in SEQUENCES]
    want = {
        "token-mean": values[mask].mean(),
        "seq-mean-token-mean": np.mean(means),
        "seq-mean-token-sum": np.mean(sums),
    }
    segments = torch.from_numpy(np.repeat([5, 0, -1, 3], LENGTHS))
    denominator = mask.sum() if reduction == "token-mean" else len(LENGTHS)
    weights = algo.token_weights(torch.from_numpy(mask), segments, reduction=reduction, denominator=denominator)
    assert (weights.numpy() * values).sum() == pytest.approx(want[reduction], rel=1e-12)
    counted = "tokens of the loss" if reduction == "token-mean" else "sequences"
    with pytest.raises(ValueError, match=f"denominator = 0: give the number of {counted}"):
        algo.token_weights(torch.from_numpy(mask), segments, reduction=reduction, denominator=0)
