"""The notebook in docs/: committed without outputs, and run from top to bottom with few steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert not [cell.source for cell in cells if cell.outputs or cell.execution_count is not None]


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
    assert len(drawn) == 4
    assert all("<svg" in html and "<script" not in html for html in drawn)
    assert any("image/png" in out.get("data", {}) for out in shown), "the reward is plotted"
    assert any("├──" in out.get("text", "") for out in shown), "a tree as text"
