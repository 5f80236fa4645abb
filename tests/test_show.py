"""Pictures of trees: where things lie, what a text may do to them (nothing), and where trees are found."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import ramulus
from growing import plant
from ramulus.core import store
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.look.viewer.picture import clean, paint, scale_of
from ramulus.look.viewer.picture import picture as drawn_by
from ramulus.look.viewer.show import Shown, show
from viewer_runs import run_folder, small_tree, tokenizer

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script>\"'&]]><img src=x onerror=y>\x1b[31m\x00\u202e"


def grown(text: str = "two + two?", name: str = "t") -> Tree:
    """Two paths that share four tokens, the first right; a third that was pruned, and a demonstration."""
    tree = Tree.plant(Task(name, (1, 2), text, answer="4"))
    top = tree.add(tree.root, [1, 1, 1, 1], Author.POLICY, entropy=[0.0, 0.5, 1.0, 2.0])
    for reward in (1.0, 0.0):
        leaf = tree.add(top, [2] * 6, Author.POLICY, entropy=[0.1] * 6, finish="eos", reward=reward, why="fork")
        leaf.verdict = {"correct": reward, "answer": EVIL, "credit/GroupMean": reward - 0.5}
    tree.add(tree.root, [3] * 2, Author.POLICY, finish="pruned")
    tree.add(tree.root, [4] * 20, Author.EXPERT, finish="eos", reward=1.0)
    return tree


def picture(tree: Tree, decode, colour: str = "value", alone: bool = False) -> str:
    return drawn_by(tree, decode, paint(tree, colour), alone=alone)


def plain(tokens: list[int]) -> str:
    return "x" * len(tokens)


def bands(drawn: str) -> list[tuple[float, float, float, str]]:
    """(where it begins, where it ends, thickness, colour) of every node."""
    found = []
    for group in ElementTree.fromstring(drawn).iter(f"{SVG}g"):
        for path in group.findall(f"{SVG}path"):
            numbers = [float(x) for x in re.findall(r"-?[\d.]+", path.get("d", ""))]
            found.append((numbers[0], numbers[-1], float(group.get("stroke-width", 0)), path.get("stroke", "")))
    return found


def test_x_is_the_token_thickness_the_paths_and_colour_the_value() -> None:
    top, right, wrong, pruned, shown = bands(picture(grown(), plain))
    px = (shown[1] - shown[0]) / 20
    assert top[1] - top[0] == pytest.approx(4 * px, abs=0.2)
    assert right[0] == pytest.approx(top[1], abs=0.2)
    assert right[1] - right[0] == pytest.approx(6 * px, abs=0.2)
    assert top[2] == 2 * right[2] == 2 * pruned[2] == 2 * shown[2]
    assert right[3] == shown[3]
    assert len({top[3], right[3], wrong[3], pruned[3]}) == 4, "one half, one, none, and no reward at all"


def test_a_column_colours_tokens_one_by_one() -> None:
    tree = grown()
    first = [band for band in bands(picture(tree, plain, "entropy")) if band[2] > 6]
    assert len({colour for *_, colour in first}) == 4
    assert len({colour for *_, colour in bands(picture(tree, plain, "credit"))}) == 4, "plus, minus, their mean, none"
    with pytest.raises(ValueError, match=r"no token has 'advantage': colour by value, credit, entropy"):
        paint(tree, "advantage")
    assert "no token has" in Shown((tree,), plain, "advantage")._repr_html_()


def test_trees_that_are_shown_together_have_one_scale() -> None:
    weak, strong = grown(), grown()
    for leaf in weak.leaves():
        leaf.verdict = {
            name: value / 10 if name.startswith("credit") else value for name, value in leaf.verdict.items()
        }
    scale = scale_of([weak, strong], "credit")
    assert (scale.low, scale.high) == (-0.5, 0.5)
    html = Shown((weak, strong), plain, "credit")._repr_html_()
    assert drawn_by(weak, plain, paint(weak, "credit", scale)) in html
    assert bands(picture(weak, plain, "credit")) == bands(picture(strong, plain, "credit")), (
        "each by itself is as strong"
    )
    assert bands(drawn_by(weak, plain, paint(weak, "credit", scale))) != bands(picture(strong, plain, "credit"))


def test_what_a_model_wrote_stays_text() -> None:
    tree = grown(EVIL)
    for html in (Shown((tree,), lambda tokens: EVIL)._repr_html_(), picture(tree, lambda tokens: EVIL, alone=True)):
        tree_of = ElementTree.fromstring(html)
        assert {element.tag.removeprefix(SVG) for element in tree_of.iter()} <= {
            "svg", "style", "title", "rect", "g", "path", "text", "circle", "div", "b", "span",
        }  # fmt: skip
        assert not [key for element in tree_of.iter() for key in element.attrib if key.startswith(("on", "href"))]
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "\x1b" not in html
    assert "\x1b" not in str(Shown((tree,), lambda tokens: EVIL))
    assert clean("a\x00b\u202ec") == "a\\x00b\\x202ec"
    assert len(clean("y" * 10_000, 100)) < 110


def test_a_picture_is_the_same_every_time_and_knows_dark_and_light() -> None:
    assert picture(grown(), plain) == picture(grown(), plain)
    alone = picture(grown(), plain, alone=True)
    assert "prefers-color-scheme:dark" in alone
    assert "prefers-color-scheme" not in picture(grown(), plain), "a notebook has a theme of its own"


@pytest.mark.parametrize("shape", ["bare", "deep", "wide", "empty nodes"])
def test_trees_of_every_shape_are_drawn(shape: str) -> None:
    tree = plant()
    node = tree.root
    for _ in range({"deep": 3000, "wide": 2000}.get(shape, 0)):
        node = tree.add(node if shape == "deep" else tree.root, [1], Author.POLICY)
    if shape == "empty nodes":
        tree.add(tree.add(tree.root, [], Author.POLICY), [], Author.POLICY, finish="length")
    drawn = ElementTree.fromstring(picture(tree, plain))
    assert float(drawn.get("height", 0)) < 8000
    assert "nan" not in ElementTree.tostring(drawn).decode().lower()


def test_trees_of_a_run_a_file_and_a_list(tmp_path: Path) -> None:
    for stage, step in (("1-sft", 9), ("2-rl", 5), ("2-rl", 10)):
        store.write(
            tmp_path / stage / "trees" / f"{step:06d}.jsonl", [grown(name=f"{stage}-{step}-{i}") for i in range(3)]
        )
    assert [tree.task.id for tree in show(tmp_path).trees] == [f"2-rl-10-{i}" for i in range(3)]
    shown = show(tmp_path, step=5, limit=2)
    assert [tree.task.id for tree in shown.trees] == ["2-rl-5-0", "2-rl-5-1"]
    assert "limit=3" in shown._repr_html_()
    assert "limit=3" in str(shown)
    assert "000005.jsonl" in str(shown)
    file = tmp_path / "1-sft" / "trees" / "000009.jsonl"
    assert len(show(file).trees) == len(show(tmp_path / "1-sft" / "trees").trees) == 3
    assert len(show(iter([grown(), grown()])).trees) == 2
    assert len(show([grown(name="a"), grown(name="b")], pick=lambda tree: tree.task.id == "b").trees) == 1
    assert ramulus.show(grown(), plain).trees[0].task.id == "t"
    assert "1 1 1 1" in str(show(grown())), "tokens, where nobody says how to read them"
    assert repr(show(grown())) == str(show(grown())), "what an interactive session shows"
    with pytest.raises(ValueError, match="no trees of step 7: it has those of 5, 10"):
        show(tmp_path, step=7)
    with pytest.raises(FileNotFoundError, match="trees_every above 0"):
        show(tmp_path / "none")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        show(grown(), limit=0)


def test_stages_are_counted_and_packed_files_found(tmp_path: Path) -> None:
    for stage in ("2-a", "10-b"):
        store.write(tmp_path / stage / "trees" / "000005.jsonl.gz", [grown(name=stage)])
    assert [tree.task.id for tree in show(tmp_path).trees] == ["10-b"]
    assert "000005.jsonl.gz" in str(show(tmp_path / "2-a"))


def test_a_stage_without_a_checkpoint_reads_by_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path / "1-sft")
    store.write(tmp_path / "2-rl" / "trees" / "000005.jsonl", [small_tree()])
    for given in ("", "2-rl", "2-rl/trees", "2-rl/trees/000005.jsonl"):
        assert " xyz " in str(show(tmp_path / given)), given
    monkeypatch.chdir(tmp_path / "2-rl")
    assert " xyz " in str(show("."))


def test_an_evaluation_is_shown_by_its_own_tokenizer(tmp_path: Path) -> None:
    for name in ("chain", "chain-greedy", "chain-tree"):
        store.write(tmp_path / f"{name}.jsonl", [small_tree(0, name), small_tree(3, name)])
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    tokenizer().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    said = str(show(tmp_path))
    assert "chain-tree.jsonl (also here: chain-greedy.jsonl, chain.jsonl)" in said
    assert " xyz " in said
    assert " xyz " in str(show(tmp_path / "chain.jsonl"))
    assert [tree.step for tree in show(tmp_path, step=3).trees] == [3]
    with pytest.raises(ValueError, match="no trees of step 7: it has those of 0, 3"):
        show(tmp_path, step=7)


def test_a_task_called_by_its_text_is_said_once() -> None:
    assert str(show(grown("1+1?", name="1+1?"))).splitlines()[0] == "1+1?"
    assert str(show(grown("1+1?", name="sum"))).splitlines()[0] == "sum  1+1?"


def test_nothing_stored_reaches_a_terminal_as_it_is() -> None:
    tree = grown(EVIL, EVIL)
    for leaf in tree.leaves():
        leaf.finish, leaf.reward = EVIL, EVIL  # type: ignore[assignment]
    said = str(Shown((tree,), lambda tokens: EVIL))
    assert not [c for c in said if not c.isprintable() and c != "\n"]
    assert "\\x1b[31m\\x00\\x202e" in said
    assert said.count("<script>") >= 4
