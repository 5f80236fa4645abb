"""Trees to JSON lines and back: nothing lost, one tree in memory at a time, damage named."""

from __future__ import annotations

import gc
import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import timeit
import tracemalloc
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramulus.core import store, tagged_json
from ramulus.core.store import StoreError, TornLine, dump, load, read, write
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.run.runtime import encode_quickly

SUFFIX = pytest.mark.parametrize("name", ["trees.jsonl", "trees.jsonl.gz"])

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)
TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(["\ud83d\ude00", "\udc00", "$", "$float", 'a"$tuple":'])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXTS | st.integers() | st.tuples(st.integers(), TEXTS), inner, max_size=3)
    ),
    max_leaves=8,
)
TOKENS = st.lists(st.integers(0, 200_000), max_size=5)


def columns(size: int) -> st.SearchStrategy[Any]:
    """[size] numbers as float32 or as float64."""
    singles = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=size, max_size=size)
    doubles = st.lists(NUMBERS, min_size=size, max_size=size)
    return singles.map(column) | doubles.map(lambda values: column(values, "d"))


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree: empty nodes, odd text, NaN, every author, finished or alive."""
    task = Task(
        id=draw(TEXTS),
        prompt=tuple(draw(TOKENS)),
        text=draw(TEXTS),
        answer=draw(TEXTS),
        demonstrations=tuple(tuple(row) for row in draw(st.lists(TOKENS, max_size=2))),
        extra=draw(st.dictionaries(TEXTS, PLAIN, max_size=3)),
    )
    tree = Tree.plant(task, draw(st.integers(0, 2**63)), step=draw(st.integers(0, 99)), visit=draw(st.integers(0, 3)))
    nodes = [tree.root]
    for _ in range(draw(st.integers(0, 6))):
        tokens = draw(TOKENS)
        node = tree.add(draw(st.sampled_from(nodes)), tokens, draw(st.sampled_from(Author)))
        node.version = draw(st.integers(0, 9))
        node.newest = draw(st.integers(node.version, 9))
        for name in draw(st.sets(st.sampled_from(["logprobs", "kept", "entropy", "temperature"]))):
            setattr(node, name, draw(columns(len(tokens))))
        if draw(st.booleans()):
            node.temperature = draw(NUMBERS)
        node.levels, node.why = draw(st.integers(0, 3)), draw(TEXTS)
        node.reward, node.finish = draw(st.none() | NUMBERS), draw(st.none() | st.sampled_from(["eos", "length"]))
        node.verdict = draw(st.dictionaries(TEXTS, PLAIN, max_size=2))
        node.signals = {name: draw(columns(len(tokens))) for name in draw(st.lists(TEXTS, max_size=1))}
        nodes.append(node)
    tree.rounds = draw(st.integers(0, 4))
    return tree


def exact(value: Any) -> Any:
    """A value in a form whose equality is identity of type and bits: NaN equals NaN, 0.0 is not -0.0, 1 is not 1.0."""
    if isinstance(value, list | tuple):
        return type(value), [exact(item) for item in value]
    if isinstance(value, array):
        return (value.typecode if value else "any"), [exact(item) for item in value]
    if isinstance(value, dict):
        return dict, [(exact(key), exact(item)) for key, item in value.items()]
    return type(value), repr(value)


def description(tree: Tree) -> list[Any]:
    """Everything in a tree, by field."""
    serial = {node: place for place, node in enumerate(tree.walk())}
    rows: list[Any] = [{f.name: getattr(tree, f.name) for f in fields(Tree) if f.init and f.name not in ("task", "root")}]
    rows.append({f.name: getattr(tree.task, f.name) for f in fields(Task)})
    for node in serial:
        plain = {f.name: getattr(node, f.name) for f in fields(Node) if f.name not in ("parent", "children")}
        rows.append(plain | {"up": serial.get(node.parent), "down": [serial[child] for child in node.children]})
    return [exact(row) for row in rows]


def bush(step: int, tokens: int = 200, paths: int = 3, task: str = "t") -> Tree:
    """A tree of some paths with `tokens` sampled tokens each, as a run writes them."""
    rng = random.Random(step)
    tree = Tree.plant(Task(task, (1, 2, 3), "1 + 2"), step=step)
    for _ in range(paths):
        leaf = tree.add(tree.root, [rng.randrange(150_000) for _ in range(tokens)], Author.POLICY)
        leaf.finish, leaf.reward = "eos", 1.0
        leaf.logprobs = column(-rng.expovariate(1) for _ in range(tokens))
        leaf.entropy = column(rng.expovariate(1) for _ in range(tokens))
        leaf.temperature, leaf.kept = column([1.0] * tokens), column([0.0] * tokens)
    return tree


@contextmanager
def encoded(quick: bool) -> Iterator[None]:
    """By json alone, or as a run does it."""
    with mock.patch.object(store, "QUICK", None), mock.patch.object(tagged_json, "FEW_DIGITS", tagged_json.nine_digits):
        if quick:
            pytest.importorskip("orjson")
            encode_quickly()
            assert store.QUICK is not None
            assert tagged_json.FEW_DIGITS is not tagged_json.nine_digits
        yield


@settings(max_examples=60)
@given(trees())
def test_a_line_is_lossless(tree: Tree) -> None:
    """By json and by the quick encoder."""
    lines = []
    for quick in (False, True):
        with encoded(quick):
            lines.append(dump(tree))
    for line in lines:
        assert line.isascii()
        assert line.count(b"\n") == 1
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert description(load(line)) == description(tree)


@settings(max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_the_quick_digits_name_the_same_float32(values: list[float]) -> None:
    numbers = array("f", values)
    with encoded(True):
        assert array("f", tagged_json.FEW_DIGITS(numbers)).tobytes() == numbers.tobytes()


def test_the_quick_encoder_is_used_where_it_can_say_the_same() -> None:
    tree, calls = bush(1), []

    def quick(line: dict[str, object]) -> bytes:
        calls.append(line)
        return encode(line)

    with encoded(True):
        encode = store.QUICK
    with mock.patch.object(store, "QUICK", quick):
        assert description(load(dump(tree))) == description(tree)
        usual = [bush(2, task="\u00e9\u03c0"), bush(3), bush(4)]
        usual[1].root.children[0].verdict["big"] = 2**70
        usual[2].root.children[0].why = "\ud800"
        lines = [dump(tree) for tree in usual]
    assert len(calls) == 4
    with mock.patch.object(store, "QUICK", None):
        assert lines == [dump(tree) for tree in usual], "letters, integers and halves of letters that it says otherwise or not at all"
    assert [description(load(line)) for line in lines] == [description(tree) for tree in usual]


def test_the_description_sees_small_differences() -> None:
    one, other = bush(1), bush(1)
    assert description(one) == description(other)
    other.root.children[0].kept[0] = -0.0
    assert description(one) != description(other)


@SUFFIX
def test_files_are_lossless_and_append(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep" / "folder" / name
    assert write(path, [bush(1), bush(2)]) == 2
    assert write(path, (bush(step) for step in (3,)), append=True) == 1
    assert [description(tree) for tree in read(path)] == [description(bush(step)) for step in (1, 2, 3)]
    assert write(path, [bush(9)]) == 1
    assert [tree.step for tree in read(path)] == [9]


@dataclass(eq=False, slots=True)
class Later(Node):
    """A node of a later version, with one more plain field."""

    shade: list[float] = field(default_factory=list)


def test_a_field_that_comes_later_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(bush(1).task, Later(0, [1, 2], Author.PROMPT, shade=[0.5, math.inf]))
    line = dump(tree)
    with pytest.raises(StoreError, match=r"unknown Node fields \['shade'\]: of a newer ramulus"):
        load(line)
    monkeypatch.setattr(store, "Node", Later)
    root = load(line).root
    assert isinstance(root, Later)
    assert root.shade == [0.5, math.inf]


def test_a_deep_chain_needs_no_recursion(tmp_path: Path) -> None:
    tree = Tree.plant(Task("deep", (1,), ""))
    node = tree.root
    for token in range(4_000):
        node = tree.add(node, [token], Author.POLICY)
    assert description(load(dump(tree))) == description(tree)


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of Python objects that this needed beyond what was there, which the collector leaves alone meanwhile."""
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gc.unfreeze()
    return peak


def one_by_one(trees: Iterable[Tree]) -> Iterator[Tree]:
    """Nothing that could go waits for the collector: trees are cycles."""
    for tree in trees:
        yield tree
        del tree
        gc.collect()


def peaks(path: Path, count: int) -> dict[str, int]:
    """Of writing as many trees, reading them one by one, reading them all, and mending the file after a torn line."""
    found = {"writing": peak_of(lambda: write(path, one_by_one(bush(step, 5, 40) for step in range(count))))}
    found["reading"] = peak_of(lambda: sum(1 for _ in one_by_one(read(path))))
    found["holding"] = peak_of(lambda: list(read(path)))
    torn(path, 20)
    with pytest.warns(TornLine):
        found["mending"] = peak_of(lambda: write(path, [], append=True))
    return found


@SUFFIX
def test_memory_does_not_grow_with_the_trees_of_a_file(tmp_path: Path, name: str) -> None:
    peaks(tmp_path / name, 8)  # what is made once in a process
    few, many = peaks(tmp_path / name, 12), peaks(tmp_path / name, 48)
    for work in ("writing", "reading", "mending"):
        assert many[work] < 1.5 * few[work], f"{work} holds more than a few trees"
    assert many["holding"] > 3 * few["holding"], "the bounds could not fail"


def test_older_formats_are_upgraded_and_newer_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "trees.jsonl", store.FORMAT
    write(path, [bush(1)])
    old = path.read_bytes().replace(b'"step":1', b'"iteration":1')
    monkeypatch.setattr(store, "FORMAT", now + 1)
    monkeypatch.setitem(store.UPGRADES, now, lambda line: line | {"step": line.pop("iteration")})
    path.write_bytes(old)
    write(path, [bush(2)], append=True)
    assert [json.loads(line)["format"] for line in path.read_text().splitlines()] == [now, now + 1]
    assert [description(tree) for tree in read(path)] == [description(bush(1)), description(bush(2))]
    monkeypatch.setattr(store, "FORMAT", now)
    path.write_bytes(dump(bush(1)) + dump(bush(2)).replace(b'"format":%d' % now, b'"format":9'))
    with pytest.raises(StoreError, match=rf"trees.jsonl line 2: format 9 .* newer ramulus.* up to {now}: upgrade"):
        list(read(path))


def test_format_1_is_read_as_it_was(tmp_path: Path) -> None:
    """Its sampled columns are float64, and stay so where the tree is written again."""
    path, values = tmp_path / "trees.jsonl", [-0.1, math.nan, 1e-300]
    node = {"up": 0, "tokens": [4, 5, 6], "author": 1, "logprobs": [-0.1, {"$float": "nan"}, 1e-300], "version": 3}
    node["temperature"] = [0.7] * 3
    nodes = [{"id": 0, "tokens": [1], "author": 0, "levels": 0}, node | {"id": 1}]
    line = {"format": 1, "step": 1, "task": {"id": "t", "prompt": [1], "text": ""}, "nodes": nodes}
    path.write_text(json.dumps(line) + "\n")
    for _ in range(2):
        (tree,) = read(path)
        (leaf,) = tree.leaves()
        assert exact(leaf.logprobs) == exact(column(values, "d"))
        assert (leaf.kept, leaf.entropy, leaf.version, leaf.newest, list(leaf.temperature)) == (None, None, 3, 3, [0.7] * 3)
        assert (leaf.tokens, tree.root.temperature) == (column([4, 5, 6], "i"), 1.0)
        write(path, [tree])


def test_format_2_is_read_with_the_names_of_today(tmp_path: Path) -> None:
    """The reference model's log-probs were `frozen`, and what a schedule ruled out stood in the verdict."""
    tree = bush(2)
    one, other = tree.leaves()[:2]
    one.verdict, other.verdict = {"correct": 1.0, "expanded": 1.0}, {"expanded": 0.0}
    one.signals["frozen"] = column([-1.0] * len(one.tokens), "d")
    path = tmp_path / "trees.jsonl"
    path.write_bytes(dump(tree).replace(b'"format":%d' % store.FORMAT, b'"format":2'))
    for _ in range(2):
        (tree,) = read(path)
        here, there = tree.leaves()[:2]
        assert (tree.unexpanded, here.verdict, there.verdict) == ((other.id,), {"correct": 1.0}, {})
        assert "frozen" not in here.signals
        assert list(here.signals["reference_model"]) == [-1.0] * len(here.tokens)
        write(path, [tree])


def test_sampled_numbers_are_written_in_the_digits_of_a_float32() -> None:
    tree = bush(1, 50)
    whole = json.loads(dump(tree))["nodes"][1]["logprobs"]
    assert max(len(repr(value)) for value in whole) <= 15
    assert column(whole) == tree.leaves()[0].logprobs


def torn(path: Path, cut: int) -> None:
    """Take the last `cut` bytes away."""
    path.write_bytes(path.read_bytes()[:-cut])


@SUFFIX
@pytest.mark.parametrize("cut", [2, 30, 400])
def test_a_torn_last_line_is_reported_and_skipped(tmp_path: Path, name: str, cut: int) -> None:
    path = tmp_path / name
    write(path, [bush(1), bush(2)])
    write(path, [bush(3)], append=True)
    torn(path, cut + 16 * name.endswith("gz"))  # a gzip stream ends with some bytes that hold no data
    with pytest.warns(TornLine, match=f"{name} line 3: the file is cut off"):
        assert [tree.step for tree in read(path)] == [1, 2]
    with pytest.raises(StoreError, match=f"{name} line 3"):
        list(read(path, strict=True))
    with pytest.warns(TornLine):
        write(path, [bush(4)], append=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [description(tree) for tree in read(path)] == [description(bush(step)) for step in (1, 2, 4)]


def test_every_cut_of_a_file_leaves_the_trees_before_it(tmp_path: Path) -> None:
    path, lines = tmp_path / "trees.jsonl", [dump(bush(1, 3)), dump(bush(2, 3))]
    ends = {len(lines[0]) + n for n in (-2, -1, 0, 1, 2)} | {len(lines[0]) + len(lines[1]) + n for n in (-2, -1)}
    for size in sorted({*range(0, len(lines[0]) + len(lines[1]), 23), *ends}):
        path.write_bytes(b"".join(lines)[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TornLine)
            steps = [tree.step for tree in read(path)]
            write(path, [bush(3, 3)], append=True)
        assert steps == [1, 2][: (size >= len(lines[0]) - 1) + (size >= len(lines[0]) + len(lines[1]) - 1)]
        assert [tree.step for tree in read(path, strict=True)] == [*steps, 3]


BROKEN = [
    (b"not json\n", "not JSON"),
    (b"[1, 2]\n", "not a tree"),
    (b'{"step": 1}\n', "`format`"),
    (b'{"format": true}\n', "`format`"),
    (b'{"format": 1}\n', "KeyError 'task'"),
    (b'{"format": 1, "task": {"id": "x", "prompt": [], "text": ""}, "nodes": []}\n', "not a tree"),
    (dump(bush(1)).replace(b'"up":0', b'"up":7', 1), "node 1 hangs under 7"),
    (dump(bush(1)).replace(b'"finish":"eos"', b'"colour":"red"', 1), r"unknown Node fields \['colour'\]"),
    (dump(bush(1)).replace(b'"author":1', b'"author":9', 1), "9 is not a valid Author"),
    (b'\x00\xff\xfe{"format"\n', "not JSON"),
]


@pytest.mark.parametrize(("line", "words"), BROKEN)
def test_a_bad_line_names_the_file_and_the_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_bytes(dump(bush(1)) + line + dump(bush(2)))
    good: Iterator[Tree] = read(path)
    assert next(good).step == 1
    with pytest.raises(StoreError, match=rf"trees.jsonl line 2: .*{words}"):
        next(good)


def test_damaged_gzip_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(StoreError, match="damaged gzip"):
        list(read(path))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: there is no such file"):
        list(read(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("verdict", {"answer": b"12"}, r"Node\.verdict: b'12' is a bytes"),
        ("tokens", [1, object()], r"Node\.tokens: <object .* is a object"),
        ("reward", 1j, r"Node\.reward: 1j is a complex"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named(field: str, value: Any, words: str) -> None:
    tree = bush(1, task="p7")
    setattr(tree.root.children[0], field, value)
    with pytest.raises(StoreError, match=rf"task 'p7': {words}.*use plain"):
        dump(tree)


def test_trees_before_one_that_cannot_be_stored_are_written(tmp_path: Path) -> None:
    trees = [bush(step, task=f"p{step}") for step in range(5)]
    trees[3].root.children[1].verdict["answer"] = b"12"
    with pytest.raises(StoreError, match=r"task 'p3': Node\.verdict: b'12' is a bytes"):
        write(tmp_path / "trees.jsonl", trees)
    assert [tree.task.id for tree in read(tmp_path / "trees.jsonl")] == ["p0", "p1", "p2"]


def test_lines_do_not_depend_on_what_is_written_beside_them(tmp_path: Path) -> None:
    trees = [bush(step, tokens=step % 3, paths=step % 4) for step in range(70)]
    trees[5].root.children[0].signals["odd"] = column([math.inf], "d")
    assert write(tmp_path / "trees.jsonl", iter(trees)) == 70
    assert [description(load(dump(tree))) for tree in trees] == [description(tree) for tree in read(tmp_path / "trees.jsonl")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot write trees to /dev/full: No space left.*another output folder"):
        write("/dev/full", map(bush, range(100)))


def test_appending_to_a_damaged_file_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    content = dump(bush(1)) + b"oops\n" + dump(bush(2))[:-40]
    path.write_bytes(content)
    with pytest.raises(StoreError, match="line 2"):
        write(path, [bush(3)], append=True)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


@SUFFIX
def test_a_killed_writer_loses_nothing_it_flushed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    code = (
        "import itertools, sys; from ramulus.core.store import Writer; from ramulus.core.task import Task\n"
        "from ramulus.core.tree import Tree\n"
        "writer = Writer(sys.argv[1])\n"
        "for step in itertools.count():\n"
        "    writer.write(Tree.plant(Task('t', tuple(range(500)), ''), step=step))\n"
        "    if step == 20: writer.flush(); print('flushed', flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"flushed\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TornLine)
        steps = [tree.step for tree in read(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 20


def test_speed_is_that_of_json() -> None:
    """A tree costs at most twice what its JSON alone costs to write and read: the store adds no loop over tokens."""
    tree = bush(1, 2000)
    line, content = dump(tree), json.loads(dump(tree))
    plain = min(timeit.repeat(lambda: json.loads(json.dumps(content)), timer=time.process_time, number=2, repeat=5))
    ours = min(timeit.repeat(lambda: load(dump(tree)), timer=time.process_time, number=2, repeat=5))
    assert ours < 2 * plain + 0.005, f"{len(line) * 2 / ours / 1e6:.0f} MB/s against {len(line) * 2 / plain / 1e6:.0f}"


def test_gzip_is_smaller(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", [bush(1)])
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == dump(bush(1))
    assert len(packed) < 0.7 * len(dump(bush(1)))
