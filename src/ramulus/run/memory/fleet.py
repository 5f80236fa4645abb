"""What fits where on several GPUs, and how fast: `ramulus plan RECIPE --gpus 8xH100`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ramulus.engine.local.compiled import GB
from ramulus.engine.local.factory import Local
from ramulus.learn.policy.model import Pretrained
from ramulus.models.sizes import Sizes
from ramulus.run.config.recipe import Run
from ramulus.run.memory.auto import fitting
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.step import Site, StepMemory, engine_bytes_of
from ramulus.run.memory.work import work_of

_FEW = 8  # rows: a sampler that decodes fewer is spread over more GPUs
SISTERS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B")


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes of memory, multiplications and additions of dense bfloat16 a second, bytes read a second; as its maker states them."""

    memory: float
    speed: float
    bandwidth: float


GPUS = {  # NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM 80 GB, L40S, GeForce RTX 4090
    "H100": Gpu(80e9, 989e12, 3.35e12),
    "H200": Gpu(141e9, 989e12, 4.8e12),
    "A100": Gpu(80e9, 312e12, 2.04e12),
    "L40S": Gpu(48e9, 362e12, 0.864e12),
    "4090": Gpu(24e9, 165e12, 1.008e12),
}


class Reached(NamedTuple):
    """Which share of what a GPU can do is reached, and where that was measured."""

    share: float
    source: str


UPDATE = Reached(0.30, "torchtitan, December 2024, Llama 3.1 8B, FSDP on 8 H100: 5,762 tokens a second a GPU, compiled 6,667 (this gives 6,590)")
READING = Reached(0.70, "75 tokens a second with one request, 77 % of the bandwidth: vLLM 0.23, Llama 3.1 8B, one A100 40 GB (johnmusgrave.com)")
DECODE = Reached(0.30, "taken as in the update: products of some hundred rows")


@dataclass(frozen=True)
class Split:
    """So many GPUs learn together and the others sample, `group` of them to a sampler."""

    learners: int
    samplers: int
    group: int
    learner: StepMemory
    sampler: StepMemory
    sampled: float  # tokens a second of all samplers
    trained: float  # of all learners, of tokens that were sampled

    @property
    def rate(self) -> float:
        """Tokens a second of both together, each waiting for the other where it is slower."""
        return min(self.sampled, self.trained)


def count_of(words: str) -> tuple[int, str]:
    """`8xH100` as (8, "H100"). Raises ValueError, with the known ones, for anything else."""
    match = re.fullmatch(r"(?:(\d+)\s*[xX*])?\s*(\w+)", words.strip())
    name = {known.lower(): known for known in GPUS}.get(match[2].lower()) if match else None
    count = int(match[1] or 1) if match else 0
    if name is None or count < 1:
        raise ValueError(f"gpus={words}: give a number and one of {', '.join(GPUS)}, as in 8xH100")
    return count, name


def decode_rate(gpu: Gpu, sizes: Sizes, rows: int, context: float, itemsize: int, group: int = 1) -> float:
    """Tokens a second of `group` GPUs that decode so many rows with `context` tokens before each: a step reads weights, keys and values."""
    reads = (sizes.active * itemsize + rows * context * sizes.token_bytes(itemsize)) / (group * gpu.bandwidth * READING.share)
    products = 2 * sizes.active * rows / (group * gpu.speed * DECODE.share)
    return rows / max(reads, products)


def update_rate(gpu: Gpu, sizes: Sizes, checkpointing: bool) -> float:
    """Tokens a second that one GPU learns from: three products a weight, and a fourth where layers are computed again."""
    return gpu.speed * UPDATE.share / ((8 if checkpointing else 6) * sizes.active)


def splits(run: Run, sizes: Sizes, gpu: Gpu, count: int, all_of_them: bool = False) -> list[Split]:
    """Every way in which learners and samplers fit on GPUs of their own; or `all_of_them`, those too that do not fit."""
    work, found = work_of(run), []
    apart = replace(run, engine=Local(getattr(run.engine, "slots", 64), "auto", getattr(run.engine, "precision", None) or "bfloat16"))
    context = work.prompt + work.response / 2
    for group in (1, 2, 4, 8):
        sampler = fitting(apart, sizes, Site("cuda", shards=group, learner=False), gpu.memory, present=False)
        if group > count or (sampler.peak <= gpu.memory and sampler.rows >= _FEW):
            break
    for learners in range(1, count - group + 1):
        samplers = (count - learners) // group
        learner = fitting(run, sizes, Site("cuda", shards=learners, engine=False), gpu.memory, present=False)
        if not samplers or (max(learner.peak, sampler.peak) > gpu.memory and not all_of_them):
            continue
        sampled = samplers * decode_rate(gpu, sizes, sampler.rows, context, engine_bytes_of(apart), group)
        trained = learners * update_rate(gpu, sizes, run.activation_checkpointing)
        found.append(Split(learners, samplers, group, learner, sampler, sampled, trained))
    return found


def print_fleet(run: Run, gpus: str, console: Console) -> None:
    """Print what fits of the recipe's model and of its sisters, and the parts of the best split."""
    count, name = count_of(gpus)
    gpu, best, short = GPUS[name], None, list[str]()
    title = f"{run.name} on {count} x {name} ({gpu.memory / GB:.0f} GB each), learners and samplers on GPUs of their own"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("model", "learners", "samplers", "GB a learner", "GB a sampler", "rows a sampler", "sampled/s", "trained/s", "a learner feeds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in dict.fromkeys([None, *SISTERS]):
        changed = run if model is None else replace(run, model=Pretrained(model, dtype=getattr(run.model, "dtype", "float32")))
        sizes = planned_sizes(changed)
        ways = splits(changed, sizes, gpu, count)
        chosen = max(ways, key=lambda split: split.rate, default=None)
        best = chosen if model is None else best
        title = f"{'the recipe' if model is None else model.rpartition('/')[2]}, {sizes.parameters / 1e9:.1f}B"
        table.add_row(title, *(_cells(chosen) if chosen else ["does not", "fit"]))
        if chosen is None and (tried := splits(changed, sizes, gpu, count, all_of_them=True)):
            least = min(tried, key=lambda split: max(split.learner.peak, split.sampler.peak))
            taken = f"{least.learner.peak / GB:.0f} GB on each of {least.learners} that learn, {least.sampler.peak / GB:.0f} on one that samples"
            short.append(f"{title}: {taken}; lora=true, a lower tokens_per_batch or more GPUs")
    console.print(table)
    for line in short:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if best is not None:
        console.print(parts_table(best))
    for what, share in (("trained", UPDATE), ("sampled, reading", READING), ("sampled, products", DECODE)):
        console.print(f"{what}: {share.share:.0%} of what the GPU can do; {share.source}", markup=False, highlight=False, soft_wrap=True)


def _cells(split: Split) -> list[str]:
    """A line of the table."""
    many = f"{split.samplers}" + (f" of {split.group} GPUs" if split.group > 1 else "")
    feeds = split.trained / split.learners / (split.sampled / split.samplers)
    memory = [f"{memory.peak / GB:.0f}" for memory in (split.learner, split.sampler)]
    return [str(split.learners), many, *memory, str(split.sampler.rows), f"{split.sampled:,.0f}", f"{split.trained:,.0f}", f"{feeds:.1f} samplers"]


def parts_table(split: Split) -> Table:
    """What a learner's GPU and a sampler's hold."""
    table = Table(title="GB on one GPU", title_justify="left", box=None)
    for column in ("", "a learner", "a sampler"):
        table.add_column(column, justify="right" if column else "left")
    sides = split.learner, split.sampler
    for name in dict.fromkeys(part.name for side in sides for part in side.parts):
        sizes = [sum(p.bytes for p in side.parts if p.name == name and side.phase in p.phases) for side in sides]
        table.add_row(name, *(f"{size / GB:.2f}" if size else "" for size in sizes))
    table.add_row("[bold]all[/bold]", *(f"[bold]{side.peak / GB:.2f}[/bold]" for side in sides))
    return table
