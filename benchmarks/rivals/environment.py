"""A rival's virtual environment, made at its first use, and the worker process that runs in it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals.worker import Piped
from ramulus.native.memory import LARGE_PAGES

HERE = Path(__file__).parent
HOME = HERE.parent / ".rivals"
CONSTRAINTS = HERE.parent.parent / "constraints.txt"
TRL = "trl==1.16"


def trl() -> Path:
    """The Python of the environment that holds TRL; made where it is missing, with the torch that is installed here."""
    folder = HOME / "trl"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        exact = f"torch=={torch.__version__.split('+')[0]}"
        print(f"making {folder} with {TRL} and {exact}; this happens once", file=sys.stderr, flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            pinned = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("torch==")]
            limits = folder / "constraints.txt"
            limits.write_text("\n".join([*pinned, exact]) + "\n")
            subprocess.run([*install, "-c", limits, exact, TRL], check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"cannot make {folder}: {' '.join(map(str, error.cmd))} ended with {error.returncode}; "
                "see the lines above, or install it there by hand and create the file `installed`"
            ) from error
        done.touch()
    return python


class Worker(Piped):
    """TRL's GRPOTrainer in its own environment, one step at a time; `settings` are those of `trl_worker.py`. `pages`: large ones."""

    def __init__(self, settings: dict[str, Any], threads: int, pages: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory()
        chosen = Path(self.folder.name) / "settings.json"
        chosen.write_text(json.dumps(settings | {"out": self.folder.name, "threads": threads}))
        self.spent = 0.0  # CPU seconds of the process, all threads, when it last told
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"} | ({LARGE_PAGES: "1"} if pages else {})
        super().__init__("TRL's worker", [trl(), HERE / "trl_worker.py", chosen], threads, quiet)
        self.versions = self.hello

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command, `step`, `save` or `check`, and wait for its answer."""
        told = self.asked({"do": do} | arguments)
        self.spent = told.get("spent", self.spent)
        return told

    def close(self) -> None:
        """End the process."""
        super().close()
        self.folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
