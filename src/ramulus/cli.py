"""The command line: `ramulus train`, config, plan, sweep, compare, eval, rollout, recipes, ledger, export, push, view, serve, doctor.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from ramulus import __version__
from ramulus.adapters.command import export
from ramulus.look.terminal import new_console
from ramulus.native.memory import OutOfMemory, allocation_failed, ask_for_large_pages
from ramulus.run.config.find import check_named, yaml_of
from ramulus.run.doctor_command import doctor
from ramulus.run.evaluation.commands import eval_, rollout
from ramulus.run.screen import complain, let_go, there_are_streams
from ramulus.run.serve import serve

Asked = Annotated[Positional[tuple[str, ...]], arg(metavar="RECIPE FIELD=VALUE ...", help_behavior_hint="(required)")]
Words = Annotated[
    Positional[tuple[str, ...]], arg(metavar="RECIPE ... FIELD=VALUE ...", help_behavior_hint="(required)")
]
_Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN ...", help_behavior_hint="(required)")]
RunFolder = Annotated[Positional[Path], arg(metavar="RUN")]


def train(words: Asked = (), config: Path | None = None, dry_run: bool = False, resume: bool = False, fresh: bool = False) -> int:
    """Train by a recipe: a shipped one by name (see `ramulus recipes`), a Python file of your own, or a YAML file.

    Examples: `ramulus train grpo model=Qwen/Qwen2.5-0.5B tasks=problems.jsonl evals=held-out.jsonl rewards=mine.py:score lr=1e-6 out=runs/mine`,
    `ramulus train grpo --help` for every field with its type, its value and what it is. In a recipe of several stages a field is set in every
    stage that has it; `sft.steps=300` sets it in the stage named sft. The model is a Hugging Face folder or name, or the folder of a run.

    Args:
        words: a shipped recipe, or a .py file with a function recipe(), and any of its fields by its dotted path, for example branching.width=16;
            NAME:small and FILE.py:small are variants.
        config: a YAML file of fields, as `ramulus config RECIPE` writes it; the recipe may be named in it.
        dry_run: build everything, say what a step and the run would take, and train nothing.
        resume: go on with the run in the out folder from its last checkpoint, bit for bit; begin it where there is none.
        fresh: begin anew; a run that is in the out folder is kept as FOLDER.1.
    """
    began = time.monotonic()
    recipe, overrides = recipe_words(words, config)
    from ramulus.learn.sharded.joining import in_torchrun
    from ramulus.run.launch import launch
    from ramulus.run.runtime import collecting_seldom

    if dry_run:
        from ramulus.run.dry_run import rehearse

        return rehearse(recipe, overrides, new_console())
    with in_torchrun() as leads, collecting_seldom():  # torchrun starts this command many times: all but rank 0 serve its learner
        return launch(recipe, overrides, resume, fresh, new_console(), began) if leads else 0


def recipe_words(words: Sequence[str], config: Path | None = None) -> tuple[str, list[str]]:
    """The recipe and the overrides in the words of a command. Raises an error for a recipe that is not there, before anything is imported."""
    named = [word for word in words[:1] if "=" not in word]
    if not named and config is None:
        raise ValueError("name a recipe first, as in `ramulus train grpo steps=100`: `ramulus recipes` lists them")
    recipe = ":".join([*([str(config)] if config is not None else []), *named])
    if config is not None and config.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--config takes a YAML file, FILE.yaml, got {config}: a Python file is the recipe itself")
    check_named(recipe)
    return recipe, list(words[len(named) :])


def config(words: Asked = (), config: Path | None = None) -> int:
    """Print the whole configuration of a recipe as YAML, which `ramulus train --config FILE.yaml` takes.

    Example: `ramulus config treepo branching.width=8 > mine.yaml`, then `ramulus train --config mine.yaml steps=100`.

    Args:
        words: as in `ramulus train`.
        config: as in `ramulus train`.
    """
    recipe, overrides = recipe_words(words, config)
    from ramulus.run.config.find import absolute, stages_of
    from ramulus.run.config.override import override
    from ramulus.run.config.yaml_file import to_yaml

    base = yaml_of(recipe)
    text = to_yaml(absolute(recipe) if base is None else None, override(stages_of(recipe), overrides))
    new_console().out(text, highlight=False, end="")
    return 0


def plan(words: Asked = (), config: Path | None = None, gpus: str | None = None) -> int:
    """Say what a step of a recipe takes of memory, by part, from its configuration alone: nothing is loaded.

    Example: `ramulus plan grpo model=Qwen/Qwen2.5-1.5B lora=true tokens_per_batch=8192`.

    Args:
        words: as in `ramulus train`.
        config: as in `ramulus train`.
        gpus: say instead what fits where on so many GPUs, and how fast: 8xH100, or A100, H200, L40S, 4090.
    """
    recipe, overrides = recipe_words(words, config)
    from ramulus.run.config.resume import build
    from ramulus.run.memory.fleet_report import print_fleet
    from ramulus.run.memory.report import print_plan

    stages = build(recipe, overrides)[0]
    print_plan(stages, new_console()) if gpus is None else print_fleet(stages[-1], gpus, new_console())
    return 0


def sweep(words: Words, seeds: tuple[int, ...], out: Path, jobs: int | None = None, threads: int | None = None) -> int:
    """Train every recipe with every seed, several runs at once; the same command again goes on where a sweep was stopped.

    Example: `ramulus sweep grpo dapo treepo steps=200 --seeds 0 1 2 3 4 --out runs/three`, then `ramulus compare runs/three`.
    A run is in OUT/RECIPE/seed-N, what it says in OUT/RECIPE/seed-N.log.

    Args:
        words: recipes, as in `ramulus train`, and fields set in all of them.
        seeds: one run of each recipe for every seed.
        out: the folder of the sweep.
        jobs: runs at the same time; as many as the cores allow by default.
        threads: of each run; 1 by default, or the cores shared among the jobs where those are given.
    """
    recipes, overrides = ([word for word in words if ("=" in word) == wanted] for wanted in (False, True))
    for recipe in recipes:
        check_named(recipe)
    from ramulus.run.sweep.sweep import sweep as run_sweep

    return run_sweep(recipes, overrides, seeds, out, new_console(), jobs, threads)


def _compare(
    runs: _Runs,
    metric: str = "eval/mean",
    baseline: str | None = None,
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
    slack: float = 0.0,
    finished: bool = False,
    csv: Path | None = None,
    latex: Path | None = None,
    json: Path | None = None,
    plots: Path | None = None,
) -> int:
    """Compare runs over seeds at equal steps, sampled tokens, trained tokens and seconds, and say which differences are within noise.

    Example: `ramulus compare runs/three --baseline grpo --plots plots`. docs/compare.md says how to read the tables.

    Args:
        runs: folders of runs, or of sweeps; runs in LABEL/seed-N are the seeds of one label.
        metric: any name in metrics.jsonl; of a run of several stages, that of the last one, at the cost of all.
        baseline: the label that the others are compared with; the first one by default.
        fractions: of the largest budget that every run reaches.
        slack: share of a budget by which a value may be measured after it; 0.02 where seeds of one label spend a little more or less.
        finished: leave out runs that are not finished.
        csv: a file for the table.
        latex: a file for the table, in booktabs.
        json: a file for everything, each seed's values and curves included.
        plots: a folder for pictures, SVG and PNG; needs the extra plots.
    """
    from ramulus.look.compare.compare import compare as compare_runs
    from ramulus.look.compare.tables import publish

    publish(compare_runs(runs, metric, baseline, fractions, finished, slack), new_console(), csv, latex, json, plots)
    return 0


def recipes() -> int:
    """List the shipped recipes and their variants."""
    from rich.table import Table

    from ramulus.run.config.find import FOLDER, USUAL, shipped, variants

    table = Table(box=None, show_header=False)
    for name, about in shipped().items():
        table.add_row(f"[bold]{name}[/bold]", about)
        for function, purpose in variants(FOLDER / f"{name}.py").items():
            if function != USUAL:
                table.add_row(f"{name}:{function}", purpose)
    console = new_console()
    console.print(table)
    console.print(
        "\nramulus train NAME, or the path of a Python file with a function recipe() (mine.py:small calls another function of it); "
        "any field can be set, steps=10 for example.",
        highlight=False,
    )
    return 0


def push(folder: RunFolder, repo: tyro.conf.Positional[str], which: Literal["last", "best"] = "last", public: bool = False) -> int:
    """Send the model of a run to a hub, with a card that says where it comes from and what it scored.

    Args:
        folder: the folder of a run; of a run of several stages, its last finished stage is taken.
        repo: its name there, OWNER/NAME; made if it is not there yet.
        which: the last checkpoint, or the one with the best evaluation.
        public: let everybody see it.
    """
    from ramulus.run.publish import push_model

    console = new_console()
    console.out(f"{folder} is now at {push_model(folder, repo, which, not public, console)}", highlight=False)
    return 0


def view(
    runs: _Runs,
    port: int = 0,
    host: str = "127.0.0.1",
    tokenizer: Path | None = None,
    open: bool = False,
    out: Path | None = None,
    steps: str = "",
) -> int:
    """Look at runs and trees in the browser, live while they train; or write them into one HTML file.

    Args:
        runs: folders of runs, a folder with runs below it, folders or files of trees.
        port: by default a free one.
        host: the address to listen at; with any but this machine's own, whoever reaches it can read the runs.
        tokenizer: tokenizer.json, or the folder it is in; by default that of the run's last checkpoint.
        open: open the browser.
        out: write one HTML file with everything in it, and serve nothing.
        steps: which steps' trees go into that file, as in 5,10,15; by default the last.
    """
    from ramulus.look.viewer.viewer import view as show

    return show(runs, host, port, tokenizer, open, out, steps, new_console())


def ledger(runs: _Runs, json: Path | None = None, csv: Path | None = None, steps: bool = False) -> int:
    """Say what runs cost: tokens by source and by fate, seconds by phase; of each stage, a step, a correct answer.

    Args:
        runs: folders of runs, of single stages, or of sweeps.
        json: a file for all numbers as JSON.
        csv: a file for all numbers as CSV, a line for each run and stage.
        steps: tell every step as well.
    """
    from ramulus.look.cost.statement import read_statements, statement_tables, step_tables, write_csv, write_json

    statements = read_statements(runs)
    terminal = new_console()
    console = terminal if terminal.is_terminal else new_console(width=200)
    for statement in statements:
        for part in [*statement_tables(statement), *(step_tables(statement) if steps else ())]:
            console.print(part, highlight=False)
            console.print()
    for path, write in ((json, write_json), (csv, write_csv)):
        if path is not None:
            write(path, statements, steps)
    return 0


COMMANDS: dict[str, Any] = {
    "train": train,
    "config": config,
    "plan": plan,
    "sweep": sweep,
    "compare": _compare,
    "eval": eval_,
    "rollout": rollout,
    "recipes": recipes,
    "ledger": ledger,
    "export": export,
    "push": push,
    "view": view,
    "serve": serve,
    "doctor": doctor,
}
_ABOUT = "Reinforcement learning on verifiable rewards with one tree from sampler to optimizer. --debug after any command shows where an error arose."


def main(argv: list[str] | None = None) -> None:
    """Run one command; an error of the user's is one sentence and exit status 2."""
    there_are_streams()
    # torch reads it when it starts: threads that wait busily slow shared cores down tenfold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # a short wait, then sleep: waking up for every small operation costs more
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ask_for_large_pages()
    for library in ("torchao", "torch.utils._pytree"):  # what torchao cannot load or registers, wherever transformers meets it
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stdout.isatty():
        os.environ.pop("FORCE_COLOR", None)  # notebooks set it: a bar that redraws itself would flood a pipe or a file
    words = sys.argv[1:] if argv is None else argv
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"ramulus: {message}\n"
    try:
        sys.exit(run([word for word in words if word != "--debug"]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        memory = allocation_failed(error)
        if "--debug" in words or (isinstance(error, RuntimeError) and not memory):
            raise
        remedy = f": {remedy_of(error)}" if memory else ""
        complain("; ".join([str(error) or "out of memory", *getattr(error, "__notes__", ())]) + remedy)
        sys.exit(2)
    finally:
        warnings.formatwarning = usual
        let_go()


def remedy_of(failure: BaseException) -> str:
    """What to do about an allocation that failed: of a row or of keys and values, which can be fewer; else of the model or its optimizer."""
    if isinstance(failure, OutOfMemory):
        return "lower tokens_per_batch, engine.slots or engine.memory_mb"
    return "`ramulus plan RECIPE` says what takes how much; adapters (lora), model.dtype=bfloat16, less engine.memory_mb or a smaller model help"


def run(words: list[str]) -> int:
    """The exit status of a command line."""
    if words[:1] in (["--version"], ["-V"], ["version"]):
        sys.stdout.write(f"ramulus {__version__}\n")
        return 0
    if words[:1] in (["train"], ["config"], ["plan"]):  # their flags may stand anywhere
        words = words[:1] + flags_last(words[1:])
        if {"--help", "-h"} & set(words) and (named := [word for word in words[1:] if not word.startswith("-")]):
            flag = [word.partition("=")[2] for word in words if word.startswith("--config=")]
            recipe, overrides = recipe_words(named, Path(flag[-1]) if flag else None)
            from ramulus.run.config.field_list import show_fields

            return show_fields(recipe, overrides, new_console())
    status: Any = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="ramulus", description=_ABOUT, args=words, config=(FlagCreatePairsOff,)
    )
    return int(status or 0)


_VALUED = ("--config", "--gpus")


def flags_last(words: Sequence[str]) -> list[str]:
    """The same words with the flags behind them, each with its value: --config=FILE. `--steps=3` is a field and no flag."""
    joined, rest = [], iter(words)
    for word in rest:
        joined.append(f"{word}={next(rest, '')}" if word in _VALUED else word)
    return sorted(joined, key=lambda word: word.partition("=")[0] in _VALUED or (word.startswith("-") and "=" not in word))


if __name__ == "__main__":
    main()
