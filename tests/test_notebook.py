"""The notebook in docs/: committed with its outputs, and run from top to bottom with few steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_with_its_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert len([out for out in outputs if "<svg" in out.get("data", {}).get("text/html", "")]) == 4
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert "/root/" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("RAMULUS_NOTEBOOK_SFT_STEPS", "8")
    monkeypatch.setenv("RAMULUS_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("RAMULUS_NOTEBOOK_OUT", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = read()
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    drawn = [out.data["text/html"] for out in shown if "text/html" in out.get("data", {})]
    assert len([html for html in drawn if "<svg" in html]) == 4
    assert not [html for html in drawn if "<script" in html]
    assert any("treepo 1/2" in out.get("text", "") for out in shown), "what the training says"
    assert any("image/png" in out.get("data", {}) for out in shown), "the reward is plotted"
    assert any("├──" in out.get("text", "") for out in shown), "a tree as text"
