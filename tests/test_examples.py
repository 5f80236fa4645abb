"""Every file of examples/ runs as it stands, with fewer steps where it has any."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("method", ["grpo", "treepo"])
def test_the_loop_trains(method: str, torch_as_it_was: None, capsys: pytest.CaptureFixture[str]) -> None:
    loop = runpy.run_path(str(EXAMPLES / "loop.py"))
    rewards = asyncio.run(loop["train"](method, steps=2, sft_steps=3, count=2))
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)
    assert f"{method} 2/2" in capsys.readouterr().out


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in tests] == []
