"""Options and settings of the whole suite."""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from rich.console import Console

from ramulus.look.curves import flat
from ramulus.look.glossary import unexplained

TESTS = Path(__file__).parent
SKIPS = TESTS / "skips.txt"

# Before torch is first imported, here and in the processes that tests start: sums must not depend on the machine's load.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as what a script starts behind itself inherits; Ctrl-C is heard here and in what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ramulus", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ramulus")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--golden` reads other vectors of the same layout; `--strict-skips` (on in CI) fails on an unlisted skip."""
    parser.addoption("--golden", default=str(TESTS / "golden"), metavar="DIR", help="folder of golden *.json files")
    parser.addoption("--strict-skips", action="store_true", help="fail on a skip that tests/skips.txt does not list")


def pytest_configure(config: pytest.Config) -> None:
    """Watch the skips where that is asked for."""
    if config.getoption("--strict-skips") or os.environ.get("CI"):
        config.pluginmanager.register(StrictSkips(listed(SKIPS.read_text())), "strict-skips")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder given by `--golden`."""
    return Path(request.config.getoption("--golden"))


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """Undo what a run in this process sets for all of torch: its threads and whether it must be deterministic."""
    import torch

    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(autouse=True)
def every_metric_is_explained() -> None:
    """Whatever row a trainer of this process writes, in any test: no metric without an entry in the glossary."""
    logbook = sys.modules.get("ramulus.run.logbook")
    if logbook is None or getattr(logbook.Logbook.write, "explained", False):
        return
    write = logbook.Logbook.write

    def checked(self: Any, step: int, metrics: dict[str, Any]) -> None:
        if sys._getframe(1).f_globals["__name__"] == "ramulus.run.trainer":  # tests write rows of their own
            missing = unexplained(flat(metrics))
            assert not missing, f"{missing}: add them to src/ramulus/look/glossary.py, then run `python docs/metrics.py`"
        write(self, step, metrics)

    checked.explained = True  # type: ignore[attr-defined]
    logbook.Logbook.write = checked


def listed(text: str) -> list[tuple[str, str]]:
    """(test id pattern, reason pattern) of every line `pattern | reason` of a skip list; `#` starts a comment line."""
    rows = [line.split("|", 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"a skip list line is `test id pattern | reason pattern`, got {row[0]!r}")
    return [(pattern.strip(), reason.strip()) for pattern, reason in rows]


class StrictSkips:
    """Fails the run where a test was skipped for a reason that the list does not give for it."""

    def __init__(self, allowed: list[tuple[str, str]]) -> None:
        self.allowed = allowed
        self.unlisted: list[str] = []

    def check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Note a skip that is not listed; an expected failure is not a skip."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(fnmatch.fnmatch(report.nodeid, p) and fnmatch.fnmatch(reason, r) for p, r in self.allowed):
            self.unlisted.append(f"{report.nodeid} | {reason}")

    pytest_runtest_logreport = check
    pytest_collectreport = check

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a passing run into a failing one."""
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the skips and the remedy."""
        for row in self.unlisted:
            terminalreporter.write_line(f"UNLISTED SKIP {row} (mend it, or add it with its reason to tests/skips.txt)")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six steps of run_recipe.py as the command makes them; tests compare with it or copy it, and leave it as it is."""
    from ramulus.run.launch import launch  # seconds, which tests of the suite itself need not wait

    out = tmp_path_factory.mktemp("whole") / "run"
    assert launch(str(Path(__file__).parent / "run_recipe.py"), [f"out={out}"], False, False, Console(quiet=True)) == 0
    return out
