"""Whether the files of a folder are those that were written: their sizes and digests lie beside them in checksums.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
SIDE_BY_SIDE = 4  # files read side by side


def digest_of(path: Path) -> str:
    """The digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of_all(things: Iterable[Any]) -> str:
    """The digest of what things are, one after the other, by their representations; the order in which sets are walked leaves it as it is."""
    hasher = hashlib.blake2b(digest_size=16)
    for thing in things:
        hasher.update(repr(_ordered(thing)).encode())
    return hasher.hexdigest()


def _ordered(thing: Any) -> Any:
    """A thing with lists in place of the sets in it, which every process walks in an order of its own."""
    if isinstance(thing, set | frozenset):
        return sorted(map(_ordered, thing), key=repr)
    if type(thing) is dict:
        return {name: _ordered(value) for name, value in thing.items()}
    if type(thing) in (tuple, list) and not all(type(item) is int for item in thing):
        return type(thing)(map(_ordered, thing))
    return thing


def seal(folder: Path) -> Path:
    """Write checksums.json for all files of a folder; returns its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        digests = list(pool.map(digest_of, files))
    entries = {path.relative_to(folder).as_posix(): [path.stat().st_size, digest] for path, digest in zip(files, digests)}
    (folder / CHECKSUMS).write_text(json.dumps(entries, indent=1))
    return folder / CHECKSUMS


def damage(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """What is wrong with the files whose names are `wanted`, in words; "" where nothing is. Raises FileNotFoundError without checksums.json."""
    try:
        entries = json.loads((folder / CHECKSUMS).read_bytes())
        sealed = {str(name): (int(size), str(digest)) for name, (size, digest) in entries.items() if wanted(name)}
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, (size, _) in sealed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for (name, (_, digest)), actual in zip(sealed.items(), pool.map(lambda name: read_digest(folder / name), sealed)):
            if actual != digest:
                return f"{name} is not what was written" if actual else f"{name} cannot be read"
    return ""


def read_digest(path: Path) -> str:
    """The digest of a file; "" for one that cannot be read."""
    try:
        return digest_of(path)
    except OSError:
        return ""
