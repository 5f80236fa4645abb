"""What a run cost, added up from its lines of metrics: tokens by their fate, seconds by phase, and both for each correct answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SOURCES = {
    "engine_sampled": "sampled by the engine for trees",
    "sampled_before": "of these trees, sampled a step before",
    "sampled_ahead": "of the next step's trees, sampled now",
    "thrown_away": "sampled, in no tree",
    "sampled": "sampled, in the step's trees",
    "reused": "reused: prefixes that paths share",
    "trajectory": "in all paths",
    "eval_sampled": "sampled by evaluations",
}
FATES = {
    "trained_policy": "trained",
    "idle_tokens": "left out as idle: no credit",
    "excluded": "excluded from learning",
    "pruned": "pruned",
    "dropped_tokens": "in dropped trees",
}
UPDATES = {
    "expert": "in demonstrations",
    "trained_expert": "of those, trained",
    "repeated": "trained once more, in another row",
    "trained": "trained, of all authors",
    "zero_credit": "of those, with zero credit",
    "packed": "in rows, with prompts",
    "flattened": "in rows if every path stood alone",
}
PREFIXES = {
    "prefilled": "of prefixes, computed",
    "prefilled_again": "of those, not for the first time",
    "prefix_reused": "of prefixes, from the KV memory",
}
TOKENS = SOURCES | FATES | UPDATES | PREFIXES
"""Token counts of a step by the name they have in metrics.jsonl, in words."""

PHASES = {
    "grow": "sampling",
    "grade": "grading",
    "score": "scoring",
    "credit": "credit",
    "pack": "packing",
    "update": "update",
    "gauges": "gauges",
    "write": "writing trees",
    "load": "sync",
    "ledger": "ledger",
    "log": "log",
    "save": "checkpoint",
    "idle": "idle",
}
"""Parts of a step's seconds by their name in metrics.jsonl, in words; they add up to `step`."""

ANSWERS = ("trees", "dropped", "paths", "graded", "correct")
_Row = Mapping[str, Any]
Number = float | None


def account(rows: Sequence[_Row]) -> dict[str, Any]:
    """The totals of some steps, from rows of metrics.jsonl, as plain JSON; {} for no rows.

    Groups: `steps`; `answers`; `tokens`, by the names of TOKENS; `seconds`, by those of PHASES, their sum `step`, and `eval` and `total`
    beside it; `per_correct`, tokens and seconds for each correct answer; `ratios`; `machine`. What a row of an older run does not say is
    unknown, None, and so is every total that it would be part of.
    """
    if not rows:
        return {}
    known = [completed(row) for row in rows]
    tokens = {name: added([row.get(name) for row in known]) for name in TOKENS}
    answers = {name: added([row.get(name) for row in known]) for name in ANSWERS}
    seconds, machine = seconds_of(known), machine_of(known)
    costs = tokens | {"seconds": seconds["total"], "cpu_seconds": machine["cpu_seconds"]}
    return {
        "steps": len(rows),
        "answers": answers,
        "tokens": tokens,
        "seconds": seconds,
        "per_correct": {name: share(value, answers["correct"]) for name, value in costs.items()},
        "ratios": ratios(tokens, answers, seconds),
        "machine": machine,
    }


def completed(row: _Row) -> dict[str, Any]:
    """The row with what follows from it: what older runs did not write but what their other numbers leave no doubt about."""
    whole = dict(row)
    if None not in (row.get("sampled"), row.get("reused")):
        whole.setdefault("trajectory", row["sampled"] + row["reused"])
    if "eval/mean" not in row and "eval/reward" not in row:
        whole.setdefault("eval_sampled", 0)
    if row.get("sampled") == 0:  # then there is nothing that could have had a fate
        whole = dict.fromkeys(("engine_sampled", *FATES), 0) | whole
    if row.get("dropped") == 0:
        whole.setdefault("dropped_tokens", 0)
    if row.get("paths") == 0 or (row.get("pruned") == 0 and row.get("pass_rate") is not None):
        whole.setdefault("graded", row["paths"])  # nothing was pruned, so every path has a grade
        whole.setdefault("correct", round(row["paths"] * row.get("pass_rate", 0)))
    seconds = dict(row.get("seconds", {}))
    if "step" in seconds and "idle" not in seconds:
        parts = [value for name, value in seconds.items() if name not in ("step", "mean", "eval")]
        seconds["idle"] = max(seconds["step"] - math.fsum(parts), 0.0)
        seconds["grade"] = None if row.get("paths") else 0.0  # in those runs it was a part of `grow`
    return whole | {"seconds": seconds}


def added(values: Sequence[Number]) -> Number:
    """The sum; unknown where one of them is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return sum(known) if all(isinstance(value, int) for value in known) else math.fsum(known)


def seconds_of(rows: Sequence[dict[str, Any]]) -> dict[str, Number]:
    """Seconds by phase, then `step`, their sum, `eval`, and `total`, those two together; a phase that a row does not name took none."""
    each = [row["seconds"] for row in rows]
    if not all("step" in seconds for seconds in each):
        return dict.fromkeys((*PHASES, "step", "eval", "total"))
    named = [*PHASES, *sorted({name for seconds in each for name in seconds} - {*PHASES, "step", "mean", "eval"})]
    sums = {name: added([seconds.get(name, 0.0) for seconds in each]) for name in (*named, "step", "eval")}
    return sums | {"total": added([sums["step"], sums["eval"]])}


def machine_of(rows: Sequence[dict[str, Any]]) -> dict[str, Number]:
    """Processor seconds, the largest memory in bytes, and the mean busy share of the GPU over the seconds of the steps."""
    busy = [row.get("gpu/busy") for row in rows]
    spent = [row["seconds"].get("step") for row in rows]
    known = [(share, s) for share, s in zip(busy, spent, strict=True) if share is not None and s is not None]
    return {
        "cpu_seconds": added([row.get("cpu_seconds") for row in rows]),
        "peak_rss": max((row["memory/peak_rss"] for row in rows if row.get("memory/peak_rss")), default=None),
        "peak_gpu": max((row["memory/peak_gpu"] for row in rows if row.get("memory/peak_gpu")), default=None),
        "gpu_busy": share(math.fsum(a * s for a, s in known), math.fsum(s for _, s in known)),
    }


def ratios(
    tokens: Mapping[str, Number], answers: Mapping[str, Number], seconds: Mapping[str, Number]
) -> dict[str, Number]:
    """What is worth comparing between runs; None where a part is unknown or there is nothing to divide by."""
    sampled = tokens["sampled"]
    prefixes = added([tokens["prefilled"], tokens["prefix_reused"]])
    return {
        "pass_rate": share(answers["correct"], answers["graded"]),
        "reuse": share(tokens["trajectory"], sampled),  # trajectory tokens for each sampled one
        "kv_reuse": share(tokens["prefix_reused"], prefixes),  # share of prefix tokens that was not computed
        "update_reuse": share(tokens["flattened"], tokens["packed"]),  # flattened tokens for each packed one
        **{name.removesuffix("_tokens"): share(tokens[name], sampled) for name in FATES},  # shares of `sampled`
        "zero_credit": share(tokens["zero_credit"], tokens["trained"]),
        "sampled_per_second": share(sampled, seconds["grow"]),
        "trained_per_second": share(tokens["trained"], seconds["update"]),
        "idle_seconds": share(seconds["idle"], seconds["step"]),
    }


def share(part: Number, whole: Number) -> Number:
    """part / whole; None where one is unknown or the whole is 0."""
    return part / whole if part is not None and whole else None
