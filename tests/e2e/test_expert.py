"""An expert behind a real server: its scores are those of its weights, and a run learns from it as from a frozen teacher."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_distil.http import Http
from megatron_distil.rollout.sglang.client import Deadlines, connector
from megatron_distil.rollout.sglang.wire import Scores
from megatron_distil.types import RolloutId
from tests.quickstart import START_S, induction, launched, metrics, train_plan
from tests.server import DIMS, RealServer, real_server
from tests.tiny_model import tiny_qwen3

__all__ = ["real_server"]
K = 8


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, DIMS["vocab_size"], count).astype(np.int32)


def scores(server: RealServer, pairs: list[tuple[np.ndarray, np.ndarray]], top_k: int) -> list[Scores]:
    async def main() -> list[Scores]:
        async with Http() as http:
            engine = connector(http, str, Deadlines(60.0, 60.0))(server.record)
            await engine.settle()
            asked = [engine.score(*pair, top_k, RolloutId(0, "p", k)) for k, pair in enumerate(pairs)]
            return list(await asyncio.gather(*asked))

    return asyncio.run(asyncio.wait_for(main(), 120))


def test_scores_of_a_response_are_those_of_hugging_face_cold_and_cached(real_server: RealServer) -> None:
    context = ids(200, seed=1)
    pairs = [(context, ids(40, seed=2)), (context, ids(40, seed=3)), (ids(1, seed=4), ids(1, seed=5))]
    model = tiny_qwen3(seed=0, **DIMS)
    for top_k in (K, 0, K):  # the second and third time behind a prefix that is cached
        for (before, response), found in zip(pairs, scores(real_server, pairs, top_k), strict=True):
            tokens = torch.from_numpy(np.concatenate([before, response])).long()
            with torch.no_grad():
                rows = torch.log_softmax(model(tokens[None]).logits[0, len(before) - 1 : -1], -1)
            theirs = rows.gather(1, tokens[len(before) :, None])[:, 0].numpy()
            np.testing.assert_allclose(found.sampled, theirs, rtol=0.0, atol=1e-4)
            assert found.top_ids.shape == (len(response), top_k)
            if top_k:
                best = rows.topk(top_k).values.numpy()
                np.testing.assert_allclose(found.top_logprobs, best, rtol=0.0, atol=1e-4)
                at_ids = rows.gather(1, torch.from_numpy(found.top_ids).long()).numpy()
                np.testing.assert_allclose(found.top_logprobs, at_ids, rtol=0.0, atol=1e-4)


def test_a_run_learns_from_an_expert_as_from_a_frozen_teacher_of_the_same_weights(tmp_path: Path) -> None:
    """The expert is the model that the student starts as, and reads the feedback: so is a frozen self-teacher."""
    base = induction()
    settings = ["train.num_steps=2", "eval.every_steps=0", "objective.name=opd", "checkpoint.every_steps=2"]
    expert = ["teacher.weights=expert", f"teacher.model={base.folder / 'base'}"]
    with launched(train_plan(base, tmp_path / "expert", [*settings, *expert]), tmp_path / "expert") as run:
        assert run.wait(2 * START_S) == 0, run.text()[-3000:]
        assert "teacher-0 is ready" in run.text()
    frozen = train_plan(base, tmp_path / "frozen", [*settings, "teacher.weights=frozen"], replay=tmp_path / "expert")
    with launched(frozen, tmp_path / "frozen") as run:
        assert run.wait(2 * START_S) == 0, run.text()[-3000:]
    learned, expected = (_reverse_kl(tmp_path / name) for name in ("expert", "frozen"))
    assert len(learned) == 2
    assert learned[0] > 0.5  # alone the student is almost never right
    assert learned == pytest.approx(expected, abs=1e-4)


def _reverse_kl(run: Path) -> list[float]:
    return [row["loss/reverse_kl_nats"] for row in metrics(run) if "loss/reverse_kl_nats" in row]
