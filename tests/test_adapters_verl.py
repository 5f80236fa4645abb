"""Trees inside verl: its agent loop, its own registries of advantages and losses, its DataProto; skipped where verl is not installed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forests import forest
from ramulus import (
    Behavior,
    Clip,
    Estimator,
    GlobalLocal,
    GroupMean,
    LocalEngine,
    Mix,
    Request,
    Sampling,
    Segments,
    StopRule,
    SubgroupMean,
    Term,
)
from ramulus.adapters.flat import flat_paths
from ramulus.adapters.verl import TreeAdvantage, TreeLoss, knowing_trees, register
from ramulus.core import store
from ramulus.learn.advantage.gae import GAE
from ramulus.learn.objective.leaf_weight import SequenceRatio
from ramulus.learn.objective.mix import ConstantLength, TokenMean
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.model import characters
from ramulus.learn.policy.torch_policy import TorchPolicy
from test_equivalence_model import record
from tiny import build

pytest.importorskip("verl", reason="verl is not installed")
PATHS, LENGTH = 4, 16
SEGMENTS = Segments(width=PATHS, depth=4, length=4, branching=2, first=2)
CREDITS = {"treepo": SubgroupMean(), "treerl": GlobalLocal(unbranched=True), "grpo": GroupMean(std=True)}


def as_batch(trees: list[Any], dtype: torch.dtype = torch.float64) -> tuple[Any, list[Any], list[Any]]:
    """The graded paths as verl's trainer has them before advantages: its DataProto, what the agent loop says of each row, and the paths."""
    from verl import DataProto

    paths = flat_paths(trees, [GroupMean()([tree])[0] for tree in trees])
    rows = {(path.tree, path.leaf.id) for path in paths}
    for i, leaf in ((i, leaf) for i, tree in enumerate(trees) for leaf in tree.leaves()):
        leaf.reward = leaf.reward if (i, leaf.id) in rows else None  # demonstrations and empty paths are nothing that verl could hold
    widest = max(len(path.tokens) for path in paths)

    def padded(lines: list[list[float]]) -> torch.Tensor:
        return torch.tensor([[*line, *[0.0] * (widest - len(line))] for line in lines], dtype=dtype)

    rewards = [[0.0] * (len(path.tokens) - 1) + [path.leaf.reward] for path in paths]
    behavior = [[a + b for node in path.leaf.line()[1:] for a, b in zip(*sampled(node), strict=True)] for path in paths]
    heat = [path.temperatures for path in paths]
    tensors = {
        "token_level_rewards": padded(rewards), "response_mask": padded([list(map(float, path.learned)) for path in paths]),
        "old_log_probs": padded(behavior), "temperature": padded(heat),
    }  # fmt: skip
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": [trees[path.tree].task.id for path in paths]})
    said = []
    for i, path in enumerate(paths):
        first = i == 0 or paths[i - 1].tree != path.tree
        tree = trees[path.tree]
        said.append({"ramulus_uid": tree.task.id, "ramulus_leaf": path.leaf.id, "ramulus_tree": store.dump(tree).decode() if first else None})
    return data, said, paths


def sampled(node: Any) -> tuple[list[float], list[float]]:
    """Log-probs of a node's tokens, and what truncation left; zeros where nobody sampled them."""
    size = len(node.tokens)
    return (list(node.logprobs), list(node.kept)) if len(node.logprobs) else ([0.0] * size, [0.0] * size)


@pytest.mark.parametrize("name", CREDITS)
def test_the_registered_advantage_on_a_real_batch(name: str) -> None:
    from verl.trainer.ppo.ray_trainer import compute_advantage

    trees = forest(4, tempered=True)
    register(f"here-{name}", Estimator(Clip(), Behavior(), CREDITS[name]))
    data, said, paths = as_batch(trees)
    with knowing_trees(said):
        data = compute_advantage(data, adv_estimator=f"here-{name}", config={})
    right = flat_paths(trees, CREDITS[name](trees))
    assert any(any(path.advantages or ()) for path in right)
    for line, path, mask in zip(data.batch["advantages"], right, data.batch["response_mask"], strict=True):
        wanted = torch.tensor(path.advantages, dtype=torch.float64)
        torch.testing.assert_close(line[: len(wanted)], wanted * mask[: len(wanted)], rtol=0, atol=1e-12)
        assert not line[len(wanted) :].any()
    assert len(paths) == len(right) > 8


@pytest.mark.parametrize(("mode", "normaliser"), [("token-mean", TokenMean()), ("seq-mean-token-sum-norm", ConstantLength(32))])
def test_the_gradient_is_that_of_ramulus_on_the_same_trees(mode: str, normaliser: Any) -> None:
    """Through a real model in float64: verl's rows, its advantages, its loss with ours in it, against one packed update."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.trainer.ppo.ray_trainer import compute_advantage

    trees, model, rule = forest(7, tempered=True), build("qwen2", double=True), Estimator(Clip(0.2, 0.28), Behavior(), SubgroupMean())
    record(model, trees, 7)
    data, said, paths = as_batch(trees)
    mix = Mix((Term(rule, normaliser=normaliser),))
    policy = TorchPolicy(model)
    for batch in pack(trees, mix.credit(trees), mix, dtype=torch.float64):
        policy.accumulate(mix, batch)
    ours = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()

    register("ours", rule)
    with knowing_trees(said):
        data = compute_advantage(data, adv_estimator="ours", config={})
    heat = data.batch["temperature"].clamp(min=1e-3)
    lines = []
    for path, temperature in zip(paths, heat, strict=True):
        logits = model(input_ids=torch.tensor([path.prompt + path.tokens]), use_cache=False).logits[0, len(path.prompt) - 1 : -1]
        tempered = (logits / temperature[: len(path.tokens), None]).log_softmax(-1)
        lines.append(torch.nn.functional.pad(tempered.gather(1, torch.tensor(path.tokens)[:, None])[:, 0], (0, heat.shape[1] - len(path.tokens))))
    config = SimpleNamespace(global_batch_info={"loss_scale_factor": 32} if "norm" in mode else {})
    loss, told = get_policy_loss_fn("ours")(
        old_log_prob=data.batch["old_log_probs"], log_prob=torch.stack(lines), advantages=data.batch["advantages"],
        response_mask=data.batch["response_mask"], loss_agg_mode=mode, config=config, rollout_is_weights=None,
    )  # fmt: skip
    loss.backward()
    assert 0 < told["actor/pg_clipfrac"] < 1
    assert ours
    for name, part in model.named_parameters():
        if part.grad is not None:
            torch.testing.assert_close(part.grad, ours[name], rtol=1e-10, atol=1e-10)


class Client:
    """verl's client before a server, whose tokens are those of a real engine of ours; `asked` are its prompts."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.asked, self.sticky = engine, [], set()

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        self.asked.append(len(prompt_ids))
        self.sticky.add(request_id)
        wanted = Sampling(sampling_params["max_tokens"], sampling_params["temperature"], sampling_params["top_p"], max(sampling_params["top_k"], 0))
        rule = StopRule(frozenset(sampling_params["stop_token_ids"]))
        [segment] = await self.engine.sample([Request(tuple(prompt_ids), wanted, rule, sampling_params["seed"])])
        return TokenOutput(token_ids=list(segment.tokens), log_probs=list(segment.logprobs), extra_fields={"global_steps": 5})


def loop_of(client: Client, branching: dict[str, Any] | None, sessions: int = PATHS) -> Any:
    """The agent loop, instantiated as verl's worker does it from the entry of an agent loop file."""
    import hydra
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = characters("0123456789+-=? \n")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rollout = {"n": sessions, "prompt_length": 16, "response_length": LENGTH, "name": "vllm"}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
    entry = OmegaConf.create({"_target_": "ramulus.adapters.verl.TreeAgentLoop"} | ({"branching": branching} if branching else {}))
    return hydra.utils.instantiate(
        entry, trainer_config=DictConfigWrap(config), server_manager=client, tokenizer=tokenizer, processor=None, hf_model_type=None,
        dataset_cls=RLHFDataset, data_config=DictConfigWrap(config.data), tools=ToolListWrap([]),
    )  # fmt: skip


def engine() -> LocalEngine:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=19, max_position_embeddings=128, eos_token_id=1, pad_token_id=0, bos_token_id=None, **shape))
    return LocalEngine(model.eval(), slots=16, memory=2**24)


def sessions_of(client: Client, branching: dict[str, Any] | None, sessions: int, **sampling: Any) -> list[Any]:
    """What the sessions of one prompt end with, each by an agent loop of its own, all at once."""

    async def all_of_them() -> list[Any]:
        await client.engine.load(None, client.engine.version + 1)
        fields = {"raw_prompt": [{"role": "user", "content": "1+2="}], "uid": "u1", "global_steps": 5}
        told = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True} | sampling
        loops = [loop_of(client, branching) for _ in range(sessions)]
        return list(await asyncio.gather(*(loop.run(dict(told), session_id=i, **fields) for i, loop in enumerate(loops))))

    return asyncio.run(all_of_them())


def test_the_sessions_of_a_prompt_are_the_paths_of_one_tree() -> None:
    client = Client(engine())
    told = {"_target_": "ramulus.Segments", "width": PATHS, "depth": 4, "length": 4, "branching": 2, "first": 2}
    outputs = sessions_of(client, told, PATHS)
    trees = [store.load(out.extra_fields["ramulus_tree"].encode()) for out in outputs if out.extra_fields["ramulus_tree"]]
    assert len(trees) == 1
    leaves = trees[0].leaves()
    assert [out.response_ids for out in outputs] == [leaf.response() for leaf in leaves]
    assert [out.extra_fields["ramulus_leaf"] for out in outputs] == [leaf.id for leaf in leaves]
    drawn = sum(len(node.tokens) for node in trees[0].walk()) - len(trees[0].root.tokens)
    assert drawn < sum(len(out.response_ids) for out in outputs), "what paths share was sampled once"
    assert client.sticky == {"u1"}
    assert max(client.asked) > min(client.asked) == len(outputs[0].prompt_ids)
    assert {node.version for node in trees[0].walk() if node.parent} == {5}
    for out in outputs:
        row = out.as_dict()
        assert row["rollout_log_probs"].tolist() == out.response_logprobs
        assert len(out.response_logprobs) == len(out.response_ids) == len(out.response_mask) <= LENGTH


def test_sessions_without_a_path_end_without_a_row_and_other_numbers_are_a_star() -> None:
    """Two paths where rollout.n is 4; and three sessions, as a validation may have, of a sampler of trees."""
    two = {"_target_": "ramulus.Star", "n": 2}
    assert [isinstance(out, list) for out in sessions_of(Client(engine()), two, PATHS)] == [False, False, True, True]
    three = sessions_of(Client(engine()), None, 3)
    assert len({tuple(out.response_ids) for out in three}) == 3
    with pytest.raises(ValueError, match=r"set rollout\.n=6"):
        sessions_of(Client(engine()), {"_target_": "ramulus.Star", "n": 6}, PATHS)


def test_what_verl_cannot_tell_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="value, which verl does not compute"):
        TreeAdvantage(GAE())
    with pytest.raises(ValueError, match="weighs paths"):
        TreeLoss(Estimator(Clip(), Behavior(), GroupMean(), leaf=SequenceRatio()))
    with pytest.raises(ValueError, match="trainer_mode=ramulus_sync"):
        TreeAdvantage(GroupMean())(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(Exception, match="which verl does not compute"):  # hydra wraps it in one of its own
        loop_of(Client(engine()), {"_target_": "ramulus.AttentionForks", "roots": 2})


def test_the_trainer_tells_the_advantage_of_its_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own V1 step from rows in its queue to advantages in it; the queue is a table here, as a real one wants a cluster."""
    import numpy as np
    import transfer_queue
    from omegaconf import OmegaConf
    from tensordict import NonTensorStack, TensorDict
    from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base

    trees, rule = forest(4), Estimator(Clip(), Behavior(), SubgroupMean())
    register("queued", rule)
    _, said, paths = as_batch(trees)

    def nested(lines: list[list[float]]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(line) for line in lines], layout=torch.jagged)

    table = TensorDict({
        "uid": NonTensorStack(*[trees[path.tree].task.id for path in paths]), "extra_fields": NonTensorStack(*said),
        "response_mask": nested([list(map(int, path.learned)) for path in paths]),
        "rm_scores": nested([[0.0] * (len(path.tokens) - 1) + [float(path.leaf.reward or 0)] for path in paths]),
    }, batch_size=[len(paths)])  # fmt: skip
    written: dict[str, Any] = {}
    monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda keys, partition_id, select_fields: table.select(*select_fields, strict=False).clone())
    monkeypatch.setattr(transfer_queue, "kv_batch_put", lambda keys, partition_id, fields: written.update(fields.items()))
    monkeypatch.setattr(trainer_base, "tq", transfer_queue)
    trainer = object.__new__(get_trainer_cls("ramulus_sync"))
    trainer.config = OmegaConf.create({
        "algorithm": {"use_kl_in_reward": False, "adv_estimator": "queued", "gamma": 1.0, "lam": 1.0, "rollout_correction": None},
        "actor_rollout_ref": {"rollout": {"n": PATHS}},
    })  # fmt: skip
    keys = [f"{trees[path.tree].task.id}_{i}_0" for i, path in enumerate(paths)]
    trainer._compute_advantage(transfer_queue.KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train"), metrics={})
    right = flat_paths(trees, SubgroupMean()(trees))
    for line, path in zip(written["advantages"].unbind(), right, strict=True):
        np.testing.assert_allclose(line.numpy(), path.advantages, atol=1e-6)
