"""A rival's virtual environment, made at its first use, and the worker process that runs in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

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


class Worker:
    """TRL's GRPOTrainer in its own environment, one step at a time; `settings` are those of `trl_worker.py`."""

    def __init__(self, settings: dict[str, Any], threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        chosen = Path(self.folder.name) / "settings.json"
        chosen.write_text(json.dumps(settings | {"out": self.folder.name, "threads": threads}))
        self.log = open(Path(self.folder.name) / "log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [trl(), HERE / "trl_worker.py", chosen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env=environment, text=True, bufsize=1,
        )  # fmt: skip
        self.spent = 0.0  # CPU seconds of the process, all threads, when it last told
        self.versions = self.answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command, `step`, `save` or `check`, and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the worker; RuntimeError with the end of its log where it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"TRL's worker ended with {self.process.wait()}:\n{self.log.read()[-3000:]}")
        told = json.loads(line)
        self.spent = told.get("spent", self.spent)
        return dict(told)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
