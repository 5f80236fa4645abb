"""Trees as files of other trainers: every leaf's numbers exactly, read by verl's own functions where it is installed, and by prime-rl's types."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forests import forest
from ramulus import Author, Behavior, Clip, Credits, Estimator, GroupMean, Mix, SubgroupMean, Task, Term, Tree
from ramulus.adapters.flat import flat_paths
from ramulus.cli import run
from ramulus.core import store
from ramulus.learn.advantage.subgroup import SegmentValue
from ramulus.learn.packing.annotate import annotate
from ramulus.learn.packing.weights import select

msgspec = pytest.importorskip("msgspec")
pytest.importorskip("tensordict")
ADVANTAGES = {"GroupMean": GroupMean(std=True), "SubgroupMean": SubgroupMean(), "SegmentValue": SegmentValue(segment=2)}


class MicroBatch(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """The nine fields, in order, that prime-rl's MicroBatch begins with (src/prime_rl/transports/batch/types.py at 0f59b241, transport/types.py at
    2487f834); those behind them have defaults. Its reader is msgspec.msgpack.Decoder(type=list[MicroBatch])."""

    input_ids: list[int]
    loss_mask: list[bool]
    advantages: list[float]
    inference_logprobs: list[float]
    position_ids: list[int]
    sequence_lengths: list[int]
    temperatures: list[float]
    env_names: list[str]
    seq_lens: list[int]
    ref_logprobs: list[float] | None = None


def trained(folder: Path, name: str = "SubgroupMean", seed: int = 3) -> tuple[list[Tree], Any]:
    """A run's folder with the trees of steps 1 and 2, as training by this advantage writes them; those of step 2, and their credit."""
    advantage = ADVANTAGES[name]
    mix = Mix((Term(Estimator(Clip(), Behavior(), advantage)),))
    for step in (1, 2):
        trees = forest(seed + step, tempered=True)
        for tree in trees:
            tree.step = step
        credits = mix.credit(trees)
        annotate(trees, mix, credits, select(trees, credits, mix))
        store.write(folder / "1-rl" / "trees" / f"{step:06d}.jsonl", trees)
    (folder / "1-rl" / "metrics.jsonl").write_text("")
    (folder / "run.json").write_text("{}")
    return trees, credits[0]


def expected(trees: list[Tree], credits: Any) -> list[dict[str, Any]]:
    """Every graded path of the policy, walked anew: what each of its tokens is, who wrote it, what it was drawn with and what it is worth."""
    rows = []
    for tree, answer in zip(trees, credits, strict=True):
        for leaf in tree.leaves():
            row: dict[str, Any] = {"tokens": [], "mine": [], "logprobs": [], "temperature": [], "reward": leaf.reward, "values": []}
            own = iter(answer.token[leaf.id] if answer.token is not None and leaf.id in answer.trained() else ())
            for node in leaf.line()[1:]:
                for k, token in enumerate(node.tokens):
                    mine = node.author is Author.POLICY
                    row["tokens"].append(token)
                    row["mine"].append(mine and leaf.id in answer.trained())
                    row["logprobs"].append(node.logprobs[k] if len(node.logprobs) else 0.0)
                    row["temperature"].append(node.column("temperature")[k] if len(node.logprobs) else 1.0)
                    worth = 0.0
                    if row["mine"][-1]:
                        whole = answer.node.get(node.id, 0.0) if answer.node is not None else answer.leaf.get(leaf.id)
                        worth = next(own) if answer.token is not None else whole
                    row["values"].append(worth)
            sampled = any(node.tokens for node in leaf.line() if node.author is Author.POLICY)
            if leaf.author is Author.POLICY and leaf.reward is not None and sampled:
                rows.append(row | {"prompt": list(tree.task.prompt), "leaf": leaf.id})
    return rows


@pytest.mark.parametrize("name", ADVANTAGES)
def test_prime_rl_reads_every_path_as_it_was(name: str, tmp_path: Path) -> None:
    trees, credits = trained(tmp_path / "run", name)
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--trees", "prime-rl"]) == 0
    batches = msgspec.msgpack.Decoder(type=list[MicroBatch]).decode((tmp_path / "out" / "step_2" / "rank_0.bin").read_bytes())
    rows = expected(trees, credits)
    assert len(batches) == len(rows) > 8
    assert any(not all(row["mine"]) for row in rows)
    for batch, row in zip(batches, rows, strict=True):
        before = len(row["prompt"])
        size = before + len(row["tokens"])
        assert batch.input_ids == row["prompt"] + row["tokens"]
        assert batch.loss_mask == [False] * before + row["mine"]
        assert batch.inference_logprobs == [0.0] * before + row["logprobs"]
        assert batch.temperatures[before:] == row["temperature"]
        assert batch.advantages == pytest.approx([0.0] * before + [float(value) for value in row["values"]], abs=1e-12)
        assert batch.position_ids == list(range(size))
        assert batch.sequence_lengths == batch.seq_lens == [size]
        assert len(batch.env_names) == size
    assert (tmp_path / "out" / "step_1" / "rank_0.bin").is_file()


def test_verl_s_cache_of_rollouts_holds_every_path_as_it_was(tmp_path: Path) -> None:
    trees, credits = trained(tmp_path / "run")
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--trees", "verl", "--steps", "2"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2"]
    payload = torch.load(tmp_path / "out" / "2" / "0" / "tq_batch.pt", weights_only=False)
    rows, data = expected(trees, credits), payload["tensordict"]
    assert len(payload["keys"]) == len(payload["tags"]) == len(rows) == len(data)
    parts = {name: data[name].unbind() for name in data.keys() if isinstance(data[name], torch.Tensor)}  # noqa: SIM118
    for i, row in enumerate(rows):
        line = {name: column[i].tolist() for name, column in parts.items()}
        assert line["prompts"] == row["prompt"]
        assert line["responses"] == row["tokens"]
        assert line["input_ids"] == row["prompt"] + row["tokens"]
        assert line["position_ids"] == list(range(len(line["input_ids"])))
        assert line["response_mask"] == line["loss_mask"] == [int(mine) for mine in row["mine"]]
        assert line["rollout_log_probs"] == row["logprobs"]
        assert line["rm_scores"] == [0.0] * (len(row["tokens"]) - 1) + [np.float32(row["reward"])]
        assert line["advantages"] == line["returns"] == [np.float32(value) for value in row["values"]]
        assert payload["tags"][i]["seq_len"] == len(line["input_ids"])
    uids = [key.split("_")[0] for key in payload["keys"]]
    assert len(set(payload["keys"])) == len(rows)
    assert len(set(uids)) == len(trees)
    assert uids == [data["uid"][i] for i in range(len(rows))]
    assert uids == sorted(uids, key=uids.index), "the rows of a tree stand together, as shared prompts are found by their neighbours"


def test_trees_that_nobody_trained_on_have_rewards_and_no_advantages(tmp_path: Path) -> None:
    store.write(tmp_path / "grown.jsonl", forest(5))
    assert run(["export", str(tmp_path / "grown.jsonl"), str(tmp_path / "out"), "--trees", "verl"]) == 0
    data = torch.load(tmp_path / "out" / "0" / "0" / "tq_batch.pt", weights_only=False)["tensordict"]
    assert "advantages" not in data.keys()  # noqa: SIM118
    assert any(part.any() for part in data["response_mask"].unbind())
    with pytest.raises(ValueError, match="no credit"):
        run(["export", str(tmp_path / "grown.jsonl"), str(tmp_path / "other"), "--trees", "prime-rl"])


def test_credit_as_given_is_exact_for_each_path_where_the_written_one_is_a_mean() -> None:
    """Two paths below a shared token that credit it differently: +1 and -3 as given, their mean as written."""
    tree = Tree.plant(Task("t", (1,), "t"))
    trunk = tree.add(tree.root, [2], Author.POLICY, logprobs=[-1.0])
    leaves = [tree.add(trunk, [3 + i], Author.POLICY, logprobs=[-1.0], finish="eos", reward=1.0) for i in range(2)]
    credits = [Credits(token={leaves[0].id: [1.0, 5.0], leaves[1].id: [-3.0, 7.0]})]
    assert [row.advantages for row in flat_paths([tree], credits)] == [[1.0, 5.0], [-3.0, 7.0]]
    mix = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
    annotate([tree], mix, [credits], select([tree], [credits], mix))
    assert [row.advantages for row in flat_paths([tree])] == [[-1.0, 5.0], [-1.0, 7.0]]


def test_several_credits_want_a_name() -> None:
    trees = forest(random.Random(1).randrange(9))
    mix = Mix(tuple(Term(Estimator(Clip(), Behavior(), advantage)) for advantage in (GroupMean(), SubgroupMean())))
    credits = mix.credit(trees)
    annotate(trees, mix, credits, select(trees, credits, mix))
    with pytest.raises(ValueError, match="--credit GroupMean"):
        flat_paths(trees)
    alone = [row.advantages for row in flat_paths(trees, name="SubgroupMean")]
    assert alone == [row.advantages for row in flat_paths(trees, credits[1])]
    with pytest.raises(ValueError, match=r"'GAE'.*GroupMean, SubgroupMean"):
        flat_paths(trees, name="GAE")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "out"], "there is no run at nowhere"),
        (["run", "out", "--steps", "7"], "no trees of step 7: it has those of 1, 2"),
        (["run", "run"], "is there already"),
        (["empty", "out"], "trees_every above 0"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(["export", *words, "--trees", "verl"])
    assert not (tmp_path / "out").exists()


def test_verl_itself_loads_the_cache(tmp_path: Path) -> None:
    """Its reader puts every path into its queue, under the uids of the prompts that the trainer just asked for."""
    pytest.importorskip("verl", reason="verl is not installed")
    from types import SimpleNamespace

    from omegaconf import OmegaConf
    from verl.utils.skip import RolloutTqSkip

    trained(tmp_path / "run")
    config = OmegaConf.create({
        "trainer": {"experiment_name": "e", "project_name": "p", "v1": {"trainer_mode": "sync"}},
        "actor_rollout_ref": {"rollout": {"n": 3}}, "data": {"train_batch_size": 3, "max_response_length": 64, "max_prompt_length": 64},
    })  # fmt: skip
    skip = RolloutTqSkip(SimpleNamespace(action="cache", enable=True, dump_dir=str(tmp_path), steps=[]), config)
    assert run(["export", str(tmp_path / "run"), str(skip._get_project_dump_dir()), "--trees", "verl"]) == 0
    assert skip.has_v1_cache(1)
    assert skip.has_v1_cache(2)
    assert not skip.has_v1_cache(3)
    queue: list[dict[str, Any]] = []
    import sys

    sys.modules["transfer_queue"], there = SimpleNamespace(kv_batch_put=lambda **put: queue.append(put)), sys.modules.get("transfer_queue")
    try:
        assert skip.maybe_load_and_inject(2, ["a", "b", "c"])
    finally:
        sys.modules.pop("transfer_queue") if there is None else sys.modules.__setitem__("transfer_queue", there)
    put, prompts = queue
    assert put["keys"] == [f"{uid}_{session}_0" for uid in "abc" for session in range(3)]
    assert prompts["keys"] == ["a", "b", "c"]
    payload = torch.load(skip._get_v1_inner_dir(2, 0) / "tq_batch.pt", weights_only=False)
    first = [line.tolist() for line in payload["tensordict"]["advantages"].unbind()]
    assert [line.tolist() for line in put["fields"]["advantages"].unbind()][:3] == first[:3]
