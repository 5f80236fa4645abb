"""What fits on several GPUs, and how many rows the shipped recipes decode: never a handful because of a constant."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from ramulus.cli import main
from ramulus.engine.local.factory import Local
from ramulus.learn.policy.model import Pretrained
from ramulus.learn.sharded.factory import Sharded
from ramulus.models.sizes import Sizes
from ramulus.recipes import attnrl, dapo, grpo, hapo, hpt, luffy, ramulus, srft, treepo, treerl
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import build
from ramulus.run.memory.auto import fitting
from ramulus.run.memory.fleet import count_of, splits, together_on, ways_that_fit
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.rates import GPUS, decode_rate, llama, published, update_rate
from ramulus.run.memory.rooms import site_of
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


@pytest.mark.parametrize(("words", "meant"), [("8xH100", (8, "H100")), ("8 x h100", (8, "H100")), ("16*a100", (16, "A100")), ("4090", (1, "4090"))])
def test_numbers_of_gpus_are_read(words: str, meant: tuple[int, str]) -> None:
    assert count_of(words) == meant


@pytest.mark.parametrize("words", ["8xT1000", "0xH100", "", "H100x8", "-1xH100", "8.5xH100", "8xH100xH100", "99999xH100", "٨xH100"])
def test_other_words_are_answered_with_what_is_known(words: str) -> None:
    with pytest.raises(ValueError, match=f"gpus={re.escape(words)}: give a number from 1 to 1024 and one of H100, H200, A100, L40S, 4090"):
        count_of(words)


def seven(**changes: object) -> Run:
    return replace(grpo.recipe(), **{"model": Pretrained("Qwen/Qwen2.5-7B")} | changes)  # type: ignore[arg-type]


SEVEN, LARGER = seven(), seven(model=Pretrained("Qwen/Qwen2.5-32B"))


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return planned_sizes(SEVEN)


def test_a_split_fits_and_more_gpus_are_faster(sizes: Sizes) -> None:
    eight, sixteen = (ways_that_fit(SEVEN, sizes, H100, count) for count in (8, 16))
    for split in eight:
        assert split.peak <= H100.memory
        assert split.sampler.rows >= 8
        assert (split.trainers if split.together else split.trainers + split.samplers * split.group) <= 8
    assert [split.together for split in eight] == [False, True]
    assert all(many.rate > 1.8 * few.rate for few, many in zip(eight, sixteen, strict=True))
    assert all(split.sharing == together_on(split.trainers, 16) <= 8 for split in sixteen)  # a machine holds one copy
    apart = [split for split in splits(SEVEN, sizes, H100, 8) if not split.together and split.peak <= H100.memory]
    assert min(split.trainers for split in apart) == 3  # a 7B's optimizer does not fit on one
    assert ways_that_fit(SEVEN, sizes, GPUS["4090"], 2) == []


def test_one_gpu_trains_and_samples_in_turns() -> None:
    run = grpo.recipe()
    [split] = ways_that_fit(run, planned_sizes(run), H100, 1)
    assert split.together
    assert split.resident >= sum(split.trainer.named(name) for name in ("weights", "optimizer", "float32 masters"))
    assert 1 / split.rate == pytest.approx(1 / split.sampled + 1 / split.trained)
    assert split.feeds == pytest.approx(split.trained / split.sampled)


def test_a_model_that_one_gpu_does_not_hold_is_sampled_by_several() -> None:
    found = ways_that_fit(LARGER, planned_sizes(LARGER), H100, 32)
    assert found
    assert {split.group for split in found} == {2}
    assert all(split.sharing > 8 for split in found)  # a machine does not hold its optimizer


def test_ranks_share_what_they_hold_and_gather_what_they_compute_with(sizes: Sizes) -> None:
    one, eight = (step_memory(SEVEN, sizes, Site("cuda", shards=shards, engine=False)) for shards in (1, 8))
    for name in ("weights", "optimizer", "float32 masters"):
        assert eight.named(name) == one.named(name) / 8
    assert eight.named("weights gathered from the ranks") > 2 * sizes.vocabulary * sizes.hidden * 2 > one.named("weights gathered from the ranks")
    offloaded = step_memory(replace(SEVEN, learner=Sharded(offload=True)), sizes, Site("cuda", shards=8, engine=False))
    assert offloaded.named("optimizer", "float32 masters") == 0
    eighth = step_memory(replace(SEVEN, learner=Sharded(adam="8bit")), sizes, Site("cuda", shards=8, engine=False))
    assert eighth.named("optimizer") == eight.named("optimizer") / 4


@pytest.mark.parametrize(("words", "shards"), [(("learner.ranks=4",), 4), ((), 1), (("learner.sharing=2",), 2)])
def test_a_plan_knows_how_many_ranks_there_are(words: tuple[str, ...], shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    [run] = build("grpo", ["learner=sharded", *words, "device=cpu"])[0]
    assert site_of(run) == Site("cpu", shards)
    for name, value in {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert site_of(run).shards == (2 if "learner.sharing=2" in words else 3)


def test_rates_follow_what_limits_them(sizes: Sizes) -> None:
    assert decode_rate(H100, sizes, 2, 100, 2) == pytest.approx(2 * decode_rate(H100, sizes, 1, 100, 2), rel=0.01)  # reading the weights
    assert decode_rate(H100, sizes, 20_000, 0, 2) == pytest.approx(decode_rate(H100, sizes, 40_000, 0, 2))  # multiplying
    assert update_rate(H100, sizes, True) == 0.75 * update_rate(H100, sizes, False) == update_rate(H100, sizes, False, scoring=1)
    assert update_rate(H100, sizes, False, 8000) < 0.85 * update_rate(H100, sizes, False)  # attention


def test_sizes_of_what_was_published_are_those_of_the_models() -> None:
    for made, billions in ((llama(4096, 14336, 32, 32, 8, 128256), 8.03), (llama(8192, 28672, 80, 64, 8, 128256), 70.55)):
        assert made.parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_documentation_has_the_table_of_rates() -> None:
    text = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    for row in published():
        assert abs(row.error) < 0.25
        assert f"| {row.what} | {row.measured:,.0f} | {row.computed:,.0f} | {row.error:+.0%} | {row.source} |" in text


def ramulus_plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *words])
    return (int(stopped.value.code or 0), *capsys.readouterr())


def test_the_command_line_says_what_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, said, _ = ramulus_plan(capsys, "grpo", "--gpus", "8xH100")
    assert status == 0
    for words in ("grpo on 8 x H100", "7.62B", "32.8B does not fit on 8 x H100", "it fits on 16 x H100", "a trainer", "apart", "in turns", "feeds"):
        assert words in said
    assert "…" not in said  # a terminal of 80 columns holds it
    status, _, error = ramulus_plan(capsys, "grpo", "--gpus", "8xABC")
    assert (status, error.count("\n")) == (2, 1)
