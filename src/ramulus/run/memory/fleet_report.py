"""`ramulus plan --gpus`: what fits of a recipe's model and of its sisters, and how fast, in tables."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ramulus.learn.policy.model import Pretrained
from ramulus.models.sizes import Sizes
from ramulus.native.memory import GB
from ramulus.run.config.recipe import Run
from ramulus.run.memory.fleet import MOST_GPUS, OF_A_MACHINE, Split, count_of, splits, ways_that_fit
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.rates import GPUS, Gpu, published
from ramulus.run.memory.step import MOMENTS, StepMemory
from ramulus.run.memory.work import work_of

SISTERS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B")
COLUMNS = ("model", "GPUs", "trainers", "samplers", "GB", "rows", "sampled/s", "trained/s", "feeds")
LEGEND = (
    "GPUs: trainers and samplers apart, or in turns on the same ones, samplers asleep while trainers learn; the fastest way of each that fits. "
    "Trainers: in brackets how many hold one copy of the weights. Samplers: x the GPUs of one. GB: on a trainer's GPU and on a sampler's. Rows: "
    "sequences that one sampler decodes together. Tokens a second: of all samplers, of all trainers. "
    "Feeds: samplers that bring as many tokens as one trainer learns from."
)


def print_fleet(run: Run, gpus: str, console: Console) -> None:
    """Print the best way for the recipe's model and for its sisters, the parts of the former, and how far rates are from what was measured."""
    count, name = count_of(gpus)
    gpu, models = GPUS[name], [(run, planned_sizes(run))]
    for model in SISTERS:
        sister = replace(run, model=Pretrained(model, dtype=getattr(run.model, "dtype", "float32")))
        sizes = planned_sizes(sister)
        models += [(sister, sizes)] if sizes.parameters not in {known.parameters for _, known in models} else []
    best_ways = [ways_that_fit(each, sizes, gpu, count) for each, sizes in models]
    console.print(fleet_table(f"{run.name} on {count} x {name}, {gpu.memory / GB:.0f} GB each", [sizes for _, sizes in models], best_ways))
    for (each, sizes), ways in zip(models, best_ways, strict=True):
        if not ways:
            console.print(shortage(each, sizes, gpu, count, name), markup=False, highlight=False, soft_wrap=True)
    if best_ways[0]:
        console.print(parts_table(max(best_ways[0], key=lambda split: split.rate)))
    for line in (LEGEND, said_of_rates(), *work_of(run).assumed):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def fleet_table(title: str, models: list[Sizes], best_ways: list[list[Split]]) -> Table:
    """A line for each model and kind of way; the recipe's own model is the first."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "GPUs") else "right", no_wrap=True)
    for sizes, ways in zip(models, best_ways, strict=True):
        name = rounded_number(sizes.parameters)
        for split in ways:
            table.add_row(f"[bold]{name}[/bold]" if sizes is models[0] else name, *table_cells(split))
        if not ways:
            table.add_row(name, "too few")
    return table


def table_cells(split: Split) -> list[str]:
    """A line of the table."""
    trainers = f"{split.trainers}" + (f" ({split.sharing})" if split.sharing != split.trainers else "")
    samplers = f"{split.samplers}" + (f" x {split.group}" if split.group > 1 else "")
    memory = f"{split.trainer.peak / GB:.0f} + {(split.sampler.peak + split.resident) / GB:.0f}"
    rates = [rounded_number(rate) for rate in (split.sampled, split.trained)]
    return ["in turns" if split.together else "apart", trainers, samplers, memory, f"{split.sampler.rows}", *rates, f"{split.feeds:.1f}"]


def rounded_number(value: float) -> str:
    """Three digits: 1.54B, 118k."""
    size, unit = next((size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= size or size == 1)
    return f"{value / size:.3g}{unit}"


def shortage(run: Run, sizes: Sizes, gpu: Gpu, count: int, name: str) -> str:
    """A sentence of what is missing, and on how many GPUs it would fit."""
    least = min(splits(run, sizes, gpu, count), key=lambda split: split.peak)
    more = next((n for n in more_than(count) if ways_that_fit(run, sizes, gpu, n)), None)
    where = f"it fits on {more} x {name}" if more else f"it fits on no number of {name} that was tried"
    taken = f"{least.trainer.peak / GB:.0f} GB on a trainer's GPU and {(least.sampler.peak + least.resident) / GB:.0f} on a sampler's"
    options = [*(["lora=true"] if run.lora is None else []), *([] if run.activation_checkpointing else ["activation_checkpointing=true"])]
    words = ", ".join([*options, "learner=sharded learner.offload=true", "a lower tokens_per_batch"])
    size = rounded_number(sizes.parameters)
    return f"{size} does not fit on {count} x {name}: at the least {taken}, of {gpu.memory / GB:.0f}; {where}, or with {words}"


def more_than(count: int) -> list[int]:
    """Larger numbers of GPUs to try."""
    return [n for n in (2, 4, OF_A_MACHINE, 2 * OF_A_MACHINE, 4 * OF_A_MACHINE, 8 * OF_A_MACHINE) if count < n <= MOST_GPUS]


def parts_table(split: Split) -> Table:
    """What a trainer's GPU and a sampler's hold when they hold most."""
    table = Table(title="GB on one GPU", title_justify="left", box=None)
    for column in ("", "a trainer", "a sampler"):
        table.add_column(column, justify="right" if column else "left")
    sides = split.trainer, split.sampler
    for name in dict.fromkeys(part.name for side in sides for part in side.parts):
        sizes = [size_of(side, name) for side in sides]
        table.add_row(name, *(f"{size / GB:.2f}" if size else "" for size in sizes))
    if split.resident:
        table.add_row("of the trainer, which sleeps", "", f"{split.resident / GB:.2f}")
    table.add_row("[bold]all[/bold]", f"[bold]{split.trainer.peak / GB:.2f}[/bold]", f"[bold]{(split.sampler.peak + split.resident) / GB:.2f}[/bold]")
    return table


def size_of(side: StepMemory, name: str) -> float:
    """Bytes of a part at the moment that takes most."""
    return sum(part.bytes for part in side.parts if part.name == name and (side.phase in part.phases or part.phases == MOMENTS))


def said_of_rates() -> str:
    """Where the rates are from, and how far they are off."""
    errors = {kind: [row.error for row in published() if row.what.startswith(kind)] for kind in ("update", "decoding")}
    spans = " and ".join(f"{min(of_kind):+.0%} to {max(of_kind):+.0%} for {kind}" for kind, of_kind in errors.items())
    here = "-15% to -11% and +9% to +34% on a CPU here, and on GPUs nothing was measured"
    return f"Rates are arithmetic over data sheets: {spans} off what others published, {here}. docs/memory.md has the tables."
