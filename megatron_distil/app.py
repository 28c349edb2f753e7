"""Composition root: configuration -> parts -> loop. The only module that knows every concrete class."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console

from megatron_distil.config.load import to_json
from megatron_distil.config.options import RunOptions
from megatron_distil.config.schema import Config
from megatron_distil.data.documents import RowDocuments, load_documents
from megatron_distil.data.packing import BatchPacker
from megatron_distil.data.prompts import TaskPrompts, load_eval_prompts, load_prompts
from megatron_distil.data.rollout_log import StepFiles
from megatron_distil.data.rows import Share
from megatron_distil.data.tokenizer import Tokenizer, prompt_encoder
from megatron_distil.errors import DataError
from megatron_distil.evals import HeldOut, RunEvals
from megatron_distil.feedback.code import SandboxPool
from megatron_distil.feedback.judge import NoRunner, TaskJudge
from megatron_distil.http import Http
from megatron_distil.loop import Parts
from megatron_distil.loop import train as run_train
from megatron_distil.metrics.log import Outlets, RunLog
from megatron_distil.metrics.reduce import Totals
from megatron_distil.metrics.sinks import JsonLines, JsonLinesSink, Sink, TensorBoardSink, TerminalSink, WandbSink
from megatron_distil.protocols import SamplingSpec, Weights
from megatron_distil.registry import Record, Registry
from megatron_distil.rollout.pool import EnginePool
from megatron_distil.rollout.sampler import GroupSampler
from megatron_distil.rollout.sglang.client import Deadlines, SglangEngine, connector
from megatron_distil.sft import SftParts
from megatron_distil.sft import sft as run_sft
from megatron_distil.sync.broadcast import BroadcastSink
from megatron_distil.sync.disk import DiskSink, Snapshots
from megatron_distil.sync.plan import weight_spec
from megatron_distil.sync.publish import Admission, NoEngines, Publisher
from megatron_distil.tasks.task import Task, task_of
from megatron_distil.teacher.context import ContextBuilder
from megatron_distil.teacher.expert import ExpertTeacher, check_vocabulary
from megatron_distil.trainer.checkpoint import Checkpoints
from megatron_distil.trainer.export import hf_weights, manifest, save_hf
from megatron_distil.trainer.groups import close_groups, make_groups
from megatron_distil.trainer.learner import MegatronLearner, StatefulTeacher
from megatron_distil.trainer.model import build_student
from megatron_distil.trainer.optim import make_optimizer
from megatron_distil.trainer.replica import Replica
from megatron_distil.trainer.teacher import make_teacher
from megatron_distil.trainer.update import Updater

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
"""All that is read of an expert's folder here; its servers read the rest."""


def train(config: Config, options: RunOptions) -> int:
    """Run or resume DistIL. Collective: every rank calls it. Returns the number of finished steps."""
    with _opened(config, options) as run:
        with ExitStack() as closing:
            weights = run.weights(closing)
            if options.replay is None:
                run.check_sandboxes()
            run.check_expert()
            parts = Parts(
                prompts=run.prompts(),
                sampler=run.sampler(config.rollout.samples_per_prompt, config.rollout.temperature),
                judge=run.judge,
                contexts=ContextBuilder(
                    task=run.task,
                    encode=run.encode,
                    defuse=run.tokenizer.defuse,
                    config=config.teacher,
                    add=run.log.add,
                ),
                rollout_log=run.rollout_log(),
                teacher=run.learner.teacher,
                packer=run.packer,
                learner=run.learner,
                weights=weights,
                evals=run.evals(),
                log=run.log,
                stopped=run.stopped,
            )
            steps = run_train(config, parts)
        run.export(steps)
        return steps


def sft(config: Config, options: RunOptions) -> int:
    """Run or resume supervised training. Collective. Returns the number of finished steps."""
    with _opened(config, options) as run:
        parts = SftParts(
            documents=run.documents(), packer=run.packer, learner=run.learner, log=run.log, stopped=run.stopped
        )
        steps = run_sft(config, parts)
        run.export(steps)
        return steps


def evaluate(config: Config, options: RunOptions) -> Mapping[str, float]:
    """Publish the newest checkpoint of a run, or the recipe's model, and evaluate it. Collective."""
    with _opened(config, options) as run, ExitStack() as closing:
        step = run.learner.resume()
        run.check_sandboxes()
        run.weights(closing).publish(version=step)
        return run.evals().run(step)


@contextmanager
def _opened(config: Config, options: RunOptions) -> Iterator[Run]:
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    run = Run(config, options)
    try:
        yield run
    finally:
        run.close()
    close_groups()  # not after an error: the other ranks may be gone, and the process ends


@dataclass
class Run:
    """Everything that is made once per run, on one rank."""

    config: Config
    options: RunOptions
    log: RunLog = field(init=False)

    def __post_init__(self) -> None:
        config, train = self.config, self.config.train
        self.model = _model_folder(config.model)
        self.task: Task = task_of(config.task)
        self.tokenizer = Tokenizer.load(self.model)
        self.encode = prompt_encoder(self.tokenizer, self.task.style)
        self.stop_ids = self.tokenizer.stop_ids(self.task.stop)
        self.groups = make_groups(
            config.parallel,
            collective_timeout_s=train.collective_timeout_s,
            collect_timeout_s=train.collect_timeout_s,
        )
        self.replica = Replica(self.groups)
        self.share = Share(self.groups.replica_index, self.groups.dp_size)
        self.is_first = self.groups.rank == 0
        self.registry = Registry(self.options.registry_folder)
        self.http = Http()
        self.log = RunLog(reduce=self._reduce, outlets=self._outlets(), num_processes=config.parallel.world_size)
        if self.is_first:
            self._describe()
        self.packer = BatchPacker(config, gather=self.replica.gather)
        self.student = build_student(self.model, config, self.groups)
        optimizer = make_optimizer(self.student, train, num_updates=train.num_steps * train.updates_per_step)
        self.learner = MegatronLearner(
            replica=self.replica,
            updater=Updater(
                self.student,
                optimizer,
                config.objective,
                temperature=config.rollout.temperature,
                head=config.train.head,
                run_dir=self.options.run,
            ),
            teacher=self._teacher(),
            checkpoints=Checkpoints(self.options.run / "checkpoints", config, self.student, optimizer),
            every_steps=config.checkpoint.every_steps,
        )
        needs_files = config.sync.snapshot or config.sync.sink == "disk"
        self.snapshots = Snapshots(self.options.run / "weights", self.model) if needs_files else None

    def close(self) -> None:
        """Not collective."""
        self.log.close()
        self.replica.close(self.http.close)

    # ---- data

    def prompts(self) -> TaskPrompts:
        """Training prompts."""
        return load_prompts(self.config, self.task, self.tokenizer, self.share)

    def documents(self) -> RowDocuments:
        """Supervised documents."""
        return load_documents(self.config, self.task, self.tokenizer, self.share)

    def rollout_log(self) -> StepFiles:
        """This run's rollouts, and those of the run that is replayed."""
        return StepFiles(
            folder=self.options.run / "rollouts",
            replica_index=self.share.replica_index,
            num_replicas=self.share.num_replicas,
            add=self.log.add,
            replay=None if self.options.replay is None else self.options.replay / "rollouts",
        )

    # ---- engines

    @cached_property
    def _connect(self) -> Callable[[Record], SglangEngine]:
        deadlines = Deadlines(self.config.rollout.request_timeout_s, self.config.sync.timeout_s)
        return connector(self.http, self.tokenizer.decode, deadlines)

    @cached_property
    def _pool(self) -> EnginePool:
        admit = None if self.snapshots is None else Admission(self.snapshots, self._connect)
        return EnginePool(
            self.registry,
            self._connect,
            admit=admit,
            concurrency=max(1, self.config.rollout.concurrency // self.groups.dp_size),
            patience_s=self.config.rollout.budget_s,
        )

    def sampler(self, samples_per_prompt: int, temperature: float) -> GroupSampler:
        """Draws from the engines of the run."""
        spec = SamplingSpec(
            temperature=temperature,
            max_new_tokens=self.config.rollout.max_response_tokens,
            stop_token_ids=self.stop_ids,
        )
        budget_s = self.config.rollout.budget_s
        return GroupSampler(self._pool, spec, samples_per_prompt=samples_per_prompt, budget_s=budget_s)

    def weights(self, closing: ExitStack) -> Weights:
        """Publishes to the engines of the run; a replayed run has none."""
        if self.options.replay is not None:
            return NoEngines()
        sync = self.config.sync
        if self.snapshots is not None and sync.sink == "disk":
            sink = DiskSink(self.snapshots)
        else:
            sink = BroadcastSink(sync.timeout_s)
        specs = manifest(self.student.dims, self.student.transformer.params_dtype)
        publisher = Publisher(
            registry=self.registry,
            connect=self._connect,
            sink=sink,
            snapshots=self.snapshots,
            export=partial(hf_weights, self.student),
            manifest=[weight_spec(spec.name, spec.shape, spec.dtype) for spec in specs],
            on_first_head=self._on_first_head,
            sync=sync,
            rollout=self.config.rollout,
        )
        closing.callback(publisher.close)
        return publisher

    # ---- an expert

    def _teacher(self) -> StatefulTeacher:
        config = self.config
        if not config.has_expert:
            return make_teacher(self.student, config, self.packer.sequences)
        folder = _model_folder(config.teacher.model, only=TOKENIZER_FILES)
        check_vocabulary(self.tokenizer.vocabulary(), Tokenizer.load(folder).vocabulary(), config.teacher.model)
        vocab_size = self.student.dims.vocab_size
        return ExpertTeacher(config, self.registry, self._connect, self.replica.on_head, vocab_size=vocab_size)

    def check_expert(self) -> None:
        """Wait for the servers of an expert. Collective."""
        if isinstance(teacher := self.learner.teacher, ExpertTeacher):
            self._on_first_head(teacher.wait)

    # ---- feedback

    @cached_property
    def _sandboxes(self) -> SandboxPool:
        feedback, dp = self.config.feedback, self.groups.dp_size
        return SandboxPool(self.http, self.registry, feedback, add=self.log.add, num_clients=dp)

    @cached_property
    def judge(self) -> TaskJudge:
        """Rules on responses."""
        return self._judge_of(self.task)

    def _judge_of(self, task: Task) -> TaskJudge:
        feedback = self.config.feedback
        concurrency = feedback.concurrency * max(1, feedback.num_sandboxes)
        runner = self._sandboxes if feedback.num_sandboxes else NoRunner()
        return TaskJudge(task, runner, concurrency=concurrency, max_unavailable=feedback.max_unavailable)

    def check_sandboxes(self) -> None:
        """Wait for the services of the run and see that they isolate as asked. Collective."""
        count = self.config.feedback.num_sandboxes

        async def check() -> None:
            wait = partial(
                self.registry.wait_for,
                "sandbox",
                count,
                timeout_s=self.config.rollout.start_timeout_s,
                stopped=self.registry.stop_requested,
            )
            await asyncio.to_thread(wait)
            known = await self._sandboxes.check()
            for name, said in known.items():
                logger.info("%s: isolation level %d, %d workers, %s", name, said.level, said.workers, said.versions)
            text = json.dumps({name: said._asdict() for name, said in known.items()}, indent=2)
            (self.options.run / "sandboxes.json").write_text(text + "\n", encoding="utf-8")

        if count:
            self._on_first_head(check)

    def evals(self) -> RunEvals:
        """Held-out prompts; none where a log is replayed without engines."""
        config = self.config.eval
        sets = [] if self.options.replay is not None else config.sets
        return RunEvals(
            config=config,
            num_steps=self.config.train.num_steps,
            sets=[
                HeldOut(prefix=one.prefix, prompts=load_eval_prompts(self.config, one, self.task, self.tokenizer))
                for one in sets
            ],
            sampler=self.sampler(config.samples_per_prompt, config.temperature),
            judge=self._judge_of(task_of(self.config.task.model_copy(update={"stop_after": 0}))),
            measures=self.task.measures,
            on_head=self.replica.on_head,
            is_first_replica=self.share.replica_index == 0,
            log=self.log,
        )

    # ---- the end

    def export(self, steps: int) -> None:
        """Write the student in Hugging Face's format, when all steps are done and somebody asked for it. Collective."""
        if self.options.export is not None and steps >= self.config.train.num_steps:
            save_hf(self.student, self.options.export, self.model)

    def stopped(self) -> bool:
        """Whether somebody asked the run to end. Collective, the same answer on every rank."""
        return self.replica.any_rank(self.is_first and self.registry.stop_requested())

    # ---- small parts

    def _on_first_head(self, work: Callable[[], Awaitable[None]]) -> None:
        async def on_head() -> list[None]:
            if self.share.replica_index == 0:
                await work()
            return []

        self.replica.on_head(on_head)

    def _reduce(self, totals: Totals) -> Totals:
        return Totals(self.replica.gather(totals.as_sums()))

    def _outlets(self) -> Outlets:
        if not self.is_first:
            return Outlets()
        run, log = self.options.run, self.config.log
        terminal = TerminalSink(self.config.train.num_steps, Console(stderr=True))
        sinks: list[Sink] = [JsonLinesSink(run / "metrics.jsonl"), terminal]
        if log.tensorboard:
            sinks.append(TensorBoardSink(run / "tensorboard"))
        if log.wandb_project:
            sinks.append(WandbSink(log.wandb_project, run, self.config))
        return Outlets(
            sinks=sinks,
            samples=JsonLines(run / "samples.jsonl") if log.rollouts_kept else None,
            num_samples=log.rollouts_kept,
            decode=lambda token: self.tokenizer.decode([token]),
            phase=terminal.phase,
        )

    def _describe(self) -> None:
        (self.options.run / "config.json").write_text(to_json(self.config), encoding="utf-8")


def _model_folder(model: str, *, only: Sequence[str] | None = None) -> Path:
    """The folder of a model: itself, or what the hub has under that id; of the hub's files only some, if asked.

    Raises:
        DataError: there is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # a model on the hub: most runs have a folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=None if only is None else list(only)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = "a folder with config.json, tokenizer.json and model.safetensors works, or an id like Qwen/Qwen3-8B"
        raise DataError(f"model = {model!r}: no such folder, and the hub does not give it ({error}); {hint}") from error
