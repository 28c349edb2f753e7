"""tools/export and tools/import, as they are called."""

import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_distil.trainer.checkpoint import Checkpoints
from tests.tiny_model import write_tiny_qwen3
from tests.tiny_training import TinyRun
from tests.trainer_config import trainer_config
from tests.world import run_ranks

ROOT = Path(__file__).parents[2]


def call(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, timeout=120, check=False)


def test_import_and_export_give_the_same_bytes_back(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", is_tied=True)
    done = call("import", model, tmp_path / "checkpoint", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    again = call("import", model, tmp_path / "checkpoint")
    assert (again.returncode, again.stdout) == (1, "")
    assert f"{tmp_path / 'checkpoint'}: is there already" in again.stderr
    done = call("export", tmp_path / "checkpoint", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    want, got = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(got) == set(want)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def checkpoint_of_a_run(rank: int, model: Path, folder: Path) -> None:
    config = trainer_config(parallel={"tp": 2}).model_copy(update={"model": str(model)})
    run = TinyRun(model, config)
    run.step(1)
    checkpoints = Checkpoints(folder, config, run.student, run.optimizer)
    checkpoints.save(1)
    checkpoints.wait()
    weights = run.weights()
    if rank == 0:
        torch.save(weights, folder / "want.pt")


def test_the_checkpoint_of_a_run_is_exported_with_the_model_it_names(tmp_path: Path) -> None:
    model, folder = write_tiny_qwen3(tmp_path / "model", vocab_size=255), tmp_path / "c"
    run_ranks(checkpoint_of_a_run, 2, model, folder)
    done = call("export", folder / "step_00000001", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in torch.load(folder / "want.pt").items())


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    done = call("export", tmp_path / "nothing", tmp_path / "hf")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path / 'nothing'}: is not a checkpoint of ours")
