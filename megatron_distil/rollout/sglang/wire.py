"""SGLang's requests and replies <-> our records. Pure; the only file that spells the field names of ``/generate``.

Whatever a reply lacks is an ``EngineReplyError`` with the rollout's id: no position is ever skipped or filled in.

Tested with SGLang 0.5.21 and 0.5.23. A server ignores fields that it does not know, so each thing that was asked for is
looked for in the reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_distil.errors import EngineReplyError
from megatron_distil.protocols import SamplingSpec
from megatron_distil.types import FinishReason, Prompt, Rollout, RolloutId

MIN_VERSION = (0, 5, 21)
"""Has the weight-update session, spans of weight versions and checksums."""

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
