"""HPT's and LUFFY's official functions against ramulus's own: one test a case, from a folder given by --golden.

Losses and gradients are those of packed trees, one tree a row, with the case's advantages as credits. Not checked are log columns that ramulus
does not keep (clipfrac, ppo_kl, means of probabilities and of losses by origin). The official normalisers stand here as `Over`: they depend on
how rows are batched, so ramulus ships none of them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.advantage.baselines import Raw, Signed, SplitMean, Whitened
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective import gauges
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import SOFT, Even, Soft, Switch, marks
from ramulus.learn.objective.leaf_weight import EntropyWeight, mean_along
from ramulus.learn.objective.mask import Clip, Everything
from ramulus.learn.objective.mix import Leaves, Mix, Term, TokenMean
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.objective.shaped_reference import Blend, One, Power, Probable, Shaped
from ramulus.learn.packing.pack import pack
from ramulus.learn.packing.weights import trained_leaves

DEFAULT = Path(__file__).parent / "golden"
COUNTS = {
    "policy_loss": 8, "sft_loss": 8, "mixed_on_off_loss": 15, "actor_loss": 20, "advantages": 9, "gate": 9, "routing": 8, "soft_coefficients": 3,
}  # fmt: skip
BOTH, POLICY, EXPERT = (Author.POLICY, Author.EXPERT), (Author.POLICY,), (Author.EXPERT,)


def load(folder: Path, group: str) -> list[dict]:
    """The cases of one group; none where the folder does not have the file."""
    file = folder / "hpt.json"
    return json.loads(file.read_text())[group] if file.exists() else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for group in set(COUNTS) & {name.removesuffix("_case") for name in metafunc.fixturenames}:
        cases = load(Path(metafunc.config.getoption("--golden")), group)
        metafunc.parametrize(f"{group}_case", cases, ids=[case["id"] for case in cases])


def close(got: float, want: float) -> bool:
    return abs(float(got) - float(want)) <= 1e-6 * max(1.0, abs(float(want)))


def differing(got: dict, expected: dict) -> list[str]:
    """The names under which two answers differ: numbers, or rows of them."""
    wrong = []
    for name, value in got.items():
        flat = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
        want = torch.as_tensor(expected[name], dtype=torch.float64).flatten().tolist()
        wrong += [] if len(flat) == len(want) and all(map(close, flat, want)) else [name]
    return wrong


@dataclass(frozen=True)
class Over:
    """Every token weighs 1 / total."""

    total: float

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        return [[share / self.total for _, share in tree] for tree in leaves]


@dataclass
class Rows:
    """The rows of a case as trees of one path each, demonstration tokens by EXPERT."""

    inputs: dict
    expert_old: list[list[float]] | None = None  # log-probs of whoever wrote the demonstrations
    trees: list[Tree] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = self.inputs
        marked = given.get("prefix_mask") or [[0] * len(row) for row in given["mask"]]
        for i, row in enumerate(given["mask"]):
            tree = Tree.plant(Task(f"q{i}", (1,), ""))
            leaf, count, prefix = tree.root, sum(row), sum(marked[i])
            for author, start, stop in ((Author.EXPERT, 0, prefix), (Author.POLICY, prefix, count)):
                if stop > start:
                    old = given.get("old_log_prob", given["log_prob"]) if author is Author.POLICY else self.expert_old
                    kept = {"kept": [0.0] * (stop - start)} | self.columns(i, start, stop)
                    sampled = {"logprobs": old[i][start:stop]} | kept if old is not None else {}
                    leaf = tree.add(leaf, [2] * (stop - start), author, **sampled)
            if leaf is tree.root:  # a row without a valid token
                leaf = tree.add(leaf, [], Author.POLICY)
            leaf.finish, leaf.reward = "eos", 0.0
            self.trees.append(tree)
            self.leaves.append(leaf)

    def columns(self, i: int, start: int, stop: int) -> dict[str, list[float]]:
        entropy = self.inputs.get("entropy")
        return {
            "entropy": entropy[i][start:stop] if entropy else [0.0] * (stop - start),
            "temperature": [1.0] * (stop - start),
        }

    @property
    def demo(self) -> list[bool]:
        return [any(node.author is Author.EXPERT for node in leaf.line()) for leaf in self.leaves]

    def tokens(self, authors: Sequence[Author]) -> int:
        return sum(len(n.tokens) for leaf in self.leaves for n in leaf.line() if n.author in authors)

    def credit(self, values: Sequence, only: Sequence[bool] | None = None) -> list[Credits]:
        """A term's credits: a number or a list of numbers for each row, of those in `only`."""
        answer = []
        for i, (leaf, value) in enumerate(zip(self.leaves, values, strict=True)):
            if only is not None and not only[i]:
                answer.append(Credits())
            elif isinstance(value, list):
                answer.append(Credits(token={leaf.id: value[: sum(self.inputs["mask"][i])]}))
            else:
                answer.append(Credits({leaf.id: value}))
        return answer

    def learn(self, mix: Mix, credits: list[list[Credits]]) -> dict:
        """Loss, gradient [B, L], mean entropy and each row's, of the packed rows."""
        logp = torch.tensor(self.inputs["log_prob"], dtype=torch.float64, requires_grad=True)
        loss, value, seen = torch.zeros((), dtype=torch.float64), 0.0, []
        for batch in pack(self.trees, credits, mix, 0, torch.float64):
            (row,) = lay_out(
                self.trees,
                [{leaf.id} if any(c[i].trained() for c in credits) else set() for i, leaf in enumerate(self.leaves)],
            )
            picks, depth = [], dict.fromkeys(range(len(self.trees)), 0)
            for tree, node, start, stop in row.nodes:
                if node.author is not Author.PROMPT:
                    picks += [(t, tree, depth[tree] + t - start) for t in range(start, stop)]
                    depth[tree] += stop - start
            spots = torch.tensor(picks, dtype=torch.long).T
            here = torch.zeros(len(batch), dtype=torch.float64).index_put((spots[0],), logp[spots[1], spots[2]])
            entropy = torch.zeros_like(here)
            if "entropy" in self.inputs:
                given = torch.tensor(self.inputs["entropy"], dtype=torch.float64)
                entropy = entropy.index_put((spots[0],), given[spots[1], spots[2]])
            loss = loss + mix.loss(here, here, entropy, batch)
            value += gauges.surrogate(mix, here, here, entropy, batch)
            seen.append(gauges.gauges(mix, here, here, entropy, batch))
            means = [mean_along(entropy, batch.term(m)) for m in range(len(mix.terms))]
        grad = torch.autograd.grad(loss, logp)[0] if loss.requires_grad else torch.zeros_like(logp)
        mean = gauges.merge(seen).get("entropy", 0.0)
        return {"loss": value, "grad_log_prob": grad, "entropy_loss": mean, "means": means if seen else []}


def term(mask, reference, authors, normaliser, coefficient=1.0, leaf=None) -> Term:
    return Term(Estimator(mask, reference, Constant(), leaf), authors, normaliser, coefficient)


def clip_of(config: dict, power: float = 1.0):
    """The case's clip as a mask; where the ratio is raised to a power, its bounds are bounds of that power."""
    if config["loss_remove_clip"]:
        return Everything()
    low, high = 1 - config["clip_ratio"], max(config.get("clip_upper_bound", 1.0), 1 + config["clip_ratio"])
    return Clip(1 - low ** (1 / power), high ** (1 / power) - 1)


def total_of(config: dict, rows: Rows, tokens: int) -> Over:
    return Over(len(rows.inputs["mask"][0]) if config["loss_remove_token_mean"] else max(tokens, 1))


def policy_loss(case: dict) -> list[str]:
    given = case["inputs"]
    rows = Rows(given)
    mix = Mix((term(clip_of(given), Behavior(), POLICY, total_of(given, rows, rows.tokens(POLICY))),))
    got = rows.learn(mix, [rows.credit(given["advantages"])])
    return differing({name: got[name] for name in ("loss", "grad_log_prob")}, case["expected"])


def test_policy_loss(policy_loss_case: dict) -> None:
    assert policy_loss(policy_loss_case) == []


def sft_loss(case: dict) -> list[str]:
    """Loss and gradient. Where there is no token at all, the official mean is NaN and ramulus's loss is 0."""
    given = case["inputs"]
    rows = Rows(given)
    got = rows.learn(Mix((term(Everything(), Itself(), POLICY, TokenMean()),)), [rows.credit([1.0] * len(rows.trees))])
    if case["expected"]["loss"] == "nan":
        assert not rows.tokens(BOTH)
        assert torch.equal(got["grad_log_prob"], torch.zeros_like(got["grad_log_prob"]))
        return [] if got["loss"] == 0.0 else ["loss"]
    return differing({name: got[name] for name in ("loss", "grad_log_prob")}, case["expected"])


def test_sft_loss(sft_loss_case: dict) -> None:
    assert sft_loss(sft_loss_case) == []


def shape_of(config: dict, side: str, column: str | None):
    """The reference that a reshape option names; on rollouts its ratio is against the sampler."""
    kind, weight = config[f"{side}_policy_reshape"], config[f"{side}_policy_reshape_weight"]
    if kind == "no_reshape":
        return One() if column is None else Behavior()
    if kind.startswith("p_div_p_"):
        return Shaped(float(kind.removeprefix("p_div_p_")), column)
    power = 0.5 if kind == "square_root" else config[f"{side}_policy_reshape_pow_exp"]
    return Blend(weight, float(kind == "p_logp"), column) if kind in ("logp", "p_logp") else Power(power, column)


def mixed_term(given: dict, config: dict, rows: Rows) -> Term:
    on = shape_of(config, "on", "behavior")
    off = Behavior() if rows.expert_old is not None else shape_of(config, "off", None)
    trusted = Everything()
    if config.get("off_max_clip") is not None:  # bounds on f(p) are bounds on p
        low, high = (0.1 * u / (1 - u) for u in (config["off_min_clip"], config["off_max_clip"]))
        trusted = Probable(low, high)
    mask = PerAuthor(clip_of(config, on.exponent if isinstance(on, Power) else 1.0), trusted)
    tokens = rows.tokens(BOTH)
    if config.get("all_max_clip") not in (None, -1):  # tokens above are in no denominator either
        mask = Probable(0.0, config["all_max_clip"])
        above = torch.tensor(given["log_prob"]).exp() > config["all_max_clip"]
        tokens -= int((above & (torch.tensor(given["mask"]) > 0)).sum())
    return term(mask, PerAuthor(on, off), BOTH, total_of(config, rows, tokens))


def mixed_on_off_loss(case: dict) -> list[str]:
    """Loss and gradient; where tokens are dropped (all_max_clip) the gradient alone, as ramulus's masks have the value of a clip."""
    given, config = case["inputs"], case["inputs"]["config"]
    known = given["target_probs"]
    rows = Rows(given, None if known is None else [[math.log(p + 1e-6) for p in row] for row in known])
    got = rows.learn(Mix((mixed_term(given, config, rows),)), [rows.credit(given["advantages"])])
    answer = {"grad_log_prob": got["grad_log_prob"]}
    return differing(answer if config["all_max_clip"] else answer | {"pg_loss": got["loss"]}, case["expected"])


def test_mixed_on_off_loss(mixed_on_off_loss_case: dict) -> None:
    assert mixed_on_off_loss(mixed_on_off_loss_case) == []


def actor_terms(given: dict, rows: Rows) -> tuple[list[Term], list[list[Credits]]]:
    """The terms of an `offline_loss_type`, and each one's credits."""
    config, kind, advantages = given["config"], given["offline_loss_type"], given["advantages"]
    demo, width = rows.demo, Over(len(given["mask"][0]))
    on = term(clip_of(config), Behavior(), POLICY, total_of(config, rows, rows.tokens(POLICY)))
    sft = term(Everything(), Itself(), EXPERT, TokenMean(), config["sft_loss_coef"])
    off = term(Everything(), Shaped(0.1), EXPERT, width, config["off_loss_coef"])
    rollouts = rows.credit(advantages, [not d for d in demo])
    ones = [1.0] * len(demo)
    if kind == "sft":
        return [on, sft], [rollouts, rows.credit(ones, demo)]
    if kind == "off_policy":
        return [mixed_term(given, config, rows)], [rows.credit(advantages)]
    if kind == "switch_off_sft":
        return [on, off, sft], [rollouts, rows.credit(advantages, demo), rows.credit(ones, demo)]
    if kind == "off_sft":
        flagged = [d and bool(f) for d, f in zip(demo, given["whether_off"], strict=True)]
        plain = [d and not f for d, f in zip(demo, flagged, strict=True)]
        return [on, replace(off, coefficient=1.0), sft], [
            rollouts,
            rows.credit(advantages, flagged),
            rows.credit(ones, plain),
        ]
    if kind == "none":
        return [replace(on, authors=BOTH, normaliser=total_of(config, rows, rows.tokens(BOTH)))], [
            rows.credit(advantages)
        ]
    reference = {"paper": Itself(), "minus_old": Itself(), "exp": One(), "classic_rl": Behavior()}[config["srft_type"]]
    ours = term(Everything(), reference, POLICY, width, leaf=EntropyWeight(0.1, 1.0))
    shown = term(Everything(), Itself(), EXPERT, TokenMean(), leaf=EntropyWeight(0.5, -1.0))
    signs = [1.0 if score == 1 else -1.0 for score in given["row_score"]]
    signed = rows.credit(signs, [not d for d in demo])
    return [ours, off, shown], [signed, rows.credit(advantages, demo), rows.credit(ones, demo)]


def actor_loss(case: dict) -> list[str]:
    """Loss, gradient, mean entropy, and SRFT's row entropies.

    The loss of `minus_old` differs by a constant from ramulus's, so its gradient alone is checked. Where the official loss is NaN (a token mean over
    no rollout), ramulus's is the SFT term.
    """
    given, expected = case["inputs"], case["expected"]
    config = given["config"]
    rows = Rows(given, given["old_log_prob"] if given["offline_loss_type"] == "none" else None)
    terms, credits = actor_terms(given, rows)
    got = rows.learn(Mix(tuple(terms)), credits)
    if expected["policy_loss"] == "nan":
        assert all(rows.demo)
        weight = config["sft_loss_coef"]
        want = torch.tensor(given["mask"], dtype=torch.float64) * -weight / rows.tokens(EXPERT)
        assert torch.allclose(got["grad_log_prob"], want)
        return [] if close(got["loss"], weight * expected["sft_loss"]) else ["loss"]
    answer = {"grad_log_prob": got["grad_log_prob"], "entropy_loss": got["entropy_loss"]}
    if config["srft_type"] != "minus_old" or given["offline_loss_type"] != "srft":
        answer |= {"pg_loss": got["loss"], "policy_loss": got["loss"] - config["entropy_coeff"] * got["entropy_loss"]}
    if "H" in expected:
        answer["H"] = [m[i] for i in range(len(rows.trees)) for m in [got["means"][2 if rows.demo[i] else 0]]]
    return differing(answer, expected)


def test_actor_loss(actor_loss_case: dict) -> None:
    assert actor_loss(actor_loss_case) == []


def advantages(case: dict) -> list[str]:
    """A value a row, the official one where its tokens are valid. A question without a rollout has the baseline 0 where `grpo_split` raises."""
    given = case["inputs"]
    trees: dict[str, Tree] = {}
    ends = []
    for name, score, row, ours in zip(*(given[key] for key in ("group", "score", "mask", "on_policy")), strict=True):
        tree = trees.setdefault(name, Tree.plant(Task(name, (1,), "")))
        author = Author.POLICY if ours else Author.EXPERT
        ends.append((name, tree.add(tree.root, [2] * sum(row), author, finish="eos", reward=score)))
    rules = {
        "grpo": GroupMean(over="all", lone="reward"), "dr_grpo": GroupMean(std=False, over="all", lone="reward"), "grpo_balance":
        Signed(over="all"), "reinforce": Raw(over="all"), "reinforce_plus_plus": Whitened(over="all"), "grpo_split": SplitMean(lone="reward"),
        "dr_grpo_split": SplitMean(std=False, lone="reward"),
    }  # fmt: skip
    got = {}
    for name, rule in rules.items():
        answers = dict(zip(trees, rule(list(trees.values())), strict=True))
        values = [answers[question].leaf[leaf.id] for question, leaf in ends]
        got[name] = [[v * m for m in row] for v, row in zip(values, given["mask"], strict=True)]
    if "grpo_split_error" in case["expected"]:
        return [] if close(got["dr_grpo_split"][2][0], given["score"][2]) else ["grpo_split"]
    return differing(got, case["expected"])


def test_advantages(advantages_case: dict) -> None:
    assert advantages(advantages_case) == []


def star(number: int, rewards: Sequence[float], demo: float | None) -> Tree:
    """A question's rollouts, with a demonstration or without."""
    tree = Tree.plant(Task(f"q{number}", (1,), ""))
    for reward in rewards:
        tree.add(tree.root, [2, 3], Author.POLICY, finish="eos", reward=reward)
    if demo is not None:
        tree.add(tree.root, [4], Author.EXPERT, finish="eos", reward=demo)
    return tree


def switch_of(given: dict) -> Switch:
    """Official gates are counts of correct rollouts, ramulus's are shares."""
    return Switch(given["switch_gate"] / given["n"], given["switch_gate_off"] / given["n"])


def gate(case: dict) -> list[str]:
    """Count, rate and where the question goes; the numbers of rows to add and remove are plumbing of the official batch."""
    given = case["inputs"]
    rule = switch_of(given) if given["unify_strategy"] == "switch" else Even()
    wrong = []
    for rewards, want in zip(given["rewards"], case["expected"]["decisions"], strict=True):
        tree = star(0, rewards, 1.0)
        weights, _ = rule(tree, {})
        modes = {"rl": Author.POLICY, "sft": Author.EXPERT, "offpolicy_rl": "off"}
        chosen = dict.fromkeys(weights, 1.0)
        if want["mode"] in modes:
            chosen = dict.fromkeys(weights, 0.0) | {modes[want["mode"]]: 1.0}
        solved = marks(tree)
        right = sum(solved) == want["n_correct"] and close(sum(solved) / len(solved), want["P"])
        wrong += [] if weights == chosen and right else [want["mode"]]
    return wrong


def test_gate(gate_case: dict) -> None:
    assert gate(gate_case) == []


def routing(case: dict) -> list:
    """Which rows are trained and with what advantage; the order of rows and the lost key are plumbing of the official batch."""
    given = case["inputs"]
    trees = [star(i, rewards, given["demo_reward"]) for i, rewards in enumerate(given["rewards"])]
    rl = Term(Estimator(Everything(), Behavior(), GroupMean(std=False)))
    shown = Term(Estimator(Everything(), Itself(), Raw(over="expert")), EXPERT)
    mix = Mix((rl, shown, replace(shown, side="off")), gate=switch_of(given))
    gates, _ = mix.gates(trees, {})
    got = {}
    for part, credit in zip(mix.terms, mix.credit(trees), strict=True):
        for q, kept in enumerate(trained_leaves(trees, credit, part, mix.share, gates)):
            for i, leaf in enumerate(trees[q].leaves()):
                if leaf.id in kept:
                    demo = leaf.author is Author.EXPERT
                    got["demo" if demo else "rollout", q, None if demo else i] = kept[leaf.id].leaf
    want = {(r["kind"], r["question"], r["rollout"]): r["dr_grpo_advantage"] for r in case["expected"]["rows"]}
    return [
        key for key in got.keys() | want.keys() if key not in got or key not in want or not close(got[key], want[key])
    ]


def test_routing(routing_case: dict) -> None:
    assert routing(routing_case) == []


def soft_coefficients(case: dict) -> list[str]:
    """The tables that the released trainer never applies; ramulus's gate does."""
    rule = Soft(SOFT[case["inputs"]["soft_type"]])
    wrong = []
    for correct, want in case["expected"]["table"].items():
        k = int(correct)
        tree = star(0, [1.0] * max(k - 1, 0) + [0.0] * (7 - max(k - 1, 0)), float(k > 0))
        weights, _ = rule(tree, {})
        got = [weights[Author.POLICY], weights["off"], weights[Author.EXPERT]]
        wrong += [] if all(map(close, got, want)) else [correct]
    return wrong


def test_soft_coefficients(soft_coefficients_case: dict) -> None:
    assert soft_coefficients(soft_coefficients_case) == []


def nudged(value: object) -> object:
    """Every number a little larger; names, flags and NaN as they are."""
    if isinstance(value, dict):
        return {key: nudged(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nudged(item) for item in value]
    return value + 1e-4 if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.mark.parametrize("group", COUNTS)
def test_a_nudged_expectation_is_noticed(group: str) -> None:
    case = copy.deepcopy(load(DEFAULT, group)[0])
    case["expected"] = nudged(case["expected"])
    if group == "routing":
        for row in case["expected"]["rows"]:
            row["question"], row["rollout"] = (
                round(row["question"]),
                round(row["rollout"]) if row["rollout"] is not None else None,
            )
    assert globals()[group](case)


def test_every_case_is_here() -> None:
    assert {group: len(load(DEFAULT, group)) for group in COUNTS} == COUNTS
