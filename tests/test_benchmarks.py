"""What benchmarks drive: a whole step of theirs is a whole step of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks of a checkout")
@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize("name", ["grpo", "treepo"])
def test_a_step_of_the_benchmarks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.step import Digits, Mine, Setting, random_model

    from ramulus.tasks.problem import Problem

    model = random_model("quickstart", torch.float32, tmp_path / "model")
    problems = tuple(Problem(text, text) for text in (f"{i}0123456789" for i in range(8)))  # letters are beyond this model's tokens
    setting = Setting(model, problems, Digits(), 4, 4, 16, 16, True, 4, 2, 1024, threads=1)
    mine = Mine(setting.run(name, tmp_path), exact=True)
    try:
        for _ in range(2):
            mine.step()
    finally:
        mine.close()
    assert len(mine.metrics) == 2
    assert all(row["paths"] == 16 and row["sampled"] > 0 and row["updates"] for row in mine.metrics)
