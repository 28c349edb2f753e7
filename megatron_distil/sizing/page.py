"""A plan on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_distil.config.check import is_supervised
from megatron_distil.config.schema import Config
from megatron_distil.sizing.machine import Machine
from megatron_distil.sizing.parts import Part, human, peak
from megatron_distil.sizing.plan import Sizes
from megatron_distil.sizing.shape import ModelShape


def print_plan(config: Config, shape: ModelShape, sizes: Sizes, machine: Machine | None) -> None:
    """All of it; without a machine no seconds, and nothing that depends on its memory."""
    console = Console()
    experts = f", {shape.active_parameters:,} for a token" if shape.experts > 1 else ""
    console.print(f"{config.model}: {sizes.parameters:,} parameters{experts}", highlight=False)
    if shape.experts > 1:
        console.print("The trainer builds dense models only; this is what a mixture of experts would need.")
    console.print(_roles(config, sizes))
    console.print(_memory("Memory of a trainer rank", sizes.trainer))
    if not is_supervised(config):
        console.print(_memory("Memory of an engine process", sizes.engine))
        if machine:
            room = sizes.capacity
            line = (
                f"An engine holds {room.tokens:,} tokens beside its weights: {room.requests:,} requests of full length."
            )
            console.print(line, highlight=False)
        if sizes.teacher:
            console.print(_memory("Memory of a process of the expert", sizes.teacher))
        table = Table("part", "size", "how", title="Bytes of a step", title_justify="left")
        for part in sizes.step:
            table.add_row(part.name, human(part.bytes), part.why)
        console.print(table)
    if machine:
        console.print(_seconds(sizes, machine))


def _roles(config: Config, sizes: Sizes) -> Table:
    parallel, rollout = config.parallel, config.rollout
    layouts = {
        "trainer": f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {parallel.dp}",
        "engine": f"{rollout.num_engines} servers, tp {rollout.engine_tp}",
        "teacher": f"{config.teacher.num_engines} servers of {config.teacher.model}, tp {config.teacher.engine_tp}",
        "sandbox": f"{config.feedback.sandbox_workers} programs at a time each",
    }
    table = Table("role", "processes", "layout", title="Processes", title_justify="left")
    for role, count in sizes.processes_by_role.items():
        if count and not (is_supervised(config) and role != "trainer"):
            table.add_row(role, str(count), layouts[role])
    return table


def _memory(title: str, parts: Sequence[Part]) -> Table:
    table = Table("part", "size", "when", "how", title=title, title_justify="left")
    for part in parts:
        table.add_row(part.name, human(part.bytes), part.phase, part.why)
    table.add_row("together", human(peak(parts)), "at most", "what always exists, and the largest phase", style="bold")
    return table


def _seconds(sizes: Sizes, machine: Machine) -> Table:
    title = (
        f"Seconds of a step on {machine.gpu.name}, at {machine.compute_efficiency:.0%} of its flops, "
        f"{machine.memory_efficiency:.0%} of its memory's and {machine.link_efficiency:.0%} of the links' bandwidth"
    )
    table = Table("phase", "seconds", "how", title=title, title_justify="left")
    for span in sizes.spans:
        table.add_row(span.name, f"{span.seconds:.2f}", span.why)
    table.add_row("together", f"{sum(span.seconds for span in sizes.spans):.2f}", "", style="bold")
    return table
