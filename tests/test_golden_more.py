"""The peers' own KL terms and KL-Cov against ramulus's, through trees: one test a case, from a folder given by --golden."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.learn.batch.tree_batch import Credits, TreeBatch
from ramulus.learn.objective import gauges
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.kl import KL
from ramulus.learn.objective.kl_cov import kl_cov
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term, TokenMean
from ramulus.learn.objective.reference import Behavior, Recomputed
from ramulus.learn.objective.token_weight import IcePop, ImportanceWeight, Product
from ramulus.learn.packing.pack import pack

GROUPS = ("kl", "kl_in_loss", "kl_cov", "icepop", "tis")
UNBUILT = "ratio, differentiated"  # importance-weighted KL is not offered


CORRECTED = {"icepop": lambda given: IcePop(given["low"], given["high"]), "tis": lambda given: ImportanceWeight(given["high"])}


@cache
def content(folder: str) -> dict:
    """more.json, or nothing where the folder does not have it."""
    file = Path(folder) / "more.json"
    return json.loads(file.read_text()) if file.exists() else {"cases": [], "batches": {}}


def cases(folder: str) -> list[dict]:
    """Those that ramulus has the like of, each with its batch."""
    held = content(folder)
    mine = [c for c in held["cases"] if c["group"] in GROUPS and UNBUILT not in (c["input"].get("weight") or "")]
    mine = [c for c in mine if c["group"] != "tis" or not c["input"]["low"]]  # weights have no floor
    return [case | {"batch": held["batches"][case["input"]["batch"]]} for case in mine]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "more_case" in metafunc.fixturenames:
        found = cases(str(metafunc.config.getoption("--golden")))
        metafunc.parametrize("more_case", found, ids=[case["id"] for case in found])


@dataclass(frozen=True)
class Given:
    """The advantage that a case gives each row: a leaf's `verdict["advantage"]`."""

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [Credits({leaf.id: leaf.verdict["advantage"] for leaf in tree.leaves()}) for tree in forest]


def trees_of(batch: dict, at_first: bool = True) -> tuple[list[Tree], dict[tuple[int, int], tuple[int, int]]]:
    """A tree for each group, with a node for each run of learned or masked tokens; (tree, node) -> row and the column it begins at."""
    trees: list[Tree] = []
    where: dict[tuple[int, int], tuple[int, int]] = {}
    for i, group in enumerate(batch["group"]):
        if not i or group != batch["group"][i - 1]:
            trees.append(Tree.plant(Task(str(group), (1,), "")))
        node, at = trees[-1].root, 0
        for learned, run in groupby(batch["mask"][i]):
            stop = at + len(list(run))
            recorded = {name: batch[name][i][at:stop] for name in ("behavior", "logp", "reference", "recomputed")}
            node = grown(trees[-1], node, learned, recorded, at_first)
            where[len(trees) - 1, node.id] = i, at
            at = stop
        node.finish, node.reward, node.verdict = "eos", batch["reward"][i], {"advantage": batch["advantage"][i]}
    return trees, where


def grown(tree: Tree, above: Node, learned: int, columns: dict[str, list[float]], at_first: bool) -> Node:
    """A node with what was recorded of its tokens; `at_first`, "recomputed" is the policy now, as at the first update of a step."""
    count = len(columns["logp"])
    if not learned:
        return tree.add(above, [2] * count, Author.TOOL)
    node = tree.add(above, [2] * count, Author.POLICY, logprobs=column(columns["behavior"], "d"), kept=[0.0] * count)
    node.signals = {"recomputed": column(columns["logp" if at_first else "recomputed"], "d"), "reference_model": column(columns["reference"], "d")}
    return node


def mix_of(case: dict) -> Mix:
    """The case's loss in ramulus's terms."""
    given, tokens = case["input"], sum(map(sum, case["batch"]["mask"]))
    if case["group"] == "kl_cov":
        coef = given["coef"] * (tokens if "plain sum" in given["aggregate"] else 1)
        return Mix(kl_cov(Given(), given["share"], coef, TokenMean(), chosen_by="recomputed"))
    normaliser = {"token-mean": TokenMean(), "seq-mean": SequenceMean()}[given["aggregate"]]
    if case["group"] in CORRECTED:
        mask = Product((Clip(given["clip"], given["clip"], "recomputed"), CORRECTED[case["group"]](given)))
        return Mix((Term(Estimator(mask, Recomputed(), Given()), normaliser=normaliser),))
    term = Term(Estimator(Clip(given["clip"], given["clip"]), Behavior(), Given()), normaliser=normaliser)
    return Mix((term,), kl_coef=given["coef"], kl=KL(given["estimator"], clamp=None))


def packed(case: dict) -> tuple[float, list[list[float]]]:
    """Loss, and its gradient in the log-prob of each token of each row."""
    trees, where = trees_of(case["batch"], case["group"] not in CORRECTED)
    mix = mix_of(case)
    logp = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in case["batch"]["logp"]]
    (batch,) = pack(trees, mix.credit(trees), mix, 0, torch.float64)
    now = laid(batch, logp, where)
    rest = torch.zeros_like(now)
    mix.loss(now, now, rest, batch).backward()
    return gauges.surrogate(mix, now, now, rest, batch), [row.grad.tolist() for row in logp]


def laid(batch: TreeBatch, rows: list[Tensor], where: dict[tuple[int, int], tuple[int, int]]) -> Tensor:
    """Log-probs of rows as the columns of a batch [T]; 0 on prompts."""
    parts = []
    for tree, node, start, stop in batch.spans:
        if (tree, node) not in where:
            parts.append(torch.zeros(stop - start, dtype=torch.float64))
            continue
        row, at = where[tree, node]
        parts.append(rows[row][at : at + stop - start])
    return torch.cat(parts)


def wrong(case: dict) -> list:
    """What is off by more than the file's tolerance."""
    want, got = case["expected"], {}
    if case["group"] == "kl":
        given, batch = case["input"], case["batch"]
        rule = KL(given["estimator"], given["output_clamp"])
        logp = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in batch["logp"]]
        values = [rule(row, torch.tensor(ref, dtype=torch.float64)) for row, ref in zip(logp, batch["reference"], strict=True)]
        masks = [torch.tensor(row, dtype=torch.float64) for row in batch["mask"]]
        torch.cat([v * m for v, m in zip(values, masks, strict=True)]).sum().backward()
        got["value"] = [(v * m).tolist() for v, m in zip(values, masks, strict=True)]
        got["grad_logp"] = [row.grad.tolist() for row in logp]
    else:
        got["loss"], got["grad_logp"] = packed(case)
    return [(name, a, b) for name in want for a, b in zip(flat(got[name]), flat(want[name]), strict=True) if not abs(a - b) <= 1e-7 * max(1, abs(b))]


def flat(value: float | list) -> list[float]:
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]


def test_more(more_case: dict) -> None:
    assert wrong(more_case) == []


NUDGED = (
    "kl/verl_k3+/extreme", "kl_in_loss/verl_k3+/tool", "kl_cov/verl_0.5/tool", "kl_cov/skyrl_.2/far",
    "icepop/openrlhf_0.9/far", "tis/openrlhf_0.0/far",
)  # fmt: skip


@pytest.mark.parametrize("name", NUDGED)
def test_a_nudged_expectation_is_noticed(name: str) -> None:
    case = copy.deepcopy(next(c for c in cases(str(Path(__file__).parent / "golden")) if c["id"] == name))
    case["expected"]["grad_logp"][0][0] += 1e-4
    assert wrong(case)


def test_the_cases_are_there() -> None:
    found = [case["group"] for case in cases(str(Path(__file__).parent / "golden"))]
    assert [found.count(group) for group in GROUPS] == [23, 11, 17, 6, 2]
