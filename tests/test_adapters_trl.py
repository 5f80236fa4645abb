"""Trees inside TRL's GRPOTrainer: the same gradients as ramulus's own on the same trees, for samplers and credits of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ramulus import (
    AttentionForks,
    Behavior,
    Clip,
    EntropyForks,
    Estimator,
    GlobalLocal,
    GroupMean,
    Mix,
    Segments,
    SequenceMean,
    Star,
    SubgroupMean,
    Term,
    TokenGroupMean,
    TokenMean,
    TorchPolicy,
    pack,
)
from ramulus.adapters.trl import TreeRollouts
from ramulus.learn.advantage.gae import GAE
from ramulus.learn.advantage.subgroup import SegmentValue
from ramulus.learn.objective.mix import ConstantLength
from ramulus.learn.policy.model import characters

pytest.importorskip("trl")
LENGTH, PATHS = 16, 4
MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SEGMENTS = Segments(width=PATHS, depth=4, length=4, branching=2, first=2)


def ones(completions: list[str], **others: Any) -> list[float]:
    """How often a completion says 1 or 2."""
    return [float(text.count("1") + text.count("2")) for text in completions]


def trainer_of(folder: Path, branching: Any, advantage: Any = None, model: Any = None, **fields: Any) -> Any:
    """A trainer of sums on a CPU, one batch of two prompts x four paths a step."""
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig

    from ramulus.adapters.trl import TreeGRPOTrainer

    tokenizer = characters("0123456789+-=? \n")
    if model is None:
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None, **MODEL)
        model = Qwen2ForCausalLM(config).float()
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2 * PATHS, "num_generations": PATHS,
        "max_completion_length": LENGTH, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(3) for b in range(4)]})
    return TreeGRPOTrainer(
        model, ones, GRPOConfig(**arguments | fields), data, processing_class=tokenizer, branching=branching, advantage=advantage
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


CASES = {
    "grpo": (Star(PATHS), GroupMean(std=True), "grpo", SequenceMean()),
    "treepo": (SEGMENTS, SubgroupMean(), "dapo", TokenMean()),
    "treepo by segments": (SEGMENTS, SegmentValue(segment=4), "bnpo", TokenMean()),
    "treerl": (EntropyForks(roots=2, points=1, branches=1, closed=None), GlobalLocal(unbranched=True), "dapo", TokenMean()),
    "attnrl": (AttentionForks(roots=2, points=1, branches=1, distance=2), GlobalLocal(unbranched=True), "dr_grpo", ConstantLength(LENGTH)),
    "attnrl, some not trained": (AttentionForks(roots=2, points=1, branches=1, distance=2), GlobalLocal(), "dapo", TokenMean()),
    "hapo": (Star(PATHS), TokenGroupMean(), "dapo", TokenMean()),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_ramulus_on_the_same_trees(name: str, tmp_path: Path) -> None:
    branching, advantage, loss_type, normaliser = CASES[name]
    trainer = trainer_of(tmp_path, branching, advantage, loss_type=loss_type, temperature=0.8)
    model = trainer.model
    same = type(model)(model.config)
    same.load_state_dict(model.state_dict())
    ours = TorchPolicy(same)
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = [{"prompt": prompt} for prompt in ("1+2=", "0+3=") for _ in range(PATHS)]
    trainer._compute_loss(model, trainer._generate_and_score_completions(inputs)).backward()
    forest = trainer.rollout_func.trees
    assert len(forest) == 2
    assert len({leaf.reward for tree in forest for leaf in tree.leaves()}) > 1
    mix = Mix((Term(Estimator(Clip(0.2, 0.2), Behavior(), advantage), normaliser=normaliser),))
    for batch in pack(forest, mix.credit(forest), mix):
        ours.accumulate(mix, batch)
    norm = 0.0
    for (where, theirs), mine in zip(model.named_parameters(), ours.model.parameters(), strict=True):
        assert theirs.grad is not None, where
        assert mine.grad is not None, where
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=2e-6)
        norm += float(mine.grad.norm())
    assert norm > 0.01


def test_every_call_draws_anew_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Star(PATHS), GroupMean(), temperature=1.0)
    prompts = ["1+2="] * PATHS

    def drawn(step: int) -> list[list[int]]:
        trainer.state.global_step = step
        return list(trainer.rollout_func(prompts, trainer)["completion_ids"])

    first, second = drawn(0), drawn(0)
    assert first != second, "the same weights, another call"
    trainer.rollout_func._calls = 0
    assert drawn(0) == first
    trainer.rollout_func._calls = 0
    assert drawn(7) not in (first, second), "a run that goes on after step 7 does not repeat its beginning"


def test_it_learns_and_says_what_was_shared(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, SEGMENTS, learning_rate=1e-2, lr_scheduler_type="constant", max_steps=12, temperature=1.0, steps_per_generation=2)
    trainer.train()
    told = [line for line in trainer.state.log_history if "reward" in line]
    rewards = [float(line["reward"]) for line in told]
    assert rewards[-1] > rewards[0] + 3, rewards
    assert 1 < float(told[0]["trees/reuse_ratio"]) < PATHS
    assert float(told[0]["trees/filled_rows"]) == 0


def test_rows_that_a_tree_leaves_empty_are_in_no_gradient(tmp_path: Path) -> None:
    """Three paths a tree where TRL wants four rows of each prompt: the same gradients as three rows alone would have."""
    trainer = trainer_of(tmp_path, Star(3), GroupMean(), loss_type="dapo")
    batch = trainer._generate_and_score_completions([{"prompt": "1+2="}] * PATHS)
    assert [leaf is None for _, leaf in trainer.rollout_func.rows] == [False] * 3 + [True]
    assert batch["tool_mask"][3].sum() == 0
    assert not batch["advantages"][3].any()
    assert int(batch["num_items_in_batch"]) == sum(len(leaf.response()) for _, leaf in trainer.rollout_func.rows[:3])


def test_completions_are_drawn_by_trl_in_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, SEGMENTS, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.model.eval()
    trainer._generate_and_score_completions([{"prompt": "1+2="}] * 2 + [{"prompt": "2+2="}] * 2)
    assert [len(tree.leaves()) for tree in trainer.rollout_func.trees] == [2, 2]
    assert not trainer.model.training


@pytest.mark.parametrize(
    ("branching", "fields", "message"),
    [
        (Star(6), {}, "num_generations=6"),
        (SEGMENTS, {"repetition_penalty": 1.5}, "repetition_penalty=1.5"),
        (SEGMENTS, {"mask_truncated_completions": True}, "mask_truncated_completions"),
    ],
)
def test_what_trees_cannot_do_there_is_said(branching: Any, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, branching, **fields)
    with pytest.raises(ValueError, match=message):
        trainer._generate_and_score_completions([{"prompt": "1+2="}] * PATHS)


def test_prompts_that_are_cut_apart(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, SEGMENTS)
    with pytest.raises(ValueError, match="3 times where num_generations is 4"):
        trainer._generate_and_score_completions([{"prompt": "1+2="}] * 3)


def test_an_advantage_that_reads_a_signal_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="value"):
        trainer_of(tmp_path, SEGMENTS, GAE())


def test_trees_of_ramulus_in_trls_own_credit(tmp_path: Path) -> None:
    """The sampler alone, as a rollout_func: TRL's advantages, one a row."""
    from trl import GRPOTrainer

    made = trainer_of(tmp_path, SEGMENTS)
    plain = GRPOTrainer(
        made.model, ones, made.args, made.train_dataset, processing_class=made.processing_class, rollout_func=TreeRollouts(SEGMENTS)
    )
    batch = plain._generate_and_score_completions([{"prompt": "1+2="}] * PATHS)
    assert batch["advantages"].shape == (PATHS,)
