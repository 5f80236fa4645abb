"""Evaluation: statistics against counting by hand, a toy model whose accuracy is known, and the ledger."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import math
import random

import pytest

from ramulus.core.task import Path, Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.stop import Stop
from ramulus.look.cost.ledger import Cost, cost
from ramulus.look.evaluation.evaluate import evaluate
from ramulus.look.evaluation.statistics import interval, mean, pass_at_k, vote
from ramulus.look.viewer.show import draw_tree, safe


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (4, 1, 4), (7, 3, 5)])
def test_pass_at_k_counts_the_draws_without_replacement(n: int, correct: int, k: int):
    marks = [1] * correct + [0] * (n - correct)
    draws = list(itertools.combinations(marks, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_refuses_more_draws_than_attempts():
    with pytest.raises(ValueError, match="n=4, correct=1, k=5"):
        pass_at_k(4, 1, 5)


def test_a_vote_counts_answers_and_a_tie_earns_the_mean_of_the_tied():
    assert vote(["3", "4", "3"], [1.0, 0.0, 1.0], 3) == (1.0, 0.0)
    assert vote(["4", "3", "3", "4"], [0.0, 1.0, 1.0, 0.0], 4) == (0.5, 1.0)
    assert vote(["4", "3", "5", "7"], [0.0, 1.0, 0.0, 0.0], 4) == (0.25, 1.0)
    assert vote(["", "", "3"], [0.0, 0.0, 1.0], 3) == (1.0, 0.0)
    assert vote(["", ""], [0.0, 0.0], 2) == (0.0, 0.0)
    assert vote(["1/2", "\\frac{1}{2}", "0.5", "2", "2"], [1.0, 1.0, 1.0, 0.0, 0.0], 5) == (1.0, 0.0)
    with pytest.raises(ValueError, match="n=2, k=3"):
        vote(["1", "2"], [1.0, 0.0], 3)


def test_interval_is_that_of_resampled_means():
    for n in (1, 2, 7):
        values = [i * i / 3 for i in range(n)]
        drawn = random.Random(f"5/interval/{n}")
        means = sorted(math.fsum(drawn.choices(values, k=n)) / n for _ in range(1000))
        assert interval(values, seed=5) == pytest.approx((means[25], means[974]), abs=1e-14)


def test_interval_covers_the_mean_and_shrinks_with_problems():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    low, high = interval(few)
    assert low < mean(few) < high
    assert interval(few) == (low, high)
    narrow = interval(many)
    assert narrow[1] - narrow[0] < (high - low) / 3
    assert high - low == pytest.approx(4 * math.sqrt(0.25 / 20), rel=0.25)


P = 0.7  # how often the toy model says token 1, the right one
TABLE = {(): [0.0, math.log(P / (1 - P)), -1e9]}


class Right:
    def __call__(self, task: Task, path: Path) -> dict[str, float | str]:
        good = path.tokens[0] == 1
        return {"reward": 2.0 * good - 1, "correct": float(good), "answer": path.text}


def say(tokens) -> str:
    return " ".join(map(str, tokens))


def run(samples: int, greedy: bool = True, seed: int = 0, n: int = 200, **kwargs):
    tasks = [Task(f"task {i}", (0,), f"say 1, number {i}", "1") for i in range(n)]
    engine, stop = ToyEngine(vocab=3, table=TABLE), Stop(eos=(2,), max_tokens=1)
    return asyncio.run(
        evaluate(engine, tasks, [(Right(), 1.0, "right")], say, stop, Sampling(1), samples, greedy, seed, **kwargs)
    )


def test_a_model_of_known_accuracy():
    found = run(8)
    assert found["mean@8"] == pytest.approx(P, abs=4 * math.sqrt(P * (1 - P) / 1600))
    assert found["pass@2"] == pytest.approx(1 - (1 - P) ** 2, abs=0.03)
    assert found["pass@8"] == pytest.approx(1.0, abs=0.01)
    assert found["greedy"] == 1.0
    assert found["length"] == 1.0
    assert found["truncated"] == 1.0
    assert found["maj@8"] > found["mean@8"]
    assert found["reward"] == pytest.approx(2 * found["mean@8"] - 1)
    low, high = found["intervals"]["mean@8"]
    assert low < found["mean@8"] < high


def test_every_answer_is_kept_and_the_result_is_json():
    found = json.loads(json.dumps(run(4, n=5)))
    assert [row["id"] for row in found["answers"]] == [f"task {i}" for i in range(5)]
    marks = [attempt["correct"] for row in found["answers"] for attempt in row["sampled"]]
    assert len(marks) == 20
    assert sum(marks) / 20 == pytest.approx(found["mean@4"])
    assert all(row["greedy"][0]["text"] == "1" for row in found["answers"])


def test_the_same_seed_gives_the_same_answers():
    assert run(3, n=20) == run(3, n=20)
    assert run(3, n=20)["answers"] != run(3, n=20, seed=1)["answers"]


def test_greedy_alone_and_refusals():
    found = run(0, n=3)
    assert found["greedy"] == 1.0
    assert "mean@0" not in found
    with pytest.raises(ValueError, match="samples >= 1"):
        run(0, greedy=False)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        run(4, n=0)
    with pytest.raises(ValueError, match="pass@9"):
        run(4, n=2, k=[9])


def test_the_ledger_counts_shared_tokens_once():
    tree = Tree.plant(Task("t", (1, 2, 3), "t"))
    shared = tree.add(tree.root, [4, 5], Author.POLICY)
    tree.add(shared, [6], Author.POLICY, finish="eos", reward=1.0)
    tree.add(shared, [7, 8], Author.POLICY, finish="pruned")
    lost = tree.add(tree.root, [9], Author.POLICY)
    tree.add(lost, [9, 9], Author.POLICY, finish="pruned")
    tree.add(tree.root, [1, 1, 1, 1], Author.EXPERT, finish="eos", reward=1.0)
    assert cost([tree]) == Cost(trees=1, paths=3, sampled=8, trajectory=10, pruned=5, expert=4)
    assert cost([tree]).reused == 2
    assert cost([tree]).reuse_ratio == 10 / 8
    assert cost([tree, tree]) == cost([tree]) + cost([tree])
    assert cost([]).reuse_ratio == 0.0


def test_texts_of_a_model_are_harmless_on_a_terminal():
    assert safe("a\x1b[31mred\x07\nb") == "a\\x1b\\[31mred\\x07⏎b" or "\x1b" not in safe("a\x1b[31mred")
    from rich.console import Console

    tree = Tree.plant(Task("t", (1,), "[bold]x[/bold] \x1b[2J"))
    tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=1.0)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(draw_tree(tree, lambda tokens: "[red]\x1b]0;title\x07[/nope]"))
    text = console.export_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]" in text
    assert "[bold]x[/bold]" in text
