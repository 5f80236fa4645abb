"""What benchmarks drive: a whole step of theirs is a whole step of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compared_runs import two_labels

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


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks of a checkout")
def test_what_is_kept_of_runs_makes_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import results_tables

    folder = two_labels(tmp_path / "whole")
    for i, run in enumerate(sorted(folder.glob("*/seed-*"))):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [row | ({"eval/greedy": row["eval/mean"] / 2} if "eval/mean" in row else {}) | {"grad_norm": 1.0} for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for when, reward in (("before", 0.1), ("after", 0.2 + i / 10)):
            (run / f"evaluation-{when}.json").write_text(json.dumps({"reward": reward, "answers": ["long"] * 9}))
    texts = []
    for folder, more in ((tmp_path / "whole", ["--keep", str(tmp_path / "kept")]), (tmp_path / "kept", [])):
        monkeypatch.setattr("sys.argv", ["results_tables", str(folder), "--baseline", "thrifty", *more])
        results_tables.main()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "| lavish | 3 | 80.0 ± 65.7 |" in texts[0]
    kept = "".join(path.read_text() for path in (tmp_path / "kept").rglob("*.json*"))
    assert "long" not in kept
    assert "grad_norm" not in kept
    assert str(tmp_path) not in kept
