"""The skip list of CI: a skip that nobody listed fails the run, and the run says which."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
SUITE = """
import pytest

def test_passes(): ...

@pytest.mark.skipif(True, reason="needs a moon")
def test_moon(): ...

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def run(folder: Path, *options: str, skips: str = "", suite: str = SUITE, ci: str = "") -> subprocess.CompletedProcess[str]:
    """A pytest run of one file under this suite's conftest and a skip list of its own."""
    shutil.copy(CONFTEST, folder)
    (folder / "skips.txt").write_text(skips)
    (folder / "test_it.py").write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *options, "test_it.py"]
    mine = ("CI", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {k: v for k, v in os.environ.items() if k not in mine} | ({"CI": ci} if ci else {})
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other packages' plugins take seconds to import
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_skip_passes_where_nobody_is_strict(tmp_path: Path) -> None:
    assert run(tmp_path).returncode == 0


@pytest.mark.parametrize(
    "skips",
    [
        "*::test_sun | needs a moon",
        *(
            pytest.param(skips, marks=pytest.mark.slow)
            for skips in ("", "# *::test_moon | needs a moon", "*::test_moon | needs a sun", "test_it.py::test_passes | *")
        ),
    ],
)
def test_an_unlisted_skip_fails(tmp_path: Path, skips: str) -> None:
    done = run(tmp_path, "--strict-skips", skips=skips)
    assert done.returncode == 1, done.stdout
    assert "UNLISTED SKIP test_it.py::test_moon | needs a moon" in done.stdout
    assert done.stdout.count("UNLISTED") == 1


@pytest.mark.slow
def test_ci_is_strict_by_itself(tmp_path: Path) -> None:
    assert run(tmp_path, ci="1").returncode == 1


@pytest.mark.parametrize("skips", ["# a comment\n\n* | needs a *", pytest.param("*::test_moon | needs a moon", marks=pytest.mark.slow)])
def test_a_listed_skip_passes(tmp_path: Path, skips: str) -> None:
    assert run(tmp_path, "--strict-skips", skips=skips).returncode == 0


@pytest.mark.parametrize(
    "suite",
    [
        "import pytest\npytest.importorskip('no_such_library')\ndef test_it(): ...",
        "import pytest\n@pytest.fixture\ndef moon(): pytest.skip('none')\ndef test_it(moon): ...",
    ],
)
def test_skipped_modules_and_fixtures_count(tmp_path: Path, suite: str) -> None:
    done = run(tmp_path, "--strict-skips", suite=suite)
    assert done.returncode == 1, done.stdout
    assert "UNLISTED SKIP test_it.py" in done.stdout


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--strict-skips", skips="test_moon needs a moon")
    assert done.returncode != 0
    assert "test id pattern | reason pattern" in done.stdout + done.stderr
