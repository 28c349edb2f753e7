from __future__ import annotations

import platform
import shutil
import sys
import threading
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from launchers import preflight
from launchers.cluster import load_cluster
from launchers.links import LinkError, Links, clock_difference, collect, listening, measure, publish
from launchers.nodefacts import Facts, code_digest, gather
from launchers.preflight import Finding, Wanted, findings, main, srun_command, table

GOOD = Facts(
    node=0, host="n0", kernel="6.1", cores=96, gpus=("NVIDIA H200",) * 8, gpu_mib=143771, gpu_used_mib=4, driver="570.1",
    versions={"trainer torch": "2.13.0", "trainer python": "3.11.7"}, code="abc", sandbox_level=2,
)  # fmt: skip
FAST = Links(unreachable={}, skew_s=0.001, visible_s=0.01, write_bytes_per_s=1e9, read_bytes_per_s=1e9)
REDUCED = {"backend": "nccl", "ranks": 16, "bytes": 2**29, "seconds": 0.01, "bus_bytes_per_s": 3e11}
WANTED = Wanted(gpus=8, min_bus_bytes_per_s=1e10, min_level=2)


def wrong(facts: list[Facts], links: list[Links] | None = None, reduced: dict | None = None) -> list[Finding]:
    rows = findings(facts, links or [FAST] * len(facts), reduced or REDUCED, WANTED)
    return [row for row in rows if row.problem]


def nodes(count: int) -> list[Facts]:
    return [replace(GOOD, node=index, host=f"n{index}") for index in range(count)]


def test_equal_nodes_are_well():
    assert wrong(nodes(3)) == []


@pytest.mark.parametrize(("change", "check", "text"), [
    ({"gpus": ("NVIDIA H200",) * 7}, "gpus", "8 are wanted"),
    ({"gpus": ()}, "gpus", "8 are wanted"),
    ({"gpus": ("NVIDIA H100",) * 8}, "gpu", "2 of 3 nodes have NVIDIA H200"),
    ({"gpu_used_mib": 40000}, "gpu memory", "somebody else is on it"),
    ({"driver": "550.2"}, "driver", "2 of 3 nodes have 570.1"),
    ({"versions": {"trainer torch": "2.12.0", "trainer python": "3.11.7"}}, "trainer torch", "2 of 3 nodes have 2.13.0"),
    ({"versions": {"trainer python": "3.11.7"}}, "trainer torch", "2 of 3 nodes have 2.13.0"),
    ({"code": "def"}, "code", "2 of 3 nodes have abc"),
    ({"sandbox_level": 1}, "sandbox", "feedback.min_isolation = 2"),
    ({"wrong": {"gpus": "nvidia-smi ended with 9"}}, "gpus", "nvidia-smi ended with 9"),
])  # fmt: skip
def test_the_node_that_differs_is_named(change: dict, check: str, text: str):
    facts = nodes(3)
    facts[1] = replace(facts[1], **change)
    found = wrong(facts)
    (row,) = [one for one in found if one.check == check]
    assert text in row.problem
    assert row.where == "1 n1"


@pytest.mark.parametrize(("change", "check", "text"), [
    ({"unreachable": {"0": "n0:20001: timed out"}}, "ports", "n0:20001: timed out"),
    ({"skew_s": 3.0}, "clock", "run an NTP client"),
    ({"visible_s": 30.0}, "shared folder", "attribute cache"),
])  # fmt: skip
def test_the_link_that_is_bad_is_named(change: dict, check: str, text: str):
    (row,) = wrong(nodes(2), [FAST, replace(FAST, **change)])
    assert (row.check, row.where) == (check, "1 n1")
    assert text in row.problem


def test_an_all_reduce_that_fails_or_is_slow_is_wrong():
    (row,) = wrong(nodes(2), reduced={"error": "a rank of node 1 ended with 1: no route"})
    assert row.problem == "a rank of node 1 ended with 1: no route"
    (row,) = wrong(nodes(2), reduced=REDUCED | {"bus_bytes_per_s": 1.1e9})
    assert row.problem.startswith("less than 10 GB/s")
    assert wrong(nodes(2), reduced=REDUCED | {"bus_bytes_per_s": 0.0, "ranks": 1}) == []


def test_the_table_marks_what_is_wrong():
    text = table([Finding("gpus", "0 n0", "8 x H200"), Finding("driver", "1 n1", "550", "1 of 2 nodes have 570")])
    assert text.splitlines() == [
        "ok     gpus    0 n0  8 x H200",
        "WRONG  driver  1 n1  550       1 of 2 nodes have 570",
        "1 of 2 checks failed",
    ]


def test_the_same_sources_have_the_same_digest_wherever_they_lie(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name / "launchers").mkdir(parents=True)
        (tmp_path / name / "launchers" / "x.py").write_text("x = 1\n")
    assert code_digest(tmp_path / "a") == code_digest(tmp_path / "b")
    shutil.move(tmp_path / "b" / "launchers" / "x.py", tmp_path / "b" / "launchers" / "y.py")
    assert code_digest(tmp_path / "a") != code_digest(tmp_path / "b")


def test_this_machine_answers():
    found = gather(0, {"trainer": sys.executable}, asks_sandbox=True)
    assert found.wrong == {}
    assert found.versions["trainer python"] == platform.python_version()
    assert found.versions["trainer numpy"] == metadata.version("numpy")
    assert found.sandbox_level >= 0
    assert len(found.code) == 12


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("8 are wanted", 1)])
def test_what_is_wrong_decides_how_every_node_ends(
    problem: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(preflight, "run", lambda options: [Finding("gpus", "0 n0", "none", problem)])
    assert main([str(tmp_path), "--nodes", "2", "--node", "1", "--run", "a"]) == code
    assert capsys.readouterr().out == ""
    assert main([str(tmp_path), "--nodes", "2", "--node", "0", "--run", "a"]) == code
    assert ("WRONG" in capsys.readouterr().out) == bool(problem)


def test_an_interpreter_that_does_not_answer_is_wrong():
    found = gather(0, {"trainer": "/nowhere/python"}, asks_sandbox=False)
    assert "/nowhere/python" in found.wrong["packages of trainer"]
    assert (found.versions, found.sandbox_level) == ({}, -1)


def test_a_clock_that_is_read_over_a_connection():
    with listening() as port:
        difference, uncertain = clock_difference("127.0.0.1", port)
    assert abs(difference) <= uncertain + 1e-4 < 1.0
    with pytest.raises(OSError, match="refused"):
        clock_difference("127.0.0.1", port)


def test_a_folder_that_only_one_node_sees_is_said(tmp_path: Path):
    publish(tmp_path / "facts-1.json", {})
    with pytest.raises(LinkError, match=rf"node 0, 2 wrote no facts within 0 s: .*does not see {tmp_path}"):
        collect(tmp_path, "facts", 3, timeout_s=0.1)


def test_a_file_that_reads_differently_is_said(tmp_path: Path):
    with listening() as port:
        good = measure(tmp_path, 0, {0: ("127.0.0.1", port)}, file_bytes=2**20 + 5, timeout_s=5)
        assert (good.unreachable, good.skew_s) == ({}, 0.0)
        assert (tmp_path / "file-0.bin").stat().st_size == 2**20 + 5
        for name in tmp_path.glob("p?ng-*"):
            name.unlink()
        (tmp_path / "file-1.bin").write_bytes(b"something else")
        publish(tmp_path / "file-1.json", {"sha256": "0"})
        answers = threading.Thread(target=_other_node, args=(tmp_path,), daemon=True)
        answers.start()
        with pytest.raises(LinkError, match=r"file-1.bin does not read as node 1 wrote it"):
            measure(tmp_path, 0, {0: ("127.0.0.1", port), 1: ("127.0.0.1", port)}, file_bytes=2**20, timeout_s=5)
        answers.join(5)


def _other_node(folder: Path) -> None:
    """Answers, and asks, as node 1 of 2 would."""
    for number in range(5):
        (folder / f"ping-1-{number}").touch()
        (folder / f"pong-0-{number}").touch()


def test_from_a_login_node_slurm_is_asked_for_the_nodes():
    command = srun_command(load_cluster("h200"), 4, ["--min-level", "0"])
    text = " ".join(command)
    assert text.startswith("srun --exclusive --account=research --partition=gpu --nodes=4 --ntasks-per-node=1")
    assert "--gpus-per-node=8" in command
    assert "--container-image=/shared/distil/images/trainer.sqsh" in command
    assert text.endswith("-m launchers preflight /shared/distil/preflight --gpus 8 --min-level 0")


def test_a_command_line_that_means_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--nodes", "2", "--node", "2", "--run", "a"]) == 2
    assert "--node 2: there are 2 nodes; give 0 to 1" in capsys.readouterr().err
    assert main([str(tmp_path), "--nodes", "2"]) == 2
    assert "several nodes have to agree on a name" in capsys.readouterr().err
    assert main(["no-such-cluster"]) == 2
    assert "Known: generic, h200, local." in capsys.readouterr().err
