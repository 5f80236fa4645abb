"""The official functions' inputs and outputs against ramulus's own: one test a case, from a folder given by --golden."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.advantage.subgroup import SegmentValue, SegmentZScore, SubgroupMean, learned

DEFAULT = Path(__file__).parent / "golden"


def load(folder: Path, name: str) -> list[dict]:
    """The cases of one file; none where the folder does not have it."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text())["cases"] if file.exists() else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "treepo_case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden"))
        if not any(folder.glob("*.json")):
            raise pytest.UsageError(f"--golden {folder} holds no *.json: give a folder of golden vectors")
        cases = load(folder, "treepo")
        metafunc.parametrize("treepo_case", cases, ids=[case["id"] for case in cases])


def forest_of(case: dict) -> tuple[list[Tree], list[tuple[Tree, Node]]]:
    """Trees with the case's segments and rewards, and where each trajectory ends."""
    trees: dict[int, Tree] = {}
    nodes: dict[tuple, Node] = {}
    ends = []
    for trajectory in case["trajectories"]:
        prompt = trajectory["prompt"]
        tree = trees.setdefault(prompt, Tree.plant(Task(id=str(prompt), prompt=(1,), text="")))
        node, path = tree.root, (prompt,)
        for label, count in zip(trajectory["nodes"], trajectory["seg_tokens"], strict=True):
            path = (*path, label)
            if path not in nodes:
                nodes[path] = tree.add(node, [2] * count, Author.POLICY)
            node = nodes[path]
        ends.append((tree, path, node, trajectory["reward"]))
    answer = []
    for tree, _path, node, reward in ends:  # an end inside another path is a leaf of its own, without tokens or level
        inside = node.children or node.reward is not None  # the second of two equal paths ends inside the first
        leaf = tree.add(node, [], Author.POLICY, levels=0) if inside else node
        leaf.reward = reward
        answer.append((tree, leaf))
    return list(trees.values()), answer


def runs(pairs: list[list[float]]) -> list[float]:
    return [value for count, value in pairs for _ in range(int(count))]


def credits_of(case: dict, **changes) -> list[list[float]]:
    """Ramulus's answer for each trajectory: a value per learned token."""
    options = case["options"]
    rules = {
        "tree_rfpp": lambda: SubgroupMean(
            options["weighting"],
            reject=options["reject_degenerate_subgroups"],
            depth=options["subgroup_depth"],
            lone="reward",
            **changes,
        ),
        "tree_segment": lambda: SegmentValue(options["segment_size"], options["eta"]),
        "spo_segment": lambda: SegmentZScore(options["segment_size"]),
    }
    trees, ends = forest_of(case)
    answers = dict(zip(map(id, trees), rules[case["estimator"]](**{})(trees), strict=True))
    values = []
    for tree, leaf in ends:
        credit = answers[id(tree)]
        values.append(credit.token[leaf.id] if credit.token is not None else [credit.leaf[leaf.id]] * learned(leaf))
    return values


def disagreements(case: dict) -> list[tuple]:
    """Where ramulus's answer and the expected one differ by more than the file's tolerance."""
    expected = case["expected"]
    wrong = []
    got = credits_of(case)
    for index, trajectory in enumerate(case["trajectories"]):
        want = (
            runs(expected["tokens_rle"][index])
            if "tokens_rle" in expected
            else [expected["adv"][index]] * sum(trajectory["seg_tokens"])
        )
        if len(got[index]) != len(want):
            wrong.append((index, "length", len(got[index]), len(want)))
        wrong += [
            (index, t, a, b) for t, (a, b) in enumerate(zip(got[index], want, strict=False)) if not abs(a - b) <= 1e-6
        ]
    if "pre_whiten_adv" in expected:
        raw = credits_of(case, whiten=False)
        wrong += [
            (i, "raw", r[0], e)
            for i, (r, e) in enumerate(zip(raw, expected["pre_whiten_adv"], strict=True))
            if r and not abs(r[0] - e) <= 1e-6
        ]
    return wrong


def test_treepo(treepo_case: dict) -> None:
    assert disagreements(treepo_case) == []


@pytest.mark.parametrize("estimator", ["tree_rfpp", "tree_segment", "spo_segment"])
def test_a_nudged_expectation_is_noticed(estimator: str) -> None:
    case = copy.deepcopy(next(c for c in load(DEFAULT, "treepo") if c["estimator"] == estimator))
    for key in ("adv", "pre_whiten_adv"):
        for index in range(len(case["expected"].get(key, []))):
            case["expected"][key][index] += 1e-4
    for pairs in case["expected"].get("tokens_rle", []):
        for pair in pairs:
            pair[1] += 1e-4
    assert disagreements(case)


def test_expected_values_are_finite() -> None:
    cases = load(DEFAULT, "treepo")
    assert len(cases) == 16
    assert all(math.isfinite(value) for case in cases for value in case["expected"].get("adv", []))
