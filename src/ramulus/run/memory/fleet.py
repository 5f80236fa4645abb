"""What fits where on several GPUs, and how fast: the ways to share them between trainers and samplers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ramulus.engine.factory import EngineTraits, engine_traits
from ramulus.engine.memory import EngineMemory
from ramulus.models.sizes import Sizes
from ramulus.run.config.recipe import Run
from ramulus.run.memory.auto import fitting
from ramulus.run.memory.rates import GPUS, Gpu, decode_rate, update_rate
from ramulus.run.memory.rooms import sharing_of
from ramulus.run.memory.step import MOMENTS, Site, StepMemory, passes_to_score, sampling_of
from ramulus.run.memory.work import work_of

_FEW = 8  # rows: a sampler that decodes fewer is spread over more GPUs
OF_A_MACHINE = 8  # GPUs of one machine, which hold one copy of the weights together where that fits
MOST_GPUS = 1024


@dataclass(frozen=True)
class Split:
    """So many GPUs train and so many samplers, of `group` GPUs each, sample: others, or the same ones in turns (`together`)."""

    trainers: int
    sharing: int  # of them hold one copy of the weights
    samplers: int
    group: int
    together: bool
    trainer: StepMemory
    sampler: StepMemory
    resident: float  # bytes that a trainer keeps while the sampler of the same GPU samples
    sampled: float  # tokens a second of all samplers
    trained: float  # of all trainers, of tokens that were sampled

    @property
    def rate(self) -> float:
        """Tokens a second of both: the slower one's where they work beside each other, one after the other where they take turns."""
        return 1 / (1 / self.sampled + 1 / self.trained) if self.together else min(self.sampled, self.trained)

    @property
    def peak(self) -> float:
        """Bytes of the GPU that takes most."""
        return max(self.trainer.peak, self.resident + self.sampler.peak)

    @property
    def feeds(self) -> float:
        """Samplers that bring as many tokens as one trainer learns from."""
        return self.trained / self.trainers / (self.sampled / self.samplers)


def count_of(words: str) -> tuple[int, str]:
    """`8xH100` as (8, "H100"). Raises ValueError, with the known ones, for anything else."""
    match = re.fullmatch(r"(?:(\d+)\s*[xX*])?\s*(\w+)", words.strip(), re.ASCII)
    name = {known.lower(): known for known in GPUS}.get(match[2].lower()) if match else None
    count = int(match[1] or 1) if match else 0
    if name is None or not 1 <= count <= MOST_GPUS:
        raise ValueError(f"gpus={words}: give a number from 1 to {MOST_GPUS} and one of {', '.join(GPUS)}, as in 8xH100")
    return count, name


def splits(run: Run, sizes: Sizes, gpu: Gpu, count: int) -> list[Split]:
    """The ways to share so many GPUs, whether they fit or not."""
    apart = [
        one
        for trainers in (n for n in range(1, count) if together_on(n, count))
        for group, sampler in samplers_of(run, sizes, count - trainers, gpu.memory)
        for one in [way(run, sizes, gpu, count, trainers, (count - trainers) // group, group, sampler)]
    ]
    return [*apart, *in_turns(run, sizes, gpu, count)]


def in_turns(run: Run, sizes: Sizes, gpu: Gpu, count: int) -> Iterator[Split]:
    """All GPUs train and sample in turns, if they are one machine or several whole ones."""
    if not together_on(count, count):
        return
    sharing, trainer = trainer_of(run, sizes, gpu, count, count)
    kept = sum(part.bytes for part in trainer.parts if part.phases == MOMENTS and part.name != "libraries")
    for group, sampler in samplers_of(run, sizes, count, max(0.0, gpu.memory - kept)):
        if count % group == 0:
            yield way(run, sizes, gpu, count, count, count // group, group, sampler, (sharing, trainer), kept)


def together_on(trainers: int, count: int) -> int:
    """How many of the trainers are on one machine, where the `count` GPUs are of machines with 8 each; 0 where they cannot be as many on each."""
    if trainers < OF_A_MACHINE or trainers % OF_A_MACHINE == 0:
        return min(trainers, OF_A_MACHINE)
    machines = -(-count // OF_A_MACHINE)
    return 0 if trainers % machines else trainers // machines


def trainer_of(run: Run, sizes: Sizes, gpu: Gpu, trainers: int, count: int) -> tuple[int, StepMemory]:
    """How many trainers hold one copy of the weights, and what one takes: those of a machine, or all where that does not fit."""
    per_copy = sharing_of(run)
    ways = [per_copy] if per_copy and trainers % per_copy == 0 else [together_on(trainers, count), trainers]
    for sharing in ways:
        memory = fitting(run, sizes, Site("cuda", shards=sharing, engine=False), gpu.memory, present=False)
        if memory.peak <= gpu.memory:
            break
    return sharing, memory


def samplers_of(run: Run, sizes: Sizes, most: int, free: float) -> Iterator[tuple[int, StepMemory]]:
    """The least GPUs, `most` at most, over which one sampler is spread so that it decodes more than a few rows, and what each takes."""
    apart = replace(run, engine=Unbuilt(EngineTraits(memory=decoder(run))))
    for group in (1, 2, 4, 8):
        sampler = fitting(apart, sizes, Site("cuda", shards=group, learner=False), free, present=False)
        if group <= most and (2 * group > min(most, OF_A_MACHINE) or (sampler.peak <= free and sampler.rows >= _FEW)):
            yield group, sampler
            return


@dataclass(frozen=True)
class Unbuilt:
    """An engine that is planned and never made."""

    traits: EngineTraits

    def __call__(self, model: Any, decode: Any) -> Any:
        """There is none."""
        raise NotImplementedError


def decoder(run: Run) -> EngineMemory:
    """The settings of the engine that is planned for a sampler's GPU."""
    memory = engine_traits(run.engine).memory
    return EngineMemory(memory.slots, "auto", memory.precision or "bfloat16")


def way(
    run: Run, sizes: Sizes, gpu: Gpu, count: int, trainers: int, samplers: int, group: int, sampler: StepMemory,
    turns: tuple[int, StepMemory] | None = None, resident: float = 0.0,
) -> Split:  # fmt: skip
    """One way, with its rates."""
    sharing, trainer = turns or trainer_of(run, sizes, gpu, trainers, count)
    work = work_of(run)
    context = work.prompt + work.response / 2
    itemsize = decoder(run).dtype(sampling_of(run, sizes, Site("cuda", learner=False))).itemsize
    sampled = samplers * decode_rate(gpu, sizes, sampler.rows, context, itemsize, group)
    trained = trainers * update_rate(gpu, sizes, run.activation_checkpointing, context, passes_to_score(run))
    return Split(trainers, sharing, samplers, group, turns is not None, trainer, sampler, resident, sampled, trained)


def ways_that_fit(run: Run, sizes: Sizes, gpu: Gpu, count: int) -> list[Split]:
    """Of the ways that fit, the one with trainers apart and the one in turns that give most tokens a second."""
    fit = [one for one in splits(run, sizes, gpu, count) if one.peak <= gpu.memory]
    kinds = ([one for one in fit if one.together is together] for together in (False, True))
    return [max(kind, key=lambda one: one.rate) for kind in kinds if kind]
