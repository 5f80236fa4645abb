"""Rows of files and Hugging Face datasets as dictionaries, each with the place it came from."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from ramulus.core.json_object import object_in

Rows = Iterator[tuple[str, dict[str, Any]]]  # ("line 3", {...}) or ("row 3", {...}); both count from 1
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def files_of(path: str) -> list[str]:
    """The files that a path stands for: itself, or several with commas between, or those that a pattern such as data/*.jsonl fits, by name.

    Raises FileNotFoundError for a pattern that nothing fits.
    """
    if Path(path).expanduser().exists() or not any(mark in path for mark in ",*?"):
        return [path]
    files: list[str] = []
    for part in (part.strip() for part in path.split(",") if part.strip()):
        fitting = sorted(glob(str(Path(part).expanduser()), recursive=True)) if any(mark in part for mark in "*?") else [part]
        if not fitting:
            raise FileNotFoundError(f"no file fits {part!r} (in {Path.cwd()}): check the pattern")
        files += fitting
    return files


def read_rows(path: str, split: str | None, config: str | None, limit: int | None) -> Rows:
    """The first `limit` rows of a .jsonl, .json, .csv, .tsv or .parquet file, a dataset folder, or a dataset on the hub.

    Raises FileNotFoundError for a path that is not there and ValueError for contents that cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of rows, at least 1, got {limit}")
    if split is not None and (why := no_split(path, split)):
        raise ValueError(f"{path!r} {why}: leave split={split!r} out")
    file = Path(path).expanduser()
    if file.is_file():
        if config is not None:
            raise ValueError(f"{path!r} is a file, which has no configurations: leave config={config!r} out")
        if file.suffix not in READERS:
            raise ValueError(
                f"{path!r} is no {', '.join(READERS)} file: convert it, or give a folder that Hugging Face datasets can load"
            )
        return islice(READERS[file.suffix](file), limit)
    return islice(_dataset(path, file, split, config, limit), limit)


def no_split(path: str, split: str) -> str:
    """Why that split cannot be chosen in a file or folder, the first where there are several; "" where it may be."""
    place = Path(next(iter(files_of(path)), path)).expanduser()
    if place.is_file():
        return "is a file, which has no splits"
    saved = object_in(place / "state.json")  # of one dataset, by save_to_disk
    own = saved.get("_split")
    if not saved or own == split:
        return ""
    return f"was saved as the split {own!r} alone" if own else "was saved as one dataset, which has no splits"


def _jsonl(file: Path) -> Rows:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in _decoded(enumerate(lines, 1), file):
            if line.strip():
                try:
                    row = json.loads(line, object_pairs_hook=partial(_fields, f"{file}, line {number}"))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{file}, line {number} is not JSON ({error.msg} at column {error.colno}): {line[:60]!r}"
                    ) from None
                yield f"line {number}", _object(row, file, f"line {number}")


def _decoded(lines: Iterator[Any], file: Path) -> Iterator[Any]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from None


def _json(file: Path) -> Rows:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=partial(_fields, str(file)))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno} is not JSON ({error.msg}); for one object a line name the file .jsonl"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a JSON {type(rows).__name__}, a list of objects was expected")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _object(row, file, f"row {number}")


def _fields(where: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where two of its fields have one name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{where}: an object has several fields named {twice!r}, of which only the last would be read: rename or remove the others")
    return row


def _object(row: Any, file: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{file}, {where} is a {type(row).__name__}, an object with named fields was expected")
    return row


def _csv(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # for the whole process: Python refuses fields above 128 kB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True, delimiter=_delimiter(file))
        try:
            for number, row in enumerate(_decoded(iter(reader), file)):
                if not number:
                    _check_names(reader.fieldnames or (), file)
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, line {reader.line_num} has more or fewer fields than the {len(reader.fieldnames or ())} of the header"
                    )
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.reader.line_num} is not CSV: {error}") from None


def _check_names(names: Sequence[str], file: Path) -> None:
    """Raise ValueError where two columns have one name; those without a name hold nothing that is asked for."""
    if twice := next((name for name, count in Counter(names).items() if name and count > 1), None):
        raise ValueError(f"{file} has several columns named {twice!r}, of which only the last would be read: rename or remove the others")


def _delimiter(file: Path) -> str:
    """What parts the columns of a CSV file: a tab in .tsv, else the mark that its header has outside quotes, a comma if several or none."""
    if file.suffix == ".tsv":
        return "\t"
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        read, quotes = [], 0
        for line in lines:
            read.append(line)
            quotes += line.count('"')
            if quotes % 2 == 0:
                break  # else a name has a line break in it
    header = re.sub(r'"[^"]*"', "", "".join(read))
    return next((mark for mark in ";\t|" if mark in header and "," not in header), ",")


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f'reading {file} needs pyarrow: pip install "ramulus[data]"') from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_names(table.schema_arrow.names, file)
        number = 0
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def _dataset(path: str, folder: Path, split: str | None, config: str | None, limit: int | None) -> Rows:
    """Rows of a dataset folder (saved by save_to_disk, or of data files) or of a dataset on the hub."""
    on_disk = folder.is_dir()
    if not on_disk and (folder.suffix in READERS or not HUB_NAME.fullmatch(path)):
        raise FileNotFoundError(f"no file or folder {path!r} (in {Path.cwd()}): check the path")
    try:
        import datasets
    except ImportError:
        raise ImportError(f'the dataset {path!r} needs Hugging Face datasets: pip install "ramulus[data]"') from None
    saved = on_disk and any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        dataset = (
            datasets.load_from_disk(str(folder))
            if saved
            else datasets.load_dataset(str(folder) if on_disk else path, config)
        )
    except Exception as error:  # whatever the library or the network raises, the name is what the user can mend
        place = "the folder" if on_disk else "no such folder here, and the hub dataset"
        raise FileNotFoundError(
            f"{place} {path!r} could not be loaded: {type(error).__name__}: {str(error)[:300]}"
        ) from None
    if hasattr(dataset, "keys"):
        splits = list(dataset.keys())
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            what = "several splits" if split is None else f"no split {split!r}"
            raise ValueError(f"the dataset {path!r} has {what}: choose one of {', '.join(splits)} as split")
        dataset = dataset[split]
    if saved and config not in (None, dataset.config_name):
        raise ValueError(f"the dataset {path!r} was saved with the configuration {dataset.config_name!r}: leave config={config!r} out")
    size = len(dataset) if limit is None else min(limit, len(dataset))
    yield from ((f"row {index + 1}", dataset[index]) for index in range(size))
