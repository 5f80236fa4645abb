"""Checkpoints: everything a run needs to go on bit for bit, written beside the old ones and renamed into place.

A checkpoint is a folder `checkpoints/step-000123` with `model/` (a plain Hugging Face folder), `tensors.safetensors` (optimizer and
the learner's random states) and `state.json` (with those of this process). checksums.json holds the digest of each file. A killed write
leaves a `.part` folder that nobody reads. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ramulus.core.checksums import CHECKSUMS, seal
from ramulus.core.run_folder import path_of, state_of, steps, wrong_with
from ramulus.run.lock import being_read

_FORMAT = 1
MODEL_ALONE = "model-alone"  # the file that marks a checkpoint whose optimizer was not kept


@dataclass(frozen=True)
class Written:
    """A checkpoint whose files are written but not yet on the disk or in their place."""

    folder: Path  # of the stage
    step: int
    there: bool  # one that gives way to it

    @property
    def final(self) -> Path:
        """The checkpoint's folder in the stage, where it stands once it is whole."""
        return path_of(self.folder, self.step)

    @property
    def part(self) -> Path:
        """Where it is until then."""
        return self.final.with_name(f".{self.final.name}.part")


async def write_files(folder: Path, step: int, files: Callable[[Path], Awaitable[dict[str, Any]]], state: dict[str, Any]) -> Written | None:
    """Write the checkpoint of `step`, for `put_in_place` to put in its place; `files` is a learner's `save`, and what it answers is kept as "policy".

    A checkpoint of that step that is there already is kept, which None says, unless its step was still to be evaluated and no longer is.

    Raises OSError, naming the checkpoint that remains, when the disk is full or the write fails.
    """
    written = Written(folder, step, step in steps(folder))
    if written.there and (state.get("pending") is not None or state_of(written.final).get("pending") is None):
        return None
    part = written.part
    with failing_clearly(written):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        state = {"format": _FORMAT, "step": step, "random": Generators.now().plain(), "sealed": True} | state | {"policy": await files(part)}
        (part / "state.json").write_text(json.dumps(state))
    return written


def put_in_place(written: Written) -> None:
    """Have a written checkpoint on the disk and in its place, whole or not at all. Raises OSError as `write_files` does."""
    with failing_clearly(written):
        put(written.part, written.final, written.there)


def put(part: Path, final: Path, there: bool) -> None:
    """Have a finished checkpoint on the disk, in its place."""
    for file in [*sorted(part.rglob("*")), seal(part)]:
        sync(file)
    sync(part)
    if there:
        os.replace(final, final.with_name(f".{final.name}.old.part"))
    os.replace(part, final)
    sync(final.parent)


def bring_back(folder: Path) -> None:
    """Put a checkpoint that was to give way to a newer one of its step back in its place, where a kill came before the newer one was there."""
    for old in (folder / "checkpoints").glob(".step-*.old.part"):
        final = old.with_name(old.name[1:].removesuffix(".old.part"))
        if not final.exists() and (old / "state.json").is_file():
            os.replace(old, final)


@contextmanager
def failing_clearly(written: Written) -> Iterator[None]:
    """Turn a failed write into one sentence, and clear away what it left."""
    folder, part, step = written.folder, written.part, written.step
    try:
        yield
    except Exception as error:
        if not of_the_disk(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        whole = steps(folder)
        whole_one = f"the checkpoint of step {whole[-1]} is whole" if whole else "there is no earlier checkpoint"
        raise OSError(
            f"cannot save step {step} in {part.parent}: {reason}; {whole_one}. Free space, then go on with --resume"
        ) from error


def of_the_disk(error: Exception) -> bool:
    """Whether a write failed for the system's sake; libraries in Rust raise whatever they like, with its number in the text."""
    if isinstance(error, ConnectionError | ChildProcessError):
        return False  # a learner that is lost
    return isinstance(error, OSError | SafetensorError) or "os error" in str(error) or "[Errno" in str(error)


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_old(folder: Path, keep: int, best: int | None, optimizer: bool = True) -> None:
    """Delete all but the last `keep` checkpoints and the best one, and what killed writes left; one that is being read stays until the next time.

    Without `optimizer` all but the last one keep their model alone.
    """
    for step in steps(folder)[:-keep]:
        gone = path_of(folder, step)
        if step != best and not being_read(gone):
            os.replace(gone, gone.with_name(f".{gone.name}.part"))
    for step in [] if optimizer else steps(folder)[:-1]:
        if not being_read(path_of(folder, step)):
            keep_model_alone(path_of(folder, step))
    for part in (folder / "checkpoints").glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def keep_model_alone(checkpoint: Path) -> None:
    """Delete what only going on needs, the optimizer above all; a kill on the way leaves a checkpoint to go on from, or one of a model alone."""
    if not (checkpoint / CHECKSUMS).is_file():
        return  # written before there were checksums
    sealed = json.loads((checkpoint / CHECKSUMS).read_bytes())
    rest = [name for name in sealed if not name.startswith("model/") and name != "state.json"]
    if rest:
        part = checkpoint / f".{CHECKSUMS}.part"
        part.write_text(json.dumps({name: digest for name, digest in sealed.items() if name not in rest}, indent=1))
        os.replace(part, checkpoint / CHECKSUMS)
    if rest or not (checkpoint / MODEL_ALONE).exists():
        (checkpoint / MODEL_ALONE).touch()
        sync(checkpoint)
    for file in checkpoint.iterdir():
        if file.name not in ("model", "state.json", CHECKSUMS, MODEL_ALONE):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


class ModelAlone(ValueError):
    """A checkpoint that was kept without its optimizer: nothing goes on from it."""


class Damaged(ValueError):
    """A checkpoint that cannot be gone on from; says why."""


def read_state(folder: Path, step: int) -> dict[str, Any]:
    """The state of a checkpoint that is whole; all else in its folder is read by whoever builds the model, and by the learner. Raises Damaged and
    ModelAlone."""
    path = path_of(folder, step)
    if (path / MODEL_ALONE).exists():
        raise ModelAlone
    if wrong := wrong_with(path):
        raise Damaged(wrong)
    state = state_of(path)
    if state.get("format", 0) > _FORMAT:
        raise ValueError(
            f"{path} was written by a newer ramulus (format {state['format']}, this one reads {_FORMAT}): upgrade ramulus to resume it"
        )
    return state


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that another one of its step can be written; returns the new place."""
    path, number = path_of(folder, step), 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


@dataclass(frozen=True)
class Generators:
    """The states of the global generators of Python, numpy and torch's CPU, for rewards and rules that draw from them."""

    python: Any
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def now(cls) -> Generators:
        """The states that Python's, numpy's and torch's global generators have now."""
        return cls(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state())

    def restore(self) -> None:
        """Set the three global generators to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)

    def plain(self) -> dict[str, Any]:
        """The three states as JSON, for a checkpoint; a learner keeps those of the process and the devices that it computes on."""
        kind, keys, place, has_gauss, gauss = self.numpy
        numbers = [kind, np.asarray(keys).tolist(), place, has_gauss, gauss]
        return {"python": self.python, "numpy": numbers, "torch": bytes(self.torch.tolist()).hex()}


def restore_random(state: dict[str, Any]) -> None:
    """Set these generators to where the checkpoint found them, after a learner has set those that it keeps; older checkpoints lack torch's."""
    version, internal, gauss = state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["random"]["numpy"]))
    if "torch" in state["random"]:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["random"]["torch"])), dtype=torch.uint8))


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
