"""AttnRL's and TreeRL's official functions against ramulus's own: one test a case, from a folder given by --golden."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.grow.points import by_score, threshold
from ramulus.grow.prompts import PromptBatch
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.batch.score_row import score_rows
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.policy.influence import Influence, folded, influences
from ramulus.learn.policy.steps import Separators, Steps, segment

DEFAULT = Path(__file__).parent / "golden"
KINDS = ("tree_advantage", "fci", "adaptive_batch", "segmentation")


def load(folder: Path, kind: str) -> list[dict]:
    """The cases of one kind; none where the folder does not have the file."""
    file = folder / "attnrl.json"
    return json.loads(file.read_text())[kind] if file.exists() else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind in KINDS:
        if f"{kind}_case" in metafunc.fixturenames:
            cases = load(Path(metafunc.config.getoption("--golden")), kind)
            metafunc.parametrize(f"{kind}_case", cases, ids=[case["name"] for case in cases])


def near(got: float, want: float) -> bool:
    return abs(got - want) <= 1e-6 * max(1, abs(want))


def tree_of(case: dict) -> tuple[Tree, dict[int, int]]:
    """The case's tree, and the id of each of its nodes in ours."""
    tree = Tree.plant(Task("t", (1,), ""))
    nodes = {None: tree.root}
    for given in case["nodes"]:
        nodes[given["id"]] = tree.add(nodes[given["parent"]], [2] * given["n_tokens"], Author.POLICY)
    for given in case["nodes"]:
        nodes[given["id"]].reward = given["reward"]
    return tree, {name: node.id for name, node in nodes.items() if name is not None}


def tree_mistakes(case: dict) -> list[tuple]:
    tree, ids = tree_of(case)
    want = case["expected"]
    paper, released = (GlobalLocal(form)([tree])[0] for form in ("paper", "released"))
    everyone = GlobalLocal("released", unbranched=True)([tree])[0]
    wrong = [] if near(tree.value(tree.root) or 0.0, want["root_value"]) else [("root", tree.value(tree.root))]
    if sorted(k for k, v in ids.items() if v in paper.leaf) != sorted(want["trained_leaves"]):
        wrong.append(("trained", paper.leaf))
    assert released.leaf == paper.leaf
    for node in want["nodes"]:
        got = (credit_of(paper, ids[node["id"]]), credit_of(everyone, ids[node["id"]]))
        expected = (node["advantage"], node["treerl_release_value"])
        wrong += [(node["id"], a, b) for a, b in zip(got, expected, strict=True) if not near(a, b)]
    return wrong


def credit_of(credits: Credits, node: int) -> float:
    assert credits.node is not None
    return credits.node[node]


def test_tree_advantage(tree_advantage_case: dict) -> None:
    assert tree_mistakes(tree_advantage_case) == []


def ranges(steps: Steps, base: int) -> list[tuple[int, int]]:
    """Half-open ranges of the steps in a path whose prompt has `base` tokens."""
    return [(base + start, base + stop) for start, stop in pairwise([*steps.starts, steps.length])]


def segmentation_mistakes(case: dict) -> list[tuple]:
    double, single = (frozenset(case[f"{name}_newline_ids"]) for name in ("double", "single"))
    steps = segment(case["response_ids"], Separators(double, double | single, case["think_end_id"]))
    got = ([list(r) for r in ranges(steps, case["prompt_len"])], steps.think_end)
    want = (case["expected"]["step_ranges"], case["expected"]["think_end_step"])
    return [(a, b) for a, b in zip(got, want, strict=True) if a != b]


def test_segmentation(segmentation_case: dict) -> None:
    assert segmentation_mistakes(segmentation_case) == []


SEPARATOR, THINK_END = 3, 4


def path_of(case: dict) -> Tree:
    """A tree of one response whose tokens are cut into the case's steps."""
    tokens = [2] * case["step_ranges"][-1][1]
    for _, stop in case["step_ranges"][:-1]:
        tokens[stop - 1] = SEPARATOR
    if case["think_end_step"] is not None:
        tokens[case["step_ranges"][case["think_end_step"]][1] - 1] = THINK_END
    tree = Tree.plant(Task("t", tuple(tokens[: case["prompt_len"]]), ""))
    tree.add(tree.root, tokens[case["prompt_len"] :], Author.POLICY)
    return tree


def influence_of(case: dict, heads: list[list]) -> list[float]:
    """The FCI of each step by ramulus's own folding, of some heads of each layer."""
    tree = path_of(case)
    (row,) = score_rows([tree])
    influence = Influence(Separators(frozenset({SEPARATOR, THINK_END}), think_end=THINK_END), case["delta"])
    watch = influence.watch(row)
    for layer in heads:
        rows = torch.tensor(layer, dtype=torch.float64)
        sums = watch.new_sums(len(rows), rows)
        for part in watch.runs:
            for block in part.blocks:
                some = rows[:, block.first : block.last, : block.keys]
                for group in block.groups:
                    weight = group.weight.to(rows).expand(len(rows), -1, -1)
                    watch.add_group(group, folded(some, weight, group, group.mask(rows)), sums)
        watch.end_layer(sums)
    ((path, found),) = watch.scores()
    assert ranges(path.steps, case["prompt_len"]) == [tuple(r) for r in case["step_ranges"]]
    assert path.steps.think_end == case["think_end_step"]
    (told,) = influences([row], [watch])
    assert [told[path.line[path.prompt + at]] for at in path.steps.starts] == found.tolist()
    return found.tolist()


def fci_mistakes(case: dict) -> list[tuple]:
    prompt, want = case["prompt_len"], case["expected"]
    heads = [influence_of(case, [[head]]) for layer in case["attention"] for head in layer]
    found = influence_of(case, case["attention"])
    flat = [head for layer in want["fci_per_layer_head"] for head in layer]
    pairs = [
        pair for a, b in zip([*heads, found], [*flat, want["fci"]], strict=True) for pair in zip(a, b, strict=True)
    ]
    pairs += [(threshold(found, case["quantile"]), want["threshold"]), (sum(found) / len(found), want["mean_fci"])]
    wrong: list[tuple] = [(a, b) for a, b in pairs if not near(a, b)]
    starts, end = [a for a, _ in case["step_ranges"]], case["step_ranges"][-1][1]
    points = by_score(found, starts, end, case["n_points"], case["quantile"], case["min_token_distance"])
    if points != want["branch_steps"] or [starts[k] - prompt for k in points] != want["branch_token_offsets"]:
        wrong.append((points, want["branch_steps"]))
    return wrong


def test_fci(fci_case: dict) -> None:
    assert fci_mistakes(fci_case) == []


def adaptive_batch_mistakes(case: dict) -> list[tuple]:
    first = case["initial_prompts"]
    target = first * case["n_roots"] * case["sequences_per_root"]
    rule = PromptBatch(first, target, case["valid_ema_alpha"], case["beta"])
    state: dict = {}
    sizes, smoothed = [rule.size(state)], []
    for sequences in case["observed_valid_sequences"]:
        state = rule.update(sequences, json.loads(json.dumps(state)))
        sizes.append(rule.size(state))
        smoothed.append(state["valid"])
    want = case["expected"]
    wrong: list[tuple] = [(a, b) for a, b in zip(smoothed, want["smoothed_valid"], strict=True) if not near(a, b)]
    return wrong + [(a, b) for a, b in zip(sizes, want["prompt_batch_sizes"], strict=True) if a != b]


def test_adaptive_batch(adaptive_batch_case: dict) -> None:
    assert adaptive_batch_mistakes(adaptive_batch_case) == []


def nudged(value):
    """Every number of a nested value moved a little, integers by one."""
    if isinstance(value, dict):
        return {name: nudged(part) for name, part in value.items()}
    if isinstance(value, list):
        return [nudged(part) for part in value]
    return value if value is None else value + (1 if isinstance(value, int) else 1e-4)


@pytest.mark.parametrize(
    ("kind", "mistakes"),
    [
        ("tree_advantage", tree_mistakes),
        ("fci", fci_mistakes),
        ("adaptive_batch", adaptive_batch_mistakes),
        ("segmentation", segmentation_mistakes),
    ],
)
def test_a_nudged_expectation_is_noticed(kind: str, mistakes) -> None:
    cases = load(DEFAULT, kind)
    assert len(cases) == {"tree_advantage": 11, "fci": 7, "adaptive_batch": 6, "segmentation": 4}[kind]
    case = copy.deepcopy(cases[0])
    if kind == "tree_advantage":
        case["expected"]["nodes"] = [
            node | {"advantage": node["advantage"] + 1e-4} for node in case["expected"]["nodes"]
        ]
    else:
        case["expected"] = nudged(case["expected"])
    assert mistakes(case)
