"""The sampler: frequencies, truncation, edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ramulus.engine.engine import HOTTEST, Sampling
from ramulus.engine.local.sampling import Drawn, SamplingBatch, draw, inverse_cdf
from ramulus.engine.toy import draw_token

CPU = torch.device("cpu")


def sample(logits: torch.Tensor, u: torch.Tensor, **sampling) -> Drawn:
    knobs = SamplingBatch([Sampling(8, **sampling)] * len(logits), CPU, logits.dtype)
    return draw(logits, knobs, u.double())


def grid(n: int) -> torch.Tensor:
    """n evenly spread uniforms: frequencies must match probabilities up to 1/n a token."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("size", [7, 2048, 2049, 151936 // 8 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_cdf_gives_each_index_its_share(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(size, generator=generator, dtype=dtype) ** 8
    weights[torch.rand(size, generator=generator) < 0.3] = 0
    n = 400
    index = inverse_cdf(weights.expand(n, size), grid(n))
    edges = weights.double().cumsum(0) / weights.double().sum()
    expected = torch.searchsorted(edges, grid(n), right=True)
    assert (index != expected).sum() <= 2  # a float32 chunk sum may move an edge by one part in 1e7
    assert (weights[index] > 0).all()


@pytest.mark.parametrize("size", [10, 5000])
def test_never_a_token_of_probability_zero(size: int) -> None:
    weights = torch.zeros(4, size, dtype=torch.float32)
    weights[:, 3] = 0.3
    weights[:, size - 2] = 0.7
    u = torch.tensor([0.0, 0.3, 1 - 2**-53, 0.9999999], dtype=torch.float64)
    assert set(inverse_cdf(weights, u).tolist()) <= {3, size - 2}
    assert int(inverse_cdf(weights, u)[0]) == 3
    assert int(inverse_cdf(weights, u)[2]) == size - 2
    logits = torch.full((1, size), -math.inf)
    logits[0, 4], logits[0, 7] = 0.0, -60.0
    out = sample(logits, torch.tensor([1 - 2**-53]))
    assert out.tokens[0] in (4, 7)
    assert math.isfinite(out.logprobs[0])
    assert out.entropy[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "temperature": 1.4, "min_p": 0.02}],
)
def test_frequencies_records_and_mass(sampling: dict) -> None:
    """Over a fine grid of uniforms, a token's frequency is exp(its recorded log-prob), and log-prob + kept the tempered one."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    n = 20000
    out = sample(logits.expand(n, 40), grid(n), **sampling)
    tempered = (logits / sampling.get("temperature", 1.0)).log_softmax(-1)
    seen: dict[int, tuple[int, float, float]] = {}
    for token, logprob, kept in zip(out.tokens, out.logprobs, out.kept):
        seen[token] = (seen.get(token, (0, 0.0, 0.0))[0] + 1, logprob, kept)
    for token, (count, logprob, kept) in seen.items():
        assert count / n == pytest.approx(math.exp(logprob), abs=2 / n)
        assert logprob + kept == pytest.approx(float(tempered[token]), abs=1e-9)
    cut = bool(set(sampling) - {"temperature"})
    kept = out.kept[0]
    assert all(k == pytest.approx(kept, abs=1e-12) for k in out.kept)
    assert (kept < 0) == cut
    if cut:  # every token that is left was seen, and their tempered mass is what was recorded
        assert math.log(sum(math.exp(float(tempered[token])) for token in seen)) == pytest.approx(kept, abs=1e-3)
    assert sum(math.exp(logprob) for _, logprob, _ in seen.values()) == pytest.approx(1, abs=1e-3)


def test_large_vocabulary_nucleus_beyond_the_first_candidates() -> None:
    """Flat logits: top-p 0.9 leaves nine tenths of 5,000 tokens, more than the first guess."""
    logits = torch.linspace(0, 0.1, 5000)[None].expand(8, 5000)
    out = sample(logits, grid(8), top_p=0.9)
    assert all(math.exp(k) == pytest.approx(0.9, abs=1e-3) for k in out.kept)
    peaked = torch.zeros(8, 5000)
    peaked[:, 17] = 20
    out = sample(peaked, grid(8), top_p=0.9)
    assert out.tokens == [17] * 8
    assert all(lp == pytest.approx(0, abs=1e-6) for lp in out.logprobs)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_truncation_is_that_of_the_reference_whatever_stands_beside(top_p: float, min_p: float) -> None:
    """Top-k around the first candidates and beyond, in rows that they settle and in flat ones, alone and beside each other."""
    size, generator = 4096, torch.Generator().manual_seed(0)
    logits = torch.randn(3, size, generator=generator, dtype=torch.float64) * torch.tensor([[2.2], [4.0], [0.1]], dtype=torch.float64)
    for top_k in (0, 1, 1023, 1024, 1025, 2000, size, 2 * size):
        settings = Sampling(1, top_k=top_k, top_p=top_p, min_p=min_p)
        for u in (0.3, 0.9999):
            uniform = torch.full((3,), u, dtype=torch.float64)
            beside = draw(logits, SamplingBatch([settings] * 3, CPU, torch.float64), uniform)
            for i, row in enumerate(logits):
                alone = draw(row[None], SamplingBatch([settings], CPU, torch.float64), uniform[:1])
                wanted = draw_token(row.tolist(), settings, 1.0, u)
                for found, at in ((alone, 0), (beside, i)):
                    assert found.tokens[at] == wanted.token, (top_k, u, i)
                    assert (found.kept[at], found.logprobs[at]) == pytest.approx((wanted.kept, wanted.logprob), abs=1e-9), (top_k, u, i)


def test_greedy_and_mixed_rows() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    knobs = SamplingBatch([Sampling(8, temperature=0.0), Sampling(8), Sampling(8, temperature=0.0, top_p=0.5)], CPU, torch.float32)
    out = draw(logits, knobs, torch.tensor([0.9, 0.9, 0.9], dtype=torch.float64))
    best = logits.argmax(-1).tolist()
    assert (out.tokens[0], out.tokens[2]) == (best[0], best[2])
    assert (out.logprobs[0], out.kept[0], out.logprobs[2], out.kept[2]) == (0, 0, 0, 0)
    assert out.temperature == [0, 1, 0]
    assert out.logprobs[1] < 0
    assert out.entropy[0] > 0
    all_cold = sample(logits, torch.zeros(3), temperature=0.0)
    assert all_cold.tokens == best
    assert all_cold.logprobs == [0.0] * 3


@pytest.mark.parametrize("temperature", [7e-46, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("beside", [{}, {"temperature": 0.7}, {"top_k": 3}])
def test_a_temperature_that_float32_rounds_to_zero_is_greedy(temperature: float, beside: dict) -> None:
    """By the number that logits are really divided by, alone and beside rows that are not."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    u = torch.tensor([0.9, 0.9, 0.9], dtype=torch.float64)
    others = [Sampling(8, **beside)] * 2
    rows = [[Sampling(8, temperature=t), *others] for t in (temperature, 0.0)]
    out, wanted = (draw(logits, SamplingBatch(row, CPU, torch.float32), u) for row in rows)
    assert (out.tokens, out.logprobs, out.kept, out.entropy) == (wanted.tokens, wanted.logprobs, wanted.kept, wanted.entropy)
    alone = sample(logits, u, temperature=temperature)
    assert (alone.tokens, alone.logprobs) == (logits.argmax(-1).tolist(), [0.0] * 3)


@pytest.mark.parametrize("temperature", [math.inf, math.nan, -math.inf, -0.1, 1e39, "0.7", None])
def test_a_temperature_that_is_none_is_refused(temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be a number from 0"):
        Sampling(8, temperature=temperature)
    assert Sampling(8, temperature=HOTTEST).temperature == HOTTEST


@pytest.mark.parametrize("name", ["max_tokens", "top_k"])
@pytest.mark.parametrize("value", [8.0, 0.5, math.nan, math.inf, "8", None, True, [8]])
def test_counts_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got "):
        Sampling(**{"max_tokens": 8} | {name: value})
    assert Sampling(np.int64(8), top_k=np.int32(2)).truncates  # type: ignore[arg-type]


@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"temperature": 0.7}])
def test_a_log_prob_that_is_no_number_is_named(others: dict) -> None:
    class Zero:
        """Says that it never answers 0, and does."""

        features = frozenset({"positive"})

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.full((len(logits),), 1e-46)

    knobs = SamplingBatch([Sampling(8, temperature=Zero()), Sampling(8, **others)], CPU, torch.float32)
    with pytest.raises(ValueError, match=r"log-prob is NaN at temperature 0\.0"):
        draw(torch.randn(2, 50, generator=torch.Generator().manual_seed(2)), knobs, grid(2))


def test_rules_touch_only_their_rows_and_are_recorded() -> None:
    def rule(logits: torch.Tensor) -> torch.Tensor:
        return 0.5 + logits.amax(-1) * 0

    def cold(logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(logits))

    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    u = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    mixed = draw(logits, SamplingBatch([Sampling(8, temperature=t) for t in (rule, 1.0, rule, cold)], CPU, torch.float32), u)
    fixed = draw(logits, SamplingBatch([Sampling(8, temperature=t) for t in (0.5, 1.0, 0.5, 0.0)], CPU, torch.float32), u)
    assert mixed == fixed
    assert mixed.temperature == [0.5, 1.0, 0.5, 0.0]


SIZES = [9, 2048, 3000, 151936 // 8 + 3]  # of one level and of two, whole chunks and a last one that is short


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [float("nan"), -0.5, float("inf")])
def test_a_rule_that_gives_nonsense_is_named(value: float, size: int) -> None:
    with pytest.raises(ValueError, match="temperature rule"):
        sample(torch.randn(2, size), grid(2), temperature=lambda logits: torch.full((len(logits),), value))
    with pytest.raises(ValueError, match="shape"):
        sample(torch.randn(2, size), grid(2), temperature=lambda logits: logits)


BROKEN = {"NaN": [math.nan, 0.0, 1.0], "inf": [0.0, math.inf, 1.0], "inf beside -inf": [-math.inf, math.inf, 0.0], "nothing": [-math.inf] * 3}
SETTINGS = [{}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}]


@pytest.mark.parametrize("size", [3, *SIZES])
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("sampling", [*SETTINGS, {"temperature": lambda logits: torch.ones(len(logits))}])
def test_logits_that_are_no_numbers_are_named(name: str, sampling: dict, size: int) -> None:
    left_out = torch.full((2, size - 3), -math.inf if name == "nothing" else 0.0)
    logits = torch.cat((torch.tensor([[0.0, 1.0, 2.0], BROKEN[name]]), left_out), 1)
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        sample(logits, grid(2), **sampling)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_tokens_that_are_masked_are_left_out(sampling: dict) -> None:
    """Some logits are -inf; far ones of float32, whose distance overflows, are as good as that."""
    masked = torch.tensor([[0.5, -math.inf, 1.0], [-math.inf, -math.inf, 3.0], [3e38, -3e38, 0.0]])
    near, out = sample(masked[:1, [0, 2]], grid(1), **sampling), sample(masked, grid(1).expand(3), **sampling)
    assert out.tokens == [[0, 2][near.tokens[0]], 2, 0]
    assert out.logprobs == pytest.approx([near.logprobs[0], 0, 0])
    assert out.entropy == pytest.approx([near.entropy[0], 0, 0])


def test_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    out = sample(logits, torch.tensor([0.999]), temperature=1e-30)
    assert out.tokens == [0]
    assert out.logprobs[0] == 0
