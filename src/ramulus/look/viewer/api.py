"""The viewer's questions and answers: parameters in, plain JSON out, no web server in between."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ramulus.core import store
from ramulus.core.json_object import finite_json
from ramulus.core.tree import Tree
from ramulus.look.cost.ledger import account
from ramulus.look.curves import flat
from ramulus.look.glossary import METRICS
from ramulus.look.viewer.files import Changed, Lines, Metrics
from ramulus.look.viewer.reports import answers_in, difference_rows, step_of, table_rows
from ramulus.look.viewer.runs import Entry, NothingShown, Shelf
from ramulus.look.viewer.text import Text
from ramulus.look.viewer.tree_json import leaf_json, node_json, step_row, tree_json

_COLUMNS = re.compile(
    rb'(?:"(?:logprobs|kept|entropy|temperature)":(?:\[[^\[\]]*\]|\{"\$array":\[[^\[\]]*\[[^\[\]]*\]\]\}),)+'
)  # in a text its quotes would be escaped
METRICS_READ = 12 << 20  # bytes of metrics.jsonl whose rows are kept; as objects they take four times as much
AROUND = 60  # characters either side of what was found
Ask = Mapping[str, str]


class BadParameter(ValueError):
    """A parameter that is missing or no number."""


class Unknown(LookupError):
    """A run, step, tree, node or page that is not there."""


class Kept:
    """The newest answers, up to a total size."""

    def __init__(self, room: int, forget: Callable[[Any], None] = lambda value: None) -> None:
        self.room, self.held, self.forget = room, 0, forget
        self.items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """What is kept under the key; else what `make` answers, with its size."""
        with self.lock:
            if key in self.items:
                self.items.move_to_end(key)
                return self.items[key][0]
        value, size = make()
        self.put(key, value, size)
        return value

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value of some size as the newest one."""
        with self.lock:
            self.held += size - (self.items.pop(key)[1] if key in self.items else 0)
            self.items[key] = (value, size)
            while self.held > self.room and len(self.items) > 1:
                old, freed = self.items.popitem(last=False)[1]
                self.held -= freed
                self.forget(old)


class Api:
    """Answers for every run on the shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.read = Kept(METRICS_READ, forget=Metrics.forget)
        self.trees = Kept(48 << 20)  # bytes of their lines; as objects they take a few times as much
        self.rows = Kept(200_000)  # nodes of the small pictures
        self.words = Kept(64 << 20)  # characters of what was searched
        self.reports = Kept(32 << 20)  # bytes of evaluations
        self.answers: dict[str, Callable[[Ask], Any]] = {
            "runs": self.runs, "metrics": self.metrics, "config": self.config, "ledger": self.ledger,
            "steps": self.steps, "tree": self.tree, "node": self.node, "leaf": self.leaf,
            "search": self.search, "evals": self.evals, "answers": self.answers_of, "differences": self.differences,
            "glossary": self.glossary,
        }  # fmt: skip

    def __call__(self, name: str, ask: Ask) -> bytes:
        """The answer to /api/NAME as JSON in ASCII; BadParameter or Unknown where there is none."""
        if name not in self.answers:
            raise Unknown(f"there is no /api/{name}: known are {', '.join(sorted(self.answers))}")
        try:
            answer = self.answers[name](ask)
        except (Changed, FileNotFoundError) as error:
            raise Unknown(str(error)) from error
        try:
            return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode("ascii")
        except (ValueError, TypeError):  # NaN, an infinity, a set
            return json.dumps(finite_json(answer), separators=(",", ":")).encode("ascii")

    def runs(self, ask: Ask) -> list[dict[str, Any]]:
        """Everything shown; a run whose files cannot be made sense of hides no other."""
        return [self.summary(one) for one in self.shelf.refresh()]

    def summary(self, one: Entry) -> dict[str, Any]:
        """A run in the list; with its `trouble` where it has one."""
        try:
            return one.summary() | {"tokenizer": self.vocabulary(one) is not None}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            text = str(error) if isinstance(error, NothingShown) else f"{type(error).__name__}: {error}"
            trouble = {"id": one.id, "title": one.title, "folder": str(one.path), "trouble": text, "status": "trouble"}
            return trouble | {"live": False, "step": 0, "steps": None, "trees": [], "tokenizer": False}

    def metrics(self, ask: Ask) -> list[dict[str, Any]]:
        """The rows after a step, flat."""
        after = _number(ask, "after", -1)
        return [flat(row) for row in self.rows_of(self.run(ask)) if row["step"] > after]

    def config(self, ask: Ask) -> dict[str, Any]:
        """The stage's settings by dotted path; a part's class is its own value."""
        return settings({name: value for name, value in self.run(ask).config().items() if name != "class"})

    def ledger(self, ask: Ask) -> dict[str, Any]:
        """Where tokens and seconds went."""
        return account(self.rows_of(self.run(ask)))

    def rows_of(self, one: Entry) -> list[dict[str, Any]]:
        """The metrics of a run; of runs that were asked for longest ago they are read again when they are asked for."""
        rows = one.metrics.refresh()
        self.read.put(one.id, one.metrics, one.metrics.lines.end)
        return rows

    def steps(self, ask: Ask) -> list[dict[str, Any]]:
        """The trees of a step in a few numbers and a small picture each."""
        one, step = self.run(ask), _number(ask, "step")
        lines, places = self.places(one, step)
        return [row for i, place in enumerate(places) if (row := self.step_row(lines, place, i)) is not None]

    def step_row(self, lines: Lines, place: int, index: int) -> dict[str, Any] | None:
        """One tree of a step; None for a line that is no tree."""

        def make() -> tuple[dict[str, Any] | None, int]:
            tree = _short(lines.read([place])[0])
            row = step_row(tree, index) if tree is not None else None
            return row, len(row["skeleton"]) if row else 1

        return self.rows.get((lines.path, lines.edition, place, index), make)

    def tree(self, ask: Ask) -> dict[str, Any]:
        """A tree with the text of every node and the means of its columns."""
        return tree_json(self.planted(ask), self.text(self.run(ask)))

    def node(self, ask: Ask) -> dict[str, Any]:
        """One node, token by token."""
        return self.at_node(ask, node_json)

    def leaf(self, ask: Ask) -> dict[str, Any]:
        """The whole response of one path, its answer and its verdict."""
        return self.at_node(ask, leaf_json)

    def at_node(self, ask: Ask, answer: Callable[[Tree, Text, int], dict[str, Any]]) -> dict[str, Any]:
        """An answer about a node of a tree."""
        tree, place = self.planted(ask), _number(ask, "node")
        try:
            return answer(tree, self.text(self.run(ask)), place)
        except KeyError:
            raise Unknown(f"this tree has no node {place}") from None
        except ValueError as error:
            raise BadParameter(str(error)) from None

    def search(self, ask: Ask) -> list[dict[str, Any]]:
        """Where a text stands in nodes and problems, upper and lower case alike, the newest steps first."""
        one, limit = self.run(ask), _number(ask, "limit", 100)
        words = self.text(one)
        wanted = ask.get("q", "").lower()
        if not wanted or limit < 1:
            raise BadParameter("q is the text to search for, limit at least 1")
        hits: list[dict[str, Any]] = []
        for step in reversed(one.tree_steps()):
            lines, places = self.places(one, step)
            for index, place in enumerate(places):
                for node, text in self.texts_of(words, lines, place):
                    if (at := text.lower().find(wanted)) >= 0:
                        hits.append({"step": step, "index": index, "node": node} | excerpt(text, at, len(wanted)))
                    if len(hits) >= limit:
                        return hits
        return hits

    def texts_of(self, words: Text, lines: Lines, place: int) -> list[tuple[int, str]]:
        """(node, text) of every node of a tree, the problem first, as the root's."""

        def make() -> tuple[list[tuple[int, str]], int]:
            tree = _short(lines.read([place])[0])
            if tree is None:
                return [], 1
            nodes = list(tree.walk())
            texts = list(zip((node.id for node in nodes), words.many([node.tokens for node in nodes]), strict=True))
            texts = texts if tree.task.text in texts[0][1] else [(tree.root.id, tree.task.text), *texts]
            return texts, sum(len(text) for _, text in texts) + 100 * len(texts)

        return self.words.get((lines.path, lines.edition, place, words.inner is None), make)

    def evals(self, ask: Ask) -> list[dict[str, Any]]:
        """The evaluations without their answers; `name` tells those of the same step apart."""
        return sorted((row for name, report in self.reports_of(self.run(ask)) for row in table_rows(name, report)), key=lambda row: row["step"])

    def differences(self, ask: Ask) -> list[dict[str, Any]]:
        """The paired differences that `ramulus eval` has found."""
        return [row for _, report in self.reports_of(self.run(ask)) for row in difference_rows(report)]

    def answers_of(self, ask: Ask) -> list[dict[str, Any]]:
        """Every answer of an evaluation; of several at one step, the one called `name`, or the first."""
        one, step, wanted = self.run(ask), _number(ask, "step"), ask.get("name")
        for name, report in self.reports_of(one):
            answers = answers_in(name, report, wanted) if step_of(name, report) == step else None
            if isinstance(answers, list):
                return answers
        raise Unknown(f"{one.title} has no evaluation {'' if wanted is None else repr(wanted) + ' '}at step {step}")

    def reports_of(self, one: Entry) -> Iterator[tuple[str, dict[str, Any]]]:
        """The evaluations of a run by name; a file that is none, or is being written, is left out."""
        for name, path in one.evaluations().items():
            report = self.report(one, path)
            if report is not None:
                yield name, report

    def glossary(self, ask: Ask) -> list[dict[str, Any]]:
        """What every metric means, in the order in which they are drawn."""
        return [asdict(metric) for metric in METRICS]

    def report(self, one: Entry, path: Path) -> dict[str, Any] | None:
        """An evaluation's file; None where it is none, or is being written."""
        try:
            stat = one.fence(path).stat()
        except OSError:
            return None

        def make() -> tuple[dict[str, Any] | None, int]:
            return one.fence.json(path), stat.st_size

        return self.reports.get((path, stat.st_mtime_ns, stat.st_size), make)

    def run(self, ask: Ask) -> Entry:
        """The run that is asked about."""
        if "run" not in ask:
            raise BadParameter("run is missing: give the id of a run, see /api/runs")
        try:
            return self.shelf[ask["run"]]
        except KeyError:
            raise Unknown(f"there is no run {ask['run'][:80]!r} here") from None

    def vocabulary(self, one: Entry) -> Path | None:
        """The tokenizer.json of a run; what the user named goes first."""
        return self.shelf.tokenizer or one.tokenizer()

    def text(self, one: Entry) -> Text:
        """How the tokens of a run become text."""
        return Text(self.vocabulary(one))

    def places(self, one: Entry, step: int) -> tuple[Lines, list[int]]:
        """The file and lines of a step's trees."""
        try:
            return one.trees(step)
        except KeyError:
            raise Unknown(f"{one.title} has no trees of step {step}") from None

    def planted(self, ask: Ask) -> Tree:
        """The tree that is asked about."""
        one, step, index = self.run(ask), _number(ask, "step"), _number(ask, "index")
        lines, places = self.places(one, step)
        if not 0 <= index < len(places):
            raise Unknown(f"{one.title} has {len(places)} trees at step {step}, numbered from 0: there is no {index}")

        def make() -> tuple[Tree, int]:
            line = lines.read([places[index]])[0]
            return store.load(line), len(line)

        try:
            return self.trees.get((lines.path, lines.edition, places[index]), make)
        except store.StoreError as error:
            raise Unknown(f"tree {index} of step {step} cannot be read: {error}") from None


def _number(ask: Ask, name: str, usual: int | None = None) -> int:
    """A whole number among the parameters."""
    text = ask.get(name)
    if text is None and usual is not None:
        return usual
    if text is None or not re.fullmatch(r"-?[0-9]{1,15}", text):
        raise BadParameter(f"{name} must be a whole number, got {text if text is None else repr(text[:40])}")
    return int(text)


def _short(line: bytes) -> Tree | None:
    """A tree without its long columns, which take most of the time to read; None for a line that is no tree."""
    try:
        return store.load(_COLUMNS.sub(b"", line))
    except store.StoreError:
        return None


def excerpt(text: str, at: int, length: int) -> dict[str, Any]:
    """What was found, with some text around it; `at` counts in the excerpt."""
    start = max(at - AROUND, 0)
    return {"excerpt": text[start : at + length + AROUND], "at": at - start, "length": length}


def settings(value: Any, path: str = "") -> dict[str, Any]:
    """A run's JSON by dotted path."""
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return {path: ", ".join(str(item) for item in value) if value else "none"}
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    values = {path: str(value["class"]).rpartition(".")[2]} if "class" in value else {}
    for name, item in value.items():
        if name != "class":
            values |= settings(item, f"{path}.{name}" if path else name)
    return values
