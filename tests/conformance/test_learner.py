"""Every learner says and learns the same: bit for bit what a policy at hand does (over ranks to 1e-10 in float64, since sums have another order
there), with the same errors, and without blocking the loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from conformance.learners import LEARNERS, Tiny, learner, near, run
from forests import forest
from kept import tensors
from methods import METHODS
from ramulus.core.tree import Tree
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.children import UNHEARD
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.learner import Evaluated, Learner, MeasuredLearner
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.scoring import score, score_now
from ramulus.learn.policy.separate import Separate
from ramulus.learn.policy.steps import Separators
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded.factory import Sharded
from ramulus.run.config.python_file import read_file
from ramulus.run.launch import launch

SEPARATORS = Separators(frozenset({3}), frozenset({3, 4}), None)
RECIPE = str(Path(__file__).parents[1] / "run_recipe.py")
NAMES = ["grpo", "grpo_leash_bonus", "treepo", "hapo", "hpt", "ppo"]


@pytest.fixture(params=LEARNERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rows(mix: Mix, trees: list[Tree], budget: int = 60) -> list[TreeBatch]:
    """The rows of an optimizer step."""
    gates, _ = mix.gates(trees, {})
    return pack(trees, mix.credit(trees), mix, budget, torch.float64, gates=gates)


def scored(trees: Sequence[Tree]) -> list[dict[str, list[float]]]:
    """All signals of all nodes."""
    return [{name: list(values) for name, values in node.signals.items()} for tree in trees for node in tree.walk()]


def exact(kind: str) -> bool:
    """Whether a learner of this kind computes the very bits of a policy at hand."""
    return kind != "over two ranks"


async def story(one: Learner, mix: Mix, seed: int) -> tuple[list[Any], list[Evaluated], list[dict[str, float]]]:
    """Two steps: signals of the forests, columns of the rows, what the updates said."""
    signals, columns, updates = [], [], []
    for step in range(2):
        trees = forest(seed + step, trees=3, tempered=True)
        await score(one, trees, mix.columns)
        signals += scored(trees)
        columns += await one.accumulate(mix, rows(mix, trees))
        updates.append(await one.update(0.01))
    return signals, columns, updates


def by_hand(policy: TorchPolicy, mix: Mix, seed: int) -> tuple[list[Any], list[Evaluated], list[dict[str, float]]]:
    """The same by a policy at hand."""
    signals, columns, updates = [], [], []
    for step in range(2):
        trees = forest(seed + step, trees=3, tempered=True)
        score_now(policy, trees, mix.columns)
        signals += scored(trees)
        columns += [policy.accumulate(mix, batch) for batch in rows(mix, trees)]
        updates.append(policy.update(0.01))
    return signals, columns, updates


def each() -> Iterator[Any]:
    """Every learner with every method; those in other processes with all but one or two where there is time."""
    for kind in LEARNERS:
        for name in NAMES:
            slow = (kind == "over two ranks" and name != "grpo_leash_bonus") or (kind == "in another process" and name != "ppo")
            yield pytest.param(kind, name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("kind", "name"), each())
def test_updates_are_those_of_a_policy_at_hand(kind: str, name: str) -> None:
    mix = METHODS[name].mix
    tiny = Tiny(value=bool(mix.value))
    policy = tiny()
    expected = by_hand(policy, mix, 5)
    with learner(kind, tiny) as one:
        signals, columns, updates = run(story(one, mix, 5))
        handle = run(one.weights())
        assert one.version == policy.version == 2
    assert near(signals, expected[0], exact(kind))
    assert len(columns) >= 2
    assert near(columns, expected[1], exact(kind))
    assert (columns[0].value is not None) == bool(mix.value)
    assert near(updates, expected[2], exact(kind))
    assert updates[0]["grad_norm"] > 0
    assert near(handle, policy.weights(), exact(kind))
    assert any(not torch.equal(handle[key], tensor) for key, tensor in tiny().weights().items())


def test_influence_rides_and_comes_back(kind: str) -> None:
    tiny = Tiny()
    ours, theirs = forest(3, trees=3), forest(3, trees=3)
    score_now(tiny(), theirs, ("recomputed",), Influence(SEPARATORS, 1))
    with learner(kind, tiny) as one:
        run(score(one, ours, ("recomputed",), Influence(SEPARATORS, 1)))
    assert near(scored(ours), scored(theirs), exact(kind))
    assert any(any(signals.get("influence", ())) for signals in scored(ours))


def test_a_restored_learner_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    mix, tiny = METHODS["ppo"].mix, Tiny(value=True)

    async def first(one: Learner) -> Any:
        await story(one, mix, 1)
        state = await one.save(tmp_path)
        return state, await story(one, mix, 7)

    async def again(one: Learner, state: dict[str, Any]) -> Any:
        await one.restore(tmp_path, state)
        assert one.version == 2
        return await story(one, mix, 7)

    with learner(kind, tiny) as one:
        state, after = run(first(one))
    with learner(kind, tiny) as one:
        anew = run(again(one, state))
    assert near(after, anew, exact=True)
    rest = {"tensors.safetensors"} if exact(kind) else {"shards", "random.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", *rest}


def test_a_folder_of_weights_is_handed_over(kind: str, tmp_path: Path) -> None:
    mix, tiny = METHODS["grpo"].mix, Tiny()

    async def work(one: Learner) -> list[tuple[Path, dict[str, Tensor]]]:
        handed = []
        for seed in range(4):
            await story(one, mix, seed)
            folder = Path(str(await one.weights(tmp_path)))
            handed.append((folder, load_file(folder / "model.safetensors")))
        held = await one.weights()
        assert all(torch.equal(held[name], tensor) for name, tensor in handed[-1][1].items())
        return handed

    with learner(kind, tiny) as one:
        handed = run(work(one))
    assert [folder.name for folder, _ in handed] == [f"version-{n:06d}" for n in (2, 4, 6, 8)]
    assert [folder.exists() for folder, _ in handed] == [False, False, True, True], "an engine may still read the one before"
    assert any(not torch.equal(handed[0][1][name], tensor) for name, tensor in handed[1][1].items())


def test_what_one_measures_grows_with_tokens_and_changes_nothing(kind: str) -> None:
    tiny = Tiny()
    with learner(kind, tiny) as one:
        assert one.features <= {"in_place", "live", "measured"}
        assert ("measured" in one.features) == (kind == "in process")
        if "measured" in one.features:
            few, more, many = (run(cast(MeasuredLearner, one).kept_bytes(tokens)) for tokens in (8, 16, 24))
            assert 0 < more - few == many - more
            assert near(run(one.weights()), tiny().weights(), exact(kind))


def test_errors_are_those_of_a_policy_at_hand(kind: str) -> None:
    mix, tiny = METHODS["grpo"].mix, Tiny(options={})
    trees = forest(2, tempered=True)
    greedy = [replace(batch, temperature=batch.temperature * 0) for batch in rows(mix, trees)]
    leashed = METHODS["grpo_leash_bonus"].mix
    with learner(kind, tiny) as one:
        with pytest.raises(ValueError, match=r"keeps none: make it with TorchPolicy\(\.\.\., reference_model=True\)"):
            run(score(one, trees, {"reference_model"}))
        with pytest.raises(ValueError, match="needs a value head"):
            run(score(one, trees, {"value"}))
        with pytest.raises(ValueError, match="sampled at temperature 0"):
            run(one.accumulate(mix, greedy))
        with pytest.raises(ValueError, match="holds no 'recomputed' log-probs: score the forest"):
            run(one.accumulate(leashed, rows(mix, trees)))
        with pytest.raises(FileNotFoundError):
            run(one.restore(Path("/nowhere"), {"version": 0, "skipped": 0}))
        assert run(one.update(0.1)) == {"grad_norm": 0.0, "skipped": 1.0}, "it goes on after an error"
        run(one.accumulate(mix, [replace(row, gain=row.gain * float("inf")) for row in rows(mix, trees)]))
        assert run(one.update(0.1))["skipped"] == 1.0
        assert one.version == 0


def test_a_policy_that_cannot_be_built_says_why_here() -> None:
    with pytest.raises(ValueError, match="no_such_layer"):
        Separate(Tiny(options={"lora": Lora(2, 4, ("no_such_layer",))}))


class Noted(list[TreeBatch]):
    """Rows that know which threads have read them."""

    def __init__(self, batches: Sequence[TreeBatch]) -> None:
        super().__init__(batches)
        self.readers: set[int] = set()

    def __iter__(self) -> Iterator[TreeBatch]:
        self.readers.add(threading.get_ident())
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def test_the_loop_goes_on_while_an_update_runs(kind: str) -> None:
    mix, go = METHODS["grpo"].mix, threading.Event()
    batches = Noted(rows(mix, forest(2, trees=4, tempered=True)))

    async def work(one: Any) -> bool:
        held = one.thread.pool.submit(go.wait, 60)  # the learner's thread is busy until the loop has turned
        update = asyncio.ensure_future(one.accumulate(mix, batches))
        for _ in range(20):
            await asyncio.sleep(0.002)
        assert not update.done()
        go.set()
        assert len(await update) == len(batches)
        return bool(held.result())

    with learner(kind, Tiny()) as one:
        assert run(work(one)), "the loop waited for the thread"
    assert batches.readers
    assert threading.get_ident() not in batches.readers, "no row is packed, pickled or computed by the loop"


def test_an_abandoned_update_stops_between_two_rows() -> None:
    mix, tiny = METHODS["grpo"].mix, Tiny()
    batches = rows(mix, forest(2, trees=4, tempered=True)) * 400

    async def work(one: Learner) -> None:
        update = asyncio.ensure_future(one.accumulate(mix, batches))
        await asyncio.sleep(0.05)
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update

    with learner("in process", tiny) as one:
        run(work(one))
        began = time.monotonic()
        one.thread.pool.shutdown(wait=True)
        assert time.monotonic() - began < 2, "the thread does not go through all rows"


def test_a_learner_that_was_killed_is_missed() -> None:
    with learner("in another process", Tiny()) as one:
        os.kill(one.process.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=r"ended with status -9: .*--resume"):
            run(one.update(0.1))


OWN = """
from dataclasses import dataclass
from ramulus import Clip

@dataclass(frozen=True)
class Mine(Clip):
    high: float = 0.3
"""


@pytest.mark.parametrize("kind", ["in another process", "over two ranks"], indirect=True)
def test_what_a_recipe_file_defines_is_learned_from(kind: str, tmp_path: Path) -> None:
    """The learner's processes have never loaded the file."""
    (tmp_path / "own.py").write_text(OWN)
    mask = read_file(str(tmp_path / "own.py"), "").Mine()
    [term] = METHODS["grpo"].mix.terms
    mix = replace(METHODS["grpo"].mix, terms=(replace(term, estimator=replace(term.estimator, mask=mask)),))
    policy = Tiny()()
    expected = by_hand(policy, mix, 5)
    with learner(kind, Tiny()) as one:
        _, columns, updates = run(story(one, mix, 5))
    assert near(columns, expected[1], exact(kind))
    assert near(updates, expected[2], exact(kind))


def test_a_rank_in_another_folder_saves_and_reads_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with learner("over two ranks", Tiny()) as one:
        assert one.world.seconds == Sharded().timeout, "not that of whoever started the ranks"
        monkeypatch.chdir(tmp_path)
        state = run(one.save(Path("here")))
        run(one.restore(Path("here"), state))
        with pytest.raises(FileNotFoundError, match=r"finds no .*: put the run's folder, out, on a disk that the machines of all ranks share"):
            run(one.restore(Path("/proc/self/cwd/here"), state))  # which rank 1 alone does not find
        (tmp_path / "here" / "shards" / "__1_0.distcp").unlink()
        with pytest.raises(FileNotFoundError, match=r"what rank 1 wrote of a checkpoint, .*__1_0\.distcp, is not there"):
            run(one.restore(Path("here"), state))
        assert run(one.update(0.1))["skipped"] == 1.0, "it goes on after an error"


@pytest.mark.parametrize("kind", ["in another process", "over two ranks"], indirect=True)
def test_signals_to_all_processes_are_left_to_the_trainer(kind: str) -> None:
    """Ctrl-C at a terminal, one that is gone, and a scheduler's SIGTERM reach a learner's processes, too; what was learned is to be saved."""
    with learner(kind, Tiny()) as one:
        for number in UNHEARD:
            os.kill((one.process if kind == "in another process" else one.world.processes[0]).pid, number)
        assert run(one.update(0.1))["skipped"] == 1.0


@pytest.mark.slow
def test_a_run_learns_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The engine takes the weights after every step; stopped and resumed, the run ends as the one in this process."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for name, steps, process in (("here", 3, False), ("there", 2, True), ("there", 3, True)):
            options = [f"out={tmp_path / name}", f"steps={steps}", "eval_every=0", "save_every=1", "optimizer.decay=constant"]
            launch(RECIPE, [*options, f"learner.process={str(process).lower()}"], True, False, Console(quiet=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    here, there = (tensors(tmp_path / name, 3) for name in ("here", "there"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here if not name.startswith("random."))
    written = [(tmp_path / name / "trees" / "000003.jsonl").read_bytes() for name in ("here", "there")]
    assert written[0] == written[1]
