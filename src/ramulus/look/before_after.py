"""What a run with a final evaluation shows of itself: how its rewards went, and a held-out problem before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from ramulus.look.terminal import safe

BARS, WIDEST = "▁▂▃▄▅▆▇█", 60
WIDTH = 120  # characters of an answer


def reward_line(rewards: Sequence[float], stage: str) -> str:
    """The rewards of the steps as bars from the lowest to the highest, some steps in one where there are many; "" for fewer than three."""
    if len(rewards) < 3:
        return ""
    edges = [round(i * len(rewards) / min(len(rewards), WIDEST)) for i in range(min(len(rewards), WIDEST) + 1)]
    means = [mean(rewards[start:stop]) for start, stop in pairwise(edges)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in means)
    return f"reward over {len(rewards)} steps of {safe(stage)}: {means[0]:.2f} {bars} {means[-1]:.2f}"


def turned(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Lines that tell of the first held-out problem whose greedy answer was wrong and is right now; none where there is none."""
    later = {row["id"]: row for row in after["answers"]}
    for row in before["answers"]:
        was, now = (one["greedy"][0] if one and one["greedy"] else None for one in (row, later.get(row["id"])))
        if was and now and rightness(was) <= 0 < rightness(now):
            yield f"\none of the held-out problems: {safe(str(row['problem']), WIDTH)}"
            yield f"  before, {judged(was, 'wrong')}: {safe(was['text'], WIDTH)}"
            yield f"  after, {judged(now, 'right')}:  {safe(now['text'], WIDTH)}"
            return


def rightness(answer: Mapping[str, Any]) -> float:
    """Above 0 where the reward takes the answer for right, or gives it something where it calls none correct."""
    correct = answer.get("correct")
    return float((answer["reward"] if correct is None else correct) or 0.0)


def judged(answer: Mapping[str, Any], word: str) -> str:
    """The word for an answer that is called correct or not; the reward of any other."""
    return word if answer.get("correct") is not None else f"reward {float(answer['reward'] or 0.0):.2f}"
