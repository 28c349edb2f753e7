"""A checkpoint is whole or absent, continues bit for bit in its layout and equally in another, and says what is wrong."""

import json
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_distil.config.schema import Config
from megatron_distil.errors import CheckpointError
from megatron_distil.trainer.checkpoint import Checkpoints, complete_steps, identity
from megatron_distil.trainer.writer import start_write
from tests.tiny_model import write_tiny_qwen3
from tests.tiny_training import TinyRun
from tests.trainer_config import trainer_config
from tests.world import RankFailed, run_ranks


def config_of(*, train: dict[str, Any] | None = None, is_async: bool = True, **parallel: Any) -> Config:
    tables = {"checkpoint": {"is_async": is_async, "keep_last": 2}, "parallel": parallel}
    return trainer_config(train={"weight_decay": 0.1, "clip_grad": 0.5} | (train or {}), **tables)


def tripled(run: TinyRun) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a teacher whose expected value is known in every layout."""
    return {"teacher": {name: 3 * param.detach().float() for name, param in run.student.gpt.named_parameters()}}


def save(rank: int, model: Path, folder: Path, **options: Any) -> None:
    """Two steps, a checkpoint while the third step runs, and what the third step should give."""
    config = config_of(**options)
    run = TinyRun(model, config)
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    run.step(1)
    run.step(2)
    before = run.weights()
    torch.manual_seed(rank + 5)
    random.seed(rank + 6)
    drawn_before = (torch.get_rng_state(), random.getstate())
    checkpoints.save(2, tripled(run))
    norm = run.step(3)
    checkpoints.wait()
    after = run.weights()
    if rank == 0:
        torch.save((before, after, norm, drawn_before), folder.parent / "reference.pt")


def resume(rank: int, model: Path, folder: Path, *, tolerance: float, **options: Any) -> None:
    config = config_of(**options)
    run = TinyRun(model, config)
    run.step(9)  # everything must come from the checkpoint
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    teacher = tripled(run)
    assert checkpoints.load(teacher) == 2
    assert all(torch.equal(teacher["teacher"][n], want) for n, want in tripled(run)["teacher"].items())
    assert run.optimizer.num_updates == 2
    want_before, want_after, want_norm, drawn = torch.load(folder.parent / "reference.pt", weights_only=False)
    before = run.weights()
    assert all(torch.equal(before[name], want) for name, want in want_before.items())
    norm = run.step(3)
    after = run.weights()
    worst = max((after[name] - want).abs().max().item() for name, want in want_after.items())
    assert worst <= tolerance, f"one more step differs by {worst} (norm {norm}, {want_norm} where it was saved)"
    assert abs(norm - want_norm) <= tolerance * 1e3
    if tolerance == 0.0:
        assert norm == want_norm
        assert rank != 0 or (torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1])


SAVED_AND_LOADED: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], float]]]] = {
    # another layout adds in another order: a few ulp of parameters of size 1, times a step of 1e-3
    "one_rank": ({}, [({}, 0.0), ({"tp": 2}, 2e-6), ({"pp": 2}, 2e-6), ({"dp": 2}, 2e-6)]),
    "tp2_sp": ({"tp": 2, "sequence_parallel": True}, [({"tp": 2, "sequence_parallel": True}, 0.0), ({}, 2e-6)]),
    "dp2": ({"dp": 2}, [({"dp": 2}, 0.0), ({"tp": 2}, 2e-6), ({"pp": 2}, 2e-6)]),
    "pp2": ({"pp": 2}, [({"pp": 2}, 0.0), ({"tp": 2}, 2e-6)]),
    "plain_optimizer": (
        {"tp": 2, "train": {"is_distributed_optimizer": False}},
        [({"tp": 2, "train": {"is_distributed_optimizer": False}}, 0.0)],
    ),
    "bfloat16": (
        {"dp": 2, "train": {"dtype": "bfloat16"}},
        [({"dp": 2, "train": {"dtype": "bfloat16"}}, 0.0), ({"tp": 2, "train": {"dtype": "bfloat16"}}, 1e-2)],
    ),
    "written_at_once": ({"is_async": False}, [({}, 0.0)]),
}


def ranks(options: dict[str, Any]) -> int:
    return options.get("tp", 1) * options.get("pp", 1) * options.get("dp", 1)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SAVED_AND_LOADED)
def test_a_run_continues_from_its_checkpoint(name: str, is_tied: bool, tmp_path: Path) -> None:
    saved, loads = SAVED_AND_LOADED[name]
    model = write_tiny_qwen3(tmp_path / "model", is_tied=is_tied)
    folder = tmp_path / "checkpoints"
    run_ranks(save, ranks(saved), model, folder, **saved)
    assert complete_steps(folder) == [2]
    for options, tolerance in loads:
        run_ranks(resume, ranks(options), model, folder, tolerance=tolerance, **options)


def teacher_crosses_layouts(rank: int, model: Path, folder: Path, *, is_saving: bool, **parallel: int) -> None:
    config = config_of(**parallel)
    run = TinyRun(model, config)
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    if is_saving:
        checkpoints.save(1, tripled(run))
        checkpoints.wait()
        return
    teacher = tripled(run)
    for tensor in teacher["teacher"].values():
        tensor.zero_()
    checkpoints.load(teacher)
    assert all(torch.equal(teacher["teacher"][name], want) for name, want in tripled(run)["teacher"].items())


def test_the_weights_of_a_teacher_are_cut_like_the_students(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", vocab_size=255)
    run_ranks(teacher_crosses_layouts, 2, model, tmp_path / "c", is_saving=True, tp=2)
    run_ranks(teacher_crosses_layouts, 2, model, tmp_path / "c", is_saving=False, pp=2)
    run_ranks(teacher_crosses_layouts, 1, model, tmp_path / "c", is_saving=False)


def load_without_teacher(rank: int, model: Path, folder: Path) -> None:
    config = config_of()
    run = TinyRun(model, config)
    with pytest.raises(CheckpointError, match="holds no teacher"):
        Checkpoints(folder, config, run.student, run.optimizer).load(tripled(run))


def test_a_checkpoint_without_the_teacher_says_so(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model")
    run_ranks(one_checkpoint, 1, model, tmp_path / "c")
    run_ranks(load_without_teacher, 1, model, tmp_path / "c")


def one_checkpoint(rank: int, model: Path, folder: Path, *, steps: tuple[int, ...] = (1,)) -> None:
    config = config_of()
    run = TinyRun(model, config)
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    for step in steps:
        checkpoints.save(step)
    checkpoints.wait()


def load_says(rank: int, model: Path, folder: Path, parts: tuple[str, ...], **options: Any) -> None:
    config = config_of(**options)
    run = TinyRun(model, config)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, config, run.student, run.optimizer).load()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def loads(rank: int, model: Path, folder: Path, step: int) -> None:
    config = config_of()
    run = TinyRun(model, config)
    assert Checkpoints(folder, config, run.student, run.optimizer).load() == step


def test_the_last_checkpoints_are_kept_and_no_process_is_left(tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model"), tmp_path / "c"
    run_ranks(one_checkpoint, 1, model, folder, steps=(1, 2, 3))
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model"), tmp_path / "c"
    run_ranks(one_checkpoint, 1, model, folder)
    (folder / ".step_00000005.tmp").mkdir()
    (folder / "step_00000004").mkdir()  # without the marker
    run_ranks(loads, 1, model, folder, 1)
    assert not (folder / ".step_00000005.tmp").exists()


def test_without_a_checkpoint_a_run_starts_at_step_zero(tmp_path: Path) -> None:
    run_ranks(loads, 1, write_tiny_qwen3(tmp_path / "model"), tmp_path / "none", 0)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_names_the_folder_and_the_way_out(damage: str, tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model"), tmp_path / "c"
    run_ranks(one_checkpoint, 1, model, folder, steps=(1, 2))
    file = max((folder / "step_00000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    parts = (str(folder / "step_00000002"), "remove this folder to resume from step_00000001", file.name)
    run_ranks(load_says, 2, model, folder, parts, tp=2)


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model"), tmp_path / "c"
    run_ranks(one_checkpoint, 1, model, folder)
    path = folder / "step_00000001" / "config.json"
    saved = json.loads(path.read_text())
    saved["task"]["name"] = "two_roads"
    _rewrite(path, json.dumps(saved))
    parts = ('task.name = "program_induction", and the checkpoint has "two_roads"', "another run directory")
    run_ranks(load_says, 1, model, folder, parts)


def _rewrite(path: Path, text: str) -> None:
    """Changes a file of a checkpoint as if it had been written so."""
    import zlib

    path.write_text(text)
    marker = path.parent / "COMPLETE"
    table = json.loads(marker.read_text())
    table["files"][path.name] = [len(text.encode()), zlib.crc32(text.encode())]
    marker.write_text(json.dumps(table))


def test_what_a_run_is_does_not_depend_on_how_long_it_runs() -> None:
    short, long = config_of(train={"num_steps": 3}), config_of(train={"num_steps": 9, "learning_rate": 0.1})
    assert identity(short) == identity(long)
    assert set(identity(short)) >= {"model", "task.name", "objective"}


def full_device(rank: int, model: Path, folder: Path, *, is_async: bool) -> None:
    config = config_of(tp=2, is_async=is_async)
    run = TinyRun(model, config)
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    checkpoints.save(1)
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with pytest.raises(CheckpointError) as caught:  # noqa: PT012 - one of the two, by is_async
        checkpoints.save(2)
        checkpoints.wait()
    assert "File too large" in str(caught.value)
    assert str(folder) in str(caught.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert checkpoints.newest() == 1


@pytest.mark.parametrize("is_async", [True, False], ids=["in_the_background", "at_once"])
def test_a_full_device_is_an_error_on_every_rank_and_older_checkpoints_stay(is_async: bool, tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model"), tmp_path / "c"
    run_ranks(full_device, 2, model, folder, is_async=is_async)
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    run_ranks(loads, 1, model, folder, 1)


def killed_writer(rank: int, model: Path, folder: Path) -> None:
    config = config_of()
    run = TinyRun(model, config)
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    checkpoints.save(1)
    for pid in _children():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="ended with -9"):
        checkpoints.wait()
    assert not list(folder.iterdir())


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_a_killed_writer_is_an_error_and_not_a_wait_for_ever(tmp_path: Path) -> None:
    run_ranks(killed_writer, 1, write_tiny_qwen3(tmp_path / "model"), tmp_path / "c")


def trainer_that_dies(rank: int, folder: Path) -> None:
    """Its writer waits at a pipe that nobody reads."""
    os.mkfifo(folder / "pipe")
    bucket = (str(folder / "pipe"), "pipe", ([], []))
    request = SimpleNamespace(
        async_fn=partial(print, []), async_fn_args=[rank, [bucket], None], preload_fn=None, finalize_fns=[]
    )
    write = start_write(lambda: request, folder, rank=rank, in_background=True)
    (writer,) = _children()
    os.setpgid(writer, writer)  # or the world would end it with its rank
    (folder / "writer").write_text(str(writer))
    time.sleep(0.5)
    assert write.is_running()
    os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_writer_dies_with_its_trainer(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="-9"):
        run_ranks(trainer_that_dies, 1, tmp_path)
    writer = int((tmp_path / "writer").read_text())
    deadline = time.monotonic() + 5
    while is_alive := _is_alive(writer):
        if time.monotonic() > deadline:
            os.kill(writer, signal.SIGKILL)
            break
        time.sleep(0.05)
    assert not is_alive, "the writer outlives its trainer"


def restore_for_transformers(rank: int, model: Path, folder: Path, target: Path) -> None:
    from megatron_distil.trainer.export import save_hf

    config = config_of(pp=2)
    run = TinyRun(model, config)
    Checkpoints(folder, config, run.student, run.optimizer).load()
    save_hf(run.student, target, model)


def test_a_checkpoint_exports_to_what_was_trained(tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model"), tmp_path / "c"
    run_ranks(save, 2, model, folder, tp=2)
    run_ranks(restore_for_transformers, 2, model, folder, tmp_path / "hf")
    want = torch.load(tmp_path / "reference.pt", weights_only=False)[0]
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
