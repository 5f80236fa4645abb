"""Comparison over seeds: every expected number is worked out by hand from small metrics.jsonl files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from compared_runs import at, run, shown, stage, sweep, two_labels
from ramulus.look.compare.compare import Difference, Estimate, Place, compare, estimate, paired, student_quantile
from ramulus.look.curves import find_runs, read_curve
from ramulus.run.config.resume import move_aside

T2 = 4.302652729696144  # Student's t, two degrees of freedom, 95 %


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return two_labels(tmp_path / "sweep")


def test_equal_steps(two: Path):
    found = compare([two])
    assert [axis.name for axis in found.axes] == ["steps", "sampled", "trained", "seconds", "cpu_seconds"]
    assert list(found.groups) == ["thrifty", "lavish"]  # the order of the sweep
    whole = at(found, "steps", 1.0)
    assert whole["thrifty"].values == {0: 0.4, 1: 0.5, 2: 0.9}
    # mean 0.6, deviations -0.2 -0.1 0.3: variance 0.14 / 2, half of the interval T2 * sqrt(0.07 / 3)
    assert whole["thrifty"].estimate == Estimate(3, pytest.approx(0.6), pytest.approx(T2 * math.sqrt(0.07 / 3)))
    assert at(found, "steps", 0.75)["thrifty"].values == {0: 0.1, 1: 0.2, 2: 0.3}  # step 3: last measured at step 2
    assert at(found, "steps", 0.75)["thrifty"].measured == pytest.approx(2 / 3)
    nothing = at(found, "steps", 0.25)["thrifty"]  # step 1: not measured yet
    assert (nothing.values, nothing.estimate, nothing.difference) == ({}, None, None)


def test_equal_sampled_tokens(two: Path):
    found = compare([two])
    (axis,) = (axis for axis in found.axes if axis.name == "sampled")
    assert axis.budgets[-1].amount == 40  # thrifty samples 4 x 10, lavish 4 x 20
    assert axis.limit == "thrifty seed 0"
    whole = at(found, "sampled", 1.0)
    assert whole["thrifty"].values == {0: 0.4, 1: 0.5, 2: 0.9}
    assert whole["lavish"].values == {
        0: 0.2,
        1: 0.3,
        2: 0.4,
    }  # after 40 tokens it stands at step 2, measured at exactly 40
    assert whole["lavish"].measured == 1.0
    assert whole["lavish"].next_at is None
    assert at(found, "sampled", 0.75)["lavish"].values == {}  # 30 tokens: step 1, not measured yet


def test_equal_seconds_leave_evaluations_out(two: Path):
    found = compare([two])
    amounts = {axis.name: axis.budgets[-1].amount for axis in found.axes}
    assert amounts == {"steps": 4, "sampled": 40, "trained": 20, "seconds": 8, "cpu_seconds": 4}


def test_paired_differences(two: Path):
    found = compare([two], baseline="thrifty")
    gap = at(found, "steps", 1.0)["lavish"].difference
    assert gap is not None  # 0.2 for every seed: far clearer than the spread of the seeds, which pairing takes out
    assert (gap.pairs, gap.verdict) == (3, "higher")
    assert gap.estimate == Estimate(3, pytest.approx(0.2), pytest.approx(0, abs=1e-12))
    assert at(found, "steps", 1.0)["thrifty"].difference is None
    less = at(found, "sampled", 1.0)["lavish"].difference
    assert less is not None  # -0.2 -0.2 -0.5: mean -0.3, variance 0.03, half T2 * 0.1 = 0.43
    assert less.estimate == Estimate(3, pytest.approx(-0.3), pytest.approx(T2 * 0.1))
    assert less.verdict == "within noise"
    turned = at(compare([two], baseline="lavish"), "steps", 1.0)["thrifty"].difference
    assert turned is not None
    assert turned.verdict == "lower"


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.1, 0.1, 0.1], "higher"),
        ([-0.1, -0.1, -0.1], "lower"),
        ([0.125, 0.125], "two equal differences: cannot tell"),
        ([0.0, 0.0], "within noise"),
        ([0.0, 0.0, 0.0], "within noise"),
        ([0.1, 0.2, 0.3], "within noise"),  # mean 0.2, half T2 * 0.1 / sqrt(3) = 0.248
        ([0.2, 0.3, 0.4], "higher"),  # mean 0.3, the same half
        ([0.5], "one seed: cannot tell"),
        ([], "no common seed"),
    ],
)
def test_verdicts(gaps: list[float], verdict: str):
    values = dict(enumerate(gaps))
    those = Place("b", dict.fromkeys(values, 0.0) or {7: 0.0}, dict.fromkeys(values, 0.0))
    assert paired(Place("a", values or {1: 0.0}, values), those).verdict == verdict


def test_a_verdict_that_the_next_measurement_may_undo_is_unsure():
    these, those = {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.5, 2: 0.6}
    on_time = Place("a", these, these)
    assert paired(on_time, Place("b", those, those)).verdict == "higher"
    assert paired(on_time, Place("b", those, {0: 0.6, 1: 0.7, 2: 0.8})).verdict == "higher (unsure)"
    assert paired(Place("b", those, {0: 0.6, 1: 0.7, 2: 0.8}), on_time).verdict == "lower (unsure)"
    assert paired(on_time, Place("b", those, {0: 0.45, 1: 0.55, 2: 0.65})).verdict == "higher"  # closer, but still higher
    assert Difference(2, estimate([0.1, -0.1]), sure=False).verdict == "within noise"


def test_measured_before_the_budget_is_said(tmp_path: Path):
    folder = sweep(tmp_path, {"a": [{4: 0.5}] * 3, "b": [{3: 0.1, 4: 0.7}] * 3}, {"a": 10, "b": 11})
    place = at(compare([folder]), "sampled", 1.0)["b"]  # 40 tokens: b had spent 33 at step 3 and 44 at step 4
    assert (place.values, place.later) == (dict.fromkeys(range(3), 0.1), dict.fromkeys(range(3), 0.7))
    assert (place.measured, place.next_at) == (pytest.approx(33 / 40), pytest.approx(44 / 40))
    assert place.difference is not None
    assert place.difference.verdict == "lower (unsure)"
    said = shown(compare([folder]))
    assert "(the earliest: b, at 0.82 of the sampled tokens)" in said
    assert "0.700 at 1.10" in said


def test_slack(tmp_path: Path):
    folder = sweep(tmp_path, {"a": [{2: 0.1, 4: 0.5}], "b": [{2: 0.2, 4: 0.7}]}, {"a": 100, "b": 101})
    assert at(compare([folder]), "sampled", 1.0)["b"].values == {0: 0.2}  # at 404 tokens it is too late for 400
    place = at(compare([folder], slack=0.02), "sampled", 1.0)["b"]
    assert (place.values, place.measured, place.next_at) == ({0: 0.7}, pytest.approx(1.01), None)
    assert at(compare([folder], slack=0.005), "sampled", 1.0)["b"].values == {0: 0.2}
    assert "or up to 0.02 of it after it" in shown(compare([folder], slack=0.02))


def test_stages_count_but_the_last_is_judged(tmp_path: Path):
    folder = run(tmp_path / "run", 3, stages=2)
    stage(folder / "1-sft", {1: 0.9}, 5, sampled=0, trained=100)
    stage(folder / "2-rl", {2: 0.3, 4: 0.5}, 4)
    (found,) = find_runs([folder])
    curve = read_curve(found, "eval/mean")
    assert (found.label, found.seed, found.finished) == ("run", 3, True)
    assert (curve.steps, curve.values) == ([2, 4], [0.3, 0.5])
    assert curve.costs == {
        "steps": [7, 9], "sampled": [20, 40], "trained": [510, 520], "seconds": [14, 18], "cpu_seconds": [7, 9]
    }  # fmt: skip
    assert curve.totals["seconds"] == 18
    whole = at(compare([folder]), "steps", 0.75)[
        "run"
    ]  # 6.75 steps: the last stage had not been measured, the first does not count
    assert whole.values == {}


def test_a_stage_that_has_not_begun_has_no_value(tmp_path: Path):
    folder = run(tmp_path / "run", 0, stages=2, finished=False)
    stage(folder / "1-sft", {1: 0.9}, 5)
    curve = read_curve(find_runs([folder])[0], "eval/mean")
    assert (curve.values, curve.totals["steps"]) == ([], 5)


def test_any_metric(two: Path):
    found = compare([two], "reward", fractions=[1.0])
    assert at(found, "steps", 1.0)["lavish"].values == {0: 0.4, 1: 0.4, 2: 0.4}
    assert at(compare([two], "seconds/grow"), "steps", 1.0)["lavish"].values == {0: 1.5, 1: 1.5, 2: 1.5}
    with pytest.raises(ValueError, match=r"no run has the metric 'evl/mean'\. Did you mean eval/mean"):
        compare([two], "evl/mean")


def test_student():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 10: 2.228, 29: 2.045, 120: 1.980}
    assert {df: round(student_quantile(df), 3) for df in table} == table
    assert estimate([1.0, 2.0, 3.0]) == Estimate(3, 2.0, pytest.approx(T2 / math.sqrt(3)))
    assert estimate([0.7]) == Estimate(1, 0.7, None)


def test_other_numbers_of_seeds(two: Path):
    for name in ("metrics.jsonl", "run.json", "summary.json"):
        (two / "lavish" / "seed-1" / name).unlink()
    found = compare([two])
    gap = at(found, "steps", 1.0)["lavish"].difference
    assert gap is not None
    assert (gap.pairs, gap.verdict) == (2, "two equal differences: cannot tell")
    assert any("thrifty: 0 1 2, lavish: 0 2" in note for note in found.notes)
    assert len(find_runs([two])) == 5


def test_unfinished_runs(two: Path):
    (two / "lavish" / "seed-2" / "summary.json").unlink()
    stage(two / "lavish" / "seed-2", {2: 0.4}, 2, 20)
    found = compare([two])
    assert found.axes[0].budgets[-1].amount == 2
    assert found.axes[0].limit == "lavish seed 2"
    assert any("not finished: lavish seed 2 (they lower" in note for note in found.notes)
    without = compare([two], finished=True)
    assert without.axes[0].budgets[-1].amount == 4
    assert any("not finished: lavish seed 2 (left out)" in note for note in without.notes)


def test_a_run_without_the_metric_is_left_out(two: Path):
    stage(two / "lavish" / "seed-0", {}, 4, 20)
    found = compare([two])
    assert [curve.run.seed for curve in found.groups["lavish"]] == [1, 2]
    assert any("left out, without eval/mean so far: lavish seed 0" in note for note in found.notes)


def test_axes_that_some_run_lacks(tmp_path: Path):
    sweep(tmp_path, {"sampler": [{4: 0.5}], "reader": [{4: 0.5}]}, {"sampler": 10, "reader": 0})
    stage(tmp_path / "sampler" / "seed-0", {4: 0.5}, 4, cpu=False)
    found = compare([tmp_path])
    assert [axis.name for axis in found.axes] == ["steps", "trained", "seconds"]
    assert "not at equal sampled tokens: reader had none" in found.notes
    assert "not at equal CPU seconds: not in the metrics of sampler seed 0" in found.notes


def test_one_label_and_one_seed(tmp_path: Path):
    stage(tmp_path / "alone", {4: 0.5}, 4)
    found = compare([tmp_path / "alone"])
    assert found.baseline is None
    assert at(found, "steps", 1.0)["alone"].estimate == Estimate(1, 0.5, None)
    assert "one seed only, so no interval: alone" in found.notes


def test_labels_of_two_sweeps(tmp_path: Path):
    for name in ("one", "two"):
        sweep(tmp_path / name, {"grpo": [{4: 0.5}]})
    assert [found.label for found in find_runs([tmp_path / "one", tmp_path / "two"])] == ["one/grpo", "two/grpo"]
    again = find_runs([tmp_path / "one", tmp_path / "one" / "grpo", tmp_path / "one" / "grpo" / "seed-0"])
    assert [(found.label, found.seed) for found in again] == [("grpo", 0)]


def test_runs_that_were_moved_aside_are_not_seeds(two: Path):
    assert move_aside(two / "lavish" / "seed-1").name == "seed-1.1"
    (two / "lavish" / "seed-2").rename(two / "lavish" / "seed-1")
    assert [found.seed for found in find_runs([two / "lavish"])] == [0, 2]


@pytest.mark.filterwarnings("error")
def test_a_number_in_a_name_is_no_run_moved_aside(tmp_path: Path):
    sweep(tmp_path / "rates", {name: [{4: 0.5}] for name in ("lr-0", "lr-0.1", "lr-0.01")})
    single = tmp_path / "single"
    written_in = {"easy-0.5": "easy-0.5", "mine": "mine", "mine.1": "mine", "temp-1": "temp-1", "temp-1.2": "temp-1.2"}
    for name, written in written_in.items():  # only mine.1 is what it once was beside what was begun anew
        stage(run(single / name, 0), {4: 0.5}, 4)
        (single / name / "run.json").write_text(json.dumps({"stages": [{"seed": 0, "name": "rl", "out": str(tmp_path / written)}]}))
    assert [found.label for found in find_runs([tmp_path / "rates"])] == ["lr-0", "lr-0.1", "lr-0.01"]
    assert [found.label for found in find_runs([single])] == ["easy-0.5", "mine", "temp-1", "temp-1.2"]
    assert [found.label for found in find_runs([single / "mine.1"])] == ["mine.1"]


def test_names_of_runs_of_several_stages_or_none_said(tmp_path: Path):
    for name, written in (("mine", "mine/2-rl"), ("mine.1", "mine/2-rl"), ("mine.5", "mine.5/2-rl")):
        stage(run(tmp_path / name, 0) / "1-sft", {4: 0.5}, 4)
        out = [{"name": word, "out": written} for word in ("sft", "rl")]
        (tmp_path / name / "run.json").write_text(json.dumps({"stages": out}))
    (tmp_path / "rl").mkdir()
    for name in ("rl", "rl.1"):  # runs/NAME, where no folder is said
        stage(run(tmp_path / name, 0), {4: 0.5}, 4)
        (tmp_path / name / "run.json").write_text(json.dumps({"stages": [{"name": "rl", "out": ""}]}))
    assert [found.label for found in find_runs([tmp_path])] == ["mine", "mine.5", "rl"]
    stage(run(tmp_path / "rl.2", 0), {4: 0.5}, 4)  # its run.json says nothing
    with pytest.warns(UserWarning, match=r"rl\.2 counts as a run of its own"):
        assert [found.label for found in find_runs([tmp_path])] == ["mine", "mine.5", "rl", "rl.2"]


def test_no_folder_at_all():
    with pytest.raises(ValueError, match="name the folder of a run or of a sweep"):
        compare([])


def test_seeds_in_order_of_number(tmp_path: Path):
    for seed in (10, 9, 2):
        stage(run(tmp_path / "a" / f"seed-{seed}", seed), {4: 0.5}, 4)
    assert [found.seed for found in find_runs([tmp_path])] == [2, 9, 10]


def test_a_line_in_the_making_and_a_damaged_one(two: Path):
    path = two / "lavish" / "seed-0" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 5, "sam')
    assert at(compare([two]), "steps", 1.0)["lavish"].values[0] == 0.6
    path.write_text(whole.replace('{"step": 3', '{"st', 1))
    with pytest.raises(ValueError, match=r"line 3 of .*metrics.jsonl is no JSON"):
        compare([two])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"baseline": "grpo"}, "there is no 'grpo' to compare with: the labels are thrifty, lavish"),
        ({"fractions": [0.0]}, "fractions must be above 0"),
        ({"fractions": []}, "fractions must be above 0"),
        ({"slack": -0.1}, "slack is a share of the budget"),
        ({"paths": ["nowhere"]}, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_compared(two: Path, options: dict, said: str):
    paths = [Path(path) for path in options.pop("paths", [two])]
    with pytest.raises(ValueError, match=said):
        compare(paths, **options)


def test_an_empty_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no run"):
        compare([tmp_path])
