"""The documentation: links that lead somewhere, a site that builds without a warning, a tutorial whose commands do what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")


def headings(page: Path) -> set[str]:
    """The anchors that the headings of a page give, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lost(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
        parts = urlsplit(link)
        target = page if not parts.path else page.parent / unquote(parts.path)
        if not parts.scheme and not (target.exists() and (not parts.fragment or parts.fragment in headings(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert lost(page, page.read_text(encoding="utf-8")) == []


def test_a_link_that_leads_nowhere_is_seen() -> None:
    text = "[a](nowhere.md) [b](metrics.md#no-such) [c](metrics.md#learning) [d](https://x.y/z) `[e](code.md)` ![f](gone.png)"
    assert lost(ROOT / "docs" / "viewer.md", text) == ["nowhere.md", "metrics.md#no-such", "gone.png"]


class Links(HTMLParser):
    """The addresses and anchors of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.to: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.to += [value for name in ("href", "src") if (value := named.get(name))]
        self.ids |= {value for name in ("id", "name") if (value := named.get(name))}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_every_link_in_it_holds(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path: Links() for path in tmp_path.rglob("*.html")}
    for path, links in pages.items():
        links.feed(path.read_text(encoding="utf-8"))
    assert {"quickstart", "own-data", "metrics", "architecture", "troubleshooting"} <= {path.stem for path in pages}
    for path, links in pages.items():
        for link in links.to:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                assert parts.scheme in ("https", "http", "data", "mailto"), f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
    scripts = [link for links in pages.values() for link in links.to if link.endswith((".js", ".css")) and urlsplit(link).scheme]
    assert scripts == [], "the site is read from files, without a network"
    index = (tmp_path / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    assert "Segments" in (tmp_path / "api" / "grow.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_tutorial_of_own_data_runs_as_it_stands(tmp_path: Path) -> None:
    import torch

    from ramulus.learn.policy.model import Scratch

    torch.manual_seed(0)
    net, words = Scratch("".join(map(chr, range(32, 127))) + "\n", hidden=16, layers=1, heads=2, kv_heads=1, max_positions=512)()
    net.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    text = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```\{code-block\} python\n:caption: (\S+)\n\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    paths = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "make_data.py"], cwd=tmp_path, check=True)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 64
    train = next(line for line in re.findall(r"^ramulus (train .*)$", text.replace("\\\n", " "), re.MULTILINE))
    small = ["schedule.prompts=2", "branching.width=2", "branching.length=4", "branching.depth=2", "response_limit=8", "eval_samples=1", "threads=1"]
    fields = {word.partition("=")[0] for word in small}
    words_of = [word for word in shlex.split(train.replace("MODEL", "./model")) if word.partition("=")[0] not in fields]
    done = subprocess.run([sys.executable, "-m", "ramulus.cli", *words_of, *small], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all("eval/mean" in row for row in rows)
