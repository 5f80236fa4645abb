"""The commands that work with a model without training it: `ramulus eval` and `ramulus rollout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from ramulus.look.terminal import new_console
from ramulus.run.evaluation.task_sets import ProblemOptions

ModelPath = Annotated[Positional[str], arg(metavar="MODEL")]
PROBLEM = ProblemOptions()
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness
ELSEWHERE = ("model", "tasks", "reward", "limit", "out", "problem", "device", "threads", "slots")  # options that say something for any task
Tasks = Annotated[tuple[str, ...], arg(metavar="FILE|gym:NAME|lm_eval:NAME|chain|sums|word_problems ...")]


def eval_(
    model: ModelPath,
    tasks: Tasks = (),
    reward: str | None = None,
    samples: int = 4,
    k: tuple[str, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = True,
    tree: bool = False,
    independent: bool = True,
    width: int | None = None,
    segment: int = 64,
    branching: int = 2,
    limit: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    problem: OmitArgPrefixes[ProblemOptions] = PROBLEM,
    against: str | None = None,
    out: Path | None = None,
) -> int:
    """Evaluate a model on problems: avg@k, pass@k, maj@k and greedy accuracy with 95 % intervals, lengths, and every answer.

    Examples: `ramulus eval runs/mine` on the problems that the run holds out, graded as in training;
    `ramulus eval runs/mine --tasks aime24.jsonl aime25.jsonl --samples 32 --k 1,8,32 --out evals/mine`; the same command again
    goes on where it was killed. docs/eval.md says what each number is.

    Args:
        model: a Hugging Face model folder or name, or the folder of a run (its last checkpoint).
        tasks: files of problems graded as boxed mathematics (jsonl, csv, parquet), gym:NAME for a reasoning-gym task, chain, sums or word_problems;
            by default the held-out problems of the run. lm_eval:NAME, or lm_eval:FILE.yaml, is a task of lm-evaluation-harness, scored by it.
        reward: what grades, as NAME or FILE.py:FUNCTION, several with commas between; by default the rewards of the run, or the usual of each set.
        samples: independent attempts at each problem; 0 for greedy alone.
        k: which pass@k and maj@k are said, as 1,8,32 or 1 8 32, each at most samples; by default the powers of two up to samples.
        temperature: of the attempts.
        top_p: keep the most probable tokens of this total probability.
        greedy: leave out the one greedy answer to each problem, with --no-greedy.
        tree: also grow a tree for each problem, and compare it with independent attempts at equal answers and at equal tokens.
        independent: leave out the independent attempts, with --no-independent: trees alone.
        width: answers of a tree; as many as samples by default.
        segment: tokens of a tree's segment, at the end of which it branches.
        branching: branches of a path of a tree in each round.
        limit: problems of each task set; all by default.
        max_tokens: the longest response; by default that of the run, or 1024, or what the model has room for.
        seed: the same seed gives the same answers on the same machine.
        chunk: problems sampled together, kept together and, after a kill, done again together; by default what fills the slots four times.
        against: another model, or the folder or JSON file of an earlier evaluation of the same problems: paired differences.
        out: a folder for trees, tables and CSV, which a killed evaluation goes on from; or a .json file for the result with every answer.
    """
    options = dict(locals())
    from ramulus.run.evaluation.evaluation import run_evaluation
    from ramulus.run.evaluation.loaded_model import load_model
    from ramulus.run.evaluation.own_run import asked_sets
    from ramulus.run.evaluation.plan import plan_of, refuse_unused, whole_numbers

    harness = [name.removeprefix(HARNESS) for name in tasks if name.startswith(HARNESS)]
    tasks = tuple(name for name in tasks if not name.startswith(HARNESS))
    opener = partial(load_model, device=problem.device, threads=problem.threads, slots=problem.slots)
    if harness:
        return evaluate_by_harness(opener, harness, tasks, options)
    if not tree:
        refuse_unused("without --tree no tree is grown", width=width is not None, segment=segment != 64, branching=branching != 2)
    sets = asked_sets(model, tasks, limit, problem, reward)
    grown = (samples if width is None else width, segment, branching) if tree else None
    plan = plan_of(samples if independent else 0, temperature, top_p, greedy, grown, max_tokens, seed, chunk)
    return run_evaluation(model, opener, sets, plan, whole_numbers(k), against, out, new_console())


def evaluate_by_harness(opener: Callable[[str], Any], harness: list[str], tasks: tuple[str, ...], options: dict[str, Any]) -> int:
    """`eval_` on tasks of lm-evaluation-harness alone; ValueError for options that have no say there."""
    from ramulus.run.evaluation.lm_eval_tasks import check_alone, run_harness
    from ramulus.run.evaluation.plan import refuse_unused

    check_alone(harness[0], tasks, [options["problem"].examples, options["problem"].extract, options["reward"]])
    refuse_unused(f"lm_eval:{harness[0]} samples and prompts in ways of its own", **options_set(options))
    return run_harness(opener(options["model"]), harness, options["limit"], options["out"], new_console())


def options_set(given: Mapping[str, Any]) -> dict[str, bool]:
    """Which options of `eval_` are not as they are by default, of those that have a say in how answers are sampled and prompted."""
    usual = {name: parameter.default for name, parameter in signature(eval_).parameters.items() if name in given}
    options = {name if value is not True else f"no_{name}": given[name] != value for name, value in usual.items() if name not in ELSEWHERE}
    return options | {name: value != getattr(PROBLEM, name) for name, value in vars(given["problem"]).items() if name not in ELSEWHERE}


def rollout(
    model: ModelPath,
    tasks: Tasks = (),
    reward: str | None = None,
    width: int = 8,
    branching: int = 2,
    depth: int = 8,
    segment: int = 64,
    star: bool = False,
    temperature: float = 1.0,
    limit: int = 1,
    seed: int = 0,
    problem: OmitArgPrefixes[ProblemOptions] = PROBLEM,
    out: Path | None = None,
) -> int:
    """Grow trees with a model, show or save them, and say what they cost.

    Args:
        model: a Hugging Face model folder or name, or the folder of a run (its last checkpoint).
        tasks: files of problems graded as boxed mathematics (jsonl, csv, parquet), gym:NAME for a reasoning-gym task, chain, sums or word_problems;
            by default the held-out problems of the run.
        reward: what grades, as NAME or FILE.py:FUNCTION; by default the rewards of the run, or the usual of each set.
        width: paths of a tree.
        branching: branches of a path in each round.
        depth: segments of a path, at most.
        segment: tokens of a segment.
        star: independent paths that share the prompt alone, in place of a tree.
        temperature: of the sampling.
        limit: problems of each task set.
        seed: the same seed gives the same trees on the same machine.
        out: a file for the trees, one JSON line each; they are not shown then.
    """
    from ramulus.grow.branching import Star
    from ramulus.grow.segments import Segments
    from ramulus.run.evaluation.loaded_model import grow_trees, load_model
    from ramulus.run.evaluation.own_run import asked_sets
    from ramulus.run.evaluation.plan import refuse_unused

    if star:
        refuse_unused("--star grows paths that never branch", branching=branching != 2)
    sets = asked_sets(model, tasks, limit, problem, reward)
    rule: Any = Star(width) if star else Segments(width, depth, segment, branching)
    loaded = load_model(model, problem.device, problem.threads, problem.slots)
    return grow_trees(loaded, sets, rule, temperature, depth * segment, seed, out, new_console())
