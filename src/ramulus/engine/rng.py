"""Counter-based random numbers: a draw is a function of (seed, index) and of nothing else.

Each request owns a SplitMix64 stream (Steele, Lea and Flood, OOPSLA 2014) that starts at a mixed copy of its seed; the number
for its i-th token can be computed by anybody, in any order, in any batch. So a request's draws never depend on its neighbours.
"""

from __future__ import annotations

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: int) -> int:
    """The SplitMix64 finaliser on one 64-bit integer."""
    x &= MASK
    x = ((x ^ (x >> 30)) * FIRST) & MASK
    x = ((x ^ (x >> 27)) * SECOND) & MASK
    return x ^ (x >> 31)


def uniform(seed: int, index: int) -> float:
    """The `index`-th number of the stream of `seed`: a float in [0, 1) with 53 random bits."""
    return (mix(mix(seed) + (index + 1) * GOLDEN) >> 11) * 2.0**-53


def streams(seeds: list[int]) -> np.ndarray:
    """The starting points of the streams of `seeds`, uint64 [B], for `uniforms`."""
    return np.array([mix(seed) for seed in seeds], dtype=np.uint64)


def uniforms(starts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """`uniform` for B streams at once: starts uint64 [B] from `streams`, indices uint64 [B] -> float64 [B]."""
    x = starts + (indices + np.uint64(1)) * np.uint64(GOLDEN)  # wraps modulo 2^64, as meant
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
