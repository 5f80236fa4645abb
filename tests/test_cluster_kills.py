"""Processes of a run on a cluster, killed or hung at seeded moments: the run ends as one that nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engines import KERNELS
from run_cluster_kills import story, wrong_with

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), KERNELS]


def test_a_run_whose_processes_are_killed_ends_where_it_should(tmp_path: Path) -> None:
    dice, blows = random.Random(3), ("sampler", "rank", "hung sampler", "driver")
    story("held", tmp_path / "whole", (), dice)
    struck = story("held", tmp_path / "run", blows, dice)
    assert tuple(blow["kind"] for blow in struck) == blows
    assert wrong_with(tmp_path / "whole", tmp_path / "run") == []

    trees = tmp_path / "run" / "trees" / "000002.jsonl"
    trees.write_text(trees.read_text().replace("1", "2", 1))
    assert wrong_with(tmp_path / "whole", tmp_path / "run") == ["000002.jsonl differs"], "the comparison could not fail"
