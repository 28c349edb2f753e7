"""Our reading of replies that a real server gave (``recorded/``), and of what they must never be."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_distil.errors import EngineReplyError
from megatron_distil.protocols import SamplingSpec
from megatron_distil.rollout.sglang import wire
from megatron_distil.types import FinishReason, Prompt, Rollout, RolloutId

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def asked(record: dict[str, Any]) -> tuple[Prompt, SamplingSpec, RolloutId]:
    """The request of a recorded exchange, as our records."""
    request = record["request"]
    params = request["sampling_params"]
    step, prompt_id, sample = request["rid"].removesuffix(".").split("/")
    prompt = Prompt(prompt_id=prompt_id, text="", token_ids=np.asarray(request["input_ids"], dtype=np.int32), task={})
    spec = SamplingSpec(
        temperature=params["temperature"],
        max_new_tokens=params["max_new_tokens"],
        stop_token_ids=tuple(params["stop_token_ids"]),
    )
    return prompt, spec, RolloutId(int(step), prompt_id, int(sample))


def read(record: dict[str, Any], reply: Any = None) -> Rollout:
    prompt, spec, rollout_id = asked(record)
    return wire.rollout(reply or record["reply"], prompt, spec, rollout_id, lambda ids: " ".join(map(str, ids)))


@pytest.mark.parametrize("name", ["length", "stop", "abort", "two_versions"])
def test_the_body_is_the_one_that_a_real_server_was_sent(name: str) -> None:
    record = recorded(f"generate_{name}")
    assert wire.generate_body(*asked(record)) == record["request"]


def test_a_response_that_met_a_stop_token_keeps_the_token_and_loses_its_text() -> None:
    rollout = read(recorded("generate_stop"))
    assert rollout.finish is FinishReason.STOP
    assert rollout.token_ids.tolist() == [158, 38, 372]
    assert rollout.text == "158 38"
    assert rollout.rollout_id == RolloutId(7, "two roads", 1)
    assert (rollout.oldest_weights, rollout.newest_weights) == (7, 7)


def test_a_response_that_was_cut_keeps_all_its_text() -> None:
    record = recorded("generate_length")
    rollout = read(record)
    assert rollout.finish is FinishReason.LENGTH
    assert len(rollout.token_ids) == 6
    assert rollout.text == " ".join(map(str, record["reply"]["output_ids"]))
    expected = [entry[0] for entry in record["reply"]["meta_info"]["output_token_logprobs"]]
    np.testing.assert_array_equal(rollout.logprobs, np.asarray(expected, dtype=np.float32))


def test_a_response_that_was_sampled_under_two_versions_says_so() -> None:
    rollout = read(recorded("generate_two_versions"))
    assert (rollout.oldest_weights, rollout.newest_weights) == (7, 8)


def test_an_aborted_response_is_read_as_far_as_it_came() -> None:
    record = recorded("generate_abort")
    rollout = read(record)
    assert rollout.finish is FinishReason.ABORT
    assert len(rollout.token_ids) == record["reply"]["meta_info"]["completion_tokens"] > 0


Edit = Callable[[dict[str, Any], dict[str, Any]], object]

NONSENSE: dict[str, tuple[Edit, str]] = {
    "another request's reply": (lambda r, m: m.update(id="7/two roads/11."), "for request '7/two roads/11.'"),
    "another prompt's reply": (lambda r, m: m.update(prompt_tokens=11), "sent 12 prompt tokens, the server read 11"),
    "no ids": (lambda r, m: r.pop("output_ids"), "output_ids"),
    "no meta_info": (lambda r, m: r.pop("meta_info"), "meta_info"),
    "a short list of log-probabilities": (lambda r, m: m["output_token_logprobs"].pop(), "6 tokens, 5 log-prob"),
    "a long list of log-probabilities": (
        lambda r, m: m["output_token_logprobs"].append([-1.0, 3, None]),
        "6 tokens, 7 log-prob",
    ),
    "no log-probabilities": (lambda r, m: m.pop("output_token_logprobs"), "output_token_logprobs, got None"),
    "a shift by one": (
        lambda r, m: m["output_token_logprobs"].insert(0, m["output_token_logprobs"].pop()),
        "token 0 is",
    ),
    "a null log-probability": (lambda r, m: m["output_token_logprobs"][2].__setitem__(0, None), "token 2 is None"),
    "NaN": (lambda r, m: m["output_token_logprobs"][2].__setitem__(0, float("nan")), "token 2 is nan"),
    "minus infinity": (lambda r, m: m["output_token_logprobs"][5].__setitem__(0, float("-inf")), "token 5 is -inf"),
    "text for a number": (lambda r, m: m["output_token_logprobs"][0].__setitem__(0, "-1"), "token 0 is '-1'"),
    "a token that is none": (lambda r, m: r["output_ids"].__setitem__(1, None), "token 1 is None"),
    "a negative token": (lambda r, m: r["output_ids"].__setitem__(1, -1), "token 1 is -1"),
    "another count": (lambda r, m: m.update(completion_tokens=7), "completion_tokens is 7"),
    "an unknown end": (lambda r, m: m.update(finish_reason={"type": "tired"}), "unknown finish reason 'tired'"),
    "no end": (lambda r, m: m.update(finish_reason=None), "finish_reason"),
    "an early cut": (lambda r, m: _drop_last(r, m), "ended by length with 5 tokens, the limit is 6"),
    "a stop token that is not last": (
        lambda r, m: m.update(finish_reason={"type": "stop", "matched": 511}),
        "stopped by 511",
    ),
    "a stop by text": (lambda r, m: m.update(finish_reason={"type": "stop", "matched": "\n"}), "stopped by '\\n'"),
    "no spans": (lambda r, m: m.pop("weight_versions"), "weight_versions, got None"),
    "start weights": (lambda r, m: m["weight_versions"][0].update(version="default"), "'default'"),
    "a span too short": (lambda r, m: m["weight_versions"][0].update(end=5), "the weight spans end at 5"),
    "a gap between spans": (
        lambda r, m: m.update(weight_versions=[_span("7", 0, 2), _span("8", 3, 6)]),
        "after token 2",
    ),
    "an overlap of spans": (
        lambda r, m: m.update(weight_versions=[_span("7", 0, 4), _span("8", 3, 6)]),
        "after token 4",
    ),
}


def _span(version: str, start: int, end: int) -> dict[str, Any]:
    return {"version": version, "start": start, "end": end}


def _drop_last(reply: dict[str, Any], meta: dict[str, Any]) -> None:
    reply["output_ids"].pop()
    meta["output_token_logprobs"].pop()
    meta["completion_tokens"] -= 1
    meta["weight_versions"][0]["end"] -= 1


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_with_the_id_and_the_place(what: str) -> None:
    edit, fragment = NONSENSE[what]
    record = recorded("generate_length")
    read(record)  # without the edit it is fine
    reply = copy.deepcopy(record["reply"])
    edit(reply, reply["meta_info"])
    with pytest.raises(EngineReplyError) as caught:
        read(record, reply)
    assert str(caught.value).startswith("7/two roads/0: ")
    assert fragment in str(caught.value)


@pytest.mark.parametrize("reply", [None, [], "busy", [{"output_ids": []}]])
def test_a_reply_that_is_no_object_is_refused(reply: Any) -> None:
    prompt, spec, rollout_id = asked(recorded("generate_length"))
    with pytest.raises(EngineReplyError, match="meta_info"):
        wire.rollout(reply, prompt, spec, rollout_id, str)


def scored(record: dict[str, Any], reply: Any = None) -> wire.Scores:
    return wire.scores(reply or record["reply"], *scored_request(record))


def scored_request(record: dict[str, Any]) -> tuple[Any, Any, int, RolloutId]:
    request = record["request"]
    ids = np.asarray(request["input_ids"], dtype=np.int32)
    at = request["logprob_start_len"] + 1
    return ids[:at], ids[at:], request.get("top_logprobs_num", 0), RolloutId(7, "two roads", 0)


@pytest.mark.parametrize("name", ["score_top", "score_sampled"])
def test_the_body_of_a_scoring_request_is_the_one_that_a_real_server_was_sent(name: str) -> None:
    record = recorded(name)
    assert wire.score_body(*scored_request(record)) == record["request"]


def test_scores_are_read_from_the_token_after_the_context_on() -> None:
    top, bare = scored(recorded("score_top")), scored(recorded("score_sampled"))
    # the server's own JSON of the same request
    said = [-5.665281, -4.456226, -5.750217, -5.452737, -5.041898, -5.164944]
    np.testing.assert_allclose(top.sampled, said, atol=1e-6)
    np.testing.assert_array_equal(top.sampled, bare.sampled)
    assert (bare.top_ids.shape, bare.top_logprobs.shape) == ((6, 0), (6, 0))
    assert top.top_ids.tolist()[1] == [244, 192, 128, 191]  # the second token of the response is its own favourite
    assert top.top_logprobs[1, 0] == top.sampled[1]
    assert (np.diff(top.top_logprobs, axis=1) <= 0).all()


SCORED_NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another request": (lambda m: m.update(id="7/two roads/1."), "for request '7/two roads/1.'"),
    "tokens cut off": (lambda m: m.update(prompt_tokens=25), "sent 26 tokens, the server read 25"),
    "no scores": (lambda m: m.update(input_token_logprobs=None), "input_token_logprobs, got None"),
    "none at all": (lambda m: m.update(input_token_logprobs=[]), "expected null for token 280 first, got []"),
    "one too few": (lambda m: m["input_token_logprobs"].pop(), "6 tokens, 5 log-probabilities"),
    "one too many": (lambda m: m["input_token_logprobs"].append([-1.0, 3, None]), "6 tokens, 7 log-probabilities"),
    "shifted by one": (lambda m: m["input_token_logprobs"].pop(0), "expected null for token 280 first"),
    "another token": (lambda m: m["input_token_logprobs"][3].__setitem__(1, 9), "token 2 is 201"),
    "nothing for a token": (lambda m: m["input_token_logprobs"][2].__setitem__(0, None), "token 1 is None"),
    "no number": (lambda m: m["input_token_logprobs"][2].__setitem__(0, float("nan")), "token 1 is nan"),
    "an old server": (lambda m: m.pop("input_top_logprobs_shape"), "asked for [6, 4] in input_top_logprobs, got None"),
    "another support": (lambda m: m.update(input_top_logprobs_shape=[6, 5]), "asked for [6, 4]"),
    "no first null": (lambda m: m.update(input_top_logprobs_null_prefix=0), "null_prefix is 0, not 1"),
    "another type": (lambda m: m.update(input_top_logprobs_val_flat_b64_dtype="bfloat16"), "of 'bfloat16'"),
    "no base64": (lambda m: m.update(input_top_logprobs_val_flat_b64="?"), "is not base64"),
    "bytes missing": (lambda m: _cut(m, "val"), "has 92 bytes for [6, 4] numbers"),
    "ids missing": (lambda m: m.pop("input_top_logprobs_idx_flat_b64"), "expected str in input_top_logprobs_idx"),
    "an id twice": (lambda m: _write(m, "idx", 1, 244), "negative or there twice"),
    "a negative id": (lambda m: _write(m, "idx", 3, -1), "negative or there twice"),
    "no number among the best": (lambda m: _write(m, "val", 5, float("nan")), "is not finite"),
    "rows that are shifted": (lambda m: _roll(m), "token 1 has log-probability -4.45"),
}


def _array(meta: dict[str, Any], part: str) -> np.ndarray:
    dtype = np.dtype(np.int32 if part == "idx" else np.float32)
    return np.frombuffer(base64.b64decode(meta[f"input_top_logprobs_{part}_flat_b64"]), dtype).copy()


def _store(meta: dict[str, Any], part: str, values: np.ndarray) -> None:
    meta[f"input_top_logprobs_{part}_flat_b64"] = base64.b64encode(values.tobytes()).decode()


def _write(meta: dict[str, Any], part: str, at: int, value: float) -> None:
    values = _array(meta, part)
    values[at] = value
    _store(meta, part, values)


def _cut(meta: dict[str, Any], part: str) -> None:
    _store(meta, part, _array(meta, part)[:-1])


def _roll(meta: dict[str, Any]) -> None:
    for part in ("idx", "val"):
        _store(meta, part, np.roll(_array(meta, part), 4))


@pytest.mark.parametrize("what", SCORED_NONSENSE)
def test_nonsense_scores_are_refused_with_the_id_and_the_place(what: str) -> None:
    edit, fragment = SCORED_NONSENSE[what]
    record = recorded("score_top")
    scored(record)  # without the edit it is fine
    reply = copy.deepcopy(record["reply"])
    edit(reply["meta_info"])
    with pytest.raises(EngineReplyError) as caught:
        scored(record, reply)
    assert str(caught.value).startswith("7/two roads/0: ")
    assert fragment in str(caught.value)


def test_no_request_id_begins_with_another() -> None:
    ids = [wire.request_id(RolloutId(step, "p", sample)) for step in (1, 11) for sample in range(120)]
    assert not [(a, b) for a in ids for b in ids if a != b and b.startswith(a)]


def test_only_versions_that_we_published_are_versions() -> None:
    assert wire.version_of(recorded("model_info")["weight_version"]) == 8
    assert [wire.version_of(text) for text in ("0", "12", "default", "", "-1", "1.5", None, 3)] == [0, 12, *[None] * 6]


def test_what_a_server_says_of_itself_is_read() -> None:
    info = wire.server_info(recorded("server_info"), "engine0")
    assert info == wire.ServerInfo(version="0.5.21", tp_size=1, device="cpu", dtype="float32")


@pytest.mark.parametrize("version", ["0.5.20", "0.5.9", "0.4.99.post3"])
def test_a_server_that_is_too_old_is_refused_by_name(version: str) -> None:
    with pytest.raises(EngineReplyError, match=f"engine0: runs SGLang {version}; needs 0.5.21 or later"):
        wire.server_info(recorded("server_info") | {"version": version}, "engine0")


@pytest.mark.parametrize("version", ["0.5.21.post1", "0.5.23", "0.6.0rc1", "1.0"])
def test_a_later_server_is_taken(version: str) -> None:
    assert wire.server_info(recorded("server_info") | {"version": version}, "engine0").version == version


def test_checksums_are_tables_per_rank() -> None:
    (table,) = wire.checksums(recorded("weights_checker"), "engine0")
    assert len(table) == 27
    assert all(len(digest) == 16 for digest in table.values())


@pytest.mark.parametrize("reply", [None, {}, {"ranks": []}, {"ranks": [{"checksums": {}}]}, {"ranks": [{}]}])
def test_missing_checksums_are_an_error(reply: Any) -> None:
    with pytest.raises(EngineReplyError, match="engine0"):
        wire.checksums(reply, "engine0")
