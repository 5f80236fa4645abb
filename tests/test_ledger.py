"""The ledger: on real small runs every token has one source and one fate, every second one phase, and totals are sums."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import shutil
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import ramulus.run.gated_engine as waiting
import run_ledger
from ramulus.cli import main
from ramulus.core import run_folder, store
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.objective.gate import demonstrated
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.packing.annotate import names
from ramulus.learn.packing.weights import Selection, TrainedLeaf
from ramulus.look.cost.account import FATES, PHASES, TOKENS
from ramulus.look.cost.ledger import Cost, account, cost, costs
from ramulus.look.cost.statement import read_statements
from ramulus.run.config.recipe import Run
from ramulus.run.launch import launch
from ramulus.run.machine import Machine
from ramulus.run.rollouts import Rollout
from ramulus.run.step_statistics import StepStatistics
from ramulus.run.trainer import Clock, differences
from run_ledger import PLAIN

RECIPE = str(Path(__file__).parent / "run_ledger.py")
OLD = {"step": 1, "trees": 2, "dropped": 0, "paths": 4, "sampled": 9, "reused": 3, "pruned": 0, "pass_rate": 0.5}
OLD |= {
    "prefilled": 5,
    "prefix_reused": 7,
    "prefilled_again": 0,
    "trained": 9,
    "seconds": {"grow": 3.0, "step": 4.0, "mean": 4.0},
}
pytestmark = pytest.mark.usefixtures("torch_as_it_was")


class Counted:
    """What went through the engine, counted where requests and answers pass."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.prefix = self.sampled = 0
        usual = LocalEngine.sample

        async def sample(engine: LocalEngine, requests: Sequence[Request]) -> list[Segment]:
            segments = await usual(engine, requests)
            self.prefix += sum(len(request.prefix) for request in requests)
            self.sampled += sum(len(segment.tokens) for segment in segments)
            return segments

        patch.setattr(LocalEngine, "sample", sample)


def train(variant: str, out: Path, *changes: str) -> list[dict[str, Any]]:
    assert launch(f"{RECIPE}:{variant}", [f"out={out}", *changes], True, False, Console(quiet=True)) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tokens_of(leaf: Node) -> list[tuple[Node, int]]:
    """Every token of a path, prompt left out, as its node and its place there."""
    return [(node, i) for node in leaf.line() if node.author is not Author.PROMPT for i in range(len(node.tokens))]


def leaf_fates(run: Run, tree: Tree, author: Author) -> dict[Node, str]:
    """What became of a path's tokens by this author, from what is written beside the leaf: its credit, its end, its grade."""
    mine = [(term, name) for term, name in zip(run.mix.terms, names(run.mix)) if author in term.authors]
    everyone = names(run.mix)
    pulled_at = run.mix.kl_coef or run.mix.entropy_bonus
    found = {}
    for leaf in tree.leaves():
        credit = {name: leaf.verdict[name] for name in everyone if name in leaf.verdict}
        signals = any(any(node.signals.get(name, ())) for node in leaf.line() for name in credit)
        if any(name in credit for _, name in mine):
            found[leaf] = "trained" if pulled_at or any(credit.values()) or signals else "idle"
        else:
            found[leaf] = "pruned" if leaf.finish == "pruned" else "excluded"
    return found


def by_hand(run: Run, trees: list[Tree]) -> Counter[str]:
    """The fates of all tokens of a step, token by token."""
    told: Counter[str] = Counter()
    for tree in trees:
        dropped = not (run.schedule.keep(tree) or (run.mix.gate is not None and demonstrated(tree)))
        below: dict[tuple[int, int], tuple[Node, set[Node]]] = {}
        for leaf in tree.leaves():
            for node, i in tokens_of(leaf):
                below.setdefault((node.id, i), (node, set()))[1].add(leaf)
                told["trajectory"] += node.author is Author.POLICY
        for author in (Author.POLICY, Author.EXPERT):
            fates = leaf_fates(run, tree, author)
            for node, leaves in below.values():
                if node.author is author:
                    ends = {fates[leaf] for leaf in leaves}
                    best = next(end for end in ("trained", "idle", "excluded", "pruned") if end in ends)
                    told[f"{author.name} {'dropped' if dropped and best != 'pruned' else best}"] += 1
                    told[author.name] += 1
    return told


VARIANTS = ("star", "segments", "flat", "kl", "ahead", "forks", "gate", "careful", "luffy", "sft")
SEEN = {  # fates that a run must show, so that the identities are not of zeros
    "star": ("trained_policy", "idle_tokens", "excluded"), "segments": ("trained_policy", "pruned", "dropped_tokens", "repeated"),
    "flat": ("idle_tokens",), "kl": ("trained_policy", "eval_sampled", "zero_credit"), "ahead": ("sampled_before", "sampled_ahead", "reused"),
    "forks": ("trained_policy", "excluded"), "gate": ("trained_expert", "expert"), "careful": ("expert",), "luffy": ("trained_expert",),
    "sft": ("trained_expert",),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_of_a_run_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    counted = Counted(monkeypatch)
    run, rows = getattr(run_ledger, variant)(), train(variant, tmp_path / "run")
    told = account(rows)["tokens"]
    assert all(told[name] for name in SEEN[variant])
    for row in rows:
        trees = list(store.read(tmp_path / "run" / "trees" / f"{row['step']:06d}.jsonl"))
        hand = by_hand(run, trees)
        assert row["sampled"] == hand["POLICY"] == sum(row[name] for name in FATES)
        assert row["trajectory"] == hand["trajectory"] == row["sampled"] + row["reused"]
        for name, fate in zip(FATES, ("trained", "idle", "excluded", "pruned", "dropped")):
            assert row[name] == hand[f"POLICY {fate}"], name
        assert (row["expert"], row["trained_expert"]) == (hand["EXPERT"], hand["EXPERT trained"])
        assert row["engine_sampled"] == row["sampled"] - row["sampled_before"] + row["sampled_ahead"]
        assert row["thrown_away"] == 0
        assert row["trained"] == row["trained_policy"] + row["trained_expert"] + row["repeated"]
        assert 0 <= row["zero_credit"] <= row["trained"] <= row["packed"] <= row["flattened"]
        judged = [
            leaf
            for tree in trees
            for leaf in tree.leaves()
            if leaf.author is Author.POLICY and "correct" in leaf.verdict
        ]
        assert row["graded"] == len(judged)
        assert row["correct"] == pytest.approx(row.get("pass_rate", 0.0) * row["graded"])
        if run.tokens_per_batch > 100 and run.minibatches == 1:
            assert row["repeated"] == 0
    assert counted.sampled == told["engine_sampled"] + told["eval_sampled"]
    assert told["sampled_before"] == told["sampled_ahead"]  # a last step begins nothing
    if run.evals is None:
        assert counted.prefix == told["prefilled"] + told["prefix_reused"]


@pytest.mark.parametrize("variant", ["segments", "kl"])
def test_every_second_of_a_step_has_a_phase_and_totals_are_sums(tmp_path: Path, variant: str) -> None:
    rows = train(variant, tmp_path / "run")
    for row in rows:
        parts = {name: s for name, s in row["seconds"].items() if name not in ("step", "mean", "eval")}
        assert math.fsum(parts.values()) == row["seconds"]["step"]
        assert min(parts.values()) >= 0
        assert parts.keys() <= PHASES.keys()
        assert row["memory/peak_rss"] > 2**20
    whole, each = account(rows), [account([row]) for row in rows]
    for group in ("tokens", "answers"):
        assert whole[group] == {name: sum(told[group][name] for told in each) for name in whole[group]}
    seconds = whole["seconds"]
    assert seconds == pytest.approx({name: sum(told["seconds"][name] for told in each) for name in seconds})
    assert seconds["step"] == pytest.approx(sum(seconds[name] for name in PHASES))
    assert seconds["total"] == pytest.approx(seconds["step"] + seconds["eval"])
    assert (seconds["eval"] > 0) == (variant == "kl")
    assert whole["per_correct"]["sampled"] == whole["tokens"]["sampled"] / whole["answers"]["correct"]


@pytest.mark.parametrize("variant", ["ahead", "kl"])
def test_a_resumed_run_has_the_same_account(tmp_path: Path, variant: str) -> None:
    rows = train(variant, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in run_folder.steps(tmp_path / "cut")[1:]:
        shutil.rmtree(run_folder.path_of(tmp_path / "cut", step))
    again = train(variant, tmp_path / "cut")
    whole, cut = account(rows), account(again)
    for group in ("steps", "answers", "tokens"):
        assert whole[group] == cut[group]


def test_fates_of_a_tree_counted_on_paper() -> None:
    tree = Tree.plant(Task("t", (1, 2, 3), "t"))
    shared = tree.add(tree.root, [4, 5], Author.POLICY)
    good = tree.add(shared, [6], Author.POLICY, finish="eos", reward=1.0)
    even = tree.add(shared, [7, 8], Author.POLICY, finish="eos", reward=0.5)
    tree.add(shared, [9, 9, 9], Author.POLICY, finish="pruned")
    long = tree.add(tree.root, [1, 1, 1, 1], Author.POLICY, finish="length")
    shown = tree.add(tree.root, [2] * 5, Author.EXPERT, finish="eos", reward=1.0)
    other = tree.add(tree.root, [3] * 6, Author.EXPERT, finish="eos", reward=1.0)
    hinted = tree.graft(other, drop=4)
    hinted.tokens, hinted.finish = column([8] * 7, "i"), "eos"
    common = {"trees": 1, "paths": 5, "sampled": 19, "trajectory": 23, "pruned": 3, "expert": 11}
    told = costs([(tree, {good.id: 1, even.id: 4, shown.id: 2, hinted.id: 1})])
    assert told == Cost(**common, trained=2 + 1 + 7, idle=2, excluded=4, trained_expert=5)
    assert cost([tree]) == Cost(**common)  # nobody has asked an update
    assert costs([(tree, {})]) == Cost(**common, excluded=16)
    assert costs([(tree, {hinted.id: 3})]).trained_expert == 2  # a term that learns from both authors on one path
    dropped = Rollout([tree], [], 1).metrics()
    assert (dropped["dropped_tokens"], dropped["pruned"], dropped["excluded"]) == (16, 3, 0)
    assert long.id not in (good.id, even.id)


def test_tokens_that_reach_no_tree_are_thrown_away() -> None:
    found = {
        "sampled": 10,
        "sampled_before": 2,
        "sampled_ahead": 3,
        "engine_sampled": 15,
        "trained": 9,
        "trained_policy": 5,
        "trained_expert": 1,
    }
    assert differences(found) == {"thrown_away": 4, "repeated": 3}


class Slow:
    """An engine that answers when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    limit, features, about = 8, frozenset[str](), "slow"

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        await self.go.wait()
        return [Segment(array("i"), array("f"), None) for _ in requests]

    async def load(self, weights: Any, version: int) -> None: ...
    async def reset(self) -> None: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, int]:
        return {}



def test_only_the_time_in_which_nothing_but_grades_is_awaited_is_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def story() -> float:
        engine = waiting.GatedEngine(Slow())
        request = asyncio.ensure_future(engine.sample([Request((1,), Sampling(1))]))
        await asyncio.sleep(0)
        now[0] += 1  # sampling
        with engine.grading():
            now[0] += 2  # sampling and grading
            with engine.grading():
                engine.engine.go.set()  # type: ignore[attr-defined]
                await request
                now[0] += 4  # grading
            now[0] += 8  # still grading
            second = asyncio.ensure_future(engine.sample([Request((1,), Sampling(1))]))
            engine.engine.go.clear()  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            now[0] += 16  # both
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            now[0] += 32  # grading
        now[0] += 64  # neither
        return engine.seconds

    assert asyncio.run(story()) == 4 + 8 + 32


def test_seconds_move_to_a_part_and_the_rest_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    import ramulus.run.trainer as trainer

    now = [100.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = Clock({"log": 1.0, "idle": 0.5})
    with clock("grow"):
        now[0] += 8
    clock.move(3.0, "grow", "grade")
    now[0] += 2
    assert clock.step() == {"log": 1.0, "idle": 2.5, "grow": 5.0, "grade": 3.0, "step": 11.5}


def test_what_an_older_run_does_not_say_is_unknown() -> None:
    told = account([OLD, OLD])
    assert told["answers"] == {"trees": 4, "dropped": 0, "paths": 8, "graded": 8, "correct": 4}
    assert told["tokens"]["sampled"] == 18
    assert told["tokens"]["trajectory"] == 24
    assert told["tokens"]["dropped_tokens"] == 0
    assert told["tokens"]["zero_credit"] is None
    assert told["tokens"]["idle_tokens"] is None
    assert told["seconds"]["grade"] is None  # it was a part of grow
    assert told["seconds"]["idle"] == 2.0
    assert told["ratios"]["zero_credit"] is None
    assert told["ratios"]["kv_reuse"] == 7 / 12
    assert told["per_correct"]["sampled"] == 4.5
    assert told["machine"]["peak_rss"] is None
    assert account([OLD, OLD | {"zero_credit": 3}])["tokens"]["zero_credit"] is None
    assert account([OLD | {"pruned": 2}])["answers"]["graded"] is None  # pruned paths have no grade
    assert account([]) == {}
    assert account([{"step": 1}])["tokens"] == dict.fromkeys(TOKENS) | {"eval_sampled": 0}
    assert json.loads(json.dumps(told)) == told


def folder_of(path: Path, rows: list[dict[str, Any]], torn: bool = False) -> Path:
    path.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + ('{"step": 3, "tra' if torn else ""))
    return path


def test_the_command_prints_tables_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run[bold]"
    folder_of(run / "1-sft", [OLD | {"paths": 0, "sampled": 0, "reused": 0}])
    folder_of(run / "2-rl", [OLD, OLD | {"step": 2, "sampled": 1_000_011}], torn=True)
    (run / "2-rl" / "evaluation-before.json").write_text('{"seconds": 2.5}')
    words = [
        "ledger",
        str(run),
        str(run / "2-rl"),
        "--json",
        str(tmp_path / "a.json"),
        "--csv",
        str(tmp_path / "a.csv"),
        "--steps",
    ]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "1,000,020" in said
    assert "run[bold]" in said
    assert "final evaluations, in no step, 2.5 s" in said
    assert any(line.split()[:3] == ["grading", "0.00", "?"] for line in said.splitlines())
    held = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert list(held[0]["accounts"]) == ["1-sft", "2-rl", "run"]
    assert held[0]["accounts"]["run"]["steps"] == 3
    assert list(held[1]["accounts"]) == ["2-rl"]
    assert [row["step"] for row in held[1]["steps"]["2-rl"]] == [1, 2]
    with open(tmp_path / "a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("1-sft", ""), ("2-rl", ""), ("run", ""), ("1-sft", "1"), ("2-rl", "1"), ("2-rl", "2"), ("2-rl", ""), ("2-rl", "1"), ("2-rl", "2"),
    ]  # fmt: skip
    assert lines[1]["tokens/sampled"] == "1000020"
    assert lines[1]["seconds/grade"] == ""


def test_a_folder_without_metrics_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "empty", [])
    with pytest.raises(SystemExit) as done:
        main(["ledger", str(tmp_path / "empty")])
    assert done.value.code == 2
    assert "give the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["ledger"])
    assert done.value.code == 2
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        read_statements([tmp_path / "nowhere"])


class Driver:
    """What nvidia-ml-py offers of it: samples of a GPU's load, each once."""

    NVML_GPU_UTILIZATION_SAMPLES = 1

    class NVMLError(Exception):
        """It has nothing to say."""

    def __init__(self, *taken: tuple[int, int]) -> None:
        self.taken = taken

    def nvmlDeviceGetSamples(self, gpu: str, kind: int, since: int) -> tuple[int, list[Any]]:
        found = [
            SimpleNamespace(timeStamp=at, sampleValue=SimpleNamespace(uiVal=v)) for at, v in self.taken if at > since
        ]
        if not found:
            raise self.NVMLError
        return 1, found


def test_the_busy_share_is_that_since_the_last_reading() -> None:
    machine = Machine(torch.device("cpu"))
    assert machine.read().keys() == {"memory/peak_rss"}
    machine.load = (Driver((10, 0), (20, 50), (30, 100)), "gpu")
    assert machine.read()["gpu/busy"] == 0.5
    assert "gpu/busy" not in machine.read()
    machine.load[0].taken += ((40, 100), (50, 80))
    assert machine.read()["gpu/busy"] == 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_its_memory(tmp_path: Path) -> None:
    rows = train("star", tmp_path / "run", "device=cuda")
    assert all(0 < row["memory/peak_gpu"] < 2**40 and 0 <= row.get("gpu/busy", 0) <= 1 for row in rows)
    assert account(rows)["machine"]["peak_gpu"] == rows[-1]["memory/peak_gpu"]


def test_a_part_without_signal_trains_nothing() -> None:
    both = Term(PLAIN.terms[0].estimator, (Author.POLICY, Author.EXPERT))
    some, statistics = TrainedLeaf(1.0, 1, 1.0, None), StepStatistics(2, rate=0.0)
    chosen = Selection([[{1: some, 2: some}, {}], [{2: some, 3: some}, {}]], [{3}, set()])
    mix = Mix((*PLAIN.terms, both))
    for learns in (True, False):
        statistics.add_fates(chosen, mix, learns)
    assert statistics.fates == [{1: 1, 2: 1 + 2, 3: 4 + 8}, {}, {1: 4, 2: 4 + 8, 3: 4 + 8}, {}]
