"""wandb, trackio and MLflow by their own packages, offline: rows, names, tags and tables of completions arrive, and a resumed run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ramulus.run import trackers
from ramulus.run.launch import launch
from test_resume import RECIPE, metrics

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
WORDS = ("tracking.project=sums", "tracking.name=mine", "tracking.tags=small,rl", "tracking.every=2", "tracking.completions=3", "seed=5")


@pytest.fixture(autouse=True)
def no_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests put in their place is forgotten."""
    for name in ("wandb", "trackio", "mlflow"):
        if "site-packages" not in str(getattr(sys.modules.get(name), "__file__", "site-packages")):
            monkeypatch.delitem(sys.modules, name)


def trained(out: Path, name: str) -> list[dict[str, Any]]:
    """Two steps, then a resumption to three, with one tracker; the rows of metrics."""
    said = Console(record=True, quiet=False, width=300, file=open(out.with_suffix(".log"), "w"))  # noqa: SIM115
    for steps, resume in ((2, False), (3, True)):
        assert launch(RECIPE, [f"out={out}", f"steps={steps}", f"{name}=true", *WORDS], resume, False, said) == 0
    assert "fails" not in said.export_text()
    assert json.loads((out / "trackers.json").read_text())["sent"][name] == 3
    return metrics(out)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "ml").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = trained(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("sums")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine-seed5"
    assert run.data.tags["small"] == run.data.tags["rl"] == "true"
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)] == [(row["step"], row["reward"]) for row in rows]
    tables = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "completions")]
    assert sorted(tables) == ["000001.json", "000002.json"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "completions/000002.json")).read_text())
    assert len(table["data"]) == 3
    assert {"problem", "completion", "reward"} <= set(table["columns"])


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    told: list[dict[str, Any]] = []
    real = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **how: told.append(how) or real(**how))
    rows = trained(tmp_path / "run", "wandb")
    assert len(rows) == 3
    assert [(how["project"], how["name"], how["tags"], how["group"]) for how in told] == [("sums", "mine-seed5", ["small", "rl"], "rl")] * 2
    assert told[0]["id"] == told[1]["id"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{told[0]['id']}.wandb"))
    assert files
    assert all(file.stat().st_size > 1000 for file in files)
    tables = list((tmp_path / "wandb").glob("offline-run-*/files/media/table/completions*.table.json"))
    assert tables
    assert len(json.loads(tables[0].read_text())["data"]) == 3


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    rows = trained(tmp_path / "run", "trackio")
    (run,) = trackio.Api().runs("sums")
    assert run.name.startswith("mine-seed5-")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    logs = storage.get_logs("sums", run.name)
    assert [row["reward"] for row in logs if "reward" in row] == [row["reward"] for row in rows]
    assert [row["step"] for row in logs if "completions" in row] == [1, 2]


def test_tensorboard_shows_completions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = events.Tensors("completions/text_summary")
    assert [event.step for event in shown] == [1, 2]
    assert b"| step | problem | answer | completion |" in shown[0].tensor_proto.string_val[0]


def test_a_table_cannot_be_broken_by_what_a_model_wrote() -> None:
    text = trackers.markdown([{"completion": "a|b\n<script>x</script>", "reward": 1.0}])
    assert text.splitlines()[-1] == "| a&#124;b<br>&lt;script&gt;x&lt;/script&gt; | 1.0 |"
