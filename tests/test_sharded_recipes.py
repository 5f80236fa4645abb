"""What every shipped recipe learns from, learned again over 2 and 3 ranks: the update of one process, to 1e-10 in float64 and 1e-6 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conformance.learners import Tiny, ranks, run
from conformance.test_learner import rows, scored, story
from forests import forest
from methods import METHODS
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.scoring import score
from ramulus.learn.policy.torch_learner import policy_of
from ramulus.learn.sharded.factory import Sharded
from ramulus.run.launch import launch
from test_recipes_run import ONE_STAGE, RECIPE
from tiny import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_as_it_was")]
LIKE_SGD = {"eps": 1.0, "clip": 1.0}  # with rate 1 the step is the gradient, so that weights differ by what gradients do
Steps = list[tuple[Mix, list[TreeBatch]]]


@pytest.fixture(scope="module", params=[2, 3])
def size(request: pytest.FixtureRequest) -> Iterator[int]:
    ranks(request.param)
    yield request.param
    ranks(0)


def recorded(variant: str, out: Path) -> tuple[Steps, int]:
    """What two steps of a recipe have their learner accumulate, and the size of their vocabulary."""
    steps: Steps = []
    real = InProcess.accumulate

    async def accumulate(self: InProcess, mix: Mix, batches: Any) -> Any:
        steps.append((mix, list(batches)))
        return await real(self, mix, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcess, "accumulate", accumulate)
        assert launch(f"{RECIPE}:{variant}", [f"out={out}", "steps=2"], True, False, Console(quiet=True)) == 0
    return steps, 1 + max(int(batch.token.max()) for _, batches in steps for batch in batches)


async def learned(one: Any, steps: Steps) -> tuple[Any, Any, Any]:
    """Columns, updates and weights."""
    columns, updates = [], []
    for mix, batches in steps:
        columns += await one.accumulate(mix, batches)
        updates.append(await one.update(1.0))
    return columns, updates, await one.weights()


def off(one: Any, other: Any) -> float:
    """The largest difference, of numbers above 1 relative to them."""
    if isinstance(one, torch.Tensor):
        return float(((one - other).abs() / other.abs().clamp(min=1)).max()) if one.numel() else 0.0
    if isinstance(one, float):
        return abs(one - other) / max(1.0, abs(other))
    pairs = [(one[name], other[name]) for name in one] if isinstance(one, dict) else zip(one, other, strict=True)
    return max((off(a, b) for a, b in pairs if a is not None), default=0.0)


def compared(steps: Steps, double: bool, value: bool, model: dict[str, Any], options: dict[str, Any], how: Sharded) -> float:
    """How far the ranks are from one process: in float64 columns, updates and weights of all steps; in float32, where layers are computed by other
    formulas in one process, what the first step makes of the weights."""
    answers = []
    for sharded in (False, True):
        net: Any = build(double=double, **model)
        net.tiny, more = Tiny(), {**LIKE_SGD, **options}  # unpickled in other ranks, it has the methods imported in their order
        torch.manual_seed(3)  # of adapters
        one = how(net, None, None, value, more, 0) if sharded else InProcess(policy_of(net, None, value, more))
        answers.append(run(learned(one, steps if double else steps[:1])))
        one.close()
    assert answers[0][1][0]["grad_norm"] > 0
    return off(*((answers[1], answers[0]) if double else (answers[1][2], answers[0][2])))


@pytest.mark.parametrize("variant", ONE_STAGE)
def test_a_recipe_learns_over_ranks_what_it_learns_in_one_process(variant: str, size: int, tmp_path: Path) -> None:
    steps, vocabulary = recorded(variant, tmp_path)
    model = {"vocab_size": vocabulary, "max_position_embeddings": 1024}
    for double, most in ((True, 1e-10), (False, 1e-6)):
        assert compared(steps, double, bool(steps[0][0].value), model, {}, Sharded()) < most


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_of_the_equivalence_tests_does(name: str) -> None:
    ranks(2)
    mix = METHODS[name].mix
    steps = []
    for seed in (5, 6):
        trees = forest(seed, trees=3, tempered=True)
        steps.append((mix, rows(mix, trees)))
    assert compared(steps, True, bool(mix.value), {}, {}, Sharded()) < 1e-10


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], Sharded]] = {
    "tied": ({"tie_word_embeddings": True}, {}, Sharded()),
    "lora": ({}, {"lora": Lora(2, 4)}, Sharded()),
    "tied lora, checkpointed": ({"tie_word_embeddings": True}, {"lora": Lora(2, 4), "activation_checkpointing": True}, Sharded()),
    "checkpointed": ({"num_hidden_layers": 3}, {"activation_checkpointing": True}, Sharded()),
    "hybrid": ({}, {}, Sharded(sharing=1)),
    "offloaded": ({}, {"weight_decay": 0.1}, Sharded(offload=True)),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_learn_the_same(kind: str, size: int) -> None:
    model, options, how = VARIANTS[kind]
    steps = [(METHODS["grpo"].mix, rows(METHODS["grpo"].mix, forest(seed, trees=5, tempered=True))) for seed in (1, 2)]
    assert compared(steps, True, False, model, options, how) < 1e-10
    assert compared(steps, False, False, model, options, how) < 1e-6


def test_four_ranks_hold_two_copies() -> None:
    ranks(4)
    try:
        mix = METHODS["ppo"].mix
        steps = [(mix, rows(mix, forest(seed, trees=5, tempered=True))) for seed in (1, 2)]
        assert compared(steps, True, True, {}, {}, Sharded(sharing=2)) < 1e-10
    finally:
        ranks(0)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_scores_of_the_model_and_of_the_reference_model(kind: str, size: int) -> None:
    options = {"reference_model": True, **({"lora": Lora(2, 4)} if kind == "lora" else {})}
    mix, found = METHODS["grpo_leash_bonus"].mix, []

    async def told(one: Any) -> Any:
        await one.accumulate(mix, rows(mix, forest(1, tempered=True)))
        await one.update(0.1)
        trees = forest(2, trees=4, tempered=True)
        await score(one, trees, {"recomputed", "recomputed_tempered", "reference_model"})
        await one.accumulate(mix, rows(mix, trees))
        return scored(trees), await one.update(0.1)

    for sharded in (False, True):
        net = build(double=True)
        torch.manual_seed(3)
        one = Sharded()(net, None, None, False, options, 0) if sharded else InProcess(policy_of(net, None, False, options))
        found.append(run(told(one)))
        one.close()
    flat = [[torch.tensor(column, dtype=torch.float64) for node in signals for column in node.values()] for signals, _ in found]
    assert off(flat[1], flat[0]) < 1e-10
    assert off(found[1][1], found[0][1]) < 1e-10


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_shards_are_read_by_any_number_of_ranks(kind: str, tmp_path: Path) -> None:
    mix, options = METHODS["ppo"].mix, {"reference_model": True} | ({"lora": Lora(2, 4)} if kind == "lora" else {})

    async def begun(one: Any) -> Any:
        await story(one, mix, 1)
        return await one.save(tmp_path / "saved")

    async def gone_on(one: Any) -> Any:
        if state is not None:
            await one.restore(tmp_path / "saved", state)
        else:
            await story(one, mix, 1)
        columns, updates = (await story(one, mix, 7))[1:]
        return columns, updates, await one.weights()

    def made() -> Any:
        net: Any = build(double=True)
        net.tiny = Tiny()
        torch.manual_seed(3)
        return Sharded()(net, None, None, True, options, 0)

    try:
        ranks(2)
        (tmp_path / "saved").mkdir()
        one, state = made(), None
        state = run(begun(one))
        one.close()
        ends = []
        for size in (2, 1, 3):
            ranks(size)
            one = made()
            ends.append(run(gone_on(one)))
            one.close()
        ranks(2)
        one = made()
        if kind == "lora":
            with pytest.raises(ValueError, match="the model below the adapters is another than the run began with"):
                run(one.restore(tmp_path / "saved", state | {"below": "another"}))
        one.close()
        one, state = made(), None
        whole = run(gone_on(one))
        one.close()
    finally:
        ranks(0)
    assert off(ends[0], whole) == 0, "the same number of ranks: bit for bit"
    assert off(ends[1], whole) < 1e-10
    assert off(ends[2], whole) < 1e-10
