"""The local engine on a CUDA device: the same checks in short."""

from __future__ import annotations

import pytest
import torch

from engines import KINDS, ask, line, mixed, run, small, worst
from ramulus.engine.local.local_engine import LocalEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_logprobs_and_forks_on_the_device(kind: str, fast: bool) -> None:
    model = small(kind)
    engine = LocalEngine(small(kind).cuda(), slots=6, memory=2**26, fast=fast)
    requests = [*mixed(20), ask(line(12, 4), seed=1, temperature=0.8, top_p=0.7, top_k=10, min_p=0.02, max_tokens=1)]
    segments = run(engine, requests)
    assert worst(model, requests[:-1], segments[:-1]) < 1e-4
    forks = [ask(r.prefix + tuple(s.tokens[:3]), seed=i) for i, (r, s) in enumerate(zip(requests, segments))]
    assert worst(model, forks, run(engine, forks)) < 1e-4
    assert engine.counters()["reused"] > 0


def test_a_bfloat16_copy_and_repeatability_on_the_device() -> None:
    model = small().cuda()
    runs = [run(LocalEngine(model, slots=8, memory=2**26, precision=torch.bfloat16), mixed(20)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert worst(model.cpu(), mixed(20), runs[0]) < 0.5
