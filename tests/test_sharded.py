"""Learning over ranks: rows are shared without loss, shards are read by any number of ranks, and what torchrun starts is one run."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.learners import Tiny, learner, near, run
from conformance.test_learner import rows, story
from forests import forest
from methods import METHODS
from ramulus.learn.batch.score_row import score_rows
from ramulus.learn.sharded.factory import Sharded
from ramulus.learn.sharded.placing import units
from ramulus.learn.sharded.share import Piece, assembled, part_of, pieces, share_out
from ramulus.models.structure import copied, elsewhere
from ramulus.run.config.override import override
from run_recipe import rl
from tiny import build


def columns(row: Any) -> dict[str, Tensor]:
    """The tensors of a row."""
    return {field.name: getattr(row, field.name) for field in fields(row) if isinstance(getattr(row, field.name), Tensor)}


def test_trees_are_shared_evenly_and_never_cut() -> None:
    dice = random.Random(0)
    for _ in range(50):
        ranks, budget = dice.randint(1, 5), 100
        parts = [Piece(0, 0, dice.randint(1, budget), i) for i in range(dice.randint(1, 40))]
        shared = share_out(parts, ranks, budget)
        assert sorted(part.key for mine in shared for row in mine for part in row) == list(range(len(parts)))
        assert len({len(mine) for mine in shared}) == 1, "ranks go through equally many rows"
        assert all(sum(map(len, row)) <= budget for mine in shared for row in mine)
        loads = [sum(len(part) for row in mine for part in row) for mine in shared]
        assert max(loads) - min(loads) <= max(map(len, parts))


@pytest.mark.parametrize("seed", range(5))
def test_rows_taken_apart_and_put_together_are_the_same(seed: int) -> None:
    trees = forest(seed, trees=4, tempered=True)
    for batch in [*rows(METHODS["ppo"].mix, trees, 200), *score_rows(trees)]:
        parts = pieces([batch])
        assert len(parts) > 1
        again = assembled([batch], parts)
        known, found = columns(batch), columns(again)
        assert known.keys() == found.keys()
        assert all(torch.equal(known[name], found[name]) for name in known if name not in ("node", "leaf_token", "leaf_author"))
        assert again.spans == [span for span in batch.spans if span[3] > span[2]]
        alone = part_of(batch, parts[1].start, parts[1].stop)
        assert alone.parent[0] == 0
        assert alone.end.max() == len(alone) == len(parts[1])


def test_a_layer_that_shares_weights_is_no_unit_of_its_own() -> None:
    model = build(num_hidden_layers=3)
    assert units(model) == list(model.model.layers)
    model.model.layers[1].mlp = model.model.layers[2].mlp
    assert units(model) == [model.model.layers[0]]


def test_the_structure_of_a_model_takes_no_memory_and_stays_tied() -> None:
    model = build(tie_word_embeddings=True)
    ghost = copied(model, elsewhere(model, "meta"))
    assert all(p.is_meta for p in ghost.parameters())
    assert ghost.lm_head.weight is ghost.model.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())
    assert isinstance(ghost.model.layers, nn.ModuleList)


def test_a_learner_is_named_on_the_command_line() -> None:
    for words in (["learner=sharded"], ["learner=Sharded()"], ["learner=sharded", "learner.ranks=2"]):
        [changed] = override((rl(),), words)
        assert changed.learner == Sharded(ranks=2 if len(words) > 1 else None)
    with pytest.raises(ValueError, match="there is no learner 'shard': there are torch, sharded"):
        override((rl(),), ["learner=shard"])
    with pytest.raises(ValueError, match=r"learner\.sharing must be at least 1, got 0"):
        Sharded(sharing=0)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_over_two_ranks(tmp_path: Any) -> None:
    mix, tiny = METHODS["ppo"].mix, Tiny(value=True)

    async def first(one: Any) -> Any:
        await story(one, mix, 1)
        state = await one.save(tmp_path)
        return state, await story(one, mix, 7)

    async def again(one: Any, state: dict[str, Any]) -> Any:
        await one.restore(tmp_path, state)
        return await story(one, mix, 7)

    with learner("in process", tiny) as one:
        state, after = run(first(one))
    with learner("over two ranks", tiny) as one:
        assert near(run(again(one, state)), after, exact=False)


def test_what_one_process_cannot_go_on_from_says_so(tmp_path: Any) -> None:
    (tmp_path / "shards").mkdir()
    with learner("in process", Tiny()) as one, pytest.raises(ValueError, match=r"is of learner=Sharded\(\.\.\.\): go on with it"):
        run(one.restore(tmp_path, {}))
