"""Which processes of a run share the memory of a machine or a GPU, and what is free there: none of them is planned for as if it were alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ramulus.engine.factory import engine_traits
from ramulus.learn.factory import learner_traits
from ramulus.learn.sharded.joining import torchrun_size
from ramulus.models.sizes import Sizes
from ramulus.native.memory import free_memory, free_on
from ramulus.native.processors import device_of
from ramulus.run.config.recipe import Run
from ramulus.run.memory.step import MOMENTS, Phase, Site, StepMemory, step_memory

PRESENT = ("libraries", "weights", "adapters", "float32 masters", "reference model", "the sampler's model")  # when the engine is about to be made


@dataclass(frozen=True)
class Placement:
    """A machine of a cluster: ranks of the learner and samplers that are placed there; bytes free in its memory, and on a sampler's GPU."""

    trainers: int
    samplers: int
    free: float
    gpu: float = 0.0


@dataclass(frozen=True)
class Room:
    """Memory that some processes share, bytes of which are free: those that hold their models already, and those that are yet to start."""

    free: float
    here: tuple[Site, ...] = ()
    to_start: tuple[Site, ...] = ()
    by_turns: bool = False  # samplers that sleep while the learner works

    def needed(self, run: Run, sizes: Sizes, tokens: int | None, engine_bytes: int | None) -> float:
        """Bytes that they still take of a step, in the phase that takes most, with so many tokens of a batch and bytes of keys and values in each."""
        kinds = [(Counter(sites), there) for sites, there in ((self.here, True), (self.to_start, False))]
        plans = [(step_memory(run, sizes, site, tokens, engine_bytes), n, site, there) for kind, there in kinds for site, n in kind.items()]
        return max(sum(n * self._taken(plan, site, there, phase) for plan, n, site, there in plans) for phase in MOMENTS)

    def _taken(self, plan: StepMemory, site: Site, there: bool, phase: Phase) -> float:
        """Bytes that one process takes in a phase, beyond what it holds already."""
        if self.by_turns and not site.learner and phase != "grow":
            return plan.named("libraries")
        return plan.at(phase) - (plan.named(*PRESENT) if there else 0.0)

    @property
    def spelled(self) -> str:
        """For whom it is, in words; "" for one process."""
        sites = (*self.here, *self.to_start)
        ranks, samplers = sum(site.learner for site in sites), sum(not site.learner for site in sites)
        counts = [(ranks, "rank"), (samplers, "sampler")]
        return " for " + " and ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in counts if n) if len(sites) > 1 else ""


def site_of(run: Run, cuda: bool | None = None) -> Site:
    """Where a run learns: its device or its learner's own, there or not; auto is a GPU where there is one."""
    learner = learner_traits(run.learner)
    if cuda is None:
        cuda = on_gpu(learner.device or run.device)
    return Site("cuda" if cuda else "cpu", sharing_of(run) or ranks_here(run, cuda), engine=samples_itself(run) and not learner.process)


def samples_itself(run: Run) -> bool:
    """Whether the process that a run began in samples: no cluster and no servers do."""
    return run.cluster is None and not engine_traits(run.engine).servers


def on_gpu(name: str) -> bool:
    """Whether a device of a recipe is a GPU, there or not."""
    return name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())


def are_here(run: Run) -> bool:
    """Whether the devices on which a run learns and samples are there."""
    try:
        for name in (run.device, learner_traits(run.learner).device or run.device):
            device_of(name)
    except ValueError:
        return False
    return True


def numbered(device: Any) -> torch.device:
    """A device of torch, a GPU with its number."""
    where = torch.device(device)
    return torch.device(where.type, where.index or 0) if where.type == "cuda" else where


def asking_site(run: Run, cuda: bool) -> tuple[Site, ...]:
    """This process of a run whose learner has one of its own: it samples, if no other does; () where the learner is in this one."""
    if not learner_traits(run.learner).process:
        return ()
    return (Site("cuda" if cuda else "cpu", engine=samples_itself(run), learner=False),)


def sharing_of(run: Run) -> int | None:
    """Ranks that hold one copy of the weights together, where the recipe says so."""
    ranks = learner_traits(run.learner).ranks
    return ranks.sharing if ranks is not None else None


def ranks_here(run: Run, cuda: bool) -> int:
    """Ranks of the learner on this machine: those of torchrun, those of a cluster, as many as it says, or one a GPU; 1 where it has none."""
    ranks = learner_traits(run.learner).ranks
    if ranks is None:
        return 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", torchrun_size()))
    if run.cluster is not None:
        return run.cluster.trainers
    return here if here > 1 else ranks.count or (max(1, torch.cuda.device_count()) if cuda else 1)


def further(site: Site) -> Site:
    """A rank beside rank 0, which neither samples nor gathers weights to hand over."""
    return replace(site, engine=False, first=False)


def sites_of_samplers(run: Run, cuda: bool) -> tuple[Site, ...]:
    """What samples in a process of its own that the run starts here, or in one place of its cluster; () where that is rank 0, or not the run's."""
    engine = engine_traits(run.engine)
    count = engine.servers if engine.servers else int(run.cluster is not None)
    return (Site("cuda" if cuda else "cpu", learner=False),) * (0 if engine.running else count)


def rooms_here(run: Run, device: Any) -> list[Room]:
    """The rooms of a run that is all on this machine: on `device`, and where its learner has a device of its own on that."""
    sampled, named = numbered(device), learner_traits(run.learner).device
    own = numbered(device_of(named)) if named else sampled
    cuda = own.type == "cuda"
    ranks = ranks_here(run, cuda)
    if (how := run.cluster) is not None:
        return rooms_of(run, own, [Placement(ranks, how.samplers, free_memory(), float(free_on(own)))])
    first, beside = site_of(run, cuda), -(-ranks // max(1, torch.cuda.device_count())) if cuda else ranks  # on the GPU of rank 0
    learners, gpu = (first, *[further(first)] * (beside - 1)), sampled.type == "cuda"
    asking, started = asking_site(run, gpu), sites_of_samplers(run, gpu)
    if own == sampled:
        return [Room(free_on(own), (*learners, *asking), started)]
    return [Room(free_on(own), learners), Room(free_on(sampled), asking, started)]


def rooms_of(run: Run, device: Any, machines: Sequence[Placement]) -> list[Room]:
    """The rooms of a run on a cluster, the first of whose machines has rank 0, which learns on `device`."""
    how, cuda = run.cluster, str(device).startswith("cuda")
    assert how is not None
    counts = {machine.trainers for machine in machines if machine.trainers}
    shards = sharing_of(run) or (counts.pop() if len(counts) == 1 else how.trainers)
    first, sampler = replace(site_of(run, cuda), shards=shards), sites_of_samplers(run, how.gpus > 0)
    rooms = []
    for i, machine in enumerate(machines):
        ranks = [further(first) if i or rank else first for rank in range(0 if cuda else machine.trainers)]
        rooms.append(Room(machine.free, tuple(ranks), () if how.gpus else sampler * machine.samplers, how.colocated))
    mine, theirs = (first,) if cuda else (), sampler * min(how.samplers, int(1 / how.gpus) or 1) if how.gpus else ()
    if mine and theirs and how.colocated:
        rooms.append(Room(free_on(device), mine, sampler, by_turns=True))
    else:
        rooms.append(Room(free_on(device), mine))
        rooms.append(Room(min((machine.gpu for machine in machines if machine.samplers), default=0.0), (), theirs))
    return [room for room in rooms if room.here or room.to_start]
