"""The supervised loop: documents -> batches -> updates. It warms a model up; the engines have no part in it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_distil.config.schema import Config
from megatron_distil.protocols import Documents, Learner, Log, Packer, Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class SftParts:
    """What the supervised loop is made of."""

    documents: Documents
    packer: Packer
    learner: Learner
    log: Log
    stopped: Stopped


def sft(config: Config, parts: SftParts) -> int:
    """Run until ``config.train.num_steps`` steps are done, or somebody asks to stop; resumes by itself.

    Returns:
        The number of steps that are done and saved.
    """
    learner, log = parts.learner, parts.log

    step = learner.resume()
    while step < config.train.num_steps and not parts.stopped():
        with log.span("update"):
            update = learner.update(parts.packer.documents(parts.documents.take(step)))
        log.write(step, [], [], [update])
        step += 1
        learner.save_if_due(step)
    learner.finish(step)
    return step
