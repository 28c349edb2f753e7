"""Ceilings against memory, what is kept and dropped, what is counted, and the record in the registry."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_distil.registry import Record, Registry
from sandbox import limits, memory, metrics, refusal, request, store, waiting
from sandbox.registration import Registration

MIB, GIB = 1 << 20, 1 << 30


# ---------------------------------------------------------------------------------------------- memory
def machine(root: Path, groups: str, files: dict[str, str], total_kib: int = 16 << 20) -> memory.Memory:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemTotal:       {total_kib} kB\nMemAvailable: 5 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return memory.available(root)


@pytest.mark.parametrize(
    ("groups", "files", "expected", "source"),
    [
        ("", {}, 16 * GIB, "MemTotal"),
        ("0::/\n", {"memory.max": "max"}, 16 * GIB, "MemTotal"),
        ("0::/\n", {"memory.max": str(2 * GIB)}, 2 * GIB, "sys/fs/cgroup/memory.max"),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": str(3 * GIB)}, 3 * GIB, "a/memory.max"),
        ("0::/a/b\n", {"a/b/memory.max": str(GIB), "a/memory.max": str(3 * GIB)}, GIB, "a/b/memory.max"),
        ("0::/seen/outside\n", {"memory.max": str(GIB)}, GIB, "sys/fs/cgroup/memory.max"),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": str(GIB)}, GIB, "memory.limit_in_bytes"),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": str(GIB)}, GIB, "memory.limit_in_bytes"),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 16 * GIB, "MemTotal"),
        ("5:cpu:/job\n", {"memory/job/memory.limit_in_bytes": str(GIB)}, 16 * GIB, "MemTotal"),
        ("0::/\n", {"memory.max": str(64 * GIB)}, 16 * GIB, "MemTotal"),
    ],
)
def test_the_memory_is_the_least_of_what_the_cgroups_and_the_machine_say(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int, source: str
) -> None:
    found = machine(tmp_path, groups, files)
    assert found.bytes == expected
    assert source in found.source


def worst_case(ceilings: dict[str, float], workers: int, stored: int) -> float:
    """The sum as the specification writes it."""
    one = ceilings["memory_bytes"] + ceilings["tmp_bytes"] + 3 * ceilings["output_bytes"]
    return workers * one + stored


def test_ceilings_stay_where_all_fits() -> None:
    found = memory.ceilings({}, workers=2, stored_bytes=GIB, memory=memory.Memory(64 * GIB, "x"))
    assert found == dict(limits.CEILINGS)


@given(workers=st.integers(1, 64), gib=st.floats(0.5, 200), stored=st.integers(1, GIB))
def test_lowered_ceilings_fit_exactly_and_never_go_below_the_defaults(workers: int, gib: float, stored: int) -> None:
    there = memory.Memory(int(gib * GIB), "x")
    try:
        found = memory.ceilings({}, workers=workers, stored_bytes=stored, memory=there)
    except memory.DoesNotFit:
        assert worst_case(dict(limits.DEFAULTS), workers, stored) > there.bytes
        return
    assert worst_case(found, workers, stored) <= there.bytes
    assert all(limits.DEFAULTS[name] <= found[name] <= limits.CEILINGS[name] for name in limits.CEILINGS)
    if found != limits.CEILINGS:
        assert worst_case(found, workers, stored) > there.bytes - workers * 16  # nothing is left lying


def test_a_ceiling_that_is_given_is_not_lowered_but_refused_with_the_arithmetic() -> None:
    there = memory.Memory(4 * GIB, "memory.max")
    given_ = {"memory_bytes": 2 * GIB}
    with pytest.raises(memory.DoesNotFit) as caught:
        memory.ceilings(given_, workers=2, stored_bytes=512 * MIB, memory=there)
    assert str(caught.value) == (
        "2 workers x (2.00 GiB memory + 16 MiB tmp + 3 x 8 MiB output) + 512 MiB of stored tests = 4.58 GiB, and there "
        "are 4.00 GiB (memory.max). --workers 1 fits; --memory-bytes N states what there really is."
    )
    found = memory.ceilings(given_, workers=1, stored_bytes=512 * MIB, memory=there)
    assert found["memory_bytes"] == 2 * GIB
    with pytest.raises(memory.DoesNotFit, match="Lower --max-memory-bytes or --max-stored-bytes"):
        memory.ceilings({}, workers=1, stored_bytes=512 * MIB, memory=memory.Memory(GIB // 2, "x"))


def test_a_ceiling_below_a_default_becomes_the_default() -> None:
    there = memory.Memory(64 * GIB, "x")
    ceilings = memory.ceilings({"memory_bytes": 100 * MIB, "cpu_s": 2.0}, workers=1, stored_bytes=0, memory=there)
    assert (ceilings["memory_bytes"], ceilings["cpu_s"], ceilings["idle_s"], ceilings["wall_s"]) == (
        100 * MIB,
        2,
        4,
        30,
    )
    plain = limits.complete({}, ceilings)
    assert (plain["memory_bytes"], plain["cpu_s"], plain["idle_s"], plain["wall_s"]) == (100 * MIB, 2, 4, 30)
    rules = request.Rules(ceilings=ceilings)
    body = {"code": "x", "tests": [{"input": ""}]}
    assert request.parse({**body, "limits": {"cpu_s": 2}}, rules).limits["wall_s"] == 30
    with pytest.raises(refusal.BadRequest, match=r"limits\.memory_bytes: 104857601 is above .* 104857600"):
        request.parse({**body, "limits": {"memory_bytes": 100 * MIB + 1}}, rules)


# ------------------------------------------------------------------------------------------- languages
def test_a_language_that_does_not_run_here_is_refused_with_the_reason() -> None:
    rules = request.Rules(languages={"python": "", "cpp": "/usr/bin/g++ is not there"})
    body = {"code": "x", "tests": [{"input": ""}], "language": "cpp"}
    with pytest.raises(
        refusal.BadRequest, match=r"language: 'cpp' does not run here: .* is not there; these do: python"
    ):
        request.parse(body, rules)
    both = request.Rules(languages={"python": "", "cpp": ""})
    assert request.parse(body, both).digest != request.parse({**body, "language": "python"}, both).digest
    with pytest.raises(refusal.BadRequest, match="mode: 'functional' is for python"):
        request.parse({**body, "mode": "functional", "fn": "f"}, both)


# --------------------------------------------------------------------------------------- what is kept
def set_of(text: str) -> request.TestSet:
    return request.parse_tests([{"input": text}])


def test_sets_of_tests_are_dropped_by_age_of_use_when_there_are_too_many_bytes() -> None:
    sets = store.TestSets(max_bytes=10)
    for name in "abc":
        sets.put(name, set_of("xxx"))
    assert sets.get("a")
    sets.put("d", set_of("xxx"))
    assert [name for name in "abcd" if sets.get(name)] == ["a", "c", "d"]
    sets.put("a", set_of("xxxxxxx"))
    assert [name for name in "abcd" if sets.get(name)] == ["a", "d"]
    assert sets.held_bytes == 10
    sets.put("e", set_of("x" * 10))
    assert [name for name in "abcde" if sets.get(name)] == ["e"]


def test_answers_are_bounded_by_number_and_bytes_and_faults_are_not_kept() -> None:
    answers = store.Answers(max_entries=2, max_bytes=200)
    for name in "abc":
        answers.put(name, {"status": "ok"})
    assert [name for name in "abc" if answers.get(name)] == ["b", "c"]
    answers.put("d", {"status": "ok", "x": "y" * 150})
    answers.put("e", {"status": "ok", "x": "y" * 150})
    assert [name for name in "abcde" if answers.get(name)] == ["e"]
    answers.put("f", {"status": "sandbox_error"})
    assert answers.get("f") is None


def test_an_id_is_bound_to_its_content_until_it_is_forgotten() -> None:
    answers = store.Answers(max_entries=2)
    answers.claim("a", "1")
    answers.claim("a", "1")
    with pytest.raises(refusal.IdReused, match="id: 'a' was used for another request"):
        answers.claim("a", "2")
    for name in "bcde":
        answers.claim(name, "1")
    answers.claim("a", "2")


def test_the_queue_is_bounded_by_jobs_and_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_CHARS", 100)

    async def scenario() -> list[Any]:
        queue = waiting.Waiting(3)

        def job(chars: int) -> waiting.Job:
            parsed = request.parse({"code": "#" * chars, "tests": [{"input": ""}]})
            return waiting.Job(parsed, 0.0, asyncio.get_running_loop().create_future())

        big, second, third = job(150), job(10), job(11)
        queue.check_room()
        queue.put(big)
        with pytest.raises(refusal.Busy, match="150 characters wait"):
            queue.check_room()
        room = asyncio.create_task(queue.room())
        await asyncio.sleep(0)
        assert not room.done()
        queue.remove(big)
        await asyncio.wait_for(room, 1)
        for one in (second, third, job(12)):
            queue.check_room()
            queue.put(one)
        with pytest.raises(refusal.Busy, match="3 of 3 wait"):
            queue.check_room()
        queue.remove(third)
        queue.remove(third)
        taken = [await queue.take(), await queue.take()]
        assert taken[0] is second
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.05)
        return taken

    assert len(asyncio.run(scenario())) == 2


# ------------------------------------------------------------------------------------ what is counted
def test_a_histogram_counts_what_is_not_above_each_bound() -> None:
    counted = metrics.Metrics()
    seen = [0.0005, 0.001, 0.0011, 3.0, 60.0, 61.0, 1e9]
    for value in seen:
        counted.observe("test_seconds", value)
    counted.count("sandbox_errors", reason="deadline")
    lines = dict(line.rsplit(" ", 1) for line in counted.text({"workers": 3}).splitlines() if line[0] != "#")
    for bound in metrics.BOUNDS_S:
        expected = sum(value <= bound for value in seen)
        assert lines[f'sandbox_test_seconds_bucket{{le="{bound}"}}'] == str(expected)
    assert lines['sandbox_test_seconds_bucket{le="+Inf"}'] == lines["sandbox_test_seconds_count"] == str(len(seen))
    assert float(lines["sandbox_test_seconds_sum"]) == pytest.approx(sum(seen))
    assert lines['sandbox_sandbox_errors_total{reason="deadline"}'] == "1"
    assert (lines["sandbox_workers"], lines["sandbox_jobs_total"]) == ("3", "0")


# ----------------------------------------------------------------------------------------- the registry
def test_the_record_has_the_bytes_that_the_trainer_would_write(tmp_path: Path) -> None:
    info = {"level": 2, "workers": 4, "python": "3.11.2"}
    ours = Registration(tmp_path, "s", "http://h:1", info)
    ours.write("ready")
    path = tmp_path / "sandbox" / "s.json"
    data = path.read_bytes()
    (read,) = Registry(tmp_path).live("sandbox")
    assert (read.name, read.url, read.gen, dict(read.info)) == ("s", "http://h:1", 0, info)
    Registry(tmp_path).write(read)
    assert path.read_bytes() == data
    assert json.loads(data).keys() == asdict(Record("", "", "", 0, 0, "ready", 0, 0.0)).keys()


def test_a_restarted_service_has_a_new_number_and_a_removed_one_does_not_come_back(tmp_path: Path) -> None:
    first = Registration(tmp_path, "s", "http://h:1", {})
    first.write("starting")
    assert Registry(tmp_path).live("sandbox") == []
    second = Registration(tmp_path, "s", "http://h:2", {})
    second.write("ready")
    assert [record.gen for record in Registry(tmp_path).live("sandbox")] == [1]
    second.remove()
    second.write("ready")
    assert Registry(tmp_path).live("sandbox", state=None) == []
    (tmp_path / "sandbox" / "s.json").write_text("{rubbish")
    third = Registration(tmp_path, "s", "http://h:3", {})
    third.write("ready")
    assert [record.gen for record in Registry(tmp_path).live("sandbox")] == [0]


def test_heartbeats_outlive_a_folder_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sandbox.registration.HEARTBEAT_S", 0.02)
    record = Registration(tmp_path / "gone", "s", "http://h:1", {})
    (tmp_path / "gone").write_text("a file in the place of the folder")

    async def scenario() -> None:
        beating = asyncio.create_task(record.beat())
        await asyncio.sleep(0.2)
        (tmp_path / "gone").unlink()
        until = time.monotonic() + 5
        while not Registry(tmp_path / "gone").live("sandbox") and time.monotonic() < until:  # noqa: ASYNC110 - files make no events
            await asyncio.sleep(0.02)
        beating.cancel()

    asyncio.run(scenario())
    assert [one.state for one in Registry(tmp_path / "gone").live("sandbox")] == ["ready"]
    assert capfd.readouterr().err.count("\n") == 1, "it is said once"
