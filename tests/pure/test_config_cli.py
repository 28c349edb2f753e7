from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from megatron_distil.cli import app, rank_label
from megatron_distil.config.load import load_config
from megatron_distil.config.options import RunOptions
from megatron_distil.config.schema import Config, ParallelConfig
from megatron_distil.errors import DataError, EngineUnavailable, NonFiniteLossError, SandboxUnavailable, SyncError
from megatron_distil.registry import Registry
from tests.finished_run import write_run
from tests.recipe import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_recipe(tmp_path))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("megatron_distil")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def call(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"RANK": "0"} | (env or {}))


class Application:
    """Stands in for ``megatron_distil.app``, which needs torch and Megatron."""

    def __init__(self, result: int | BaseException = 100) -> None:
        self.result = result
        self.calls: list[tuple[str, Config, RunOptions]] = []

    def _work(self, name: str, config: Config, options: RunOptions) -> int:
        self.calls.append((name, config, options))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Application:
        names = ("train", "sft", "evaluate")
        commands = {name: (lambda config, options, name=name: self._work(name, config, options)) for name in names}
        monkeypatch.setitem(sys.modules, "megatron_distil.app", SimpleNamespace(**commands))
        return self


def test_check_prints_every_setting_as_an_override_that_works(recipe: str, tmp_path: Path):
    overrides = ["train.learning_rate=3e-4", 'eval.sets=[{data="a b", prefix="new_"}]', "objective.tis_clip=none"]
    done = call("check", recipe, *overrides)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert "train.learning_rate = 0.0003" in lines
    assert "checkpoint.is_async = true" in lines
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    assert load_config(empty, lines) == load_config(recipe, overrides)


def test_check_explains_settings_when_asked(recipe: str):
    assert "train.num_steps = 100    # Turns of the loop." in call("check", recipe, "--explain").stdout.splitlines()


@pytest.mark.parametrize("command", ["check", "plan", "train", "sft", "eval"])
def test_a_wrong_configuration_ends_every_command_with_2_and_no_traceback(
    command: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = call(command, recipe, "train.num_stps=3", "model=m")
    assert done.exit_code == 2
    assert done.stderr.startswith("1 problem in the configuration:\n  - train.num_stps = 3: not a setting.")
    assert "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


def test_a_supervised_recipe_belongs_to_sft_and_no_other_to_it(recipe: str):
    done = call("train", recipe, 'objective={name="sft"}')
    assert done.exit_code == 2
    assert "objective.name = 'sft': not an objective of megatron-distil train" in done.stderr
    assert "use megatron-distil sft" in done.stderr
    assert "objective.name = 'distil': not an objective of megatron-distil sft" in call("sft", recipe).stderr


def test_an_evaluation_without_sets_is_refused(recipe: str):
    done = call("eval", recipe)
    assert done.exit_code == 2
    assert "eval.sets = (): there is nothing to evaluate. Write eval.sets" in done.stderr


def test_train_hands_on_what_the_command_line_and_the_environment_say(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    application = Application().install(monkeypatch)
    arguments = ["--run", str(tmp_path / "run"), "--replay", "other", "--export", "hf"]
    done = call(
        "train", recipe, "train.num_steps=100", *arguments, env={"MEGATRON_DISTIL_REGISTRY": "/shared/registry"}
    )
    assert done.exit_code == 0, done.output
    ((name, config, options),) = application.calls
    assert (name, config.train.num_steps) == ("train", 100)
    assert options == RunOptions(
        run=tmp_path / "run", registry=Path("/shared/registry"), replay=Path("other"), export=Path("hf")
    )
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["python"] == platform.python_version()


def test_the_run_directory_is_named_after_the_recipe(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    application = Application().install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert call("sft", recipe, 'objective={name="sft"}').exit_code == 0
    assert application.calls[0][2].run == Path("runs/recipe")
    assert application.calls[0][2].registry_folder == Path("runs/recipe/registry")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("train.jsonl:3: no prompt"), 2),
        (EngineUnavailable("engine 0 at :30000 did not answer"), 75),
        (SandboxUnavailable("no sandbox"), 75),
        (SyncError("lm_head.weight differs"), 1),
    ],
)
def test_an_error_of_ours_ends_with_its_text_and_its_code(
    error: Exception, code: int, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Application(error).install(monkeypatch)
    error.add_note("raised on rank 3")
    done = call("train", recipe, "--run", str(tmp_path))
    assert done.exit_code == code
    assert done.stderr == f"{error}\nraised on rank 3\n"


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (DataError("train.jsonl:3: no prompt"), "fatal train.jsonl:3: no prompt"),
        (NonFiniteLossError("step 3: nan"), "fatal step 3: nan"),
        (SandboxUnavailable("no sandbox"), "unavailable no sandbox"),
        (40, "stopped after 40 of 100 steps"),
        (SyncError("torchrun may repair it"), ""),
        (KeyError("a bug"), ""),
        (100, ""),
    ],
)
def test_a_rank_says_why_it_ends_where_no_exit_code_would(
    result: int | BaseException, reason: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Application(result).install(monkeypatch)
    registry = Registry(tmp_path / "registry")
    env = {"MEGATRON_DISTIL_REGISTRY": str(registry.folder), "RANK": "3"}
    call("train", recipe, "parallel.tp=4", "--run", str(tmp_path), env=env)
    assert registry.reason() == reason


def test_a_rank_that_was_asked_to_stop_while_it_waits_has_stopped(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Application(EngineUnavailable("asked to stop while waiting")).install(monkeypatch)
    registry = Registry(tmp_path / "registry")
    registry.request_stop()
    call("train", recipe, "--run", str(tmp_path), env={"MEGATRON_DISTIL_REGISTRY": str(registry.folder)})
    assert registry.reason() == "stopped asked to stop while waiting"


def test_a_rank_that_is_started_again_after_its_life_has_ended_leaves_at_once(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    application = Application().install(monkeypatch)
    registry = Registry(tmp_path / "registry")
    registry.say_reason("stopped after 3 of 8 steps")
    done = call("train", recipe, "--run", str(tmp_path), env={"MEGATRON_DISTIL_REGISTRY": str(registry.folder)})
    assert (done.exit_code, application.calls) == (75, [])
    assert done.stderr == "this life of the run has ended: stopped after 3 of 8 steps\n"


def test_an_error_is_told_although_its_traceback_cannot_be_kept(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Application(SyncError("lm_head.weight differs")).install(monkeypatch)
    (tmp_path / "logs" / "error.rank0.txt").mkdir(parents=True)  # takes nothing
    done = call("train", recipe, "--run", str(tmp_path))
    assert (done.exit_code, done.stderr) == (1, "lm_head.weight differs\n")


def test_of_all_ranks_only_the_first_prints_an_error_that_all_have(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Application(SyncError("lm_head.weight differs")).install(monkeypatch)
    done = call("train", recipe, "parallel.tp=4", "--run", str(tmp_path), env={"RANK": "3"})
    assert (done.exit_code, done.output) == (1, "")
    assert "SyncError: lm_head.weight differs" in (tmp_path / "logs" / "error.rank3.txt").read_text()


def test_a_bug_leaves_its_traceback_in_the_log_and_its_last_line_here(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Application(KeyError("lost")).install(monkeypatch)
    done = call("train", recipe, "parallel.tp=2", "--run", str(tmp_path), env={"RANK": "1"})
    assert done.exit_code == 1
    assert done.stderr == f"rank 1: KeyError: 'lost'\ntraceback: {tmp_path}/logs/error.rank1.txt\n"
    assert "in _work" in (tmp_path / "logs" / "error.rank1.txt").read_text()


def test_a_run_that_was_stopped_says_how_to_go_on(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Application(40).install(monkeypatch)
    done = call("train", recipe, "--run", str(tmp_path))
    assert done.exit_code == 130
    assert done.stderr == "stopped after 40 of 100 steps; the same command goes on\n"


def test_an_interrupt_ends_with_130(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Application(KeyboardInterrupt()).install(monkeypatch)
    done = call("train", recipe, "--run", str(tmp_path))
    assert (done.exit_code, done.stderr) == (130, "stopped\n")


def test_plan_shows_processes_memory_and_bytes(recipe: str, tmp_path: Path):
    shape = {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 21,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    done = call("plan", recipe, f"model={tmp_path}", "parallel.tp=2", "parallel.dp=2")
    assert done.exit_code == 0
    for text in ("trainer", "tp 2 x pp 1 x cp 1 x dp 2", "weights", "keys and values", "publication"):
        assert text in done.stdout
    done = call("plan", recipe, f"model={tmp_path}", "parallel.tp=3", "parallel.dp=1")
    assert done.exit_code == 2
    assert "parallel.tp = 3: the model has 4 attention heads. Try 2." in done.stderr


def test_report_is_written_into_the_first_run(tmp_path: Path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", future="mean")
    done = call("report", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (done.exit_code, done.stdout) == (0, f"written: {tmp_path}/a/report.html\n")
    assert call("report", str(tmp_path / "a"), "--out", str(tmp_path / "x.html")).exit_code == 0
    assert (tmp_path / "x.html").is_file()


def test_a_report_of_nothing_is_refused(tmp_path: Path):
    done = call("report", str(tmp_path / "nowhere"))
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"{tmp_path}/nowhere: no metrics.jsonl, so this is no run directory, or its first step is not done\n"
    )


def test_ranks_have_their_place_in_megatrons_order():
    # tp-cp-dp-pp, the innermost first.
    layout = ParallelConfig(tp=2, cp=2, dp=2, pp=2)
    assert [rank_label(rank, layout) for rank in (0, 1, 2, 4, 8, 15)] == [
        "dp0.tp0.pp0.cp0",
        "dp0.tp1.pp0.cp0",
        "dp0.tp0.pp0.cp1",
        "dp1.tp0.pp0.cp0",
        "dp0.tp0.pp1.cp0",
        "dp1.tp1.pp1.cp1",
    ]


def test_a_log_file_has_the_place_of_its_rank(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Application().install(monkeypatch)
    call("train", recipe, "parallel.tp=2", "--run", str(tmp_path), env={"RANK": "1"})
    logging.getLogger("megatron_distil.x").info("quiet")
    logging.getLogger("megatron_distil.x").warning("loud")
    (line,) = (tmp_path / "logs" / "rank1.log").read_text().splitlines()
    assert line.endswith("WARNING dp0.tp1.pp0.cp0 megatron_distil.x: loud")
