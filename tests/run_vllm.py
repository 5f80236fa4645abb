"""Recipes of run_small.py, and GRPO on SmolLM2, that sample with vLLM: servers at RAMULUS_URLS, or one that the run starts."""

from __future__ import annotations

import os
from dataclasses import replace

import run_small
from ramulus import (
    Clip,
    Estimator,
    Fixed,
    GroupMean,
    IcePop,
    ImportanceWeight,
    Mix,
    Product,
    Recomputed,
    Star,
    Term,
    Vllm,
)
from ramulus.recipes import smol as smol_recipe
from ramulus.run.config.recipe import Run


def engine(**options: object) -> Vllm:
    urls = tuple(os.environ.get("RAMULUS_URLS", "").split())
    return Vllm(urls=urls, timeout=300.0, memory_mb=256, threads=1, **options)  # type: ignore[arg-type]


def elsewhere(run: Run) -> Run:
    """Three steps, saved after each."""
    return replace(run, steps=3, save_every=1, engine=engine())


def grpo() -> Run:
    return elsewhere(run_small.grpo())


def treepo() -> Run:
    return elsewhere(run_small.treepo())


def attnrl() -> Run:
    return elsewhere(run_small.attnrl())


def hapo() -> Run:
    return elsewhere(run_small.hapo())


def hpt() -> Run:
    return elsewhere(run_small.hpt())


def corrected() -> Run:
    """GRPO whose tokens are weighed by how far sampler and learner are apart."""
    mask = Product((Clip(column="recomputed"), ImportanceWeight(2.0), IcePop()))
    mix = Mix((Term(Estimator(mask, Recomputed(), GroupMean(), recomputed_tempered=True)),))
    return replace(grpo(), mix=mix)


def smol() -> Run:
    """GRPO on SmolLM2-135M-Instruct: ten small steps, with a server that the run starts."""
    changes = {"branching": Star(4), "schedule": Fixed(2), "steps": 10, "save_every": 10, "evals": None, "final_evaluation": None, "eval_every": 0}
    return replace(smol_recipe.recipe(), **changes, engine=engine(slots=16, precision="float32", limit=1024))
