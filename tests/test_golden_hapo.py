"""HAPO's official functions against ramulus's own: one test a case, from a folder given by --golden."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.batch.tree_batch import Credits, TreeBatch
from ramulus.learn.objective import gauges
from ramulus.learn.objective.entropy_signal import AdaptiveClip, EntropySignal, Redistribution, redistribution, widths
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term, TokenMean
from ramulus.learn.objective.reference import Recomputed
from ramulus.learn.objective.token_weight import Product
from ramulus.learn.packing.pack import pack

DEFAULT = Path(__file__).parent / "golden"
LISTS = {
    "group_case": "token_level_group_advantage",
    "signal_case": "entropy_signal",
    "share_case": "advantage_redistribution",
    "loss_case": "clipped_loss",
    "heat_case": "adaptive_temperature",
}
COUNTS = {"group_case": 9, "signal_case": 8, "share_case": 8, "loss_case": 11, "heat_case": 9}


def load(folder: Path, kind: str) -> list[dict]:
    """The cases of one list; none where the folder does not have the file."""
    file = folder / "hapo.json"
    return json.loads(file.read_text())[LISTS[kind]] if file.exists() else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind in set(LISTS) & set(metafunc.fixturenames):
        cases = load(Path(metafunc.config.getoption("--golden")), kind)
        metafunc.parametrize(kind, cases, ids=[case["name"] for case in cases])


def close(got: object, want: object) -> bool:
    """Whether two numbers or (ragged) lists of them agree to the file's tolerance."""
    if isinstance(want, list):
        return len(got) == len(want) and all(close(a, b) for a, b in zip(got, want, strict=True))  # type: ignore[arg-type,call-overload]
    return abs(float(got) - float(want)) <= 1e-6 * max(1.0, abs(float(want)))  # type: ignore[arg-type]


def differing(got: dict, expected: dict) -> list[str]:
    """The names under which two answers differ; every name of `got` must be expected."""
    return [name for name in got if not close(got[name], expected[name])]


def signal_of(inputs: dict, signed: bool) -> EntropySignal:
    return EntropySignal(inputs["pivot"], signed, eps=inputs.get("eps", 1e-8))


def numbers(rows: list[list[float]], signal: EntropySignal) -> dict[str, float]:
    """What a step measures on these entropies."""
    flat = np.array([x for row in rows for x in row])
    return signal.statistics(flat, np.ones(len(flat), dtype=np.int64))


def group_answer(inputs: dict) -> dict:
    trees = {g: Tree.plant(Task(str(g), (1,), "")) for g in inputs["group_ids"]}
    leaves = [
        trees[g].add(trees[g].root, [2] * n, Author.POLICY, finish="eos", reward=r)
        for g, n, r in zip(inputs["group_ids"], inputs["lengths"], inputs["rewards"], strict=True)
    ]
    rule = TokenGroupMean(inputs["normalize_by_std"], inputs["eps"], fallback=5.0, width=inputs["padded_width"], lone="reward")
    answers = dict(zip(trees, rule(list(trees.values())), strict=True))
    values = [answers[g].leaf[leaf.id] for g, leaf in zip(inputs["group_ids"], leaves, strict=True)]
    return {"advantage_per_response": values}


def signal_answer(inputs: dict) -> dict:
    signed, released = (signal_of(inputs, mode) for mode in (True, False))
    stats = numbers(inputs["entropy"], signed)
    rows = [torch.tensor(row, dtype=torch.float64) for row in inputs["entropy"]]
    return {
        "pivot_log_entropy": stats[signed.name("pivot")],
        "rms_about_pivot": stats[signed.name("rms")],
        "scale_pos": stats[signed.name("above")],
        "scale_neg": -stats[signed.name("below")],
        "h_signed": [signed(row, stats).tolist() for row in rows],
        "h_released": [released(row, stats).tolist() for row in rows],
    }


def share_answer(inputs: dict) -> dict:
    names = ("advantage", "h", "ratio", "eps_low", "eps_high")
    advantage, h, ratio, left, right = (torch.tensor(inputs[name], dtype=torch.float64) for name in names)
    return {"advantage": (advantage * redistribution(h, ratio, left, right, inputs["beta"])).tolist()}


class Given:
    """The advantages of a case."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = rows

    def __call__(self, forest: list[Tree]) -> list[Credits]:
        return [Credits(token=dict(zip([n.id for n in forest[0].leaves()], self.rows, strict=True)))]


def mix_of(inputs: dict) -> Mix:
    """The case's loss in ramulus's terms."""
    signal = signal_of(inputs, inputs["mode"] == "signed")
    low, high, ceiling = inputs["eps_low"], inputs["eps_high"], inputs["dual_clip_c"]
    alpha = inputs["clip_alpha"] if inputs["adaptive_clip"] else 0.0
    clip = (
        AdaptiveClip(low, high, alpha, ceiling, signal)
        if inputs["adaptive_clip"]
        else DualClip(low, high, ceiling, "recomputed")
    )
    beta = inputs["adv_beta"] if inputs["adaptive_advantage"] else 0.0
    mask = Product((clip, Redistribution(beta, low, high, alpha, signal)))
    normaliser = TokenMean() if inputs["loss_agg"] == "token-mean" else SequenceMean()
    return Mix((Term(Estimator(mask, Recomputed(), Given(inputs["advantage"])), normaliser=normaliser),))


def star_of(inputs: dict) -> Tree:
    """A path for each row of the case."""
    tree = Tree.plant(Task("0", (1,), ""))
    for entropy, old in zip(inputs["entropy"], inputs["old_logp"], strict=True):
        leaf = tree.add(tree.root, [2] * len(old), Author.POLICY, finish="eos", reward=1.0)
        leaf.logprobs, leaf.entropy, leaf.signals = column(old, "d"), column(entropy, "d"), {"recomputed": column(old, "d")}
        leaf.kept, leaf.temperature = column([0.0] * len(old)), 1.0
    return tree


def ragged(values: Tensor, rows: list[list[float]]) -> list[list[float]]:
    """A column [T] of a packed star, its prompt of one token first, as rows."""
    flat, start = values.tolist()[1:], np.cumsum([0] + [len(row) for row in rows])
    return [flat[a:b] for a, b in pairwise(start)]


def loss_answer(inputs: dict) -> dict:
    mix, tree, rows = mix_of(inputs), star_of(inputs), inputs["entropy"]
    (batch,) = pack([tree], mix.credit([tree]), mix, dtype=torch.float64)
    flat = {name: [0.0] + [x for row in inputs[name] for x in row] for name in ("logp", "entropy", "advantage")}
    logp = torch.tensor(flat["logp"], dtype=torch.float64, requires_grad=True)
    entropy, advantage = (torch.tensor(flat[name], dtype=torch.float64) for name in ("entropy", "advantage"))
    (grad,) = torch.autograd.grad(mix.loss(logp, logp, entropy, batch), logp)
    clip, share = mix.terms[0].estimator.mask.parts
    stats = batch.term(0).stats
    h = share.signal(entropy, stats)
    left, right = widths(h, clip.low, clip.high, share.alpha)
    moved = advantage * share(1, logp.detach(), entropy, batch.term(0))
    answer = {
        name: ragged(value, rows) for name, value in {"h": h, "lower_bound": 1 - left, "upper_bound": 1 + right}.items()
    }
    answer |= {"redistributed_advantage": ragged(moved, rows), "grad_logp": ragged(grad, rows)}
    answer |= {"loss": gauges.surrogate(mix, logp, logp, entropy, batch)}
    return answer | fractions(clip, logp.detach(), entropy, moved, batch.term(0))


def fractions(clip: object, logp: Tensor, entropy: Tensor, advantage: Tensor, batch: TreeBatch) -> dict:
    """Shares of tokens that the clip and the dual clip hold."""
    single = (
        AdaptiveClip(clip.low, clip.high, clip.alpha, None, clip.signal) if isinstance(clip, AdaptiveClip) else None
    )
    single = single or DualClip(clip.low, clip.high, math.inf, "recomputed")  # type: ignore[attr-defined]
    cut = torch.where(advantage > 0, single(1, logp, entropy, batch), single(-1, logp, entropy, batch)) == 0
    dual = (clip(-1, logp, entropy, batch) == 0) & (single(-1, logp, entropy, batch) > 0) & (advantage < 0)  # type: ignore[operator]
    cut, dual = cut[1:] & (advantage[1:] != 0), dual[1:]
    return {"clip_frac": cut.double().mean().item(), "dual_clip_frac": dual.double().mean().item()}


def heat_answer(inputs: dict) -> dict:
    base, stats = inputs["base_temperature"], None
    kind = "signed" if inputs["mode"] == "signed" else "released"
    if inputs["stats"] is not None:
        stats = ByEntropy(pivot=inputs["pivot"]).statistics([x for row in inputs["prev_step_entropy"] for x in row])
        assert close(list(stats.values()), [abs(x) if i > 2 else x for i, x in enumerate(inputs["stats"].values())])
    rows = [torch.tensor([row], dtype=torch.float64) for row in inputs["logits"]]
    bases = base if isinstance(base, list) else [base] * len(rows)
    rules = [ByEntropy(b, inputs["tau"], inputs["pivot"], kind, stats=stats) for b in bases]
    pairs = list(zip(rules, rows, strict=True))
    heat = [float(rule(row)[0]) for rule, row in pairs]
    in_float32 = torch.tensor([float(rule(row.float())[0]) for rule, row in pairs])
    assert torch.allclose(in_float32, torch.tensor(heat), rtol=1e-5, atol=0)
    return {"temperature": heat}


ANSWERS = {
    "group_case": group_answer,
    "signal_case": signal_answer,
    "share_case": share_answer,
    "loss_case": loss_answer,
    "heat_case": heat_answer,
}


def test_group_average(group_case: dict) -> None:
    assert differing(group_answer(group_case["inputs"]), group_case["expected"]) == []


def test_entropy_signal(signal_case: dict) -> None:
    assert differing(signal_answer(signal_case["inputs"]), signal_case["expected"]) == []


def test_redistribution(share_case: dict) -> None:
    assert differing(share_answer(share_case["inputs"]), share_case["expected"]) == []


def test_clipped_loss(loss_case: dict) -> None:
    assert differing(loss_answer(loss_case["inputs"]), loss_case["expected"]) == []


def test_adaptive_temperature(heat_case: dict) -> None:
    assert differing(heat_answer(heat_case["inputs"]), heat_case["expected"]) == []


@pytest.mark.parametrize("kind", LISTS)
def test_every_case_is_there_and_a_nudged_one_is_noticed(kind: str) -> None:
    cases = load(DEFAULT, kind)
    assert len(cases) == COUNTS[kind]
    case = copy.deepcopy(cases[0])
    got = ANSWERS[kind](case["inputs"])
    for name in got:
        expected = case["expected"] | {name: nudged(case["expected"][name])}
        assert differing(got, expected) == [name]


def nudged(value: object) -> object:
    return [nudged(x) for x in value] if isinstance(value, list) else value * (1 + 1e-4) + 1e-4  # type: ignore[operator]
