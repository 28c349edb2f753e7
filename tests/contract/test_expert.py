"""An expert behind servers that misbehave: what the teacher makes of their scores, and of their failures."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_distil.config.load import load_config
from megatron_distil.errors import DataError, EngineReplyError, EngineUnavailable, RegistryError
from megatron_distil.http import Http
from megatron_distil.registry import Registry
from megatron_distil.rollout.sglang.client import Deadlines, connector
from megatron_distil.teacher.expert import ExpertTeacher, check_vocabulary
from megatron_distil.types import Example, FinishReason, Outcome, Prompt, Rollout, RolloutId, TeacherContext
from tests.fakes import FakeExpert
from tests.recipe import write_recipe
from tests.task_records import said

VOCAB = 97


def example(prompt: str, sample: int, *, has_context: bool = True, length: int = 5) -> Example:
    rng = random.Random(f"{prompt} {sample}")
    ids = np.asarray([rng.randrange(VOCAB) for _ in range(length)], dtype=np.int32)
    rollout = Rollout(
        rollout_id=RolloutId(2, prompt, sample), token_ids=ids, text="", logprobs=np.zeros(length, np.float32),
        finish=FinishReason.STOP, oldest_weights=2, newest_weights=2,
    )  # fmt: skip
    context_ids = np.asarray([rng.randrange(VOCAB) for _ in range(4)], dtype=np.int32)
    return Example(
        prompt=Prompt(prompt_id=prompt, text="", token_ids=context_ids[:2], task={}),
        rollout=rollout,
        feedback=said(rollout, Outcome.FAILED),
        context=TeacherContext(token_ids=context_ids, text="", demonstration=None, shows_feedback=True)
        if has_context
        else None,
    )


EXAMPLES = [example(f"p{k}", j, has_context=(k, j) != (1, 0)) for k in range(3) for j in range(2)]


class Experts:
    """Servers by name and a teacher that asks them."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.registry = Registry(folder / "registry")
        base = ["teacher.weights=expert", "teacher.model=m", "teacher.top_k=3", "rollout.start_timeout_s=0.3"]
        self.config = load_config(write_recipe(folder), [*base, *overrides])
        self.request_s = 20.0

    def server(self, name: str, **settings: Any) -> FakeExpert:
        return FakeExpert(name=name, registry=self.registry, vocab_size=VOCAB, **settings)

    def on_head(self, ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()

    def wait(self, teacher: ExpertTeacher) -> None:
        self.on_head(teacher.wait)

    def run(
        self, servers: Sequence[FakeExpert], work: Callable[[ExpertTeacher], Any], *, vocab_size: int = VOCAB
    ) -> Any:
        """The result of ``work`` with a teacher in a thread of its own, as a rank; heads work in this loop."""

        async def main() -> Any:
            self._loop = asyncio.get_running_loop()

            async with Http() as http:
                connect = connector(http, str, Deadlines(self.request_s, 20.0))
                teacher = ExpertTeacher(self.config, self.registry, connect, self.on_head, vocab_size=vocab_size)
                for server in servers:
                    await server.start()
                try:
                    return await asyncio.to_thread(work, teacher)
                finally:
                    for server in servers:
                        await server.die()

        return asyncio.run(asyncio.wait_for(main(), 60))


def budget(seconds: float) -> list[str]:
    return [f"rollout.budget_s={seconds}", f"rollout.request_timeout_s={seconds}"]


def logprobs(example: Example) -> np.ndarray:
    """[R, V] of the fake, by its own rule."""
    assert example.context is not None
    ids = [*example.context.token_ids.tolist(), *example.rollout.token_ids.tolist()]
    at = len(example.context.token_ids)
    return np.stack([FakeExpert.row(ids[:end], VOCAB) for end in range(at, len(ids))])


def test_scores_become_targets_of_every_response_token(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    found = experts.run([experts.server("teacher-0")], lambda teacher: teacher.score(EXAMPLES))
    assert [targets is None for targets in found] == [e.context is None for e in EXAMPLES]
    for one, targets in zip(EXAMPLES, found, strict=True):
        if targets is None:
            continue
        rows = logprobs(one)
        best = np.argsort(-rows, axis=1, kind="stable")[:, :3]
        np.testing.assert_array_equal(targets.support_ids, best)
        np.testing.assert_allclose(targets.logprobs, np.take_along_axis(rows, best, 1), rtol=1e-6)
        np.testing.assert_allclose(targets.sampled, rows[np.arange(5), one.rollout.token_ids], rtol=1e-6)
        for t in range(5):
            known = [math.exp(value) for value in targets.logprobs[t]]
            classes = [*known, 1.0 - sum(known)]
            assert targets.entropy[t] == pytest.approx(-sum(p * math.log(p) for p in classes), abs=1e-5)
            assert targets.entropy[t] < -(np.exp(rows[t]) * rows[t]).sum()


def test_an_objective_that_reads_no_support_asks_for_none(tmp_path: Path) -> None:
    experts = Experts(tmp_path, "objective.name=opd")
    server = experts.server("teacher-0")
    found = experts.run([server], lambda teacher: teacher.score(EXAMPLES))
    assert all("top_logprobs_num" not in body for body in server.bodies)
    for one, targets in zip(EXAMPLES, found, strict=True):
        if targets is not None:
            assert targets.support_ids.shape == targets.logprobs.shape == (5, 0)
            p = np.exp(logprobs(one)[np.arange(5), one.rollout.token_ids])
            np.testing.assert_allclose(np.exp(targets.sampled), p, rtol=1e-6)
            np.testing.assert_allclose(targets.entropy, -(p * np.log(p) + (1 - p) * np.log1p(-p)), atol=1e-5)


def test_ids_that_the_student_has_not_are_outside_the_support(tmp_path: Path) -> None:
    experts, size = Experts(tmp_path, "teacher.top_k=60"), 60
    one = next(e for k in range(999) if (e := example(f"q{k}", 0)).rollout.token_ids.max() < size)
    (found,) = experts.run([experts.server("teacher-0")], lambda teacher: teacher.score([one]), vocab_size=size)
    for row, ids, said_of in zip(logprobs(one), found.support_ids, found.logprobs, strict=True):
        best = np.argsort(-row, kind="stable")[:60]
        own = {int(token) for token in best if token < size}
        assert {int(token) for token in ids if token >= 0} == own
        assert (said_of == -np.inf).sum() == 60 - len(own) > 0
    assert np.isfinite(found.entropy).all()


def test_the_rollouts_of_a_prompt_go_to_one_server_and_prompts_to_all(tmp_path: Path) -> None:
    experts = Experts(tmp_path, "teacher.num_engines=2")
    servers = [experts.server("teacher-0"), experts.server("teacher-1")]
    many = [example(f"p{k}", j) for k in range(6) for j in range(4)]
    experts.run(servers, lambda teacher: teacher.score(many))
    asked = [{request.split("/")[1] for request in server.requests} for server in servers]
    assert asked == [{"p0", "p2", "p4"}, {"p1", "p3", "p5"}]


def test_no_more_is_in_flight_than_the_recipe_says(tmp_path: Path) -> None:
    experts = Experts(tmp_path, "rollout.concurrency=3")
    server = experts.server("teacher-0", delay_s=0.02)
    experts.run([server], lambda teacher: teacher.score([example(f"p{k}", 0) for k in range(12)]))
    assert server.most_in_flight == 3


@pytest.mark.parametrize("fault", ["503", "close", "abort", "hang"])
def test_a_server_that_fails_is_asked_again_or_another_one_is(tmp_path: Path, fault: Any) -> None:
    experts = Experts(tmp_path, "teacher.num_engines=2")
    experts.request_s = 1.0 if fault == "hang" else 20.0
    servers = [experts.server("teacher-0", faults=[fault]), experts.server("teacher-1")]
    expected = Experts(tmp_path)
    one = expected.server("teacher-0")
    found = experts.run(servers, lambda teacher: teacher.score(EXAMPLES))
    again = expected.run([one], lambda teacher: teacher.score(EXAMPLES))
    for a, b in zip(found, again, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a.sampled, b.sampled)
    assert sum(len(server.requests) for server in servers) == len(one.requests) + 1


def test_a_reply_that_cannot_be_trusted_ends_the_step_and_is_no_score_of_zero(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    server = experts.server("teacher-0", faults=[lambda reply: reply["meta_info"]["input_token_logprobs"].pop(1)])
    with pytest.raises(EngineReplyError, match=r"2/p\d/\d: 5 tokens, 4 log-probabilities"):
        experts.run([server], lambda teacher: teacher.score(EXAMPLES))


def test_a_context_that_the_expert_cannot_read_is_its_own_words(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    server = experts.server("teacher-0", faults=["400"])
    with pytest.raises(EngineReplyError, match=r"/generate\): 400: "):
        experts.run([server], lambda teacher: teacher.score(EXAMPLES[:1]))


def test_without_a_server_the_step_ends_with_its_name(tmp_path: Path) -> None:
    experts = Experts(tmp_path, *budget(0.2), "rollout.request_timeout_s=0.1")
    with pytest.raises(
        EngineUnavailable, match=r"no score of the expert within 0.2 s; last: no server of role 'teacher'"
    ):
        experts.run([], lambda teacher: teacher.score(EXAMPLES))
    with pytest.raises(RegistryError, match=r"role 'teacher': need 1 services, have 0 ready"):
        experts.run([], experts.wait)


def test_servers_of_another_version_are_refused_before_the_first_step(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    experts.run([experts.server("teacher-0")], experts.wait)
    with pytest.raises(EngineReplyError, match=r"teacher-0: runs SGLang 0.5.9; needs 0.5.21 or later"):
        experts.run([experts.server("teacher-0", says="0.5.9")], experts.wait)


def test_a_replica_without_anything_to_teach_still_takes_part(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    assert experts.run([], lambda teacher: teacher.score([EXAMPLES[2]])) == [None]
    assert experts.run([], lambda teacher: dict(teacher.state())) == {}


def test_an_expert_that_means_another_token_by_an_id_is_refused() -> None:
    student = {"a": 0, "b": 1}
    check_vocabulary(student, {"a": 0, "b": 1, "c": 2}, "m")
    with pytest.raises(
        DataError, match=r"teacher.model = 'm': 'b' is token 1 to the student and token 2 to the expert"
    ):
        check_vocabulary(student, {"a": 0, "b": 2}, "m")
    with pytest.raises(DataError, match=r"'b' is token 1 to the student and no token to the expert"):
        check_vocabulary(student, {"a": 0}, "m")
