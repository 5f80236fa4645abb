"""`ramulus plan`: what a step of a recipe takes, in tables, and whether it fits here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ramulus.native.memory import GB, machine_memory
from ramulus.native.processors import device_of
from ramulus.run.config.recipe import Run
from ramulus.run.memory.auto import fitted
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.rooms import (
    are_here,
    asking_site,
    further,
    on_gpu,
    ranks_here,
    rooms_here,
    site_of,
    sites_of_samplers,
)
from ramulus.run.memory.step import MOMENTS, SPELLED, Site, StepMemory, step_memory


def planned(run: Run, site: Site | None = None) -> StepMemory:
    """The memory of a step of a run on its device, of rank 0 where it has several, from the config of its model alone.

    Autos take what is free here now; on a `site` that is given, on machines that are elsewhere, and for a GPU where there is none, all that could
    be used. Raises what `planned_sizes` raises.
    """
    sizes, there = planned_sizes(run), site or site_of(run)
    elsewhere = run.cluster is not None and not run.cluster.alone
    if site is not None or elsewhere or not are_here(run):
        return step_memory(run, sizes, there)
    rooms = rooms_here(run, device_of(run.device))
    return step_memory(run, sizes, there, *fitted(run, sizes, [replace(room, here=(), to_start=room.here + room.to_start) for room in rooms]))


def beside(run: Run, memory: StepMemory) -> list[tuple[str, int, StepMemory]]:
    """(kind, how many, what each takes of a step) of the processes of a run beside rank 0, whose memory is given."""
    there = site_of(run)
    ranks = (further(there),) * (ranks_here(run, there.kind == "cuda") - 1)
    cluster, gpu = run.cluster, on_gpu(run.device)
    samplers = sites_of_samplers(run, cluster.gpus > 0 if cluster else gpu) * (cluster.samplers if cluster else 1)
    kinds = [("rank", ranks), ("asking" if samplers else "sampler", asking_site(run, gpu)), ("sampler", samplers)]
    stated = memory.tokens_per_batch, memory.engine_bytes
    return [(kind, len(sites), step_memory(run, memory.sizes, sites[0], *stated)) for kind, sites in kinds if sites]


def print_plan(stages: Sequence[Run], console: Console) -> None:
    """Print the plan of every stage."""
    for run in stages:
        memory = planned(run)
        console.print(memory_table(run, memory))
        for line in remarks(run, memory):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print()


def memory_table(run: Run, memory: StepMemory) -> Table:
    """A line for each part, a column for each phase that needs one, and the sums."""
    phases = [phase for phase in MOMENTS if phase == memory.phase or any(phase in part.phases and part.phases != MOMENTS for part in memory.parts)]
    name = f"{run.name}: a step with {memory.sizes.parameters / 1e6:,.0f}M parameters, in GB"
    table = Table(title=name, title_justify="left", box=None)
    table.add_column("")
    for phase in phases:
        table.add_column(SPELLED[phase], justify="right")
    for name in dict.fromkeys(part.name for part in memory.parts):
        mine = [sum(part.bytes for part in memory.parts if part.name == name and phase in part.phases) for phase in phases]
        table.add_row(name, *(f"{size / GB:.2f}" if size else "" for size in mine))
    table.add_row("[bold]all[/bold]", *(f"[bold]{memory.at(phase) / GB:.2f}[/bold]" for phase in phases))
    return table


def remarks(run: Run, memory: StepMemory) -> list[str]:
    """What follows from it, in sentences."""
    work, site = memory.work, site_of(run)
    sentences = [
        f"at most {memory.peak / GB:.2f} GB, {SPELLED[memory.phase]}, with {memory.tokens:,} tokens going through the model at once",
        f"{memory.rows} sequences of {work.longest:,} tokens decode together, with {memory.engine_bytes / GB:.2f} GB for keys and values",
        f"a step has {work.spelled}, at most {work.tokens:,} tokens",
        *work.assumed,
    ]
    others = beside(run, memory)
    together = memory.peak + sum(count * other.peak for _, count, other in others)
    if others:
        whose = {"rank": ("the other rank", "each of the other {} ranks"), "sampler": ("the sampler", "each of {} samplers")}
        whose["asking"] = ("the process that asks it", "")
        each = [f"{whose[kind][count > 1].format(count)} takes at most {other.peak / GB:.2f} GB" for kind, count, other in others]
        mine = "rank 0" if ranks_here(run, site.kind == "cuda") > 1 else "the process that learns"
        sentences.append(f"that is {mine}{', which samples too' if site.engine else ''}; {', '.join(each)}")
    here = machine_memory()
    if site.kind == "cpu" and not on_gpu(run.device) and (run.cluster is None or run.cluster.alone):
        sentences.append(f"this machine has {here / GB:.1f} GB" + ("" if together <= here else ": it does not fit"))
    return sentences
