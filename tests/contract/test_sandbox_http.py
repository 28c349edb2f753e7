"""What comes over the wire, however wrong, gets an answer that is described, and the service goes on."""

from __future__ import annotations

import gzip
import json
import math
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import sandbox_openapi
from tests.sandbox_service import RIGHT, TESTS, Answer, Service, at_once

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis

BODY_BYTES, READ_S = 1_000_000, 1.5


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    options = ("--workers", "2", "--max-body-bytes", str(BODY_BYTES), "--read-s", str(READ_S), "--max-cpu-s", "0.5")
    with Service(*options, "--min-level", "0") as running:
        yield running
        assert running.process.poll() is None, "the service has ended"
        assert running.post({"code": f"{RIGHT} # at the end", "tests": TESTS}).body["pass_all"]


# ---------------------------------------------------------------------------------- one field at a time
GOOD: dict[str, Any] = {"code": RIGHT, "tests": TESTS}
WRONG: list[tuple[bytes, str]] = [
    (b"", "body: not JSON"),
    (b"{", "body: not JSON"),
    (b"\xff\xfe\x00", "body: not JSON"),
    (b"[" * 100_000, "body: not JSON"),
    (b'{"a":' * 900, "body: not JSON"),
    (b"9" * 60_000, "body: not JSON"),
    (b"null", "body: null is not a JSON object"),
    (b"[]", "body: a list of 0 is not a JSON object"),
    (b'{"code": "x", "code": "y", "tests": [{"input": ""}]}', "code: the object has it twice; once is right"),
    (b'{"code": "x", "tests": [{"input": "", "input": ""}]}', "input: the object has it twice"),
    (b'{"code": "x", "tests": [{"input": ""}], "limits": {"cpu_s": NaN}}', "limits.cpu_s: NaN is not a number"),
    (b'{"code": "x", "tests": [{"input": ""}], "limits": {"cpu_s": Infinity}}', "limits.cpu_s: Infinity is above this"),
    (b'{"code": "x", "tests": [{"input": ""}], "limits": {"cpu_s": -1}}', "limits.cpu_s: -1 is below 0.05"),
    (b'{"code": "x", "tests": [{"input": ""}], "limits": {"pids": 1.5}}', "limits.pids: 1.5 is not a whole number"),
    (b'{"code": "x", "tests": [{"input": ""}], "limits": {"cpu_s": 1}}', "limits.cpu_s: 1 is above this service's ceiling of 0.5"),
    (b'{"code": "x", "tests": [{"input": ""}], "mode": "both"}', "mode: \"both\" is not one of ('stdin', 'functional')"),
    (b'{"code": "x", "tests": [{"input": ""}], "language": "cobol"}', 'language: "cobol" is not one of'),
    (b'{"code": "x", "tests": [{"input": ""}], "deadline_s": 1e999}', "deadline_s: Infinity is not"),
    (b'{"code": "x", "tests": [{"input": 5}]}', "tests[0].input: 5 is not a string"),
    (b'{"code": "x", "tests": [{"input": ""}, {}]}', "tests[1].input: null is not a string"),
    (b'{"code": "x"}', "tests: null is not a list of 1 to 1000 objects"),
    (b'{"code": "x", "tests": [{"input": ""}], "' + b"k" * 9000 + b'": 1}', "kkkk"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_a_wrong_body_is_400_with_the_field_the_value_and_the_rule(service: Service, data: bytes, message: str) -> None:
    answer = service.post(data)
    assert (answer.status, answer.body["error"]["code"]) == (400, "bad_request")
    assert answer.body["error"]["message"].startswith(message)
    assert len(answer.body["error"]["message"]) < 700


def test_more_tests_than_are_taken_are_413(service: Service) -> None:
    answer = service.post({"code": "x", "tests": [{"input": ""}] * 10_000})
    assert (answer.status, answer.body["error"]["code"]) == (413, "too_large")
    assert "10000 are more than the 1000" in answer.body["error"]["message"]


def test_text_of_any_characters_goes_through(service: Service) -> None:
    for text in ("\x00", "\ud800", "\u2028\r\n\x1b[0m", "\U0001f600", "\ufeff"):
        code = "import sys; print(len(sys.stdin.read()))"
        tests = [{"input": text, "output": text}, {"input": "x", "output": "1"}]
        answer = service.post({"code": code, "tests": tests, "id": text})
        assert (answer.status, answer.body["status"], answer.body["id"]) == (200, "ok", text)
        assert answer.body["passed"] == 1


# ------------------------------------------------------------------------------------- the connection
def exchange(service: Service, *pieces: bytes, pause_s: float = 0.0, timeout_s: float = 20.0) -> bytes:
    """What comes back on a connection of our own, until it is closed."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            while chunk := connection.recv(65536):
                received += chunk
                if b"\r\n\r\n" in received and b"Connection: close" not in received:
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
        return received


def head(route: str, *fields: str) -> bytes:
    return "\r\n".join([f"POST {route} HTTP/1.1", "Host: x", *fields, "", ""]).encode("latin-1")


def test_a_large_body_is_413_before_it_is_read(service: Service) -> None:
    started = time.monotonic()
    said = exchange(service, head("/v1/run", "Content-Length: 104857600"), b"x" * 100_000)
    assert b" 413 " in said.split(b"\r\n")[0]
    assert b"104857600 bytes are more than the 1000000" in said
    assert time.monotonic() - started < 5


def test_a_large_body_without_a_length_is_413(service: Service) -> None:
    chunk = b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n"
    said = exchange(service, head("/v1/run", "Transfer-Encoding: chunked"), *([chunk] * 20))
    assert b" 413 " in said.split(b"\r\n")[0]


def test_a_compressed_bomb_is_413(service: Service) -> None:
    bomb = gzip.compress(b"x" * 50_000_000)
    assert len(bomb) < BODY_BYTES
    said = exchange(service, head("/v1/run", f"Content-Length: {len(bomb)}", "Content-Encoding: gzip"), bomb)
    assert b" 413 " in said.split(b"\r\n")[0]


@pytest.mark.parametrize("route", ["/v1/run", "/v1/batch", "/v1/tests/" + "0" * 64])
def test_a_body_that_breaks_off_is_no_error_of_ours(service: Service, route: str) -> None:
    data = b"not gzip at all"
    requests = [
        head(route, "Content-Length: 15", "Content-Encoding: gzip") + data,
        head(route, "Transfer-Encoding: chunked") + b"zz\r\nrubbish",
        head(route, "Content-Length: 99") + data,
        head(route, "Content-Length: -1"),
        head(route, "Content-Length: 1e9"),
        head(route, "Authorization: \xff\xfe", "Content-Length: 2") + b"{}",
        head(route, "Expect: miracles", "Content-Length: 2") + b"{}",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET " + b"/" * 100_000,
        b"POST " + route.encode() + b" HTTP/9.9\r\n\r\n",
    ]
    for request in requests:
        request = request if not route.startswith("/v1/tests") else request.replace(b"POST", b"PUT", 1)
        said = exchange(service, request, timeout_s=4 * READ_S)
        assert not said or 400 <= int(said.split()[1]) < 500 or b"/v1/batch" in request, (request, said)


def test_who_sends_slowly_is_answered_at_the_deadline(service: Service) -> None:
    said = exchange(service, head("/v1/run", "Content-Length: 100"), b"{", pause_s=0.1)
    assert b" 408 " in said.split(b"\r\n")[0]
    assert b"body: not there within 1.5 s" in said


def test_connections_that_say_nothing_are_closed(service: Service) -> None:
    def silent(data: bytes) -> float:
        started = time.monotonic()
        assert exchange(service, data) == b""
        return time.monotonic() - started

    halves = [b"", b"POST /v1/run HTT", b"POST /v1/run HTTP/1.1\r\nHost: x\r\nX-Half: "]
    taken = at_once([lambda data=data: silent(data) for data in halves for _ in range(10)])
    assert all(isinstance(seconds, float) and READ_S * 0.9 < seconds < READ_S * 4 for seconds in taken), taken


def test_slow_clients_keep_nobody_else_waiting(service: Service) -> None:
    def drip() -> bytes:
        return exchange(service, head("/v1/run", "Content-Length: 1000"), *([b"{"] * 20), pause_s=0.2)

    def quick() -> float:
        time.sleep(0.5)
        started = time.monotonic()
        assert service.get("/healthz").status == 200
        return time.monotonic() - started

    answers = at_once([*[drip] * 50, quick])
    assert isinstance(answers[-1], float)
    assert answers[-1] < 2.0


# ------------------------------------------------------------------------------------------ the fuzzer
schema = schemathesis.openapi.from_dict(sandbox_openapi.description())
QUIET = [
    HealthCheck.too_slow,
    HealthCheck.function_scoped_fixture,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
]


@pytest.mark.filterwarnings("ignore")
@schema.exclude(path="/v1/batch").parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
def test_whatever_the_description_allows_is_answered_as_described(case: Any, service: Service) -> None:
    if isinstance(case.body, dict):
        case.body.pop("language", None)  # a compiler takes its time to refuse a fuzzer's programs
    response = case.call(base_url=service.url, timeout=30)
    assert response.status_code < 500, response.text
    sandbox_openapi.check(case.method, case.formatted_path, response.status_code, _decoded(response.text))


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(sandbox_openapi.description()["components"]["schemas"]["Request"]["properties"])


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_in_any_field_is_taken_or_refused_by_name(service: Service, field: str, value: Any) -> None:
    answer = service.post({**GOOD, field: value})
    assert answer.status in (200, 400, 404, 409), answer
    if answer.status != 200:
        assert answer.body["error"]["message"].startswith(("id" if answer.status == 409 else field, "tests_ref"))


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
@given(lines=st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), max_size=6))
def test_any_lines_of_a_batch_are_answered(service: Service, lines: list[bytes]) -> None:
    wanted = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
    said = service.batch(*lines, json.dumps(GOOD).encode())
    assert len(said) == len(wanted) + 1
    assert sum(line.get("pass_all", False) for line in said) == 1


# --------------------------------------------------------------------------------- what it says of itself
def test_every_route_has_a_description_and_every_description_a_route(service: Service) -> None:
    for path, item in sandbox_openapi.description()["paths"].items():
        real = path.replace("{sha256}", "0" * 64)
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            answer: Answer = service.ask(method, real, b"{}" if method in ("POST", "PUT") else None)
            assert (answer.status == 405) == (method.lower() not in item), (method, path, answer)


def test_capabilities_say_what_the_requests_then_meet(service: Service) -> None:
    said = service.get("/v1/capabilities").body
    assert said["limits"]["ceilings"]["cpu_s"] == 0.5
    assert (said["limits"]["ceilings"]["idle_s"], said["limits"]["defaults"]["cpu_s"]) == (1.0, 0.5)
    assert (said["workers"], said["queue"], said["max_body_bytes"]) == (2, 256, BODY_BYTES)
    assert said["isolation"] == service.get("/readyz").body["isolation"]
    assert "python" in said["languages"]
    assert said["versions"]["python"].count(".") == 2
    assert said["probe"]["facts"]["seccomp"]["works"] in (True, False)
    answer = service.post({"code": "while True: pass", "tests": TESTS})
    assert answer.body["tests"][0]["verdict"] == "time_limit"
    assert answer.body["tests"][0]["why"] == "CPU time above 0.5 s"


def test_metrics_are_text_that_prometheus_reads(service: Service) -> None:
    service.post({"code": f"{RIGHT} # counted", "tests": TESTS})
    values: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in service.get("/metrics").body.splitlines():
        if line.startswith("# TYPE "):
            kinds[line.split()[2]] = line.split()[3]
        else:
            name, value = line.rsplit(" ", 1)
            assert name not in values
            values[name] = float(value)
    assert all(math.isfinite(value) for value in values.values())
    for name in ("worker_start", "queue_wait", "test"):
        full = f"sandbox_{name}_seconds"
        assert kinds[full] == "histogram"
        buckets = [value for key, value in values.items() if key.startswith(f"{full}_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == values[f"{full}_count"] > 0
        assert values[f"{full}_sum"] > 0
    assert kinds["sandbox_tests_total"] == kinds["sandbox_jobs_total"] == "counter"
    named = "queue_depth workers workers_busy isolation_level jobs_total rejected_total replayed_total joined_total"
    for name in [*named.split(), "recycled_total", "start_failures_total", "cpu_seconds_total"]:
        assert f"sandbox_{name}" in values


def test_everything_under_v1_asks_for_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("secret\n")
    with Service("--workers", "1", "--token-file", str(token), "--min-level", "0") as closed:
        for path, item in sandbox_openapi.description()["paths"].items():
            for method in set(item) - {"parameters"}:
                real = path.replace("{sha256}", "0" * 64)
                data = b"{}" if method in ("post", "put") else None
                for wrong in ("", "secre", "secret2", "s\u00e9cret"):
                    status = closed.ask(method.upper(), real, data, token=wrong).status
                    assert (status == 401) == path.startswith("/v1/")
                assert closed.ask(method.upper(), real, data, token="secret").status != 401
