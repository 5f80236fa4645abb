"""A script of the tests that has imported everything, forks what it is asked for, and answers lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def fork_server(script: Path, env: Mapping[str, str]) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """What asks it; it is ended, and must end well, on leaving."""
    process = subprocess.Popen([sys.executable, str(script)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    asks, answers = process.stdin, process.stdout
    assert asks is not None
    assert answers is not None
    assert answers.readline() == "ready\n"

    def ask(question: Mapping[str, Any]) -> Any:
        asks.write(json.dumps(question) + "\n")
        asks.flush()
        return json.loads(answers.readline())

    yield ask
    asks.close()
    assert process.wait(20) == 0
