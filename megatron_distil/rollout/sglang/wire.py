"""SGLang's requests and replies <-> our records. Pure; the only file that spells the field names of ``/generate``.

Whatever a reply lacks is an ``EngineReplyError`` with the rollout's id: no position is ever skipped or filled in.

Tested with SGLang 0.5.21 and 0.5.23. A server ignores fields that it does not know, so each thing that was asked for is
looked for in the reply.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_distil.errors import EngineReplyError
from megatron_distil.protocols import SamplingSpec
from megatron_distil.types import FinishReason, Floats, Ids, Prompt, Rollout, RolloutId

MIN_VERSION = (0, 5, 21)
"""Has the weight-update session, spans of weight versions and checksums."""

SAME_NATS = 1e-3
"""Two statements about one log-probability differ by rounding only."""

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""


class ServerInfo(NamedTuple):
    """What does not change while a server lives."""

    version: str
    tp_size: int
    device: str
    dtype: str


class Span(NamedTuple):
    """Response tokens ``start <= t < end`` were sampled under ``version``."""

    version: int
    start: int
    end: int


class Scores(NamedTuple):
    """What a server's model says of a given response, in nats, at temperature 1."""

    sampled: Floats
    """[R] of its tokens."""
    top_ids: Ids
    """[R, K] the most probable ones."""
    top_logprobs: Floats
    """[R, K] normalised over the whole vocabulary."""


def request_id(rollout_id: RolloutId) -> str:
    """The id on the wire. It ends with a dot: the scheduler aborts every id that *starts* with the given one."""
    return f"{rollout_id}."


def generate_body(prompt: Prompt, spec: SamplingSpec, rollout_id: RolloutId) -> dict[str, Any]:
    """Body of ``POST /generate``: one prompt, one sample, ids in and ids out."""
    return {
        "input_ids": prompt.token_ids.tolist(),
        "rid": request_id(rollout_id),
        "return_logprob": True,
        "sampling_params": {
            "temperature": spec.temperature,
            "max_new_tokens": spec.max_new_tokens,
            "stop_token_ids": list(spec.stop_token_ids),
        },
    }


def rollout(reply: Any, prompt: Prompt, spec: SamplingSpec, rollout_id: RolloutId, decode: Decode) -> Rollout:
    """The checked reply of ``POST /generate``.

    Raises:
        EngineReplyError: anything is missing, miscounted or not finite. The text names the rollout.
    """
    meta = _field(reply, "meta_info", dict, rollout_id)
    if (rid := meta.get("id")) != request_id(rollout_id):
        raise EngineReplyError(f"{rollout_id}: the reply is for request {rid!r}")
    if (count := meta.get("prompt_tokens")) != len(prompt.token_ids):
        raise EngineReplyError(f"{rollout_id}: sent {len(prompt.token_ids)} prompt tokens, the server read {count!r}")
    ids = _token_ids(_field(reply, "output_ids", list, rollout_id), rollout_id)
    logprobs = _logprobs(_field(meta, "output_token_logprobs", list, rollout_id), ids, rollout_id)
    if (count := meta.get("completion_tokens")) != len(ids):
        raise EngineReplyError(f"{rollout_id}: {len(ids)} tokens in output_ids, completion_tokens is {count!r}")
    finish, stop = _finish(_field(meta, "finish_reason", dict, rollout_id), ids, spec, rollout_id)
    spans = _spans(_field(meta, "weight_versions", list, rollout_id), len(ids), rollout_id)
    return Rollout(
        rollout_id=rollout_id,
        token_ids=np.asarray(ids, dtype=np.int32),
        text=decode(ids[:-1] if stop else ids),
        logprobs=logprobs,
        finish=finish,
        oldest_weights=min((span.version for span in spans), default=-1),
        newest_weights=max((span.version for span in spans), default=-1),
    )


def score_body(context_ids: Ids, response_ids: Ids, top_k: int, rollout_id: RolloutId) -> dict[str, Any]:
    """Body of ``POST /generate`` that generates nothing: the response is scored from the last token of its context on.

    Prompt scores are at temperature 1 whatever is sent, and the first of them is always null.
    """
    top = {
        "top_logprobs_num": top_k,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }
    return {
        "input_ids": [*context_ids.tolist(), *response_ids.tolist()],
        "rid": request_id(rollout_id),
        "return_logprob": True,
        "logprob_start_len": len(context_ids) - 1,
        **(top if top_k else {}),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
    }


def scores(reply: Any, context_ids: Ids, response_ids: Ids, top_k: int, rollout_id: RolloutId) -> Scores:
    """The checked reply to ``score_body``.

    Raises:
        EngineReplyError: anything is missing, miscounted, of other tokens or not finite. The text names the rollout.
    """
    meta = _field(reply, "meta_info", dict, rollout_id)
    if (rid := meta.get("id")) != request_id(rollout_id):
        raise EngineReplyError(f"{rollout_id}: the reply is for request {rid!r}")
    sent = len(context_ids) + len(response_ids)
    if (count := meta.get("prompt_tokens")) != sent:
        raise EngineReplyError(f"{rollout_id}: sent {sent} tokens, the server read {count!r}")
    entries = _field(meta, "input_token_logprobs", list, rollout_id)
    last = int(context_ids[-1])
    if not entries or not isinstance(entries[0], list) or entries[0][:2] != [None, last]:
        raise EngineReplyError(f"{rollout_id}: expected null for token {last} first, got {_short(entries[:1])}")
    sampled = _logprobs(entries[1:], response_ids.tolist(), rollout_id)
    ids, logprobs = _top(meta, len(response_ids), top_k, rollout_id)
    if top_k:
        gap = np.where(ids == response_ids[:, None], np.abs(logprobs - sampled[:, None]), 0.0).max(1)
        wrong = (gap > SAME_NATS) | (sampled > logprobs.max(1) + SAME_NATS)
        if wrong.any():
            token = int(wrong.argmax())
            raise EngineReplyError(
                f"{rollout_id}: token {token} has log-probability {sampled[token]}, among the most probable ones it is "
                f"another: {_short(dict(zip(ids[token].tolist(), logprobs[token].tolist(), strict=True)))}"
            )
    return Scores(sampled=sampled, top_ids=ids, top_logprobs=logprobs)


def was_aborted(reply: Any) -> bool:
    """Whether the server gave the request up, as it does when it is told to, or ends."""
    meta = reply.get("meta_info") if isinstance(reply, Mapping) else None
    reason = meta.get("finish_reason") if isinstance(meta, Mapping) else None
    return isinstance(reason, Mapping) and reason.get("type") == "abort"


def version_of(text: object) -> int | None:
    """The version that we published, from its text; None for anything else: the server has start weights."""
    return int(text) if isinstance(text, str) and text.isdecimal() and text.isascii() else None


def server_info(reply: Any, name: str) -> ServerInfo:
    """``GET /server_info``.

    Raises:
        EngineReplyError: a field is missing, or the version is one that we do not speak.
    """
    try:
        info = ServerInfo(
            version=str(reply["version"]),
            tp_size=int(reply["tp_size"]),
            device=str(reply["device"]),
            dtype=str(reply["dtype"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EngineReplyError(f"{name}: /server_info lacks {error}") from error
    if _release(info.version) < MIN_VERSION:
        oldest = ".".join(map(str, MIN_VERSION))
        raise EngineReplyError(f"{name}: runs SGLang {info.version}; needs {oldest} or later")
    return info


def checksums(reply: Any, name: str) -> list[dict[str, str]]:
    """``POST /weights_checker``: one table of digests per tensor-parallel rank, under the server's fused names."""
    try:
        tables = [dict(rank["checksums"]) for rank in reply["ranks"]]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineReplyError(f"{name}: /weights_checker gave no checksums: {str(reply)[:300]}") from error
    if not tables or not all(tables):
        raise EngineReplyError(f"{name}: /weights_checker gave empty checksums")
    return tables


def _release(version: str) -> tuple[int, ...]:
    """``0.5.21.post1`` -> (0, 5, 21); a part without digits counts as 0."""
    digits = ("".join(filter(str.isdigit, part)) for part in version.split(".")[:3])
    return tuple(int(part or 0) for part in digits)


def _field(table: Any, name: str, kind: type, rollout_id: RolloutId) -> Any:
    value = table.get(name) if isinstance(table, Mapping) else None
    if not isinstance(value, kind):
        raise EngineReplyError(f"{rollout_id}: expected {kind.__name__} in {name}, got {_short(value)}")
    return value


def _token_ids(values: list[Any], rollout_id: RolloutId) -> list[int]:
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value < 2**31:
            raise EngineReplyError(f"{rollout_id}: token {index} is {_short(value)}")
    return values


def _logprobs(entries: list[Any], ids: list[int], rollout_id: RolloutId) -> Any:
    """[[logprob, id, null], ...] -> [R] float32."""
    if len(entries) != len(ids):
        raise EngineReplyError(f"{rollout_id}: {len(ids)} tokens, {len(entries)} log-probabilities")
    values: list[float] = []
    for index, (entry, token) in enumerate(zip(entries, ids, strict=True)):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            raise EngineReplyError(f"{rollout_id}: token {index} is {token}, its log-probability is {_short(entry)}")
        value = entry[0]
        if type(value) not in (float, int) or not math.isfinite(value):
            raise EngineReplyError(f"{rollout_id}: log-probability of token {index} is {_short(value)}")
        values.append(value)
    return np.asarray(values, dtype=np.float32)


def _top(meta: Mapping[str, Any], length: int, top_k: int, rollout_id: RolloutId) -> tuple[Ids, Floats]:
    """Flat bytes -> (ids, log-probabilities), [R, K] each."""
    shape = (length, top_k)
    if not top_k:
        return np.empty(shape, np.int32), np.empty(shape, np.float32)
    if (told := meta.get("input_top_logprobs_shape")) != list(shape):
        raise EngineReplyError(f"{rollout_id}: asked for {list(shape)} in input_top_logprobs, got {_short(told)}")
    if (skipped := meta.get("input_top_logprobs_null_prefix")) != 1:
        raise EngineReplyError(f"{rollout_id}: input_top_logprobs_null_prefix is {_short(skipped)}, not 1")
    ids = _flat(meta, "input_top_logprobs_idx_flat_b64", np.dtype(np.int32), shape, rollout_id)
    logprobs = _flat(meta, "input_top_logprobs_val_flat_b64", np.dtype(np.float32), shape, rollout_id)
    ordered = np.sort(ids, axis=1)
    if (ordered[:, :1] < 0).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise EngineReplyError(f"{rollout_id}: an id among the most probable ones is negative or there twice")
    if not np.isfinite(logprobs).all():
        raise EngineReplyError(f"{rollout_id}: a log-probability of the most probable ids is not finite")
    return ids, logprobs


def _flat(meta: Mapping[str, Any], name: str, dtype: np.dtype, shape: tuple[int, int], rollout_id: RolloutId) -> Any:
    text = _field(meta, name, str, rollout_id)
    if (told := meta.get(f"{name}_dtype")) != dtype.name:
        raise EngineReplyError(f"{rollout_id}: {name} is of {_short(told)}, expected {dtype.name}")
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise EngineReplyError(f"{rollout_id}: {name} is not base64: {error}") from error
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise EngineReplyError(f"{rollout_id}: {name} has {len(raw)} bytes for {list(shape)} numbers")
    return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _finish(
    reason: Mapping[str, Any], ids: list[int], spec: SamplingSpec, rollout_id: RolloutId
) -> tuple[FinishReason, bool]:
    """(reason, whether the last token is a stop token)."""
    match reason.get("type"):
        case "stop":
            # The model's own end tokens also stop it, so this need not be one of ours; it must be the last token.
            if not ids or reason.get("matched") != ids[-1]:
                raise EngineReplyError(
                    f"{rollout_id}: stopped by {_short(reason.get('matched'))}, the last token is {ids[-1:]}"
                )
            return FinishReason.STOP, True
        case "length":
            if len(ids) != spec.max_new_tokens:
                raise EngineReplyError(
                    f"{rollout_id}: ended by length with {len(ids)} tokens, the limit is {spec.max_new_tokens}"
                )
            return FinishReason.LENGTH, False
        case "abort":
            return FinishReason.ABORT, False
        case other:
            raise EngineReplyError(f"{rollout_id}: unknown finish reason {_short(other)}")


def _spans(entries: list[Any], num_tokens: int, rollout_id: RolloutId) -> list[Span]:
    """Contiguous from 0 to the number of tokens, under versions that we published."""
    spans: list[Span] = []
    at = 0
    for entry in entries:
        version = version_of(entry.get("version")) if isinstance(entry, Mapping) else None
        if version is None or entry.get("start") != at or type(entry.get("end")) is not int or entry["end"] < at:
            raise EngineReplyError(f"{rollout_id}: weight span {_short(entry)} after token {at}: {_short(entries)}")
        if entry["end"] > at:
            spans.append(Span(version, at, entry["end"]))
        at = entry["end"]
    if at != num_tokens:
        raise EngineReplyError(f"{rollout_id}: {num_tokens} tokens, the weight spans end at {at}: {_short(entries)}")
    return spans


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
