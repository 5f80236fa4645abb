"""What a package index is told: metadata, a README whose links lead somewhere or are text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the sources")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def told(**environment: str) -> str:
    """The long description, and the addresses, that setup.py gives."""
    program = (
        "import setuptools, runpy; given = {}\nsetuptools.setup = given.update\nrunpy.run_path('setup.py')\n"
        "print(given['project_urls']); print(given['long_description'])"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def test_no_link_breaks_where_nobody_says_what_the_address_is() -> None:
    text = told(RAMULUS_URL="")
    assert re.findall(r"\]\((?!https?:)", text) == []
    assert "docs/methods.md" in text
    assert text.startswith("{}\n# ramulus")


def test_links_lead_to_the_address_that_is_given() -> None:
    text = told(RAMULUS_URL="https://example.org/ramulus/blob/main/")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert "https://example.org/ramulus/blob/main/docs/methods.md" in links
    assert "https://example.org/ramulus/raw/main/docs/viewer-tree.png" in links
    assert all(link.startswith("https://") for link in links)
    assert "'Changelog': 'https://example.org/ramulus/blob/main/CHANGELOG.md'" in text


def test_the_index_is_told_who_what_and_for_whom() -> None:
    assert PROJECT["authors"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(PROJECT["classifiers"])
    assert PROJECT["license"] == "Apache-2.0"
    assert not any("License ::" in line for line in PROJECT["classifiers"]), "an index refuses them beside an SPDX expression"
    named = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    assert all("@" not in name for name in named), "an index refuses direct references"


def test_the_image_and_the_workflow_name_what_is_there() -> None:
    image = (ROOT / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", image, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert build["environment"]["RAMULUS_WHEEL_KERNELS"] == "require"
    for name in re.findall(r"\{project\}/(\S+?)['\" ]", build["test-command"] + " "):
        assert (ROOT / name).exists(), name
