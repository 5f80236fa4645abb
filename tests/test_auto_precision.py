"""`autocast=auto` and `engine.precision=auto`: bfloat16 where the device multiplies it, said alike by learner, engine, ranks, plan and resume."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ramulus import recipes
from ramulus.engine import memory
from ramulus.engine.local import factory
from ramulus.engine.local.factory import Local
from ramulus.learn.policy import torch_policy
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded import factory as sharded_factory
from ramulus.learn.sharded.factory import Sharded
from ramulus.models.sizes import sizes_of_model
from ramulus.native.processors import device_of
from ramulus.recipes import grpo, smol
from ramulus.run.config.describe import to_json
from ramulus.run.config.resume import as_begun
from ramulus.run.memory import step as memory_step
from ramulus.run.memory.step import Site
from ramulus.run.stage import warn_of_float16


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mps", "device=mps: models run on cpu or cuda here"),
        ("meta", "device=meta: models run on cpu or cuda here"),
        ("nowhere", "device=nowhere: not a device"),
        ("cuda:7", "device=cuda:7: there are 2 CUDA devices here, the first is cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_refused_for_a_run_and_for_a_learner_of_its_own(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=words):
        device_of(name)
    model, tokenizer = Scratch("01")()
    with pytest.raises(ValueError, match=words):
        Torch(process=True, device=name)(model, tokenizer, Scratch("01"), False, {}, 0)
    assert str(device_of("cuda:1")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device=cuda: torch .* sees no CUDA device here"):
        device_of("cuda")


def test_weights_that_lose_what_is_learned_are_said(tmp_path: Path) -> None:
    """Gradients in float16, and adapters added to half precision."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = Scratch("0123")()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    for dtype in ("float32", "bfloat16", "float16"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, _ = Pretrained(str(tmp_path / "model"), adapter=str(tmp_path / "adapters"), dtype=dtype)()
            warn_of_float16(grpo.recipe(), model)
        words = "\n".join(str(warning.message) for warning in caught)
        assert (f"adapters are added to weights in {dtype}" in words) == (dtype != "float32")
        assert ("learns through weights in float16" in words) == (dtype == "float16")
