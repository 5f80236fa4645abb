"""Samplers and ranks that cannot start on a cluster: a run ends with a sentence that says why, long before its patience does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ramulus import Ray
from ramulus.engine.pool import Lost
from ramulus.run.cluster import connected
from ramulus.run.launch import launch

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_no_start.py")
PATHS = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
SCARCE = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("torch_as_it_was")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = PATHS
    with connected(Ray(samplers=1, store_mb=100)):
        yield


@pytest.mark.parametrize(
    ("variant", "kind", "words"),
    [
        ("missing", ConnectionError, r"a sampler cannot start on [\d.]+: No module named 'nowhere_to_be_found': install there what this machine has"),
        ("memory", MemoryError, r"this is what a sampler on [\d.]+ said when it began"),
        ("killed", Lost, r"sampler 0 was lost while it started: its process on [\d.]+ ended without a word: killed, as by the system when memory"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*another is started in its place")
def test_a_sampler_that_cannot_start_is_a_sentence(cluster: None, tmp_path: Path, variant: str, kind: type[Exception], words: str) -> None:
    began = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        launch(f"{RECIPE}:{variant}", [f"out={tmp_path}/run", "cluster=ray"], True, False, Console(quiet=True))
    assert time.monotonic() - began < 200, "it waited for more than a sure sign"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SCARCE, "sampler 0 was lost while it started: Ray killed its process"),
        ({"PYTHONPATH": "broken"}, "a sampler cannot start: its process on"),
        ({"PYTHONPATH": "broken", "RANKS": "2"}, "rank 1 ended while it started: its process on"),
    ],
    ids=["no memory on its machine", "another ramulus", "another ramulus of ranks"],
)
def test_so_the_command_says(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    """The machine's monitor kills at once, or what is imported there cannot be."""
    pytest.importorskip("ray")
    (tmp_path / "broken" / "ramulus").mkdir(parents=True)
    (tmp_path / "broken" / "ramulus" / "__init__.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    elsewhere = {"PYTHONPATH": str(tmp_path / "broken")} if "PYTHONPATH" in environment else {"PYTHONPATH": PATHS}
    ranks = ["learner=sharded", f"cluster.trainers={environment['RANKS']}"] if "RANKS" in environment else []
    code = f"import os, sys; from ramulus.cli import main; os.environ.update({elsewhere!r}); main(sys.argv[1:])"
    words = ["train", f"{HERE / 'run_small.py'}:grpo", f"out={tmp_path}/run", "cluster=ray", "cluster.store_mb=100", *ranks]
    here = os.environ | environment | {"PYTHONPATH": PATHS}
    done = subprocess.run([sys.executable, "-c", code, *words], env=here, capture_output=True, text=True, timeout=400)
    assert done.returncode == 2, done.stdout + done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith(f"ramulus: {expected}") and "another is started" not in line]
    assert ("libfoo.so.1: cannot open shared object file: install there" in said) == ("PYTHONPATH" in environment)
    assert "Traceback" not in done.stderr
