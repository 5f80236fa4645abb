"""What the viewer makes of tokens and of files that change: characters split over tokens, torn and replaced lines."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from ramulus.core import store
from ramulus.core.task import Task
from ramulus.core.tree import Tree, column
from ramulus.look.viewer.files import Changed, Fence, Lines, Metrics
from ramulus.look.viewer.picture import paint, picture
from ramulus.look.viewer.text import Text
from ramulus.look.viewer.tree_json import Outline, step_row, texts, tree_json
from viewer_runs import EOS, small_tree, tokenizer, tokens, write

MIXED = "Größe 日本語 👩‍👩‍👧 e\u0301 ∑ \u202e ok\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer().save(str(path))
    return Text(path)


def test_a_character_is_shown_at_the_token_that_completes_it(text: Text) -> None:
    assert text.pieces([], tokens("aü日b")) == ["a", "", "ü", "", "", "日", "b"]
    assert text.pieces(tokens("a") + tokens("日")[:1], tokens("日")[1:]) == ["", "日"]
    assert text.pieces([], tokens("日")[:2]) == ["", "\ufffd"], "a text that ends inside a character says so"
    assert text.pieces([], tokens("日")[:2], last=False) == ["", ""], "what follows completes it"


def test_pieces_joined_are_the_whole(text: Text) -> None:
    row = [*tokens(MIXED * 20), EOS]
    assert "".join(text.pieces([], row)) == text.whole(row) == MIXED * 20 + "<eos>"
    assert "".join(text.pieces(row[:-30], row[-30:])) == text.after([(row[:-30], row[-30:], True)])[0]


@given(st.lists(st.integers(0, 255), max_size=60), st.integers(0, 60))
def test_pieces_of_any_bytes_joined_are_the_whole(text: Text, row: list[int], at: int) -> None:
    whole = text.whole(row)
    assert "".join(text.pieces([], row)) == whole == bytes(row).decode(errors="replace")
    above, below = row[:at], row[at:]
    head = text.after([([], above, not below)])[0]
    if below:
        assert head + text.after([(text.context(lambda n: above[-n:]), below, True)])[0] == whole
        assert head + "".join(text.pieces(above, below)) == whole


@given(st.integers(0, 10_000))
def test_the_texts_of_a_path_joined_are_the_path(text: Text, seed: int) -> None:
    rng = random.Random(seed)
    tree = Tree.plant(Task("t", tuple(tokens("日?")), "日?"))
    places = [tree.root]
    for _ in range(12):
        above = rng.choice(places)
        if above.parent is not None and len(above.tokens) > 1:
            above = tree.cut(above, rng.randrange(1, len(above.tokens)))
        places.append(write(tree, above, "".join(rng.choices("aü日👩 ", k=3)).encode()[: rng.randint(1, 9)]))
    outline = Outline(tree)
    said = dict(zip((node.id for node in outline.nodes), texts(outline, text), strict=True))
    for leaf in tree.leaves():
        assert "".join(said[node.id] for node in leaf.line()) == text.whole(leaf.prefix())


def test_a_decoder_that_leaves_out_the_first_space(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1, "c": 2}, merges=[]))
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path / "tokenizer.json")
    assert text.whole([0, 1, 2, 0]) == "a bc a"
    assert text.pieces([], [0, 1, 2, 0]) == ["a", " b", "c", " a"]
    assert text.pieces([0], [1, 2]) == [" b", "c"]
    assert text.after([([0], [1, 2], True)]) == [" bc"]


def test_without_a_tokenizer_ids_are_shown() -> None:
    text = Text(None)
    assert text.pieces([7], [1, 23]) == ["⟨1⟩", "⟨23⟩"]
    assert text.after([([7], [1, 23], False)]) == ["⟨1⟩⟨23⟩"]


def test_text_is_decoded_by_special_tokens_or_without(text: Text) -> None:
    assert text.whole([*tokens("a"), EOS], special=False) == "a"


def test_why_is_said_where_growth_began() -> None:
    tree = Tree.plant(Task("t", (1,), "t"))
    first = write(tree, tree.root, "abcdefgh", why="first")
    late = tree.graft(first, 2, why="fallback")
    early = tree.graft(first, 4, why="3.10 nats")
    late.tokens, early.tokens = column([65], "i"), column([66], "i")
    rows = {node["id"]: node for node in tree_json(tree, Text(None))["nodes"]}
    assert rows[first.id]["why"] == "continues"
    assert (rows[late.id]["why"], rows[early.id]["why"]) == ("fallback", "3.10 nats")
    top = first.line()[1]
    assert top is not first
    assert rows[top.id]["why"] == "first"
    assert "rebranched" in step_row(tree, 0)["flags"]


@pytest.mark.parametrize(
    ("rewards", "flag", "rate"), [((0.0, 0.0), "all_wrong", 0.0), ((1.0, 1.0), "all_right", 1.0), ((0.0, 1.0), "mixed", 0.5)]
)  # fmt: skip
def test_flags(rewards: tuple[float, ...], flag: str, rate: float) -> None:
    tree = Tree.plant(Task("t", (1,), "t"))
    for reward in rewards:
        write(tree, tree.root, "a", finish="eos", reward=reward, why="star", verdict={"correct": reward})
    row = step_row(tree, 3)
    assert (row["flags"], row["pass_rate"], row["index"]) == ([flag], rate, 3)


@pytest.mark.parametrize(("rewards", "flags"), [((0.25, 0.75), ["mixed"]), ((0.5, 0.5), []), ((-1.0, 2.0), ["mixed"])])
def test_a_reward_on_a_scale_is_a_number_and_neither_right_nor_wrong(rewards: tuple[float, ...], flags: list[str]) -> None:
    tree = Tree.plant(Task("t", (1,), "t"))
    for reward in rewards:
        write(tree, tree.root, "a", finish="eos", reward=reward, why="star")
    row = step_row(tree, 0)
    assert (row["flags"], row["pass_rate"], row["correct"], row["reward"]) == (flags, None, 0, pytest.approx(sum(rewards) / 2))
    drawn = picture(tree, lambda tokens: "", paint(tree, "value"))
    assert "<circle" not in drawn, "full and hollow circles say right and wrong"
    assert all(f">{reward:.2g}<" in drawn for reward in rewards)


def test_a_tree_without_paths_has_no_pass_rate() -> None:
    row = step_row(Tree.plant(Task("t", (1,), "t")), 0)
    assert (row["paths"], row["pass_rate"], row["flags"], row["reuse"]) == (0, None, [], 0.0)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[str], Lines]:
    return lambda name: Lines(tmp_path / name, Fence([tmp_path]))


def whole(lines: Lines) -> list[bytes]:
    lines.refresh()
    return lines.read(range(len(lines.spans)))


def test_lines_are_read_as_they_come(lines: Callable[[str], Lines], tmp_path: Path) -> None:
    made, path = lines("a"), tmp_path / "a"
    assert whole(made) == []
    path.write_bytes(b'{"a":1}\n\n  \n{"b"')
    assert whole(made) == [b'{"a":1}\n']
    with open(path, "ab") as file:
        file.write(b":2}")
    assert whole(made) == [b'{"a":1}\n', b'{"b":2}'], "whole without its newline"
    with open(path, "ab") as file:
        file.write(b'\n{"c":3}\n')
    edition = made.edition
    assert whole(made)[2:] == [b'{"c":3}\n']
    assert made.edition == edition


def test_long_lines_across_blocks(lines: Callable[[str], Lines], tmp_path: Path) -> None:
    parts = [b"x" * size + b"\n" for size in (3_000_000, 1 << 20, (1 << 20) - 1, 5)]
    (tmp_path / "a").write_bytes(b"".join(parts))
    assert whole(lines("a")) == parts


def test_another_file_begins_anew(lines: Callable[[str], Lines], tmp_path: Path) -> None:
    made, path = lines("a"), tmp_path / "a"
    path.write_bytes(b"one\ntwo\n")
    whole(made)
    edition = made.edition
    path.write_bytes(b"uno\n")
    assert whole(made) == [b"uno\n"]
    assert made.edition != edition
    path.write_bytes(b"eno\ntwo\n")
    assert whole(made) == [b"eno\n", b"two\n"], "as long as before or longer, with other content"
    (tmp_path / "b").write_bytes(b"eno\ntwo\nthree\n")
    (tmp_path / "b").replace(path)
    assert len(whole(made)) == 3
    path.unlink()
    assert whole(made) == []
    with pytest.raises(Changed):
        made.read([2])


def test_nothing_outside_the_fence(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "in" / "metrics.jsonl").symlink_to(tmp_path / "secret.jsonl")
    fence = Fence([tmp_path / "in"])
    assert Metrics(tmp_path / "in" / "metrics.jsonl", fence).refresh() == []
    assert not fence.has(tmp_path / "in" / ".." / "secret.jsonl")
    assert fence.json(tmp_path / "secret.jsonl") is None
    with pytest.raises(FileNotFoundError):
        fence(tmp_path / "in" / "metrics.jsonl")


def test_rows_that_are_none_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\nnot json\n[2]\n{"no": 3}\n{"step": 4}\n')
    rows = Metrics(tmp_path / "metrics.jsonl", Fence([tmp_path])).refresh()
    assert [row["step"] for row in rows] == [1, 4]


def test_tasks_with_fields_like_columns(tmp_path: Path) -> None:
    """A task whose own fields look like a node's columns is read all the same."""
    from ramulus.look.viewer.api import Api
    from ramulus.look.viewer.runs import Shelf

    tree = small_tree(0)
    odd = Task("x", (97,), 'says "entropy":[1] and [', "", extra={"entropy": [[1, 2], 3], "kept": [1]})
    odd_tree = Tree.plant(odd)
    write(odd_tree, odd_tree.root, "a", finish="eos", reward=1.0)
    store.write(tmp_path / "odd.jsonl", [odd_tree, tree])
    api = Api(Shelf([tmp_path / "odd.jsonl"]))
    rows = api.steps({"run": "odd", "step": "0"})
    assert [row["text"] for row in rows] == [odd.text, "1+1?"]
    assert (rows[0]["reward"], rows[0]["pass_rate"]) == (1.0, None)
