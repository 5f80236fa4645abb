"""Overrides by dotted path: values and types that are taken, and the sentence for those that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pytest

from ramulus.grow.stop import BoxedAnswer, Repeats
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained
from ramulus.run.config.find import find
from ramulus.run.config.override import override
from ramulus.run.config.recipe import AdamW, FinalEvaluation, Run, Weighted
from ramulus.run.config.short_names import NOT_TAKEN, OTHER_NAMES
from ramulus.tasks.chain import ChainSum
from ramulus.tasks.files import File
from ramulus.tasks.gym import Gym
from ramulus.tasks.rewards import ExactAnswer, Overlong


@dataclass(frozen=True)
class Clip:
    low: float = 0.2
    high: float = 0.2


@dataclass(frozen=True)
class Term:
    mask: Any = Clip()
    coefficient: float = 1.0


@dataclass(frozen=True)
class Wide:
    width: int = 8
    branching: int = 2

    def __post_init__(self) -> None:
        if self.width < self.branching:
            raise ValueError(f"width={self.width} is below branching={self.branching}: raise width")


@dataclass(frozen=True)
class Small:
    name: str = "small"
    model: Callable[[], int] | str = Clip()
    branching: Any = field(default_factory=Wide)
    terms: tuple[Term, ...] = (Term(), Term())
    betas: tuple[float, float] = (0.9, 0.999)
    limit: int | None = None
    decay: Literal["constant", "cosine"] = "constant"
    bf16: bool = False
    heat: Any = 1.0
    label: str = ""


def test_values_of_every_type():
    (run,) = override(
        (Small(),),
        [
            "limit=5",
            "decay=cosine",
            "bf16=true",
            "heat=0.7",
            "label=1e3",
            "betas=0.8,0.95",
            "terms.1.mask.high=0.28",
            "model=some/path",
            "branching.width=16",
        ],
    )
    assert (run.limit, run.decay, run.bf16, run.heat, run.label) == (5, "cosine", True, 0.7, "1e3")
    assert run.betas == (0.8, 0.95)
    assert run.terms == (Term(), Term(Clip(0.2, 0.28)))
    assert run.model == "some/path"
    assert run.branching == Wide(16)


def test_none_index_and_later_value_wins():
    (run,) = override((Small(limit=3),), ["limit=None", "betas.1=0.5", "heat=2", "heat=3"])
    assert run.limit is None
    assert run.betas == (0.9, 0.5)
    assert run.heat == 3.0


def test_values_are_validated_together():
    assert override((Small(),), ["branching.branching=12", "branching.width=12"])[0].branching == Wide(12, 12)
    with pytest.raises(ValueError, match=r"branching\.width=1: width=1 is below branching=2"):
        override((Small(),), ["branching.width=1"])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("limit=many", ["limit=many", "'many'", "a whole number or None"]),
        ("limit=2.5", ["'2.5'", "a whole number"]),
        ("bf16=1", ["'1'", "true or false"]),
        ("decay=linear", ["'linear'", "one of constant, cosine"]),
        ("terms.0.coefficient=big", ["terms.0.coefficient=big", "a number"]),
        ("terms.0.coefficient=nan", ["'nan'", "a number"]),
        ("betas=0.9", ["a list like a,b"]),
        ("branching=Star", ["branching is an object, Wide", "branching.width, branching.branching"]),
        ("branching.widht=4", ["no field 'widht'", "Did you mean branching.width?", "width, branching"]),
        ("stepz=4", ["no field 'stepz'", "It has: name, model"]),
        ("terms.2.coefficient=1", ["2 items, numbered from 0 to 1"]),
        ("terms.coefficient=1", ["'coefficient' is none of them", "terms.0.coefficient and terms.1.coefficient are there"]),
        ("limit.x=1", ["limit is None", "no field 'x'"]),
        ("steps", ["is no override", "field=value"]),
        ("=3", ["is no override"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(assignment: str, words: list[str]):
    with pytest.raises(ValueError, match=words[0].replace(".", r"\.").replace("(", r"\(")) as error:
        override((Small(),), [assignment])
    for word in words:
        assert word in str(error.value)


def test_stages_by_name_or_all_that_have_the_field():
    stages = (Small(name="sft", branching=Clip()), Small(name="rl"))
    first, second = override(stages, ["limit=7", "branching.width=4", "rl.bf16=true"])
    assert (first.limit, second.limit) == (7, 7)
    assert first.branching == Clip()
    assert second.branching == Wide(4)
    assert (first.bf16, second.bf16) == (False, True)
    with pytest.raises(ValueError, match="no field 'widht'"):
        override(stages, ["branching.widht=4"])
    with pytest.raises(ValueError, match="no field 'width'"):
        override(stages, ["sft.branching.width=4"])


def test_nothing_is_evaluated():
    (run,) = override((Small(),), ["label=__import__('os').getcwd()"])
    assert run.label == "__import__('os').getcwd()"
    with pytest.raises(ValueError, match="is not a number"):
        override((Small(),), ["heat=__import__('os')"])


# a whole and parts of it, and objects where there was None


def shipped(*assignments: str, recipe: str = "grpo", function: str = "recipe") -> Any:
    made = getattr(find(recipe), function)()
    return override(made if isinstance(made, tuple) else (made,), list(assignments))[-1]


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (("model=a/b", "model.dtype=bfloat16"), "model", Pretrained("a/b", dtype="bfloat16")),
        (("model=a/b", "model.rope.rope_theta=4e4"), "model", Pretrained("a/b", rope={"rope_theta": 4e4})),
        (("evals=held.jsonl", "evals.prompt=question"), "evals", File("held.jsonl", prompt="question")),
        (("evals=gym:chain_sum", "evals.size=7"), "evals", Gym("chain_sum", 7)),
        (("evals.path=held.jsonl", "evals.limit=3"), "evals", File("held.jsonl", limit=3)),
        (("evals=chain",), "evals", ChainSum(100, "test")),
        (("tasks=mine.jsonl", "tasks.demonstration=solution"), "tasks", File("mine.jsonl", demonstration="solution")),
        (("lora.rank=8", "lora.alpha=4"), "lora", Lora(8, 4)),
        (("lora=4", "lora.targets=q_proj,v_proj"), "lora", Lora(4, targets=("q_proj", "v_proj"))),
        (("lora=true",), "lora", Lora()),
        (("rewards=ExactAnswer", "rewards.wrong=-1"), "rewards", ExactAnswer(wrong=-1.0)),
        (
            ("rewards=exactanswer,Overlong", "rewards.1.reward.limit=64", "rewards.1.reward.buffer=8", "rewards.1.weight=0.5"),
            "rewards",
            (Weighted(ExactAnswer()), Weighted(Overlong(64, 8), 0.5)),
        ),
        (("final_evaluation.samples=2", "final_evaluation.tasks=held.jsonl"), "final_evaluation", FinalEvaluation(File("held.jsonl"), 2)),
        (("answer.window=9",), "answer", BoxedAnswer(window=9)),
        (("repetition=true", "repetition.times=3"), "repetition", Repeats(times=3)),
        (("optimizer.betas=0.5,0.6", "optimizer.betas.1=0.7"), "optimizer", AdamW(1e-6, (0.5, 0.7), warmup=10, weight_decay=0.1)),
    ],
)
def test_a_whole_and_its_parts_in_any_order(words: tuple[str, ...], path: str, value: Any):
    for order in (words, words[::-1]):
        assert getattr(shipped(*order), path) == value


def test_a_whole_replaces_what_the_recipe_had_and_a_part_keeps_it():
    kept = shipped("model.path=mine", recipe="sft").model
    assert kept == Pretrained("mine", dtype="bfloat16", max_positions=16384, rope={"rope_theta": 40000.0})
    assert shipped("model=mine", recipe="sft").model == "mine"
    assert shipped("model=mine", "model.dtype=auto", recipe="sft").model == Pretrained("mine", dtype="auto")
    assert shipped("model=mine", "treepo.model.dtype=auto", recipe="quickstart").model == Pretrained("mine", dtype="auto")


def test_a_reward_of_a_file(tmp_path: Any):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\ndef score(task, path):\n    return 0.5\n"
        "@dataclass(frozen=True)\nclass Longer:\n    than: int = 3\n    def __call__(self, task, path):\n"
        "        return float(path.length > self.than)\n"
    )
    assert shipped(f"rewards={tmp_path}/mine.py:score").rewards(None, None) == 0.5
    longer = shipped("rewards.than=5", f"rewards={tmp_path}/mine.py:Longer").rewards
    assert (type(longer).__name__, longer.than) == ("Longer", 5)
    with pytest.raises(ValueError, match=r"rewards=.*mine.py has no function 'nothing' that grades"):
        shipped(f"rewards={tmp_path}/mine.py:nothing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch_size=8"], "Run has no field 'batch_size': schedule.prompts is the number of problems of a step"),
        (["num_train_epochs=3"], "steps = epochs x problems / schedule.prompts"),
        (["gradient_accumulation_steps=3"], "tokens_per_batch what goes through the model at once"),
        (["lr=fast"], "optimizer.lr=fast: 'fast' is not a number"),
        (["betas=0.9,0.95"], "Did you mean optimizer.betas\\?"),
        (["high=0.3"], "Did you mean mix.terms.0.estimator.mask.high\\?"),
        (["evals.prompt=q"], "evals is to be File, which needs path: set evals.path=... as well"),
        (["evals=none", "evals.path=x"], "evals is None, which has no field 'path': say first what it is"),
        (["rewards=Right"], "there is no reward 'Right'.*There are Boxed, ExactAnswer"),
        (["rewards=Format"], "rewards is to be Format, which needs pattern: set rewards.pattern"),
        (["lora=big"], "lora is a rank, 16 say"),
        (["lora.rank=0"], "lora.rank=0: lora.rank must be at least 1"),
        (["pruning.0.share=1"], "pruning has no items: make them in the recipe file"),
        (["evals.path.x=1", "evals.path=held.jsonl"], "evals.path is 'held.jsonl', which has no field 'x'"),
        (["model.dtype=half", "model=a/b"], "'half' is not one of float32, bfloat16"),
        (["seed.x=1"], "seed is 0, which has no field 'x': set seed=value"),
    ],
)
def test_what_cannot_be_is_said_with_a_remedy_that_works(words: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        shipped(*words)


# names that other trainers have for a field


@pytest.mark.parametrize(("path", "names"), OTHER_NAMES.items())
def test_a_short_name_is_its_field(path: str, names: tuple[str, ...]):
    known = path.split("|")[0]
    values = {"optimizer.betas": "0.5,0.6", "optimizer.decay": "cosine", "autocast": "false", "activation_checkpointing": "false"}
    values |= {"tasks": "a.jsonl", "evals": "b.jsonl", "rewards": "ExactAnswer", "lora.targets": "q_proj", "model": "a/b", "model.dtype": "auto"}
    value = values.get(known, "2048")
    set_by_name = shipped(f"{known}={value}", "tokens_per_batch=100000")
    assert set_by_name != shipped("tokens_per_batch=100000")
    for name in names:
        assert shipped(f"{name}={value}", "tokens_per_batch=100000") == set_by_name


def test_a_short_name_is_the_field_that_this_recipe_has():
    assert shipped("num_generations=4", recipe="treepo").branching.width == 4
    with pytest.raises(ValueError, match=r"branching\.n: AttentionForks has no field 'n'.* It has: roots, points"):
        shipped("num_generations=4", recipe="attnrl")
    assert shipped("data=a.jsonl", "tasks.prompt=q", "val_files=b.jsonl", "evals.prompt=q") == shipped(
        "tasks=a.jsonl", "tasks.prompt=q", "evals=b.jsonl", "evals.prompt=q"
    )
    stages = override((find("sft_then_grpo").recipe)(), ["grpo.lr=3e-6"])
    assert [stage.optimizer.lr for stage in stages][1] == 3e-6 != stages[0].optimizer.lr


def test_no_name_is_taken_and_explained_at_once_and_none_hides_a_field():
    names = [name for names in OTHER_NAMES.values() for name in names]
    assert len(set(names)) == len(names)
    assert not {*names, *NOT_TAKEN} & {field.name for field in fields(Run)}
    assert not set(names) & NOT_TAKEN.keys()
