"""Weights on their way to samplers in other processes: files of safetensors in a folder that all of them read, or where they are."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramulus.engine.weight_bytes import to_bytes


@dataclass(frozen=True)
class Pushed:
    """Weights under a name that nothing else has: a path that servers read, and what its bytes add up to, where we wrote them."""

    path: Path
    version: int
    crc: int | None = None  # of a file of ours
    name: str = field(default_factory=lambda: secrets.token_hex(8))

    def drop(self) -> None:
        """Remove the file, if it is ours."""
        if self.crc is not None:
            with suppress(OSError):
                self.path.unlink()


@dataclass(frozen=True, kw_only=True)
class Held(Pushed):
    """Weights that are sent from where they are, under the condition that they have not been learned further since."""

    tensors: Mapping[str, Any]
    now: Callable[[], int] = field(repr=False)  # their version

    @property
    def changed(self) -> bool:
        """Whether they are other weights by now."""
        return self.now() != self.version

    def drop(self) -> None:
        """Nothing: the tensors are the learner's."""


def pushed(weights: Any, version: int, folder: Path, setting: str = "engine.folder") -> Pushed:
    """A state dict in a file of its own, whole or not at all, or the path that was given; `setting` chooses the folder.

    ValueError where there is nothing to read.
    """
    if isinstance(weights, str | os.PathLike):
        path = Path(weights).absolute()
        if not path.is_file() and not any(path.glob("*.safetensors")):
            raise ValueError(f"there are no safetensors at {path}: load a folder of them, such a file, or tensors")
        return Pushed(path, version)
    if not isinstance(weights, Mapping):
        raise ValueError("an engine in another process cannot read the learner's weights in place: load a folder or tensors")
    body = to_bytes(weights)
    final = folder / f"{version:06d}-{secrets.token_hex(4)}.safetensors"
    part = final.with_suffix(".part")
    try:
        part.write_bytes(body)
        os.replace(part, final)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(f"cannot write weights for the samplers in {folder}: {reason}; make room, or name another {setting}") from error
    return Pushed(final, version, zlib.crc32(body))
