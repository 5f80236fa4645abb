"""What fits on several GPUs, and how many rows the shipped recipes decode: never a handful because of a constant."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from ramulus.cli import main
from ramulus.engine.local.factory import Local
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes import attnrl, dapo, grpo, hapo, hpt, luffy, ramulus, srft, treepo, treerl
from ramulus.run.config.recipe import Run
from ramulus.run.memory.auto import fitting
from ramulus.run.memory.fleet import GPUS, count_of, decode_rate, splits, update_rate
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.step import Site, step_memory

LARGE = [grpo, attnrl, dapo, treepo, hapo, hpt, luffy, srft, ramulus, treerl]  # 1.5B, 7B and 14B
H100 = GPUS["H100"]


@pytest.mark.parametrize("gpu", ["H100", "H200"])
@pytest.mark.parametrize("recipe", LARGE, ids=lambda recipe: recipe.__name__.rpartition(".")[2])
def test_shipped_recipes_decode_as_many_rows_as_memory_holds(recipe: ModuleType, gpu: str) -> None:
    run, memory = recipe.recipe(), GPUS[gpu].memory
    sizes = planned_sizes(run)
    assert run.engine.memory_mb == "auto"
    slot = sizes.token_bytes(2) * (run.prompt_limit + run.response_limit)
    for site in (Site("cuda"), Site("cuda", shards=8), Site("cuda", learner=False)):
        planned = fitting(run, sizes, site, memory, present=False)
        if planned.peak > memory:  # it does not fit at all
            continue
        unused = memory * 0.9 - planned.peak
        assert planned.rows == run.engine.slots >= 64 or unused < 2 * slot / 0.75 + 2**20
    assert fitting(run, sizes, Site("cuda", learner=False), memory, present=False).rows >= 16
    constant = replace(run, engine=Local(run.engine.slots, memory_mb=1024, precision=run.engine.precision))
    assert step_memory(constant, sizes, Site("cuda")).rows <= 8  # what a gibibyte gave


def test_numbers_of_gpus_are_read() -> None:
    assert count_of("8xH100") == count_of("8 x h100") == (8, "H100")
    assert count_of("4090") == (1, "4090")
    with pytest.raises(ValueError, match="gpus=8xT1000: give a number and one of H100"):
        count_of("8xT1000")
    with pytest.raises(ValueError, match="gpus=0xH100"):
        count_of("0xH100")


def seven(**changes: object) -> Run:
    return replace(grpo.recipe(), **{"model": Pretrained("Qwen/Qwen2.5-7B")} | changes)  # type: ignore[arg-type]


def test_a_split_fits_and_more_gpus_are_faster() -> None:
    sizes = planned_sizes(seven())
    eight, sixteen = (splits(seven(), sizes, H100, count) for count in (8, 16))
    for split in eight:
        assert max(split.learner.peak, split.sampler.peak) <= H100.memory
        assert split.sampler.rows >= 8
        assert split.learners + split.samplers * split.group <= 8
    assert max(s.rate for s in sixteen) > 1.8 * max(s.rate for s in eight)
    assert min(s.learners for s in eight) >= 2  # a 7B's optimizer does not fit on one
    assert splits(seven(), sizes, GPUS["4090"], 2) == []


def test_a_model_that_one_gpu_does_not_hold_is_sampled_by_several() -> None:
    run = seven(model=Pretrained("Qwen/Qwen2.5-32B"))
    found = splits(run, planned_sizes(run), H100, 32)
    assert {split.group for split in found} == {2}


def test_rates_follow_what_limits_them() -> None:
    sizes = planned_sizes(seven())
    assert decode_rate(H100, sizes, 2, 100, 2) == pytest.approx(2 * decode_rate(H100, sizes, 1, 100, 2), rel=0.01)  # reading the weights
    assert decode_rate(H100, sizes, 20_000, 0, 2) == pytest.approx(decode_rate(H100, sizes, 40_000, 0, 2))  # multiplying
    assert update_rate(H100, sizes, True) == 0.75 * update_rate(H100, sizes, False)


@pytest.mark.parametrize(("gpu", "rows", "context", "measured"), [("A100", 1, 1088, 75 * 2039 / 1555)])
def test_decoding_is_near_what_was_published(gpu: str, rows: int, context: int, measured: float) -> None:
    run = seven(model=Pretrained("Qwen/Qwen2.5-7B"))  # measured with 8.0B on the A100 of 40 GB, whose bandwidth is 1,555 GB/s
    found = decode_rate(GPUS[gpu], planned_sizes(run), rows, context, 2) * 7.07 / 7.5
    assert found == pytest.approx(measured, rel=0.15)


def test_training_is_near_what_was_published() -> None:
    sizes = planned_sizes(seven())
    assert update_rate(H100, sizes, False) * 7.07 / 7.5 == pytest.approx(6667, rel=0.05)  # torchtitan: Llama 3.1 8B, 7.5B of them multiplied


def test_the_command_line_says_what_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "grpo", "--gpus", "8xH100"])
    assert not stopped.value.code
    said = capsys.readouterr().out
    for words in ("grpo on 8 x H100", "Qwen2.5-7B, 7.6B", "Qwen2.5-32B, 32.8B", "a learner", "torchtitan"):
        assert words in said
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "grpo", "--gpus", "8xABC"])
    assert stopped.value.code == 2
