"""Temperature by entropy: the rule, the engine that evaluates it, and its numbers carried from step to step."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines import ask, line, run, small
from ramulus.core import run_folder, store
from ramulus.core.checksums import seal
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.engine.engine import Sampling, rule_features
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.sampling import SamplingBatch, draw
from ramulus.engine.toy import ToyEngine
from ramulus.grow.branching import Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.stop import Stop
from ramulus.grow.temperature import ByEntropy
from ramulus.run.stage import check_engine
from run_recipe import rl
from test_resume import killed, metrics, same, train

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_hapo.py")
STATS = ByEntropy().statistics([0.001, 0.02, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0])
ENTROPIES = torch.tensor([0.0, 1e-9, 1e-3, 0.1, 0.5, 1.0, 1.4, 2.0, 3.0], dtype=torch.float64)

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def test_the_first_step_is_sampled_at_the_base() -> None:
    assert ByEntropy(0.7).of_entropy(ENTROPIES).tolist() == [0.7] * len(ENTROPIES)


@pytest.mark.parametrize("kind", ["zscore", "signed"])
def test_wavering_tokens_are_hotter(kind: str) -> None:
    heat = ByEntropy(0.8, 0.1, kind=kind, stats=STATS).of_entropy(ENTROPIES)
    assert bool((heat.diff() >= 0).all())
    assert float(heat[0]) < 0.8 < float(heat[-1])
    most = 5.0 if kind == "zscore" else 1.0
    assert float(heat.min()) >= 0.8 * (1 - 0.1 * most) - 1e-12
    assert float(heat.max()) <= 0.8 * (1 + 0.1 * most) + 1e-12
    at_pivot = ByEntropy(0.8, 0.1, kind=kind, stats=STATS).of_entropy(torch.tensor([math.exp(STATS["pivot"])]))
    assert float(at_pivot) == pytest.approx(0.8)


def test_the_released_sign_heats_the_surest_tokens_too() -> None:
    released, signed = (
        ByEntropy(tau=0.1, kind=kind, stats=STATS).of_entropy(ENTROPIES) for kind in ("released", "signed")
    )
    assert float(released[0]) > 1 > float(signed[0])
    assert torch.allclose(released, 1 + (signed - 1).abs(), rtol=1e-12)


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(-50, 50))
def test_logits_and_their_entropy_give_the_same_answer(row: list[float], shift: float) -> None:
    logits = torch.tensor([row, [x + shift for x in row]], dtype=torch.float64)
    rule = ByEntropy(stats=STATS)
    logp = logits.log_softmax(-1)
    assert torch.allclose(rule(logits), rule.of_entropy(-(logp.exp() * logp).sum(-1)), atol=1e-9)


def test_impossible_tokens_do_not_spoil_it() -> None:
    rule = ByEntropy(stats=STATS)
    logits = torch.tensor([[1.0, 0.0, -1.0, -math.inf]], dtype=torch.float64)
    assert float(rule(logits)) == pytest.approx(float(rule(logits[:, :3])))
    drawn = draw(
        logits,
        SamplingBatch([Sampling(4, temperature=rule)], logits.device, logits.dtype),
        torch.tensor([0.5], dtype=torch.float64),
    )
    assert drawn.temperature == pytest.approx(rule(logits).tolist())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"base": 0.0}, "base above 0"),
        ({"pivot": 1.5}, "pivot"),
        ({"kind": "percent"}, "kind"),
        ({"tau": 0.2}, "stay above 0"),
        ({"tau": 1.0, "kind": "signed"}, "stay above 0"),
        ({"tau": -0.1}, "stay above 0"),
        ({"tau": 0.2 - 1e-9}, "stay above 0"),
        ({"base": 1e-46}, "base above 0"),
        ({"base": 1e39}, "base above 0"),
        ({"base": math.nan}, "base above 0"),
        ({"stats": {}}, "stats are numbers named pivot, rms"),
        ({"stats": [1, 2]}, "stats are numbers named pivot, rms"),
        ({"stats": STATS | {"median": 1.0}}, "stats are numbers named pivot, rms"),
        ({"stats": {"pivot": 0.1}}, "stats are numbers named pivot, rms"),
        ({"stats": {"pivot": 0.1, "rms": 0.5}, "kind": "signed"}, "stats are numbers named pivot, rms"),
        *(({"stats": STATS | {name: value}}, f"got {name}=") for name in STATS for value in (math.nan, math.inf, "1", None)),
        *(({"stats": STATS | {name: -1.0}}, f"got {name}=") for name in STATS if name != "pivot"),
    ],
)
def test_what_cannot_be(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ByEntropy(**wrong)


def test_numbers_count_every_sampled_token_once() -> None:
    """Shared tokens once, prompts and demonstrations not at all."""
    tree = Tree.plant(Task("a", (1, 2), ""))
    trunk = tree.add(tree.root, [3, 4], Author.POLICY)
    trunk.entropy = column([0.5, 1.0], "d")
    for value in (0.1, 2.0, 0.7):
        tree.add(trunk, [5], Author.POLICY).entropy = column([value], "d")
    tree.add(tree.root, [6, 7], Author.EXPERT)
    assert ByEntropy().measure([tree]) == ByEntropy().statistics([0.5, 1.0, 0.1, 2.0, 0.7])
    assert ByEntropy().measure([Tree.plant(Task("b", (1,), ""))]) is None


def test_the_engine_samples_each_token_at_the_temperature_of_its_entropy() -> None:
    """With the logits' own entropy handed over, beside rows of other settings."""
    rule = ByEntropy(tau=0.15, stats=STATS)
    engine = LocalEngine(small(), slots=4)
    requests = [ask(line(5 + i, i), seed=i, temperature=rule if i % 2 else 0.9, max_tokens=12) for i in range(6)]
    segments = run(engine, requests)
    assert len({round(t, 4) for s in segments[1::2] for t in s.temperature}) > 10
    for segment in segments[1::2]:
        want = rule.of_entropy(torch.tensor(segment.entropy.tolist(), dtype=torch.float64)).tolist()
        assert segment.temperature.tolist() == pytest.approx(want, abs=1e-5)
    assert all(s.temperature == 0.9 for s in segments[::2])


def test_the_toy_engine_takes_the_rule_as_well() -> None:
    tree = Tree.plant(Task("a", (1, 2), ""), seed=1)
    rule = ByEntropy(stats=STATS)
    asyncio.run(
        grow_forest(
            [tree], ToyEngine(9, seed=0, as_array=torch.tensor), Star(2), Sampling(6, temperature=rule), Stop((0,), 6)
        )
    )
    for leaf in tree.leaves():
        assert leaf.column("temperature") == pytest.approx(rule.of_entropy(torch.tensor(leaf.entropy)).tolist(), abs=1e-4)


@dataclass(frozen=True)
class Doubled:
    """A rule of before there were features."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full(logits.shape[:1], 2.0)

    def measure(self, forest: list[Tree]) -> None: ...


def test_a_rule_whose_feature_is_not_said_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Doubled has measure but not the feature 'stats': write features = frozenset"):
        check_engine(replace(rl(), temperature=Doubled()), ToyEngine())
    check_engine(replace(rl(), temperature=ByEntropy()), ToyEngine())
    assert rule_features(0.7) == rule_features(lambda logits: logits) == frozenset()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of HAPO that nobody interrupted."""
    out = tmp_path_factory.mktemp("hapo") / "run"
    assert train(out, recipe=RECIPE) == 0
    return out


def test_numbers_are_those_of_the_step_before(whole: Path) -> None:
    """Every token's recorded temperature is what the entropies of the step before make of its own entropy."""
    rule, before, moved = ByEntropy(tau=0.1), None, 0
    for step in range(1, 5):
        forest = list(store.read(whole / "trees" / f"{step:06d}.jsonl"))
        heat = rule.given(before)
        for node in (node for tree in forest for node in tree.walk() if node.entropy):
            want = heat.of_entropy(torch.tensor(node.entropy, dtype=torch.float64)).tolist()
            assert node.column("temperature") == pytest.approx(want, abs=1e-4)
            moved += sum(abs(t - 1) > 0.01 for t in node.column("temperature"))
        before = rule.measure(forest)
    assert moved > 50
    state = json.loads((run_folder.path_of(whole, 4) / "state.json").read_text())
    assert state["cursor"]["temperature"] == before


def test_numbers_survive_a_resume(whole: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "steps=2", recipe=RECIPE) == 0
    assert train(tmp_path / "run", "steps=4", recipe=RECIPE) == 0
    same(whole, tmp_path / "run")


@pytest.mark.slow
def test_numbers_survive_a_kill(whole: Path, tmp_path: Path) -> None:
    killed(tmp_path / "run", "pruning", 1, RECIPE)  # in the third step, as soon as the checkpoint of the second is in its place
    assert run_folder.steps(tmp_path / "run")[-1] == 2
    assert train(tmp_path / "run", recipe=RECIPE) == 0
    same(whole, tmp_path / "run")


def test_a_run_that_forgot_them_would_differ(whole: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "steps=2", recipe=RECIPE) == 0
    path = run_folder.path_of(tmp_path / "run", 2) / "state.json"
    state = json.loads(path.read_text())
    state["cursor"]["temperature"] = None
    path.write_text(json.dumps(state))
    seal(path.parent)
    assert train(tmp_path / "run", "steps=4", recipe=RECIPE) == 0
    assert metrics(whole)[:2] == metrics(tmp_path / "run")[:2]
    assert metrics(whole)[2] != metrics(tmp_path / "run")[2]
