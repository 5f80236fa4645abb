"""The grader of mathematics: what it takes as equal, what would hang it, and every reference answer of six real benchmarks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path as File
from typing import Any

import pytest

from ramulus.core.task import Path, Task
from ramulus.tasks.equality import same
from ramulus.tasks.latex import one_spelling, unwrap
from ramulus.tasks.math import Boxed

DATA = File(__file__).parents[2] / "shared" / "data" / "math"
SETS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmarks in ../shared/data/math")

# What does not grade as it should, compared for equality below so that the lists cannot rot.
WRONG_AGAINST_ITSELF: dict[str, str] = {}
RIGHT_AGAINST_ANOTHER = {  # (problem, whose answer it was given): why that is right
    ("math500-22", "math500-23"): "5 and x=5 are the same answer",
}


def graded(answer: str, *references: str, text: str | None = None, **options: Any) -> dict[str, Any]:
    """The verdict on a response that ends in this boxed answer."""
    task = Task("t", (), "?", references[0], extra={"answers": list(references)} if len(references) > 1 else {})
    reward = Boxed(**options)
    return asyncio.run(reward(task, Path(rf"So it is $\boxed{{{answer}}}$." if text is None else text, (1,), "eos")))


SAME = [
    ("7", "7"), ("7", "7.0"), ("7", "$7$"), ("7", r"\boxed{7}"), ("7", "7."), ("7", r"\,7\;"), (r"\boxed{204}", "204"), ("025", "25"),
    (r"\frac{1}{2}", r"\dfrac12"), (r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", "1/2"), (r"\frac{1}{3}", "0.333333"), (r"-\frac12", r"\frac{-1}{2}"),
    ("1000", "1,000"), ("1,000,000", r"1{,}000{,}000"), ("10000", r"10\,000"), (r"\$18.90", "18.9"), ("12", r"12\%"), ("75\\%", "0.75"),
    ("90^\\circ", "90"), ("10", r"10\text{ cm}"), ("10 \\text{ m/s}^2", "10"), ("4.5e33", r"4.5 \times 10^{33}"), ("1e-19", r"1.0\cdot 10^{-19}"),
    ("10^{-3}", "0.001"), (r"\text{Evelyn}", "Evelyn"), (r"\text{June 20}", "june 20"), (r"\text{(C)}", "C"), ("6:00 PM", r"6\!:00 \text{ pm}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"), ("1,2", "2, 1"), ("1,2", r"\{1,2\}"), (r"\pm 3", "3,-3"), ("p - q", "-q+p"),
    ("x^2+2x+1", "(x+1)^2"), (r"\sqrt{18}", r"3\sqrt2"), ("x=5", "5"), (r"x \in [-2,7]", "[-2,7]"), ("2220_5", "2220_{5}"), ("2220_5", "2220"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\[2pt] 2 \end{bmatrix}"),
]  # fmt: skip

DIFFERENT = [
    ("7", "8"), ("7", "-7"), ("7", "seven"), ("0", "0.0000001"), ("0.0000001", "0.0000003"), ("1.6e-19", "2.6e-19"),
    (r"1.6 \times 10^{-19}", r"2.6\times 10^{-19}"), ("1.6e-19", "0"), ("1/3", "0.33"), ("1,234", "1, 234"), ("1,2", "1,3"), ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"), (r"\infty", r"-\infty"), ("2220_5", "2220_7"), (r"\text{yes}", r"\text{no}"), (r"\text{even}", "odd"), ("A", "B"),
    ("Evelyn", "John"), ("x+1", "x-1"), ("7", "1+2+3"), ("7", ""), ("7", r"\text{}"), ("7", "7, 8"), ("6:00 PM", "6:00 AM"), ("123456", "123456.5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"), ("7", r"\frac{7}{0}"), ("7", "}{"), ("7", "\\"), ("7", "$$$"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_the_same(reference: str, answer: str) -> None:
    verdict = graded(answer, reference)
    assert (verdict["reward"], verdict["correct"]) == (1.0, 1.0), verdict


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different(reference: str, answer: str) -> None:
    verdict = graded(answer, reference)
    assert (verdict["reward"], verdict["correct"]) == (0.0, 0.0), verdict


def test_the_last_box_counts_within_the_window() -> None:
    assert graded("", "7", text=r"\boxed{7} no, \boxed{8}") == {"reward": 0.0, "correct": 0.0, "answer": "8"}
    assert graded("", "7", text=r"\boxed{8} no, \boxed{7} \boxed{9")["answer"] == "7"
    assert graded("", "7", text="it is 7") == {"reward": 0.0, "correct": 0.0, "answer": "", "reason": "no answer found"}
    far = r"\boxed{7}" + "x" * 300
    assert graded("", "7", text=far)["correct"] == 1
    assert graded("", "7", text=far, window=300)["reason"] == "no answer found in the last 300 characters"
    assert graded("", "7", text=far, window=309)["correct"] == 1


def test_values_and_several_references() -> None:
    assert graded("7", "7", correct=1, wrong=-1)["reward"] == 1
    assert graded("8", "7", correct=1, wrong=-1)["reward"] == -1
    assert graded("0.5", "7", r"\frac12")["correct"] == 1
    assert graded("6", "7", r"\frac12")["correct"] == 0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Boxed(window=0)
    with pytest.raises(ValueError, match="above 0, got 0"):
        Boxed(seconds=0)


DECIDED = [json.loads(line) for line in (File(__file__).parent / "data" / "decided.jsonl").read_text().splitlines()]


def verdict_of(case: dict[str, Any]) -> bool:
    """The verdict on a decided case: its response, or its answer in a box."""
    text = case.get("response") or rf"So the answer is $\boxed{{{case['answer']}}}$."
    return bool(graded("", case["reference"], text=text)["correct"])


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in DECIDED}))
def test_decided_cases(kind: str) -> None:
    """Every case of this kind, accepted and refused; the table has no case that is known to be wrong."""
    cases = [case for case in DECIDED if case["kind"] == kind]
    assert {case["right"] for case in cases} == {0, 1}
    assert [case for case in cases if verdict_of(case) != bool(case["right"])] == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/grading.json")
def test_answers_that_got_the_wrong_verdict_once() -> None:
    cases = json.loads((DATA.parent / "grading.json").read_text())
    assert [case for case in cases if verdict_of(case) != bool(case["right"])] == []


def test_a_plain_numeric_answer_is_decided_in_a_few_hundred_calls() -> None:
    """Some tenths of a millisecond; what takes a formula apart makes thousands."""
    graded("7", "8")  # what is made once
    made = []
    for n in range(200):
        answer, reference = (str(n + 1000), rf"\frac{{{n}}}{{7}}", f"{n}.5", f"{n},001")[n % 4], str(n + 1000)
        made.append(calls_of(lambda: graded(answer, reference)) - calls_of(lambda: graded("7", "7")))  # noqa: B023
    assert sorted(made)[100] < 1000


def calls_of(work: Callable[[], object]) -> int:
    """How many functions of Python are called."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(events)


def test_readings() -> None:
    assert unwrap(r"\boxed{\boxed{3}}") == "3"
    assert unwrap(r"\boxed{1},\boxed{2}") == "1, 2"
    assert one_spelling(r" $\left(1,\, \dfrac{1}{2}\right)$. ") == r"(1, \frac{1}{2} )."
    assert one_spelling(r"2½\,\text{cm}²") == r"2\frac{1}{2} \text{cm}^{2}"
    with pytest.raises(ValueError, match="too long or nested too deep"):
        one_spelling("(" * 100)
    assert same("x+1", r"\sum x") is None, "takes algebra"
    assert same("7", "9^{9^{9^9}}") is None, "without bound"


HANGS = [r"9^{9^{9^9}}", r"99999999!"]
SUMS = [rf"\sum_{{k=1}}^{{3}} {text}" for text in HANGS]  # only these reach math-verify

IN_PROCESS = """
import sys, threading
from math_verify import parse, verify
def grade():
    gold, answer = (parse(text, parsing_timeout=None) for text in (r"\\boxed{7}", sys.argv[1]))
    print("started", flush=True)
    verify(gold, answer, timeout_seconds=None)
    print("ended", flush=True)
thread = threading.Thread(target=grade)
thread.start()
thread.join()
"""


def test_an_output_that_hangs_math_verify_in_process() -> None:
    """In a thread of the trainer its own time limits are refused (they need the main thread's alarm), and without them it hangs."""
    command = [sys.executable, "-c", IN_PROCESS, rf"\boxed{{{HANGS[0]}}}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        process.kill()
        assert process.stdout.read() == b""


@pytest.mark.parametrize("answer", SUMS)
def test_ours_returns_in_bounded_time_and_grades_the_next(answer: str) -> None:
    graded("1+1", "2", seconds=5)
    began = time.monotonic()
    verdict = graded(answer, "7", seconds=0.5)
    assert verdict["reward"] == 0.0
    assert verdict["reason"].split(":")[0] in ("timeout", "memory")
    assert time.monotonic() - began < 15
    assert graded(r"\sum_{k=1}^{3} k", "6", seconds=5)["correct"] == 1


HOSTILE = [
    "(" * 1500,
    "{" * 900 + "}" * 900,
    r"\frac{1}{" * 150 + "}" * 150,
    "9" * 2000,
    "9" * 50_000,
    r"\sqrt" * 300,
    "\x00\ud800",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong(answer: str) -> None:
    assert graded(answer, "7", seconds=0.5)["correct"] == 0


def test_many_gradings_at_once_with_some_that_hang() -> None:
    async def main() -> list[dict[str, Any]]:
        reward = Boxed(seconds=0.5)
        answers = [SUMS[0] if n % 30 == 0 else rf"\sum_{{k=1}}^{{1}} {n + 1}" for n in range(60)]
        return await asyncio.gather(
            *(reward(Task("t", (), "?", str(n + 1)), Path(rf"\boxed{{{a}}}", (), "eos")) for n, a in enumerate(answers))
        )

    assert [verdict["correct"] for verdict in asyncio.run(main())] == [float(n % 30 != 0) for n in range(60)]


@lru_cache
def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


async def verdicts(pairs: list[tuple[dict[str, str], dict[str, str]]]) -> list[dict[str, Any]]:
    """Each first problem given the second's reference answer, written in a box."""
    reward = Boxed(seconds=3)

    def response(row: dict[str, str]) -> Path:
        return Path(rf"Therefore the answer is \boxed{{{row['answer']}}}.", (1,), "eos")

    return await asyncio.gather(*(reward(Task(a["id"], (), a["problem"], a["answer"]), response(b)) for a, b in pairs))


def wrong_against_themselves(name: str) -> set[str]:
    pairs = [(row, row) for row in rows(name)]
    return {a["id"] for (a, _), verdict in zip(pairs, asyncio.run(verdicts(pairs))) if verdict["correct"] != 1}


def right_against_others(name: str, every: int) -> set[tuple[str, str]]:
    """Each problem given the answer of the next one that is not written alike."""
    found = rows(name)
    pairs = []
    for i in range(0, len(found), every):
        others = (found[(i + j) % len(found)] for j in range(1, len(found)))
        pairs.append((found[i], next(o for o in others if one_spelling(o["answer"]) != one_spelling(found[i]["answer"]))))
    return {
        (a["id"], b["id"]) for (a, b), verdict in zip(pairs, asyncio.run(verdicts(pairs))) if verdict["correct"] != 0
    }


@needs_data
@pytest.mark.parametrize("name", SETS)
def test_every_reference_is_right_against_itself(name: str) -> None:
    assert wrong_against_themselves(name) == {key for key in WRONG_AGAINST_ITSELF if key.startswith(name + "-")}


@needs_data
def test_references_are_wrong_against_others_sampled() -> None:
    for name in SETS:
        assert right_against_others(name, every=37) <= RIGHT_AGAINST_ANOTHER.keys()


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", SETS)
def test_every_reference_is_wrong_against_another(name: str) -> None:
    assert right_against_others(name, every=1) == {
        pair for pair in RIGHT_AGAINST_ANOTHER if pair[0].startswith(name + "-")
    }


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", SETS)
def test_references_survive_rewriting(name: str) -> None:
    """As models write them: \\dfrac, other spacing, dollars inside the box. These must not need the same string."""

    def rewritten(row: dict[str, str]) -> dict[str, str]:
        text = unwrap(row["answer"]).replace(r"\frac", r"\dfrac").replace(" ", "~")
        return {**row, "answer": f"$ {text} $"}

    pairs = [(row, rewritten(row)) for row in rows(name)]
    assert {a["id"] for (a, _), verdict in zip(pairs, asyncio.run(verdicts(pairs))) if verdict["correct"] != 1} == set()
