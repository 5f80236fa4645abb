"""What two evaluations were asked, graded and stopped by is told apart, and means the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from ramulus.core.checksums import digest_of_all
from ramulus.grow.stop import BoxedAnswer
from ramulus.look.curves import sweep_in
from ramulus.run.evaluation.answers import Earlier, earlier, settle
from ramulus.run.evaluation.evaluation import there
from ramulus.run.evaluation.results import EvaluatedModel, differing
from ramulus.run.evaluation.task_sets import PROMPTING, ProblemOptions, TaskSets, ending_text
from ramulus.run.sweep.sweep import recipes_and_labels
from ramulus.run.trackers import plain_name

BASE: dict[str, Any] = {"samples": 4, "temperature": 1.0, "weights": "a"}


@pytest.mark.parametrize(
    ("there_too", "here", "expected"),
    [
        ({}, {}, []),
        ({"weights": "b"}, {}, []),
        ({}, {"answer": "BoxedAnswer()"}, ["answer None there, 'BoxedAnswer()' here"]),
        ({"answer": "BoxedAnswer()"}, {}, ["answer 'BoxedAnswer()' there, None here"]),
        ({}, {"rewards": ["1 x boxed"], "code of the rewards": "ab"}, ["rewards None there, ['1 x boxed'] here"]),
        ({"rewards": ["1 x mine"], "code of the rewards": "ab"}, {"rewards": ["1 x mine"], "code of the rewards": "cd"},
         ["code of the rewards 'ab' there, 'cd' here"]),
        ({"template": "{problem}", "system": None}, {"template": None, "system": "Be brief."},
         ["template '{problem}' there, None here", "system None there, 'Be brief.' here"]),
        ({}, {"template": "{problem}", "examples": "ab"}, []),  # it was not written down then
    ],
)  # fmt: skip
def test_settings_of_either_side_are_named(there_too: dict[str, Any], here: dict[str, Any], expected: list[str]) -> None:
    rival, outcome = Earlier("m", BASE | there_too, {}), EvaluatedModel("n", BASE | here, [])
    assert differing(rival, outcome) == expected
    assert differing(Earlier("m", {"seed": 0}, {}, whole=False), EvaluatedModel("n", BASE | here | {"seed": 0}, [])) == []


def test_what_stands_around_the_problems_is_written_down(tmp_path: Path) -> None:
    shown = tmp_path / "shown.jsonl"
    shown.write_text('{"problem": "1+1?", "answer": "2"}\n')
    asked = ProblemOptions(template="Q: {problem}", examples=str(shown))
    prompting = TaskSets(("chain",), 3, asked).prompting
    assert {name for name, value in prompting.items() if value is not None} == {"template", "examples"}
    assert TaskSets(("chain",), 3, ProblemOptions()).prompting == dict.fromkeys(PROMPTING)
    shown.write_text('{"problem": "1+1?", "answer": "3"}\n')
    assert TaskSets(("chain",), 3, asked).prompting["examples"] != prompting["examples"]
    settle(tmp_path / "former", "m", BASE, {"chain": {"digest": "x"}})
    settle(tmp_path / "former", "m", BASE | prompting, {"chain": {"digest": "x"}})  # it was not written down then
    with pytest.raises(ValueError, match="template was"):
        settle(tmp_path / "former", "m", BASE | {"template": "other"}, {"chain": {"digest": "x"}})


class OwnStop:
    """A rule that is no dataclass."""

    def __call__(self, text: str) -> bool:
        return text.endswith("stop")


def own_stop(text: str) -> bool:
    return text.endswith("stop")


def test_a_rule_of_ones_own_is_the_same_text_in_every_process() -> None:
    assert ending_text(BoxedAnswer()) == repr(BoxedAnswer())
    first, again = ending_text(OwnStop()), ending_text(OwnStop())
    assert first == again
    assert first.startswith("OwnStop {'test_eval_settings.py': ")
    assert "0x" not in first.split(" ")[0] + ending_text(own_stop).split(" ")[0]


def test_the_digest_of_sets_is_the_same_in_every_process() -> None:
    extra = "{'answers': {'1/2', '0.5', 'x'}, 'b': [frozenset({'p', 'q'})]}"
    code = f"from ramulus.core.checksums import digest_of_all; print(digest_of_all([('a', {extra})]))"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(digests) == 1
    former = ("a", (1, 2), "b", {"n": 1, "list": ["x", (3, "y")]})
    assert digest_of_all([former]) == blake2b(repr(former).encode(), digest_size=16).hexdigest()  # as evaluations and runs of before wrote it


def test_the_json_files_of_an_evaluations_folder_stand_for_it(tmp_path: Path) -> None:
    settings = BASE | {"kinds": [], "seed": 0, "max_tokens": 4}
    settle(tmp_path / "base", "m", settings, {})
    (tmp_path / "base" / "results.json").write_text(json.dumps({"model": "m", "tasks": {}}))
    for name in ("", "results.json", "eval.json"):
        assert earlier(tmp_path / "base" / name) == Earlier("m", settings, {})
    (tmp_path / "alone.json").write_text("{}")
    with pytest.raises(ValueError, match=r"name the folder, or the \.json file, that `ramulus eval --out` was given"):
        earlier(tmp_path / "alone.json")


def test_what_is_no_model_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "none"), str(tmp_path / "a.json")):
        with pytest.raises(FileNotFoundError, match=r"there is neither a model nor an evaluation at .*: check --against"):
            there(name)


@pytest.mark.parametrize(
    ("name", "plain"), [("Qwen/grpo-seed0", "Qwen-grpo-seed0"), ("lr:1e-6", "lr-1e-6"), ("50%?", "50"), ("bob's", "bob-s"), ("Ü//", "run")]
)
def test_ids_hold_what_services_take(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_damaged_list_of_a_sweep_costs_its_order_alone(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"labels": [')
    with pytest.warns(UserWarning, match=r"sweep\.json is damaged, so the labels stand in the order of their names"):
        assert sweep_in(tmp_path) == {}
    with pytest.warns(UserWarning, match="the same sweep writes it anew"):
        assert recipes_and_labels(["grpo"], tmp_path)["labels"] == ["grpo"]
