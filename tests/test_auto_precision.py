"""`autocast=auto` and `engine.precision=auto`: bfloat16 where the device multiplies it, said alike by learner, engine, ranks, plan and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ramulus import recipes
from ramulus.engine import memory
from ramulus.engine.local import factory
from ramulus.engine.local.factory import Local
from ramulus.learn.policy import torch_policy
from ramulus.learn.policy.model import Scratch
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded import factory as sharded_factory
from ramulus.learn.sharded.factory import Sharded
from ramulus.models.sizes import sizes_of_model
from ramulus.recipes import grpo, smol
from ramulus.run.config.describe import to_json
from ramulus.run.config.resume import as_begun
from ramulus.run.memory import step as memory_step
from ramulus.run.memory.step import Site


@pytest.mark.parametrize("multiplied", [True, False])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(multiplied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learner, engine and the memory plan agree."""
    for module in (factory, torch_policy):
        monkeypatch.setattr(module, "device_multiplies_bfloat16", lambda device: multiplied)
    for module in (memory_step, memory):
        monkeypatch.setattr(module, "planned_in_bfloat16", lambda cuda: cuda or multiplied)
    model, _ = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
    assert TorchPolicy(model, autocast="auto").autocast is multiplied
    engine, chosen = Local(precision="auto", memory_mb=8)(model), torch.bfloat16 if multiplied else torch.float32
    assert engine.forward.geometry.dtype == chosen
    here = replace(smol.recipe(), model="x", activation_checkpointing=False)
    sizes = sizes_of_model(model)
    assert memory_step.autocasts(here, Site()) is multiplied
    assert here.engine.traits.memory.dtype(memory_step.sampling_of(here, sizes, Site())) == chosen
    assert memory_step.autocasts(here, Site("cuda"))
    assert memory_step.autocasts(replace(here, autocast=True), Site())
    assert Local(precision="auto", memory_mb=8)(model.to(torch.float64)).forward.geometry.dtype == torch.float64, "as the model is"


def test_ranks_take_what_their_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the processor does that holds the copy from which their policy is made."""
    asked, given = [], []
    monkeypatch.setattr(sharded_factory, "device_multiplies_bfloat16", lambda device: asked.append(device.type) or True)
    monkeypatch.setattr("ramulus.learn.sharded.starting.start_ranks", lambda size, timeout: None)
    monkeypatch.setattr("ramulus.learn.sharded.sharded_learner.sharded_learner", lambda *parts: given.append(parts[4]))
    model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
    Sharded(ranks=1)(model.to("meta"), tokenizer, None, False, {"autocast": "auto"}, 0)
    assert (asked, [more["autocast"] for more in given]) == (["meta"], [True])


def test_a_run_that_began_in_bfloat16_goes_on_in_it() -> None:
    now = (replace(grpo.recipe(), name="now"),)
    before = [to_json(replace(now[0], autocast=True, engine=replace(now[0].engine, precision="bfloat16")))]
    (run,) = as_begun(now, before, [])
    assert (run.autocast, run.engine.precision) == (True, "bfloat16")
    assert as_begun(now, before, ["bf16=auto"]) == now
    assert as_begun(now, [to_json(now[0])], []) == now


@pytest.mark.parametrize("module", sorted(Path(recipes.__path__[0]).glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_no_shipped_recipe_asks_a_processor_for_what_it_cannot_multiply(module: Path) -> None:
    """On a laptop without bfloat16 such a product takes several times as long as one of float32."""
    text = module.read_text()
    assert not [word for word in ("autocast=True", '"autocast": True', 'precision="bfloat16"') if word in text]
