"""The viewer's page in a real browser: a real server, real run folders, Debian's chromium without a screen."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("playwright.sync_api")

from playwright import sync_api as playwright

from ramulus.core import store
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.remote.listen import bind as bound_at
from ramulus.look.viewer.api import Api
from ramulus.look.viewer.page import everything, one_file
from ramulus.look.viewer.runs import Shelf
from ramulus.look.viewer.viewer import server
from viewer_runs import add_rows, large_tree, row, run_folder, small_tree, tokens, write

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

EVIL = '<img src=x onerror="window.pwned=1"></script><script>window.pwned=1</script>&lt;b&gt; \u202egnirts שלום \x1b[31m\x00'
WAIT = 15_000  # ms that a slow machine may take


@dataclass
class Seen:
    """A page, and all that must never happen on it."""

    page: Any
    base: str
    faults: list[str] = field(default_factory=list)

    def open(self, place: str = "") -> Any:
        self.page.goto("about:blank")  # so that the same address is opened anew
        self.page.goto(self.base + place)
        return self.page

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def wait(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector).first).to_contain_text(text, timeout=WAIT)

    def at(self, place: str) -> None:
        """Wait for an address whose part after # matches."""
        self.page.wait_for_function("place => new RegExp(place).test(location.hash)", arg=place)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def watched(browser: Any) -> Iterator[Callable[..., Seen]]:
    """Pages whose errors, dialogs and questions to other places fail the test."""
    contexts, pages = [], []

    def opened(base: str, quiet: bool = False, **options: Any) -> Seen:
        context = browser.new_context(viewport={"width": 1280, "height": 720}, **options)
        contexts.append(context)
        seen = Seen(context.new_page(), base)
        seen.page.set_default_timeout(WAIT)
        seen.page.on("pageerror", lambda error: seen.faults.append(f"error: {error}"))
        seen.page.on("dialog", lambda box: (seen.faults.append(f"dialog: {box.message}"), box.dismiss()))
        seen.page.on(
            "console",
            lambda said: seen.faults.append(f"console: {said.text}") if said.type == "error" and not quiet else None,
        )
        seen.page.on(
            "request",
            lambda asked: (
                seen.faults.append(f"asks {asked.url[:90]}")
                if not asked.url.startswith((base.split("#")[0], "data:", "about:"))
                else None
            ),
        )
        pages.append(seen)
        return seen

    yield opened
    for seen in pages:
        assert seen.faults == []
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Real servers in threads; gives the address."""
    running = []

    def started(*given: Path) -> str:
        ready = threading.Event()
        bound = bound_at("127.0.0.1", 0)
        made = server(Api(Shelf(given, None)), "127.0.0.1", bound, lambda address: ready.set())
        thread = threading.Thread(target=made.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert ready.wait(20)
        running.append((made, thread))
        return f"http://127.0.0.1:{bound.getsockname()[1]}/"

    yield started
    for made, thread in running:
        made.should_exit = True
        thread.join(10)


def right_tree(step: int) -> Tree:
    """Both paths right; shorter than the others."""
    tree = Tree.plant(Task("easy", tuple(tokens("2?")), "2?", "2"), step=step)
    for _ in range(2):
        write(
            tree,
            tree.root,
            "2",
            why="star",
            finish="eos",
            reward=1.0,
            verdict={"correct": 1.0, "answer": "2", "credit/SubgroupMean": 0.0},
            version=3,
        )
    return tree


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs; step 10 of the first holds three trees."""
    root = tmp_path_factory.mktemp("two")
    first = run_folder(root / "first")
    run_folder(root / "second", steps=8, trees=(), name="grpo")
    store.write(first / "trees" / "000010.jsonl", [small_tree(10), small_tree(10, "what is ü?"), right_tree(10)])
    return root


@pytest.fixture(scope="module")
def address(serve: Callable[..., str], two: Path) -> str:
    return serve(two)


@pytest.fixture
def seen(watched: Callable[..., Seen], address: str) -> Seen:
    return watched(address)


def first_of(seen: Seen) -> str:
    """The id of the run that has trees."""
    return next(run["id"] for run in seen.page.request.get(seen.base + "api/runs").json() if run["trees"])


def test_curves(seen: Seen) -> None:
    page = seen.open()
    page.get_by_role("link", name="first").click()
    reward = page.locator("figure", has_text="reward")
    seen.wait("figcaption", "reward")
    assert "Mean reward of the policy's graded paths" in reward.locator(".metric").get_attribute("title")
    reward.locator(".plot").hover(position={"x": 60, "y": 50})
    seen.wait(".place", "step ")
    reward.locator(".plot").focus()
    seen.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert "reward" in seen.text("#said")
    assert "step" in seen.text("#said")
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter(x => x > 0).length"
    once = reward.locator("canvas").evaluate(drawn)
    assert once > 0
    page.get_by_role("checkbox", name="second").check()
    playwright.expect(reward.locator('.plot[data-lines="2"]')).to_have_count(1)
    assert reward.locator("canvas").evaluate(drawn) > once
    page.get_by_role("button", name="Log scale").click()
    page.get_by_label("Smoothing").fill("0.9")
    page.get_by_label("Metric").fill("grow")
    playwright.expect(page.locator("figure", has_text="reward")).to_have_count(0)
    assert {"with=", "log=1", "smooth=0.9", "metric=grow"} <= set(
        re.findall(r"with=|log=1|smooth=0\.9|metric=grow", page.url)
    )
    page.reload()
    seen.wait("#metric", "")
    assert page.get_by_role("checkbox", name="second").is_checked()
    assert page.get_by_role("button", name="Log scale").get_attribute("aria-pressed") == "true"


def test_a_click_on_a_curve_opens_the_nearest_trees(seen: Seen) -> None:
    page = seen.open()
    page.get_by_role("link", name="first").click()
    page.locator("figure", has_text="reward").locator(".plot").click(position={"x": 100, "y": 50})
    seen.at("/step/5")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two recipes, three and two seeds; a run that cannot be read; an evaluation."""
    root = tmp_path_factory.mktemp("many")
    for label, seeds in (("grpo", 3), ("treepo", 2)):
        for seed in range(seeds):
            folder = run_folder(root / label / f"seed-{seed}", steps=4 + seed, trees=(), name=label)
            (folder / "metrics.jsonl").unlink()
            for step in range(1, 5 + seed):
                with open(folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row(step) | {"reward": step / 10 + seed, "loss": 1e-9 * step}) + "\n")
    bad = run_folder(root / "bad", trees=())
    (bad / "metrics.jsonl").write_bytes(b"\x00\xff{{{")
    (bad / "run.json").write_text("{")
    (bad / "evals" / "000005.json").write_text("[")
    shutil.rmtree(bad / "evals")
    (bad / "trees").write_text("no folder")
    results = {"model": "mine", "settings": {"seed": 0}, "tasks": {"held": {"problems": 7, "mean@4": 0.25, "intervals": {"mean@4": [0.2, 0.3]}}}}
    gap = {"this": 0.25, "other": 0.5, "difference": -0.25, "interval": [-0.3, -0.2], "within_noise": False}
    results["against"] = {"model": "rival", "tasks": {"held": {"independent": {"mean": gap}}}}
    store.write(root / "eval" / "held.jsonl", [small_tree(0)])
    (root / "eval" / "results.json").write_text(json.dumps(results))
    return root


@pytest.fixture(scope="module")
def table(serve: Callable[..., str], many: Path) -> str:
    return serve(many)


def names(seen: Seen) -> list[str]:
    return [text.rpartition("/")[2] for text in seen.page.locator(".runs-list tbody td:nth-child(2) a").all_inner_texts()]


def test_the_table_of_runs_sorts_filters_and_hides(watched: Callable[..., Seen], table: str) -> None:
    seen = watched(table)
    page = seen.open()
    seen.wait("h1", "Runs")
    assert sorted(names(seen)) == ["bad", "grpo", "held", "treepo"]
    assert "Qwen2.5-0.5B" in seen.text(".runs-list")
    page.locator("[data-sort=reward]").click()
    page.locator("[data-sort=reward]").click()
    assert names(seen)[:2] == ["grpo", "treepo"]  # mean of 0.4, 1.5, 2.6, then of two seeds
    assert "sort=reward&down=1" in page.url
    page.reload()
    seen.wait(".runs-list", "grpo")
    assert names(seen)[:2] == ["grpo", "treepo"]
    page.get_by_role("button", name="3 seeds").click()
    assert len(names(seen)) == 7
    page.get_by_label("Filter").fill("GRPO live")
    playwright.expect(page.locator(".runs-list tbody tr")).to_have_count(4)
    page.get_by_label("Filter").fill("")
    page.get_by_label("Tick many").first.wait_for()
    page.locator(".runs-list tr", has_text="treepo").locator("input").check()
    page.get_by_role("button", name="Hide the ticked").click()
    assert "treepo" not in names(seen)
    page.reload()
    seen.wait(".runs-list", "grpo")
    assert "treepo" not in names(seen)
    page.get_by_role("button", name="Hidden ones too").click()
    assert "treepo" in names(seen)


def test_seeds_are_a_mean_in_a_band(watched: Callable[..., Seen], table: str) -> None:
    seen = watched(table)
    page = seen.open()
    page.locator(".runs-list").get_by_role("link", name="grpo", exact=False).first.click()
    reward = page.locator('.plot[data-metric="reward"]')
    reward.wait_for()
    assert [reward.get_attribute(f"data-{name}") for name in ("lines", "bands")] == ["1", "1"]
    assert "3 seeds" in reward.get_attribute("aria-label")
    reward.focus()
    seen.press("ArrowLeft")
    assert page.locator(".readout .number").first.inner_text() == "1.3"  # of the last step but one that all seeds have
    assert page.locator("figure", has_text="loss").count() == 0  # noise of 1e-9
    assert "loss" in seen.text(".constants")
    page.get_by_role("button", name="Mean and band of 3 seeds").click()
    playwright.expect(page.locator('.plot[data-metric="reward"][data-lines="3"][data-bands="0"]')).to_have_count(1)
    assert "seeds=0" in page.url


@pytest.mark.slow
def test_one_bad_run_hides_no_other(watched: Callable[..., Seen], table: str, many: Path, tmp_path: Path) -> None:
    seen = watched(table)
    page = seen.open()
    seen.wait(".runs-list", "grpo")
    ids = {one["title"].split("/", 1)[1]: one["id"] for one in page.request.get(seen.base + "api/runs").json()}
    page = seen.open(f"#/run/{ids['grpo/seed-0']}?with={ids['bad']}")
    page.locator('.plot[data-metric="reward"]').wait_for()
    for place in ("", "?part=config", "?part=cost", "?part=trees", "/evals"):
        seen.open(f"#/run/{ids['bad']}{place}")
        seen.wait("#crumbs", "bad")
        assert page.locator("main").inner_text()
    out = tmp_path / "page.html"
    out.write_text(one_file(everything(Api(Shelf([many], None)), [])))
    seen = watched(out.as_uri())
    seen.open()
    seen.wait(".runs-list", "grpo")
    assert sorted(names(seen)) == ["bad", "grpo", "held", "treepo"]


def test_the_numbers_of_an_evaluation_are_shown(watched: Callable[..., Seen], table: str) -> None:
    seen = watched(table)
    page = seen.open()
    page.get_by_role("link", name="held").click()
    page.get_by_role("link", name="Evaluations").click()
    seen.wait("main table", "mean@4")
    assert "0.25" in seen.text("main table")
    assert "0.2–0.3" in seen.text("main table")
    assert "k independent samples" in page.locator("th", has_text="mean@4").get_attribute("title")
    page.get_by_text("held: this model and rival").click()
    assert "−0.25" in page.locator("main table").nth(1).inner_text()
    page.get_by_role("link", name="its trees").click()
    seen.at("/step/0")


@pytest.mark.slow
def test_a_link_survives_other_runs_beside_it(watched: Callable[..., Seen], serve: Callable[..., str], table: str, many: Path) -> None:
    seen = watched(serve(many / "grpo" / "seed-1"))
    page = seen.open()
    page.locator('.plot[data-metric="reward"]').wait_for()
    link = page.evaluate("location.hash")
    other = watched(table)
    other.open(link)
    other.wait("#crumbs", "grpo/seed-1")
    assert link.rpartition("-")[2] in other.page.url
    former = "#/run/grpo-seed-1"  # as links were before ids ended in letters of the path
    alone = watched(serve(many / "grpo"))
    alone.open(former)
    alone.wait("#crumbs", "grpo/seed-1")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1366, 390])
def test_pages_fit_a_laptop_and_a_phone(watched: Callable[..., Seen], table: str, width: int) -> None:
    seen = watched(table)
    seen.page.set_viewport_size({"width": width, "height": 768})
    page = seen.open()
    seen.wait(".runs-list", "grpo")
    ids = {one["title"].split("/", 1)[1]: one["id"] for one in page.request.get(seen.base + "api/runs").json()}
    for place in ("", f"#/run/{ids['grpo/seed-0']}", f"#/run/{ids['eval/held']}/evals", f"#/run/{ids['eval/held']}/step/0/tree/0"):
        seen.open(place)
        page.locator("main table, main .plot, main canvas").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
        boxes = page.locator("#bar > :not(#crumbs):visible, #crumbs > *:visible").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect()).filter(r => r.width).map(r => [r.left, r.top, r.right, r.bottom])"
        )
        for i, one in enumerate(boxes):
            assert one[2] <= width + 1, place
            for two in boxes[:i]:
                apart = one[0] >= two[2] - 1 or two[0] >= one[2] - 1 or one[1] >= two[3] - 1 or two[1] >= one[3] - 1
                assert apart, f"two parts of the header overlap at {place}"


def test_configuration_and_cost(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}?part=config")
    seen.wait(".config", "branching.width")
    assert page.locator(".differs").count() == 0
    page.get_by_role("checkbox", name="second").check()
    playwright.expect(page.locator("td.differs")).to_have_count(1)  # the name of the stage
    assert page.locator(".config tbody tr").inner_text().split() == ["name", "treepo", "grpo"]
    page.get_by_role("button", name="Time and tokens").click()
    seen.wait(".stacked", "sampling")
    assert page.locator(".stack").first.get_attribute("aria-label").startswith("Seconds: ")


def cards(seen: Seen) -> list[str]:
    return seen.page.locator(".card .problem").all_inner_texts()


def test_a_step_sorts_and_filters(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/10")
    playwright.expect(page.locator(".card")).to_have_count(3)
    assert cards(seen) == ["1+1?", "what is ü?", "2?"]
    page.get_by_label("Sort by").select_option("length")
    assert cards(seen)[0] == "2?"
    page.locator("#direction").click()
    assert cards(seen)[-1] == "2?"
    page.locator("[data-flag=all_right]").click()
    assert cards(seen) == ["2?"]
    page.locator("[data-flag=mixed]").click()
    assert len(cards(seen)) == 3
    page.locator("[data-flag=demonstration]").click()
    page.locator("[data-flag=pruned]").click()
    page.locator("[data-flag=rebranched]").click()
    assert sorted(cards(seen)) == ["1+1?", "what is ü?"]
    page.reload()
    playwright.expect(page.locator(".card")).to_have_count(2)
    page.get_by_label("Problem").fill("Ü")
    playwright.expect(page.locator(".card")).to_have_count(1)
    page.get_by_label("Problem").fill("nowhere")
    seen.wait(".cards", "Switch one off")
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0)"
    page.get_by_label("Problem").fill("")
    playwright.expect(page.locator(".card")).to_have_count(2)
    page.wait_for_function(f"({drawn})(document.querySelector('canvas.small'))")


def point_at(seen: Seen, node: int) -> None:
    """Move the mouse over the picture until it tells of this node."""
    box = seen.page.locator(".stage").bounding_box()
    for share in (0.75, 0.6, 0.5, 0.4, 0.2):
        for y in range(40, int(box["height"]), 12):
            seen.page.mouse.move(box["x"] + box["width"] * share, box["y"] + y)
            if seen.page.locator(".tip").is_visible() and seen.text(".tip").startswith(f"node {node} "):
                seen.page.mouse.click(box["x"] + box["width"] * share, box["y"] + y)
                return
    raise AssertionError(f"node {node} is nowhere in the picture")


def test_a_click_on_a_node_and_on_a_leaf(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/10")
    page.locator(".card a").first.click()
    seen.wait(".panel h2", "Problem")
    assert "Reference answer 2" in seen.text(".panel")
    point_at(seen, 2)
    seen.wait(".verdict", "Answer read by the verifier")
    assert [row.split("\t") for row in page.locator(".verdict tr").all_inner_texts()][:2] == [
        ["Reference answer", "2"],
        ["Answer read by the verifier", "2"],
    ]
    assert "✓ right" in seen.text(".panel h2")
    assert page.url.endswith("/tree/0/node/2")
    assert seen.text(".text.whole") == "abc=2<eos>"
    seen.wait(".siblings", "node 3")
    assert page.locator(".siblings mark").all_inner_texts() == ["3"]
    page.locator(".siblings button", has_text="node 3").click()
    seen.wait(".panel h2", "✗ wrong")
    page.get_by_role("button", name="Above").click()
    seen.wait(".why", "branches into 2")
    seen.wait(".heat", "c=")
    assert page.locator(".heat span").count() == len("c=") or page.locator(".heat span").count() == len("abc=")


def test_a_reward_on_a_scale_is_a_number_without_a_tick(watched: Callable[..., Seen], serve: Callable[..., str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "scaled")
    tree = Tree.plant(Task("t", tuple(tokens("2?")), "2?", "2"), step=5)
    for reward in (0.25, 0.75):
        write(tree, tree.root, "2", why="star", finish="eos", reward=reward, version=3)
    store.write(folder / "trees" / "000005.jsonl", [tree])
    given = [{"text": "2", "correct": None, "reward": reward, "verdict": {}, "finish": "eos", "tokens": 1} for reward in (0.25, 0.75)]
    report = {"problems": 1, "reward": 0.5, "answers": [{"id": "t", "problem": "2?", "answer": "2", "sampled": given, "greedy": []}]}
    for path in folder.glob("evals/*.json"):
        path.write_text(json.dumps(report))
    seen = watched(serve(folder))
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/5")
    seen.wait(".card .facts", "reward 0.5")
    page.locator(".card a").first.click()
    seen.wait(".panel .lines", "0.25")
    page.locator(".panel .lines button").first.click()
    seen.wait(".panel h2", "reward 0.")
    assert "✓" not in seen.text(".panel")
    assert "right" not in seen.text(".panel h2")
    page = seen.open(f"#/run/{run}/evals/5")
    seen.wait(".problem-row summary", "reward 0.5")
    page.locator(".problem-row summary").first.click()
    seen.wait(".sibling .badge", "reward 0.25")


def test_colours_have_legends(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/10/tree/0")
    seen.wait(".panel h2", "Problem")
    offered = page.locator("#colour").locator("option").evaluate_all("all => all.map(one => one.value)")
    assert {"value", "advantage", "entropy", "temperature", "version", "author", "logprobs"} <= set(offered)
    picture = "() => document.querySelector('.stage canvas').toDataURL()"
    drawn = set()
    for key in offered:
        page.locator("#colour").select_option(key)
        assert page.locator("#legend .legend").count() == 1
        page.wait_for_timeout(60)
        drawn.add(page.evaluate(picture))
    assert len(drawn) >= 5
    assert f"colour={offered[-1]}".replace("/", "%2F") in page.url


def test_a_link_to_a_node_restores_it(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/10/tree/1/node/3?colour=entropy")
    seen.wait(".panel h2", "Path to node 3")
    assert page.locator("#colour").input_value() == "entropy"
    page.evaluate("location.hash = location.hash.replace('node/3', 'node/2')")
    seen.wait(".panel h2", "Path to node 2")


def test_keys(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/10/tree/0")
    seen.wait(".panel h2", "Problem")
    found = []
    for _ in range(6):
        seen.press("l")
        found.append(seen.text(".panel h2").split()[3])
    assert len(set(found)) == 5  # five leaves, and the last one stays
    seen.press("L")
    assert seen.text(".panel h2").split()[3] == found[3]
    seen.press("m", "Home")
    seen.wait(".panel h2", "Problem")
    seen.press("ArrowRight", "ArrowRight")
    below = seen.text(".panel h2")
    seen.press("ArrowDown")
    assert seen.text(".panel h2") != below
    seen.press("ArrowLeft", "ArrowLeft")
    seen.wait(".panel h2", "Problem")
    seen.press("Enter", "+", "-", "0", "Shift+ArrowLeft", "c")
    assert page.locator("#colour").input_value() != "value"
    seen.press("t")
    seen.at("/tree/1")
    seen.press("T")
    seen.at("/tree/0")
    seen.press("S")
    seen.at("/step/5/tree/0")  # the tree of the same problem
    seen.press("s")
    seen.at("/step/10/tree/0")
    seen.press("u")
    seen.at("/step/10$")
    seen.press("u")
    seen.at(f"/run/{run}$")
    seen.press("?")
    seen.wait("dialog", "next, previous leaf")
    seen.press("Escape")
    playwright.expect(page.locator("dialog")).to_have_count(0)


def test_search_leads_to_the_node(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}")
    seen.wait("figcaption", "reward")
    seen.press("/")
    page.keyboard.type("XYZ")
    seen.wait(".results", "step 10 · tree 0")
    seen.press("ArrowDown", "Enter")
    seen.at("/node/.*find=XYZ")
    seen.wait(".text.whole .found", "xyz")
    assert page.locator("#find").input_value() == "XYZ"
    page.locator("#find").fill("no such text")
    seen.wait(".tools output", "nowhere")


def test_a_training_run_is_followed(watched: Callable[..., Seen], serve: Callable[..., str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "live", steps=3, trees=(2,))
    seen = watched(serve(folder))
    page = seen.open()
    seen.wait("figcaption", "reward")
    seen.wait(".pulse", "live")
    assert seen.text(".side .soft").strip() == "step 3 of 20"
    before = page.locator('.plot[data-metric="reward"]').get_attribute("data-points")
    add_rows(folder, range(4, 7))
    store.write(folder / "trees" / "000006.jsonl", [small_tree(6)])
    seen.wait(".side", "step 6 of 20")
    playwright.expect(page.locator('.plot[data-metric="reward"]')).not_to_have_attribute("data-points", before)
    assert page.locator("#step").locator("option").all_inner_texts()[1:] == ["step 2", "step 6"]


def evil_run(folder: Path) -> Path:
    """Texts that would run as HTML, in every place where a run can hold a text."""
    run_folder(folder)
    tree = Tree.plant(Task(EVIL, tuple(tokens(EVIL)), EVIL, EVIL), step=5)
    trunk = write(tree, tree.root, EVIL, why=EVIL)
    for answer in (EVIL, EVIL + "2"):
        write(
            tree,
            trunk,
            EVIL + answer,
            why=EVIL,
            finish=EVIL,
            reward=1.0,
            verdict={"correct": 1.0, "answer": answer, EVIL: EVIL},
        )
    store.write(folder / "trees" / "000005.jsonl", [tree])
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, EVIL: 1.0, "reward": 2.0}) + "\n" + json.dumps({"step": 2, EVIL: 2.0}) + "\n"
    )
    config = {"format": 1, "stages": [{"name": "evil", EVIL: EVIL}]}
    (folder / "run.json").write_text(json.dumps(config))
    given = [{"text": EVIL, "correct": 1.0, "verdict": {"answer": EVIL}, "finish": EVIL, "tokens": 1}]
    report = {
        "problems": 1,
        EVIL: 0.5,
        "answers": [{"id": EVIL, "problem": EVIL, "answer": EVIL, "sampled": given, "greedy": given}],
    }
    for path in folder.glob("evals/*.json"):
        path.write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def evil(serve: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return serve(evil_run(tmp_path_factory.mktemp("evil") / "run <b>"))


@pytest.mark.parametrize(
    ("place", "selector"),
    [
        ("", "figcaption"),
        ("?part=config", ".config"),
        ("?part=cost", ".cost"),
        ("/evals/5", ".problem-row"),
        ("/step/5", ".card"),
        ("/step/5/tree/0", ".panel .heat"),
        ("/step/5/tree/0/node/1", ".siblings, .lines"),
        ("/step/5/tree/0/node/2?find=img", ".verdict"),
    ],
)
def test_what_a_model_wrote_stays_text(watched: Callable[..., Seen], evil: str, place: str, selector: str) -> None:
    seen = watched(evil)
    seen.open()
    page = seen.open(f"#/run/{first_of(seen)}{place}")
    page.wait_for_selector(selector)
    if "evals" in place:
        page.locator(".problem-row summary").click()
    if "tree" in place:
        seen.wait(".panel .heat", "<img src=x")
        page.locator(".stage").hover(position={"x": 300, "y": 300})
    if "find" in place:
        seen.press("/")
        page.keyboard.type("onerror")
        seen.wait(".results", "<img src=x onerror")
    assert page.evaluate("window.pwned") is None
    counted = (
        "[document.images.length, document.scripts.length, document.querySelectorAll('main b b, [onerror]').length]"
    )
    assert page.evaluate(counted) == [0, 3, 0]
    shown = page.evaluate("document.body.innerText")
    assert not set(shown) & set("\x00\x1b\u202e")
    if selector != ".cost":
        assert "<img src=x onerror" in shown
    if selector not in (".cost", ".card"):  # a card holds the beginning only
        assert "⟨U+202E⟩" in shown
        assert "⟨U+001B⟩" in shown


def test_characters_that_cannot_be_seen_are_told_by_their_number(seen: Seen) -> None:
    seen.open()
    hidden = [0x0, 0x1B, 0x7F, 0xAD, 0x115F, 0x1160, 0x180E, 0x200B, 0x2028, 0x202E, 0x3164, 0xFEFF, 0xE0001, 0xE0041]
    ask = "async texts => { const {shown} = await import('/assets/dom.js'); return texts.map(shown); }"
    said = seen.page.evaluate(ask, [f"a{chr(code)}b" for code in hidden])
    assert said == [f"a⟨U+{code:04X}⟩b" for code in hidden]
    plain = "a\tb\nü 日本 שלום 👩 한"
    assert seen.page.evaluate(ask, [plain]) == [plain]


def test_one_file_needs_no_server(watched: Callable[..., Seen], two: Path, tmp_path: Path) -> None:
    evil = evil_run(tmp_path / "evil")
    out = tmp_path / "page.html"
    out.write_text(one_file(everything(Api(Shelf([two / "first", evil], None)), [10, 5])))
    seen = watched(out.as_uri())
    page = seen.open()
    page.get_by_role("link", name="first").click()
    seen.wait("figcaption", "reward")
    page.locator("#step").select_option("10")
    page.locator(".card a").first.click()
    seen.wait(".panel h2", "Problem")
    seen.press("l")
    seen.wait(".verdict", "Answer read by the verifier")
    seen.wait(".heat", "2")
    seen.press("/")
    page.keyboard.type("xyz")
    seen.wait(".results", "step 10 · tree 0")
    seen.press("Enter")
    seen.at("find=xyz")
    page.evaluate("location.hash = '#/'")
    page.get_by_role("link", name="evil").click()
    seen.wait("figcaption", "<img src=x")
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.images.length") == 0


def contrast(page: Any, ink: str, paper: str) -> float:
    """WCAG's contrast ratio of two of the page's colours."""
    return page.evaluate(
        """([ink, paper]) => {
          const style = getComputedStyle(document.documentElement);
          const [a, b] = [ink, paper].map((name) => {
            const {r, g, b} = d3.rgb(style.getPropertyValue(name).trim());
            const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
            return 0.2126 * x + 0.7152 * y + 0.0722 * z + 0.05;
          });
          return Math.max(a, b) / Math.min(a, b);
        }""",
        [ink, paper],
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_dark_and_light(watched: Callable[..., Seen], address: str, scheme: str) -> None:
    seen = watched(address, color_scheme=scheme)
    page = seen.open()
    seen.wait("h1", "Runs")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == scheme
    for paper in ("--bg", "--panel"):
        for ink in ("--ink", "--soft", "--accent", "--right", "--wrong"):
            assert contrast(page, ink, paper) >= 4.5, (ink, paper)
    seen.press("d")
    other = page.evaluate(theme)
    assert {scheme, other} == {"dark", "light"}
    page.reload()
    seen.wait("h1", "Runs")
    assert page.evaluate(theme) == other


def test_every_stop_of_the_tab_key_can_be_seen(seen: Seen) -> None:
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/10/tree/0/node/2")
    seen.wait(".siblings", "node 3")
    names = set()
    for _ in range(30):
        seen.press("Tab")
        stop = page.evaluate(
            """() => { const a = document.activeElement; const s = getComputedStyle(a); const r = a.getBoundingClientRect();
            return {tag: a.tagName, name: a.getAttribute('aria-label') || a.labels?.[0]?.innerText || a.innerText || a.title,
                    outline: s.outlineStyle, wide: r.width * r.height, left: r.left}; }"""
        )
        if stop["tag"] == "BODY":
            break
        assert stop["outline"] != "none", stop
        assert stop["wide"] > 0, stop
        assert stop["name"], stop
        assert stop["left"] >= 0, stop
        names.add(stop["name"].split("\n")[0])
    assert {"Skip to the content", "Step", "Colour", "Zoom in (+)", "Copy link"} <= names


def test_what_is_not_there_is_said(watched: Callable[..., Seen], address: str) -> None:
    seen = watched(address, quiet=True)  # the browser itself tells of the server's 404
    seen.open()
    run = first_of(seen)
    seen.open(f"#/run/{run}/step/77")
    seen.wait("main", "no trees of step 77")
    seen.open("#/run/nobody")
    seen.wait("main", "There is no run “nobody” here")


@pytest.mark.slow
def test_a_large_tree_can_be_walked(watched: Callable[..., Seen], serve: Callable[..., str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "large", trees=())
    store.write(folder / "trees" / "000001.jsonl", [large_tree()])
    seen = watched(serve(folder))
    seen.open()
    run = first_of(seen)
    page = seen.open(f"#/run/{run}/step/1/tree/0?colour=entropy")
    seen.wait(".panel", "2\u2009000")
    assert page.evaluate("document.querySelectorAll('*').length") < 3000  # nothing drawn as an element each
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    for _ in range(6):
        page.mouse.wheel(0, -400)
    page.mouse.down()
    page.mouse.move(box["x"] + 400, box["y"] + 350, steps=5)
    page.mouse.up()
    seen.press("l", "l", "z", "0")
    seen.wait(".panel h2", "Path to node")


@pytest.mark.parametrize("place", ["#/run/%", "#/run/%E0%A4%A", "#/run/%/step/5"])
def test_an_address_that_is_no_encoding_is_answered(seen: Seen, place: str) -> None:
    page = seen.open()
    page.wait_for_selector("table.list")
    page.evaluate("place => { location.hash = place }", place)
    page.wait_for_selector("text=There is no run")
    page.click("text=All runs")
    page.wait_for_selector("table.list")
