"""One real SGLang server for the tests of a process: started when it is first asked for, killed at the end."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_distil.registry import Record
from megatron_distil.rollout.sglang.client import SglangEngine
from megatron_distil.types import Prompt, Rollout
from tests.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("DISTIL_SERVER_PYTHON") or "no-server-environment")
"""``tools/test`` makes the environment and sets the variable."""
DIMS = {"vocab_size": 300, "num_hidden_layers": 2}
"""300 rows are padded to 320 by the server."""
START_TIMEOUT_S = 400.0
"""25 s on a quiet machine; two cores that others use take ten times as long."""


@dataclass
class RealServer:
    """A process group of its own, so that a kill takes its children along."""

    folder: Path
    """Scratch: model, log, temporary files of the server."""
    port: int
    gen: int = -1
    process: subprocess.Popen[bytes] | None = None

    @property
    def model(self) -> Path:
        """What it was started with: ``tiny_qwen3(seed=0, **DIMS)``."""
        return self.folder / "model"

    @property
    def record(self) -> Record:
        assert self.process is not None
        pid = self.process.pid
        url = f"http://127.0.0.1:{self.port}"
        return Record("rollout", "engine0", url, pid, pid, "ready", self.gen, time.time() + 3600)

    def start(self) -> None:
        """Also after ``kill``, on the same port."""
        self.gen += 1
        command = [str(PYTHON), "-m", "megatron_distil.rollout.sglang.serve", "--model-path", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--skip-tokenizer-init", "--random-seed", "0"]
        temporary = self.folder / "tmp"  # a killed server leaves files
        temporary.mkdir(exist_ok=True)
        with (self.folder / f"server.{self.gen}.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait(self) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / f"server.{self.gen}.log").read_text(errors="replace")
                raise RuntimeError(f"the server did not start: exit {self.process.poll()}\n{log[-3000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return reply.status == 200
        except (OSError, urllib.error.URLError):
            return False


@functools.cache
def _server() -> RealServer:
    folder = Path(tempfile.mkdtemp(prefix="real-server-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = RealServer(folder, port)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    write_tiny_qwen3(server.model, seed=0, **DIMS)
    server.start()
    return server


def skip_without_server() -> None:
    """A plain ``pytest`` has no server; ``tools/test`` has one."""
    if not PYTHON.exists():
        pytest.skip("needs server: DISTIL_SERVER_PYTHON names no interpreter; run tools/test")


@pytest.fixture
def real_server() -> RealServer:
    """The server of this process, healthy; whatever an earlier test did to it."""
    skip_without_server()
    server = _server()
    if server.process is not None and server.process.poll() is not None:
        server.start()
    server.wait()
    return server


def prompts(count: int, length: int = 20) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(prompt_id=f"p{k}", text="", token_ids=rng.integers(0, 300, length).astype(np.int32), task={})
        for k in range(count)
    ]


def logprobs(model: Any, prompt: Prompt, rollout: Rollout, temperature: float) -> torch.Tensor:
    """[R] nats, of the sampled tokens, by Hugging Face."""
    ids = torch.tensor([[*prompt.token_ids.tolist(), *rollout.token_ids.tolist()]])
    with torch.no_grad():
        rows = torch.log_softmax(model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature, -1)
    return rows.gather(1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0]


async def load(engine: SglangEngine, folder: str, version: int) -> None:
    """A publication by hand."""
    await engine.pause()
    await engine.flush()
    await engine.update_from_disk(folder, version)
    await engine.resume()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
