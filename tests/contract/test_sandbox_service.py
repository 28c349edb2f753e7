"""The service over HTTP: what is refused, joined, replayed and drained, and what it says of itself."""

from __future__ import annotations

import collections
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_distil.registry import Registry
from tests.sandbox_service import (
    RIGHT,
    ROOT,
    SLOW,
    SPIN,
    TESTS,
    WRONG,
    Answer,
    Service,
    at_once,
    children,
    command,
    environment,
)

ANY_LEVEL = ("--min-level", "0")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service("--workers", "2", *ANY_LEVEL) as running:
        yield running


def test_right_and_wrong_programs_get_their_verdicts(service: Service) -> None:
    right, wrong = (service.post({"code": code, "tests": TESTS}).body for code in (RIGHT, WRONG))
    assert (right["pass_all"], right["tests"][0]["verdict"], right["feedback"]) == (True, "passed", "")
    assert (wrong["pass_all"], wrong["tests"][0]["verdict"]) == (False, "wrong_answer")
    assert wrong["feedback"].startswith(
        "Passed 0 of 1 tests.\n\nTest 1: Wrong Answer\nInput:\n```\n1\n```\nOutput:\n```\n7"
    )


def test_a_test_without_expected_output_is_run_and_shown_whole(service: Service) -> None:
    answer = service.post({"code": "print('x' * 50000)", "tests": [{"input": "", "output": None}]}).body
    assert answer["tests"][0]["verdict"] == "ran"
    assert answer["tests"][0]["stdout"] == "x" * 50000 + "\n"
    failed = service.post({"code": "print(1); 1 / 0", "tests": [{"input": ""}]}).body
    assert failed["tests"][0]["verdict"] == "runtime_error"
    assert "ZeroDivisionError" in failed["feedback"]


def test_a_function_is_called_with_json_and_compared_as_data(service: Service) -> None:
    body = {"code": "def f(a, b): return (a, b)", "mode": "functional", "fn": "f"}
    tests = [{"input": '1\n"x"', "output": '[1, "x"]'}, {"input": "1\n2", "output": "[1, 3]"}, {"input": "1\n2"}]
    answer = service.post({**body, "tests": tests}).body
    assert [row["verdict"] for row in answer["tests"]] == ["passed", "wrong_answer", "ran"]
    assert answer["tests"][2]["got"] == "(1, 2)"


def test_the_rest_is_not_run_after_enough_failures(service: Service) -> None:
    answer = service.post({"code": WRONG, "tests": TESTS * 3, "stop_after": 2}).body
    assert (answer["ran"], answer["total"], answer["pass_fraction"]) == (2, 3, 0.0)


def test_each_test_has_a_fresh_process(service: Service) -> None:
    code = "import builtins\nprint(getattr(builtins, 'n', 0)); builtins.n = 1"
    answer = service.post({"code": code, "tests": [{"input": "", "output": "0"}] * 3}).body
    assert answer["pass_all"]


@pytest.mark.parametrize(
    ("path", "data", "status", "code"),
    [
        ("/v1/run", b"{", 400, "bad_request"),
        ("/v1/run", b"[" * 100_000, 400, "bad_request"),
        ("/v1/run", b"\xff", 400, "bad_request"),
        ("/v1/run", b"{}", 400, "bad_request"),
        ("/v1/walk", b"{}", 404, "no_such_route"),
        ("/healthz", b"{}", 405, "no_such_route"),
    ],
)
def test_bad_requests_are_answered_with_a_code(
    service: Service, path: str, data: bytes, status: int, code: str
) -> None:
    answer = service.post(data, path=path)
    assert (answer.status, answer.body["error"]["code"]) == (status, code)


def test_programs_of_any_characters_are_answered(service: Service) -> None:
    for code in ("print('\ud800')", "\x00", "", "\ufeffprint(2)", "#" * 100_000):
        answer = service.post({"code": code, "tests": TESTS})
        assert (answer.status, answer.body["status"], answer.body["ran"]) == (200, "ok", 1)


def test_the_same_id_and_the_same_content_run_once(service: Service) -> None:
    before = service.count('sandbox_tests_total{verdict="passed"}')
    body = {"id": "a", "code": SLOW, "tests": TESTS}
    same_content = {"id": "b", "code": SLOW, "tests": TESTS}
    answers = at_once([lambda b=b: service.post(b) for b in (body, body, same_content)])
    assert [(a.status, a.body["pass_all"]) for a in answers if isinstance(a, Answer)] == [(200, True)] * 3
    assert sorted(a.body["id"] for a in answers if isinstance(a, Answer)) == ["a", "a", "b"]
    assert service.count('sandbox_tests_total{verdict="passed"}') == before + 1
    assert service.post(body).body["replayed"]
    reused = service.post({"id": "a", "code": RIGHT, "tests": TESTS})
    assert (reused.status, reused.body["error"]["code"]) == (409, "id_reused")


def test_health_readiness_and_metrics_say_what_they_should(service: Service) -> None:
    assert service.get("/healthz") == (200, "ok\n")
    ready = service.get("/readyz")
    assert (ready.status, ready.body["ready"]) == (200, True)
    level = ready.body["isolation"]["level"]
    assert service.count("sandbox_isolation_level") == level
    assert service.count("sandbox_workers") == 2
    if level < 2:
        assert ready.body["isolation"]["missing"]


def test_a_spinning_program_does_not_stop_the_others(service: Service) -> None:
    spin = {"code": SPIN, "tests": TESTS, "limits": {"cpu_s": 3.0}}
    thread = threading.Thread(target=service.post, args=(spin,))
    thread.start()
    started = time.monotonic()
    assert service.post({"code": f"{RIGHT} # beside a loop", "tests": TESTS}).body["pass_all"]
    assert time.monotonic() - started < 2.5
    thread.join()


def test_a_body_that_is_too_large_is_refused() -> None:
    with Service("--workers", "1", "--max-body-bytes", "1000", *ANY_LEVEL) as small:
        answer = small.post({"code": "#" * 2000, "tests": TESTS})
        assert (answer.status, answer.body["error"]["code"]) == (413, "too_large")


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    with Service("--workers", "1", "--queue", "2", *ANY_LEVEL) as narrow:
        bodies = [{"code": f"{SLOW} # {index}", "tests": TESTS} for index in range(8)]
        answers = [a for a in at_once([lambda b=b: narrow.post(b) for b in bodies]) if isinstance(a, Answer)]
        statuses = collections.Counter(answer.status for answer in answers)
        assert sum(statuses.values()) == 8
        assert statuses[429] >= 4
        assert statuses[200] >= 2
        assert all(answer.body["pass_all"] for answer in answers if answer.status == 200)
        busy = next(answer for answer in answers if answer.status == 429)
        assert busy.body["error"]["retry_after_s"] > 0
        assert narrow.get("/readyz").status == 200


def drain(deadline_s: str, code: str) -> tuple[int, Answer, float]:
    with Service("--workers", "1", "--drain-s", deadline_s, *ANY_LEVEL) as running:
        answers: list[Answer | Exception] = []
        body = {"code": code, "tests": TESTS, "limits": {"cpu_s": 30.0}}
        thread = threading.Thread(target=lambda: answers.extend(at_once([lambda: running.post(body)])))
        thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        exit_code = running.stop()
        taken = time.monotonic() - started
        thread.join()
    assert isinstance(answers[0], Answer)
    return exit_code, answers[0], taken


def test_drain_finishes_what_was_accepted() -> None:
    exit_code, answer, _ = drain("20", SLOW)
    assert (exit_code, answer.status, answer.body["pass_all"]) == (0, 200, True)


def test_drain_ends_at_its_deadline_with_an_error_and_no_verdict() -> None:
    exit_code, answer, taken = drain("0.5", SPIN)
    assert exit_code == 0
    assert taken < 10
    assert (answer.body["status"], answer.body["tests"]) == ("sandbox_error", [])


def refusal(*options: str) -> str:
    done = subprocess.run(command(*options), capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_it_refuses_to_start_below_the_wanted_level_and_says_what_is_missing() -> None:
    message = refusal("--min-level", "3")
    assert "at least 3 is required" in message
    assert "--min-level" in message.splitlines()[-1]
    assert "--level 1 is below --min-level 2" in refusal("--level", "1")


def test_it_refuses_a_python_that_cannot_run_programs_with_the_reason(tmp_path: Path) -> None:
    assert "/usr/no-such-python: does not exist" in refusal("--python", "/usr/no-such-python", *ANY_LEVEL)
    message = refusal("--python", "/bin/false", *ANY_LEVEL)
    assert "/bin/false: as " in message
    assert "exit status 1" in message
    assert "--python PATH" in message
    closed = tmp_path / "python"
    closed.touch(mode=0o600)
    assert "may not run it" in refusal("--python", str(closed), *ANY_LEVEL)


def test_it_refuses_to_be_open_to_others_without_a_token(tmp_path: Path) -> None:
    assert "--token-file" in refusal("--host", "0.0.0.0", *ANY_LEVEL)
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o644)
    assert "chmod 600" in refusal("--token-file", str(token), *ANY_LEVEL)


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("secret\n")
    with Service("--workers", "1", "--token-file", str(token), *ANY_LEVEL) as closed:
        assert closed.post({"code": RIGHT, "tests": TESTS}).status == 401
        assert closed.get("/healthz").status == 200


def test_it_refuses_a_worst_case_that_does_not_fit_with_the_arithmetic() -> None:
    message = refusal("--workers", "8", "--memory-bytes", str(4 << 30), *ANY_LEVEL)
    assert (
        "8 workers x (512 MiB memory + 16 MiB tmp + 3 x 8 MiB output) + 512 MiB of stored tests = 4.81 GiB" in message
    )
    assert "4.00 GiB (--memory-bytes). --workers 6 fits" in message
    assert "--max-cpu-s: nan is not a number from 0.05 on" in refusal("--max-cpu-s", "nan")
    assert "--queue: 0" in refusal("--queue", "0")


def test_its_record_is_in_the_registry_from_the_first_program_on_until_it_drains(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with Service("--workers", "1", "--registry", str(tmp_path), "--name", "s", *ANY_LEVEL) as running:
        (record,) = registry.wait_for("sandbox", 1, timeout_s=30)
        assert (record.url, record.pid, record.gen) == (running.url, running.process.pid, 0)
        assert record.info["level"] == running.get("/readyz").body["isolation"]["level"]
        assert record.info["workers"] == 1
        time.sleep(2.5)
        (later,) = registry.live("sandbox")
        assert later.ts > record.ts
        assert running.stop() == 0
        assert registry.live("sandbox", state=None, stale_s=float("inf")) == []


def test_workers_outlive_the_threads_of_the_service() -> None:
    with Service("--workers", "1", *ANY_LEVEL) as running:
        before = children(running.process.pid)
        large = {"code": "print('x' * 900_000)", "tests": [{"input": "", "output": "x"}]}  # judged in a thread
        for index in range(3):
            assert running.post({**large, "id": f"large {index}", "stop_after": index + 1}).body["status"] == "ok"
        assert running.post({"code": RIGHT, "tests": TESTS}).body["pass_all"]
        assert children(running.process.pid) == before
        assert running.count("sandbox_faults_total") == 0


def test_no_python_runs_between_fork_and_exec() -> None:
    sources = [path.read_text() for path in (Path(ROOT) / "sandbox").glob("*.py")]
    assert not any("preexec_fn" in source for source in sources), "it may hang in a process that has threads"


def test_a_taken_port_is_one_clear_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*command(*ANY_LEVEL), "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(),
            check=False,
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
