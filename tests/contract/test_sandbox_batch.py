"""Batches, uploaded tests, deadlines and hang-ups over real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.sandbox_service import (
    RIGHT,
    SLOW,
    SPIN,
    TESTS,
    WRONG,
    Answer,
    Service,
    at_once,
    children,
    descendants,
    is_alive,
    until,
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    options = ("--workers", "1", "--queue", "4", "--max-stored-bytes", "2000", "--max-body-bytes", "100000")
    with Service(*options, "--read-s", "2", "--min-level", "0") as running:
        yield running


def body(code: str, **more: object) -> dict[str, object]:
    return {"code": code, "tests": TESTS, **more}


# ------------------------------------------------------------------------------------------- batches
def test_every_line_of_a_batch_gets_its_own_answer_or_its_own_error(service: Service) -> None:
    said = service.batch(
        body(RIGHT, id="right"),
        b"",
        b'{"code": ',
        body(WRONG, id="wrong"),
        b"\r",
        {"id": "bad", "code": 3, "tests": TESTS},
        {"id": "ref", "code": RIGHT, "tests_ref": "0" * 64},
        b'{"id": "large", "code": "' + b"#" * 200_000 + b'", "tests": []}',
        body(WRONG, id="right"),
        body("print(0)", id="last"),
    )
    by_id = {line["id"]: line for line in said if line["id"]}
    assert by_id["wrong"]["pass_all"] is False
    assert by_id["last"]["pass_all"] is False
    errors = {line["line"]: line["error"] for line in said if "error" in line}
    codes = {number: error["code"] for number, error in errors.items()}
    assert codes == {3: "bad_request", 6: "bad_request", 7: "tests_unknown", 8: "too_large", 9: "id_reused"}
    assert by_id["bad"]["error"]["message"] == "code: 3 is not a string"
    assert [line.get("pass_all") for line in said if line["id"] == "right"].count(True) == 1
    assert len(said) == 8


def test_a_batch_is_answered_in_order_of_completion() -> None:
    with Service("--workers", "2", "--min-level", "0") as service:
        quick = [body(f"{RIGHT} # {index}", id=str(index)) for index in range(4)]
        said = service.batch(body(SLOW, id="slow"), *quick)
        assert [line["id"] for line in said] == ["0", "1", "2", "3", "slow"]


def test_a_batch_larger_than_the_queue_is_taken_as_there_is_room(service: Service) -> None:
    lines = [body(f"{RIGHT} # of many {index}", id=f"many {index}") for index in range(40)]
    said = service.batch(*lines)
    assert sorted(line["id"] for line in said) == sorted(line["id"] for line in lines)
    assert all(line["pass_all"] for line in said)
    batches = at_once([lambda k=k: service.batch(*({**line, "code": f"{RIGHT} # {k} {line['id']}", "id": f"{k} {line['id']}"} for line in lines[:12])) for k in range(4)])  # fmt: skip
    assert [len(said) for said in batches if isinstance(said, list)] == [12] * 4
    assert all(line["pass_all"] for said in batches if isinstance(said, list) for line in said)


def connected(service: Service) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    chunks: list[bytes] = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


NEWLINE = b"\n"
HEAD = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{}\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_who_reads_no_answers_is_not_read_from(service: Service) -> None:
    wanted = 200
    code = "print('{}', 'x' * 60000)"
    lines = [json.dumps({"code": code.format(index), "tests": [{"input": ""}]}).encode() for index in range(wanted)]
    before = service.count("sandbox_jobs_total")

    def done() -> float:
        return service.count("sandbox_jobs_total") - before

    with connected(service) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        fields = f"Content-Length: {len(NEWLINE.join(lines))}\r\nConnection: close"
        connection.sendall(HEAD.format("/v1/batch", fields).encode() + NEWLINE.join(lines))
        seen = -1.0
        while seen < done() < wanted:  # until nothing moves
            seen = done()
            time.sleep(1.0)
        assert 0 < done() < wanted
        assert service.post(body(RIGHT + " # beside it")).body["pass_all"]
        said = read_all(connection)
    assert said.count(b'"status": "ok"') == wanted


def test_a_line_that_does_not_come_ends_the_batch_with_an_error(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(HEAD.format("/v1/batch", "Transfer-Encoding: chunked\r\nConnection: close").encode())
        connection.sendall(chunked(json.dumps(body(RIGHT, id="in time")).encode() + b'\n{"code'))
        said = read_all(connection)
    assert b'"in time"' in said
    assert b'"too_slow"' in said


# ------------------------------------------------------------------------------- uploaded sets of tests
def uploaded(tests: object) -> tuple[bytes, str]:
    data = json.dumps(tests).encode()
    return data, hashlib.sha256(data).hexdigest()


def test_uploaded_tests_are_named_by_their_hash(service: Service) -> None:
    data, ref = uploaded(TESTS)
    path = f"/v1/tests/{ref}"
    asked = {"code": RIGHT, "tests_ref": ref}
    assert service.ask("HEAD", path).status == 404
    unknown = service.post(asked)
    assert (unknown.status, unknown.body["error"]["code"]) == (404, "tests_unknown")
    assert service.ask("PUT", path, data).body["tests"] == 1
    assert service.ask("PUT", path, data).status == 200
    assert service.ask("HEAD", path).status == 200
    answer = service.post(asked)
    assert answer.body["pass_all"]
    inline = service.post({"code": RIGHT, "tests": TESTS})
    assert inline.body["replayed"], "the same tests, named or sent, are the same request"
    both = service.post({**asked, "tests": TESTS})
    assert (both.status, both.body["error"]["message"][:10]) == (400, "tests_ref:")


@pytest.mark.parametrize(
    ("name", "data", "status", "message"),
    [
        ("0" * 64, b"[]", 400, "is not the hash of the body"),
        ("", b"[]", 400, "tests: a list of 0"),
        ("", b"{", 400, "body: not JSON"),
        ("", b'[{"input": 3}]', 400, "tests[0].input: 3 is not a string"),
        ("", json.dumps([{"input": "", "output": ""}] * 1001).encode(), 413, "tests: 1001 are more than the 1000"),
        ("", b" " * 100_001, 413, "body: 100001 bytes"),
        ("", json.dumps([{"input": "x" * 3000}]).encode(), 413, "more than the 2000 that are stored"),
        ("ABC", b"[]", 400, "'ABC' is not 64 hexadecimal digits"),
    ],
)
def test_what_is_wrong_with_an_upload_is_said(
    service: Service, name: str, data: bytes, status: int, message: str
) -> None:
    answer = service.ask("PUT", f"/v1/tests/{name or hashlib.sha256(data).hexdigest()}", data)
    assert answer.status == status
    assert message in answer.body["error"]["message"]


def test_the_least_recently_used_tests_are_forgotten_first(service: Service) -> None:
    sets = [uploaded([{"input": f"{index}\n", "output": "x" * 800}]) for index in range(3)]
    for data, ref in sets[:2]:
        assert service.ask("PUT", f"/v1/tests/{ref}", data).status == 200
    assert service.ask("HEAD", f"/v1/tests/{sets[0][1]}").status == 200
    data, ref = sets[2]
    assert service.ask("PUT", f"/v1/tests/{ref}", data).status == 200
    assert [service.ask("HEAD", f"/v1/tests/{ref}").status for _, ref in sets] == [200, 404, 200]


def test_functional_tests_that_are_not_json_are_refused_where_they_are_used(service: Service) -> None:
    data, ref = uploaded([{"input": "1", "output": "{"}])
    assert service.ask("PUT", f"/v1/tests/{ref}", data).status == 200
    answer = service.post({"code": "x", "tests_ref": ref, "mode": "functional", "fn": "f"})
    assert answer.body["error"]["message"].startswith("tests[0].output: not JSON")


# ------------------------------------------------------------------------------ deadlines and hang-ups
def test_a_deadline_covers_the_queue_and_leaves_no_verdict(service: Service) -> None:
    spin = body(SPIN + " # deadline", limits={"cpu_s": 20.0}, deadline_s=0.8)
    started = time.monotonic()
    running, waiting = at_once([lambda: service.post(spin), lambda: late(service)])
    assert time.monotonic() - started < 6
    for answer in (running, waiting):
        assert isinstance(answer, Answer)
        assert (answer.status, answer.body["status"], answer.body["tests"]) == (200, "sandbox_error", [])
        assert answer.body["detail"].startswith("deadline")
    assert service.post(body(RIGHT + " # afterwards")).body["pass_all"]
    assert service.count('sandbox_sandbox_errors_total{reason="deadline"}') >= 2
    assert service.post(body(SLOW, deadline_s=20)).body["pass_all"]


def late(service: Service) -> Answer:
    time.sleep(0.2)
    return service.post(body(RIGHT + " # waits", deadline_s=0.3))


def test_a_client_that_hangs_up_takes_its_job_along_if_it_says_so(service: Service) -> None:
    idle = set(descendants(service.process.pid))
    spin = body(SPIN + " # hang up", limits={"cpu_s": 30.0}, cancel_on_disconnect=True)
    with pytest.raises(TimeoutError):
        service.post(spin, timeout=0.7)
    program = [pid for pid in descendants(service.process.pid) if pid not in idle]
    assert until(lambda: service.count("sandbox_workers_busy") == 0, 3)
    assert until(lambda: not any(map(is_alive, program)), 3)
    assert service.count("sandbox_cancelled_total") >= 1
    assert service.post(body(RIGHT + " # after a hang-up")).body["pass_all"]


def test_a_job_that_another_client_wants_is_not_taken_along(service: Service) -> None:
    slow = body("import time\ntime.sleep(1.5)\nprint(2)", cancel_on_disconnect=True)
    stays: list[object] = []
    thread = threading.Thread(target=lambda: stays.extend(at_once([lambda: service.post(slow)])))
    thread.start()
    with pytest.raises(TimeoutError):
        service.post(slow, timeout=0.5)
    thread.join()
    (answer,) = stays
    assert isinstance(answer, Answer)
    assert answer.body["pass_all"]


def test_an_idle_worker_that_died_costs_nobody_a_verdict(service: Service) -> None:
    before = service.count("sandbox_sandbox_errors_total")
    for pid in children(service.process.pid):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    assert service.post(body(RIGHT + " # after a death")).body["pass_all"]
    assert service.count("sandbox_sandbox_errors_total") == before


def test_hang_ups_at_any_moment_leave_the_service_whole(service: Service) -> None:
    rng = random.Random(1)
    for index in range(30):
        data = json.dumps(body(f"import time; time.sleep(0.05); {RIGHT} # {index}", cancel_on_disconnect=True)).encode()
        head = HEAD.format("/v1/run", f"Content-Length: {len(data)}").encode()
        with connected(service) as connection:
            whole = head + data
            connection.sendall(whole[: rng.choice([5, len(head), len(head) + 9, len(whole), len(whole)])])
            time.sleep(rng.choice([0.0, 0.02, 0.1]))
    assert until(lambda: service.count("sandbox_workers_busy") == 0)
    assert service.count("sandbox_queue_depth") == 0
    assert service.post(body(RIGHT + " # after many")).body["pass_all"]
