"""The parts of a run: its settings, its JSON and Python text, the order of tasks, checkpoints, logbook, one step."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from kept import tensors
from ramulus.core import run_folder
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.local.factory import Local
from ramulus.engine.toy import ToyEngine
from ramulus.grow.branching import Star
from ramulus.grow.grading import grade
from ramulus.grow.schedule import Dynamic, Fixed
from ramulus.grow.stop import Stop
from ramulus.learn.policy.in_process import random_tensors, restore_random_tensors
from ramulus.run import checkpoint
from ramulus.run.config.describe import changes, recipe_text, to_json
from ramulus.run.config.find import find
from ramulus.run.config.recipe import AdamW, FinalEvaluation, Run, Weighted
from ramulus.run.config.resume import _compare, since_then
from ramulus.run.launch import launch
from ramulus.run.minibatch import parts
from ramulus.run.rollouts import START, Rollout, Rollouts
from test_resume import MEASURED

RECIPE = str(Path(__file__).with_name("run_recipe.py"))


def run(**changed) -> Run:
    return replace(find(RECIPE).rl(), **changed)


# settings


def test_learning_rate_rises_then_falls():
    how = AdamW(lr=1.0, warmup=4, decay="linear", floor=0.1)
    rates = [how.rate(step, 12) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 8)
    cosine = AdamW(lr=1.0, decay="cosine")
    assert cosine.rate(6, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert AdamW(lr=3.0).rate(7, 10) == 3.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: run(tokens_per_batch=27), "tokens_per_batch=27 cannot hold one path"),
        (lambda: run(temperature=0), "temperature must be above 0 while training, got 0"),
        (lambda: run(minibatches=0), "minibatches must be at least 1, got 0"),
        (lambda: run(eval_every=-1), "eval_every must be at least 0, got -1"),
        (lambda: run(threads=0), "threads must be at least 1"),
        (lambda: AdamW(clip=0), "optimizer.clip must be above 0"),
        (lambda: Local(slots=0), "engine.slots and engine.memory_mb must be at least 1, got 0"),
        (lambda: FinalEvaluation(temperatures=(0.0,)), "final_evaluation.temperatures must be above 0"),
        (lambda: Weighted(len, math.nan), "finite number, got nan"),
        (lambda: run(rewards=(Weighted(len), Weighted(len, 2.0))).weighted(), "two rewards have the same name"),
    ],
)
def test_settings_that_cannot_work(make, words: str):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make()


def test_rewards_get_names():
    one, other = find(RECIPE).Digits(), len
    assert run(rewards=one).weighted() == ((one, 1.0, "digits"),)
    assert run(rewards=(one, Weighted(other, 0.5))).weighted() == ((one, 1.0, "digits"), (other, 0.5, "len"))
    assert run(rewards=(Weighted(one, 2.0, "mine"),)).weighted()[0][2] == "mine"


def test_json_names_classes_and_differences():
    old = to_json(run())
    assert json.loads(json.dumps(old, allow_nan=False)) == old
    assert old["branching"]["class"] == "ramulus.Segments"
    new = to_json(run(steps=9, branching=Star(4), optimizer=AdamW(lr=1e-2, decay="linear", clip=math.inf)))
    found = {path: (a, b) for path, a, b in changes(old, new)}
    assert found.keys() == {"steps", "branching", "optimizer.clip"}
    assert found["steps"] == (6, 9)
    assert found["optimizer.clip"] == (1.0, "inf")
    with pytest.raises(ValueError, match="frozen dataclass"):
        to_json(run(answer=object()))


def test_the_text_of_a_run_builds_it_again():
    module = find(RECIPE)
    made = replace(
        module.rl(), optimizer=AdamW(clip=math.inf), rewards=(Weighted(module.Digits(), 0.5),), out="somewhere"
    )
    space: dict = {}
    exec(recipe_text(made), space)
    assert space["run"] == made


# where trees come from


@dataclass(frozen=True)
class Length:
    def __call__(self, task: Task, path) -> float:
        return float(path.length)


def forests(n: int = 7, **changed) -> Rollouts:
    tasks = [Task(f"t{i}", (i % 4,), f"t{i}", demonstrations=((1, 2, 3),)) for i in range(n)]
    made = run(branching=Star(3), rewards=Length(), schedule=Fixed(4), seed=5, **changed)
    return Rollouts(made, tasks, ToyEngine(vocab=4), Stop((3,), 12), lambda tokens: " ".join(map(str, tokens)))


def harvest(source: Rollouts, steps: int) -> tuple[list, dict]:
    cursor, found = START, []
    for step in range(1, steps + 1):
        made, cursor = asyncio.run(source.get(step, cursor))
        found.append(made)
    return found, cursor


def test_every_task_is_visited_once_an_epoch_in_a_seeded_order():
    found, cursor = harvest(forests(), 7)
    drawn = [tree.task.id for made in found for tree in made.grown]
    assert len(drawn) == 28
    assert Counter(drawn) == {f"t{i}": 4 for i in range(7)}
    epochs = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [tree.visit for tree in found[-1].grown] == [3] * 4
    assert cursor == START | {"epoch": 4, "visits": {f"t{i}": 4 for i in range(7)}}
    assert START == {"epoch": 0, "place": 0, "visits": {}, "schedule": {}, "temperature": None}


def test_the_cursor_is_all_there_is_to_remember():
    whole, _ = harvest(forests(), 4)
    _, cursor = harvest(forests(), 3)
    again, _ = asyncio.run(forests().get(4, json.loads(json.dumps(cursor))))
    tokens = [[node.tokens for tree in made.grown for node in tree.walk()] for made in (whole[-1], again)]
    assert tokens[0] == tokens[1]


def test_visits_of_a_task_differ_and_demonstrations_are_grafted():
    (one, other), _ = harvest(forests(4, demonstrations=1), 2)
    texts = [
        {tree.task.id: [leaf.response() for leaf in tree.leaves()] for tree in made.grown} for made in (one, other)
    ]
    assert texts[0].keys() == texts[1].keys()
    assert texts[0] != texts[1]
    experts = [leaf for tree in one.grown for leaf in tree.leaves() if leaf.author is Author.EXPERT]
    assert [list(leaf.tokens) for leaf in experts] == [[1, 2, 3]] * 4
    counts = one.metrics()
    assert counts["expert"] == 12
    assert counts["paths"] == 12
    assert counts["reward"] == pytest.approx(counts["length"])
    assert counts["sampled"] == sum(len(n.tokens) for t in one.grown for n in t.walk() if n.author is Author.POLICY)


@dataclass(frozen=True)
class Never:
    def __call__(self, task: Task, path) -> float:
        return 0.0


def test_dynamic_sampling_without_signal_gives_up_after_its_draws():
    source = forests()
    source.run = replace(source.run, schedule=Dynamic(3, draws=2), rewards=Never())
    made, _ = asyncio.run(source.get(1, START))
    assert (len(made.grown), len(made.kept), made.draws) == (6, 0, 2)
    assert made.metrics()["dropped"] == 6


def test_parts_are_whole_and_even():
    assert parts(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert parts(2, 5) == [slice(0, 1), slice(1, 2)]
    assert parts(0, 3) == []


# checkpoints


def write(folder: Path, step: int, **state) -> None:
    async def save(part: Path) -> dict:
        save_file({"w": torch.full((3,), float(step))}, part / "tensors.safetensors")
        return {"version": step}

    if written := asyncio.run(checkpoint.write_files(folder, step, save, {"pending": None} | state)):
        checkpoint.put_in_place(written)


def test_checkpoints_keep_the_last_and_the_best(tmp_path: Path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
        checkpoint.drop_old(tmp_path, 2, best=2)
    assert run_folder.steps(tmp_path) == [2, 4, 5]
    state = checkpoint.read_state(tmp_path, 4)
    assert (state["step"], state["policy"]) == (4, {"version": 4})
    assert torch.equal(tensors(tmp_path, 4)["w"], torch.full((3,), 4.0))


def test_what_a_killed_write_left_is_not_read(tmp_path: Path):
    write(tmp_path, 1)
    part = tmp_path / "checkpoints" / ".step-000002.part"
    part.mkdir()
    (part / "state.json").write_text("{")
    (tmp_path / "checkpoints" / "step-000003").mkdir()
    assert run_folder.steps(tmp_path) == [1]
    checkpoint.drop_old(tmp_path, 2, None)
    assert not part.exists()


def test_a_step_that_was_still_to_be_evaluated_is_saved_again(tmp_path: Path):
    write(tmp_path, 1, pending={"reward": 1.0})
    write(tmp_path, 1, best={"step": 1, "score": 0.5})
    assert checkpoint.read_state(tmp_path, 1)["best"] == {"step": 1, "score": 0.5}
    write(tmp_path, 1, best=None)
    assert checkpoint.read_state(tmp_path, 1)["best"] == {"step": 1, "score": 0.5}


def test_nothing_is_pickled(tmp_path: Path):
    write(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def draws() -> tuple[float, ...]:
    return random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(()).item(), torch.randn(()).item()


@pytest.mark.parametrize("between", [False, True], ids=["saved at once", "drawn from before the learner saved"])
@pytest.mark.parametrize("odd", [False, True])
def test_random_states_come_back(tmp_path: Path, odd: bool, between: bool):
    checkpoint.seed_all(3)
    if odd:
        draws()  # half of a pair of normal numbers is kept for the next call
    generators = checkpoint.Generators.now()
    first = draws()
    if not between:
        generators.restore()
    held = random_tensors()  # as a learner in this process keeps them
    write(tmp_path, 1, random=generators.plain())
    checkpoint.seed_all(4)
    restore_random_tensors(held)
    checkpoint.restore_random(checkpoint.read_state(tmp_path, 1))
    assert draws() == first


def test_a_checkpoint_of_before_leaves_torch_to_the_learner(tmp_path: Path):
    checkpoint.seed_all(3)
    held, former = random_tensors(), checkpoint.Generators.now().plain()
    first = draws()
    write(tmp_path, 1, random={name: former[name] for name in ("python", "numpy")})
    checkpoint.seed_all(4)
    restore_random_tensors(held)
    checkpoint.restore_random(checkpoint.read_state(tmp_path, 1))
    assert draws() == first


# a run, small


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def train(out: Path, *overrides: str) -> list[dict]:
    assert launch(RECIPE, [f"out={out}", *overrides], True, False, Console(quiet=True)) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_metrics_say_everything_the_issue_asks_for(tmp_path: Path):
    lines = train(tmp_path / "run", "steps=3")
    wanted = {
        "reward",
        "pass_rate",
        "length",
        "truncated",
        "entropy",
        "clip_high",
        "clip_low",
        "kl_sampler",
        "ratio_max",
        "ratio_min",
    }
    wanted |= {
        "mismatch_max",
        "grad_norm",
        "lr",
        "loss",
        "sampled",
        "reused",
        "reuse_ratio",
        "pruned",
        "trained",
        "skipped",
        "dropped",
    }
    assert all(wanted <= line.keys() for line in lines)
    phases = {"grow", "grade", "score", "credit", "pack", "update", "gauges", "write", "load", "ledger", "idle"}
    assert all(phases < line["seconds"].keys() for line in lines)
    for before, line in zip([None, *lines], lines):
        parts = {name: seconds for name, seconds in line["seconds"].items() if name not in ("step", "mean", "eval")}
        assert math.fsum(parts.values()) == line["seconds"]["step"]
        assert ("log" in parts) == (before is not None)  # what came after the line of the step before
    assert all(line["mismatch_max"] < 1e-4 for line in lines)
    assert "eval/mean" in lines[2]
    assert "eval/mean" not in lines[1]
    answers = json.loads((tmp_path / "run" / "evals" / "000003.json").read_text())["answers"]
    assert [len(row["sampled"]) for row in answers] == [2] * 4


def test_the_console_tells_them_too(tmp_path: Path):
    plain = Console(record=True, width=60, file=io.StringIO())
    live = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    for name, console in (("plain", plain), ("live", live)):
        words = [f"out={tmp_path / name}", "steps=2", "eval_every=1"]
        assert launch(RECIPE, words, False, False, console) == 0
        said = " ".join(console.export_text().split())
        for word in ("2/2", "reward", "passed", "length", "tok/s", "reuse", "left", "held out"):
            assert word in said
        for word in ("entropy", "clipped", "KL", "ratio", "gradient", "sampled", "trained", "seconds: ", "grow"):
            assert word in said
    seconds = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert seconds["seconds"] > seconds["stages"]["rl"] > 0  # what start-up took counts too


def test_paths_that_a_filter_took_out_count_as_failed():
    tree = Tree.plant(Task("t", (1,), "?", ""), seed=0)
    rewards = [(lambda task, path: {"reward": 1.0, "correct": float(path.finish == "eos")}, 1.0, "it")]
    for finish in ("eos", "length"):
        tree.add(tree.root, [2, 3], Author.POLICY, finish=finish)
    asyncio.run(grade(tree, rewards, lambda tokens: "text", filter_overlong=True))
    told = Rollout([tree], [0], 1).metrics()
    assert (told["reward"], told["pass_rate"], told["truncated"]) == (1.0, 0.5, 0.5)


def test_a_run_repeats_bit_for_bit_and_seeds_differ(tmp_path: Path):
    def plain(out: Path, *overrides: str) -> list[dict]:
        return [
            {k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in train(out, "steps=2", *overrides)
        ]

    one = plain(tmp_path / "one")
    assert one == plain(tmp_path / "other")
    assert one != plain(tmp_path / "seed", "seed=1")


def test_a_step_without_signal_changes_no_weight(tmp_path: Path):
    text = "from dataclasses import replace\nfrom ramulus.grow.schedule import Fixed\nfrom ramulus.run.config.find import find\n\n\n"
    text += f"def flat(task, path):\n    return 1.0\n\n\ndef recipe():\n    run = find({RECIPE!r}).rl()\n"
    text += "    return replace(run, rewards=flat, schedule=Fixed(2), mix=replace(run.mix, kl_coef=0.0, entropy_bonus=0.0), steps=2)\n"
    (tmp_path / "flat.py").write_text(text)
    console = Console(record=True, width=200, file=io.StringIO())
    assert launch(str(tmp_path / "flat.py"), [f"out={tmp_path / 'run'}", "save_every=1"], False, False, console) == 0
    assert "no signal, weights unchanged" in console.export_text()
    first, last = (tensors(tmp_path / "run", step) for step in (1, 2))
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("weights/"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [2, 2]


def test_tensorboard_is_written_and_purged_on_resume(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ramulus.core import run_folder as saved

    out = tmp_path / "run"
    train(out, "steps=4", "tensorboard=true")
    for step in saved.steps(out):
        if step > 2:
            saved.path_of(out, step).rename(tmp_path / f"gone-{step}")
    lines = train(out)
    board = EventAccumulator(str(out / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    events = board.Scalars("reward")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx([line["reward"] for line in lines])
    assert "seconds/grow" in board.Tags()["scalars"]


def test_held_out_problems_that_are_trained_on_are_told(tmp_path: Path):
    with pytest.warns(UserWarning, match="4 of the held-out problems are among the tasks"):
        train(tmp_path / "run", "steps=1", "evals.split=train", "evals.count=4", "tasks.count=1000")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_gpu_goes_on_after_a_stop(tmp_path: Path):
    train(tmp_path / "run", "steps=2", "device=cuda")
    lines = train(tmp_path / "run", "steps=4")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 and line["mismatch_max"] < 1e-3 for line in lines)


def test_a_field_that_is_new_since_a_run_was_saved_is_no_change() -> None:
    """Two of them do otherwise than was done without them, and say so."""
    stage = run()
    saved = to_json(stage)
    for name in ("kl", "entropy_tempered", "normaliser"):
        del saved["mix"][name]
    del saved["mix"]["terms"][0]["estimator"]["advantage"]["lone"]
    later = since_then(saved, stage)
    assert len(later) == 2
    assert _compare([saved], [to_json(stage)], (stage,)) == later
    other = replace(stage, mix=replace(stage.mix, entropy_tempered=True))
    assert _compare([saved], [to_json(other)], (other,)) == ["mix.entropy_tempered was None, is now True", *later]
