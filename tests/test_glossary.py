"""No metric without an entry: of small runs here, of every run of the suite in conftest.py; docs/metrics.md is what the table says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ramulus.look import glossary
from ramulus.look.curves import flat
from ramulus.look.evaluation.measures import report_of, scores_of
from ramulus.run import logbook
from ramulus.run.machine import Machine
from ramulus.tasks.grading_budget import GradingBudget

ROOT = Path(__file__).parents[1]


def test_names_are_listed_once_and_say_something() -> None:
    names = [metric.name for metric in glossary.METRICS]
    assert len(names) == len(set(names))
    for metric in glossary.METRICS:
        assert metric.text.endswith("."), metric.name
        assert metric.good in ("", "up", "down"), metric.name
    assert {metric.group for metric in glossary.METRICS} == {"Learning", "Evaluation", "Tokens and trees", "Seconds", "Machine"}


def test_a_name_is_found_by_its_pattern() -> None:
    assert glossary.unexplained(["step", "reward", "pass@8", "seconds/grow", "pass@", "passes", "seconds/nothing"]) == ["passes", "seconds/nothing"]
    found = glossary.metric_of("maj@16")
    assert found is not None
    assert found.name == "maj@*"


@pytest.mark.parametrize("kind", [["sampled", "greedy"], ["greedy"], ["sampled", "tree"]])
def test_every_number_of_an_evaluation_has_an_entry(kind: list[str]) -> None:
    attempt = {"tokens": 3, "finish": "eos", "reward": 1.0, "correct": 1.0, "verdict": {"answer": "2"}}
    row = {"id": "a", "problem": "1+1?", "answer": "2", "tree_tokens": 9} | {name: [attempt] * 4 for name in kind}
    report = report_of(scores_of([row], [1, 2, 4]), [row])
    names = [name for name in flat({k: v for k, v in report.items() if k != "intervals"}) if "/intervals/" not in name]
    assert len(names) > 4
    assert glossary.unexplained(name.rpartition("/")[2] for name in names) == []


def test_what_only_some_machines_and_graders_write_has_an_entry() -> None:
    source = Path(Machine.read.__code__.co_filename).read_text()
    on_some = set(re.findall(r'"((?:memory|gpu)/[a-z_]+)"', source))
    assert len(on_some) >= 3
    assert glossary.unexplained([*on_some, *GradingBudget(1.0).metrics(), "explained_variance", "answered", "mixed"]) == []


def test_the_rows_of_every_run_in_the_data_have_entries() -> None:
    for line in (ROOT / "tests/data/run-0.1/metrics.jsonl").read_text().splitlines():
        assert glossary.unexplained(flat(json.loads(line))) == []


def test_a_metric_without_an_entry_fails_any_test_that_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(logbook.Logbook.write, "explained", False), "conftest.py watches"
    spoken = {"__name__": "ramulus.run.trainer", "write": logbook.Logbook.write}
    with pytest.raises(AssertionError, match=r"glossary\.py"):
        exec("def told(): write(None, 1, {'nobody_knows': 1.0})\ntold()", spoken)


def test_the_page_is_what_the_table_says() -> None:
    assert (ROOT / "docs/metrics.md").read_text(encoding="utf-8") == glossary.page(), "run `python docs/metrics.py`"
