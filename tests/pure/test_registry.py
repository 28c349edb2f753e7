import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from megatron_distil.errors import RegistryError
from megatron_distil.registry import STALE_S, Record, Registry


def record(name: str = "rollout-0", **changes: object) -> Record:
    fields: dict[str, object] = {
        "role": "rollout",
        "name": name,
        "url": "http://127.0.0.1:3000",
        "pid": 1,
        "pgid": 1,
        "state": "ready",
        "gen": 0,
        "ts": time.time(),
        "info": {"gpus": 2, "model": "tiny"},
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_what_was_written_is_read_back_sorted_by_name(registry):
    records = [record("rollout-2"), record("rollout-0"), record("rollout-1")]
    for each in records:
        registry.write(each)
    assert registry.live("rollout") == sorted(records, key=lambda r: r.name)
    assert registry.live("sandbox") == []


def test_a_service_without_heartbeat_is_not_live(registry):
    registry.write(record("old", ts=time.time() - STALE_S - 0.1))
    registry.write(record("new", ts=time.time() - STALE_S + 2.0))
    assert [r.name for r in registry.live("rollout")] == ["new"]
    assert [r.name for r in registry.live("rollout", stale_s=60.0)] == ["new", "old"]


def test_a_service_that_starts_is_found_in_its_state_only(registry):
    registry.write(record(state="starting"))
    assert registry.live("rollout") == []
    assert len(registry.live("rollout", state="starting")) == 1
    assert len(registry.live("rollout", state=None)) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"role": "rollout"}', "\x00" * 40])
def test_a_torn_record_hides_nobody_else(registry, text):
    registry.write(record("rollout-1"))
    (registry.folder / "rollout" / "rollout-0.json").write_text(text)
    assert [r.name for r in registry.live("rollout")] == ["rollout-1"]


def test_a_reader_never_sees_half_a_record(registry):
    registry.write(record())
    long = "m" * 100_000
    ended = threading.Event()

    def rewrite() -> None:
        for gen in range(150):
            registry.write(record(gen=gen, info={"model": long}))
        ended.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    reads = 0
    while not ended.is_set():
        (seen,) = registry.live("rollout")
        assert seen.info["model"] in ("tiny", long)
        reads += 1
    writer.join()
    assert reads > 10
    assert os.listdir(registry.folder / "rollout") == ["rollout-0.json"]


def test_waiting_ends_as_soon_as_enough_are_ready(registry):
    registry.write(record("rollout-0"))

    def second_comes() -> None:
        time.sleep(0.3)
        registry.write(record("rollout-1"))

    writer = threading.Thread(target=second_comes)
    writer.start()
    started = time.monotonic()
    assert [r.name for r in registry.wait_for("rollout", 2, timeout_s=20.0)] == ["rollout-0", "rollout-1"]
    writer.join()
    assert 0.3 <= time.monotonic() - started < 10.0


def test_waiting_ends_at_its_deadline_and_says_who_is_missing_and_how(registry):
    registry.write(record("rollout-0"))
    registry.write(record("rollout-1", state="starting", gen=3))
    registry.write(record("rollout-2", ts=time.time() - 100.0))
    with pytest.raises(RegistryError) as caught:
        registry.wait_for("rollout", 3, timeout_s=0.3)
    text = str(caught.value)
    assert "waited 0 s for role 'rollout': need 3 services, have 1 ready" in text
    assert "rollout-1 is starting, start 3" in text
    assert "rollout-2 is ready, start 0, last heartbeat 100 s ago" in text
    assert str(registry.folder) in text


def test_waiting_for_a_role_that_nobody_has_says_so(registry):
    with pytest.raises(RegistryError, match=r"role 'sandbox': need 1 services, have 0 ready \(no other service"):
        registry.wait_for("sandbox", 1, timeout_s=0.0)


def test_waiting_ends_when_the_run_is_asked_to_stop(registry):
    registry.request_stop()
    with pytest.raises(RegistryError, match="asked to stop while waiting for role 'rollout': need 1"):
        registry.wait_for("rollout", 1, timeout_s=600.0, stopped=registry.stop_requested)


def test_waiting_for_nobody_does_not_wait(registry):
    assert registry.wait_for("sandbox", 0, timeout_s=0.0) == []


def test_a_pause_is_seen_by_everybody_until_it_is_over(registry):
    one, two = record("rollout-0"), record("rollout-1")
    registry.write(one)
    registry.mark_paused(one)
    other = Registry(registry.folder)
    assert other.is_paused("rollout", "rollout-0")
    assert not other.is_paused("rollout", "rollout-1")
    assert [r.name for r in other.live("rollout")] == ["rollout-0"]
    other.clear_paused(one)
    other.clear_paused(two)
    assert not registry.is_paused("rollout", "rollout-0")


def test_a_service_that_is_taken_off_leaves_no_pause_behind(registry):
    registry.write(record())
    registry.mark_paused(record())
    registry.remove("rollout", "rollout-0")
    registry.write(replace(record(), gen=1))
    assert not registry.is_paused("rollout", "rollout-0")


def test_the_first_reason_stays(registry):
    registry.say_reason("fatal the model is no folder")
    registry.say_reason("failed train ended with exit code 1")
    assert registry.reason() == "fatal the model is no folder"


def test_the_wish_to_end_is_a_stop_that_outlives_a_plain_one(registry):
    registry.request_stop()
    assert not registry.end_requested()
    registry.request_end()
    registry.request_stop()
    assert registry.stop_requested()
    assert registry.end_requested()
    registry.forget_end()
    assert not registry.end_requested()


def test_a_thousand_records_are_read_in_a_moment(registry, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for index in range(1000):
        registry.write(record(f"rollout-{index:04d}", ts=time.time() + 60.0))
    costs = []
    for _ in range(10):
        began = time.process_time()  # others work on this machine as well
        assert len(registry.live("rollout")) == 1000
        costs.append(time.process_time() - began)
    assert min(costs) < 0.05


def test_what_registered_once_is_known_by_its_role(registry):
    assert registry.roles() == []
    registry.write(record())
    registry.write(record("sandbox-0", role="sandbox"))
    registry.request_stop()
    assert registry.roles() == ["rollout", "sandbox"]


def test_stop_and_reason_belong_to_one_attempt(registry):
    assert registry.reason() == ""
    assert not registry.stop_requested()
    registry.say_reason("unavailable: rollout-0\n  died")
    registry.request_stop()
    assert registry.reason() == "unavailable: rollout-0 died"
    assert registry.stop_requested()
    registry.forget_end()
    assert registry.reason() == ""
    assert not registry.stop_requested()


def test_a_reason_that_cannot_be_written_ends_nothing_and_leaves_its_place_to_another(tmp_path):
    said = """
import resource, sys
from megatron_distil.registry import Registry
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
Registry(sys.argv[1]).say_reason("failed the folder is full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert Registry(sys.argv[1]).reason() == ""
Registry(sys.argv[1]).say_reason("failed later")
"""
    subprocess.run([sys.executable, "-c", said, str(tmp_path)], check=True, timeout=60)
    assert Registry(tmp_path).reason() == "failed later"


def test_a_reason_in_a_place_that_is_no_folder_ends_nothing(tmp_path):
    (tmp_path / "file").touch()
    Registry(tmp_path / "file").say_reason("failed")
