"""FCI: read block by block on packed trees, against attention maps of separate sequences written down naively."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from forests import VOCABULARY, forest
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.learn.policy import influence as module
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.steps import Separators, marked_steps
from ramulus.learn.policy.torch_policy import TorchPolicy
from tiny import FAMILIES, build

SEPARATORS = Separators(frozenset({3}), frozenset({3, 4, 5}), think_end=6)


@pytest.fixture(autouse=True, params=["kernels", pytest.param("torch", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels that attend and fold at once, and by torch's operations beside attention."""
    monkeypatch.setenv("RAMULUS_NATIVE", str(int(request.param == "kernels")))


def star(seed: int, paths: int = 4, length: int = 40) -> Tree:
    """Independent paths of random tokens; one without a double separator, one without any."""
    rng = random.Random(seed)
    tree = Tree.plant(Task(f"s{seed}", tuple(rng.randrange(VOCABULARY) for _ in range(5)), ""))
    for i in range(paths):
        allowed = [t for t in range(VOCABULARY) if t != 6 and (i != 1 or t != 3) and (i != 2 or t not in (3, 4, 5))]
        tokens = [rng.choice(allowed) for _ in range(length + i)]
        if i == 3:
            tokens[length // 2] = 6
        tree.add(tree.root, tokens, Author.POLICY, finish="eos")
    return tree


def deep(seed: int) -> Tree:
    """A star grown on from random places, several times over."""
    rng, tree = random.Random(f"deep{seed}"), star(seed)
    for _ in range(12):
        node = rng.choice([node for node in tree.walk() if node.author is Author.POLICY and len(node.tokens) > 2])
        leaf = tree.graft(node, rng.randint(1, len(node.tokens) - 1))
        leaf.tokens = column([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))], "i")
        leaf.finish = "eos"
    return tree


MAPS: list[torch.Tensor] = []


def dense(layer: nn.Module, query, key, value, attention_mask=None, scaling=None, **options):
    """Eager attention on one sequence, as transformers has it but for its softmax, which is always in float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    MAPS.append(scores.masked_fill(later, -torch.inf).softmax(-1))
    return (MAPS[-1] @ value).transpose(1, 2), None


AttentionInterface.register("dense_in_double", dense)


def naive_steps(response: list[int]) -> tuple[list[list[int]], int | None]:
    """Steps as lists of offsets, by the words of the specification."""
    marks = SEPARATORS.double if SEPARATORS.double & set(response) else SEPARATORS.single
    if not marks & set(response):
        marks = frozenset(response)
    steps: list[list[int]] = [[]]
    for at, token in enumerate(response):
        steps[-1].append(at)
        if token in marks:
            steps.append([])
    steps = [step for step in steps if step]
    ends = [at for at, token in enumerate(response) if token == SEPARATORS.think_end]
    return steps, next((k for k, step in enumerate(steps) if step[-1] >= ends[-1]), None) if ends else None


def naive(model: nn.Module, leaf: Node, delta: int) -> tuple[list[float], list[list[int]]]:
    """The published recipe on dense attention maps of one sequence."""
    tokens, response = leaf.prefix(), leaf.response()
    prompt = len(tokens) - len(response)
    MAPS.clear()
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    maps = MAPS
    steps, think_end = naive_steps(response)
    ranges = [list(range(prompt)), *([prompt + at for at in step] for step in steps)]
    best = [0.0] * len(ranges)
    for layer in maps:
        for head in layer[0]:
            for k in range(len(ranges)):
                total = 0.0
                for j in range(k + delta, len(ranges)):
                    total += float(head[ranges[j]][:, ranges[k]].sum()) / len(ranges[j]) / len(ranges[k])
                best[k] = max(best[k], total)
    best[0] = 0.0
    if len(best) > 1:
        best[1] = 0.0
    if think_end is not None:
        best[think_end + 1 :] = [0.0] * len(best[think_end + 1 :])
    return best[1:], steps


def expected(model: nn.Module, tree: Tree, delta: int) -> dict[int, list[list[float]]]:
    """Node id -> for each of its tokens the FCI of its step on every path that holds it."""
    found: dict[int, list[list[float]]] = {}
    for leaf in tree.leaves():
        if leaf.author is not Author.POLICY:
            continue
        values, steps = naive(model, leaf, delta)
        flat = [value for value, step in zip(values, steps, strict=True) for _ in step]
        at = 0
        for node in leaf.line():
            if node.author is Author.PROMPT:
                continue
            each = found.setdefault(node.id, [[] for _ in node.tokens])
            for k in range(len(node.tokens)):
                each[k].append(flat[at + k])
            at += len(node.tokens)
    return found


def check(model: nn.Module, trees: list[Tree], delta: int, tolerance: float, least: float = 0.05) -> float:
    """The largest difference to the naive answer, relative to the largest score."""
    worst, largest = 0.0, 0.0
    usual = model.config._attn_implementation
    model.set_attn_implementation("dense_in_double")
    wanted = [expected(model, tree, delta) for tree in trees]
    model.set_attn_implementation(usual)
    for tree, want in zip(trees, wanted, strict=True):
        for node in tree.walk():
            if node.id not in want:
                assert "influence" not in node.signals
                continue
            got = node.signals["influence"]
            assert len(got) == len(node.tokens)
            for value, values in zip(got, want[node.id], strict=True):
                mean = sum(values) / len(values)
                assert abs(value - mean) < tolerance  # not so where it is no number
                worst, largest = max(worst, abs(value - mean)), max(largest, abs(mean))
    assert largest > least
    assert worst < tolerance
    return worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [star, deep])
def test_packed_and_blockwise_is_the_dense_recipe(family: str, shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)  # blocks that end inside steps
    monkeypatch.setattr(module, "SCORES", 200)  # and one key head at a time
    model = build(family, double=True)
    policy = TorchPolicy(model)
    trees = [shape(0), shape(1)]
    score_now(policy, trees, (), Influence(SEPARATORS, delta=4))
    check(model, trees, 4, 1e-12)


@pytest.mark.parametrize("delta", [1, 2])
def test_any_tree_any_distance(delta: int) -> None:
    """Cuts, empty nodes, strict prefixes, tool turns and demonstrations; and a forest on several rows."""
    model = build("qwen2", double=True)
    trees = forest(5)
    policy = TorchPolicy(model)
    score_now(policy, trees, (), Influence(SEPARATORS, delta), tokens=8)
    check(model, trees, delta, 1e-12)


@pytest.mark.parametrize("tokens", [60, 80, 100])
@pytest.mark.parametrize("lengths", [(30, 40, 20, 20), (20, 10, 60, 20, 30, 10), (10, 10, 10, 50, 10, 10)])
def test_parts_of_one_tree_may_share_a_row(lengths: tuple[int, ...], tokens: int) -> None:
    """Rows are filled with the first part that fits, and a node that stands on one twice has other paths each time."""
    rng, allowed = random.Random(tokens), [token for token in range(VOCABULARY) if token != 6]
    tree = Tree.plant(Task("parts", (7, 8), ""))
    shared = tree.add(tree.root, rng.choices(allowed, k=12), Author.POLICY)
    for length in lengths:
        tree.add(shared, rng.choices(allowed, k=length), Author.POLICY, finish="eos")
    model = build("qwen2", double=True)
    score_now(TorchPolicy(model), [tree], (), Influence(SEPARATORS, 2), tokens=tokens)
    check(model, [tree], 2, 1e-12, least=0.01)


def test_it_rides_on_the_pass_that_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3", double=True)
    policy = TorchPolicy(model)
    passes = 0
    body = type(model.base_model).forward

    def counted(self, *args, **options):
        nonlocal passes
        passes += 1
        return body(self, *args, **options)

    monkeypatch.setattr(type(model.base_model), "forward", counted)
    tree, alone = deep(2), deep(2)
    score_now(policy, [alone], ("recomputed",))
    assert passes == 1
    score_now(policy, [tree], ("recomputed",), Influence(SEPARATORS))
    assert passes == 2
    check(model, [tree], 4, 1e-12)
    for one, other in zip(tree.walk(), alone.walk(), strict=True):
        assert one.signals.get("recomputed") == other.signals.get("recomputed")
    assert "influence" not in alone.leaves()[0].signals


def test_what_rode_along_is_kept_and_only_later_paths_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TorchPolicy(build("qwen3", double=True))
    passed: list[int] = []
    inner = TorchPolicy._score_row
    monkeypatch.setattr(TorchPolicy, "_score_row", lambda *a, **k: (passed.append(len(a[2])), inner(*a, **k))[1])
    tree, other = star(5), star(6)
    score_now(policy, [tree, other], ("recomputed",), Influence(SEPARATORS))
    leaf = tree.graft(tree.leaves()[0], 9)
    leaf.tokens, leaf.finish = column([1, 2, 3, 4], "i"), "eos"
    before = {id(node): node.signals.get("recomputed") for node in tree.walk()}
    score_now(policy, [tree, other], ("recomputed",), known=("recomputed",))
    assert passed == [2 * (5 + 4 * 41.5), 5 + 40 - 9 + 4]
    assert all(node.signals["recomputed"] == before[id(node)] for node in tree.walk() if before[id(node)])
    kept = [x for node in (*tree.walk(), *other.walk()) for x in node.signals.get("recomputed", [])]
    score_now(policy, [tree, other], ("recomputed",))
    again = [x for node in (*tree.walk(), *other.walk()) for x in node.signals.get("recomputed", [])]
    assert kept == pytest.approx(again, abs=1e-12)
    assert len(kept) == 2 * 4 * 41.5 + 4


def test_steps_are_recorded_and_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    policy = TorchPolicy(model)
    tree = star(3)
    before = model.config._attn_implementation
    score_now(policy, [tree], (), Influence(SEPARATORS))
    assert model.config._attn_implementation == before
    for node, name, values in marked_steps(tree, SEPARATORS):
        node.signals[name] = column(values, "d")
    for leaf in tree.leaves():
        steps, _ = naive_steps(leaf.response())
        assert [at for at, start in enumerate(leaf.signals["steps"]) if start] == [step[0] for step in steps]
    check(model, [tree], 4, 1e-5)  # float32


@pytest.mark.parametrize("times", [30, 10_000])
def test_products_too_large_for_an_exponential(times: int) -> None:
    model = build("llama", double=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= times
    tree = star(7)
    score_now(TorchPolicy(model), [tree], (), Influence(SEPARATORS))
    check(model, [tree], 4, 1e-9)  # so do the roundings of the products


def test_a_distance_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Influence(SEPARATORS, 0)


def test_autocast_narrows_the_model_and_not_the_attention_weights() -> None:
    plain, narrow = star(4), star(4)
    score_now(TorchPolicy(build("qwen2")), [plain], (), Influence(SEPARATORS))
    score_now(TorchPolicy(build("qwen2"), autocast=True), [narrow], (), Influence(SEPARATORS))
    for one, other in zip(plain.leaves(), narrow.leaves(), strict=True):
        assert one.signals["influence"] == pytest.approx(other.signals["influence"], rel=0.05, abs=0.02)
        assert one.signals["influence"] != other.signals["influence"]
