"""The prefix trie against a plain model of what was inserted, with KV that says which tokens it belongs to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramulus.engine.local.radix_tree import RadixTree, common

TOKEN = 2 * 3 * 4  # bytes of a token: [1, 2, 1, n, 3] float32


def kv(text: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """KV whose values are a hash of the whole prefix at each position: wrong context shows."""
    values = [hash(text[: i + 1]) % 100003 for i in range(start, stop)]
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 3).clone()


def copied(found: list[tuple[torch.Tensor, int]]) -> list[float]:
    return [x for chunk, n in found for x in chunk[0, 0, 0, :n, 0].tolist()]


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from([0, 5, 12, 30, 10**6]), st.randoms(use_true_random=False))
def test_matches_are_right_and_the_budget_holds(lines: list[tuple[int, ...]], tokens: int, rng) -> None:
    trie = RadixTree(TOKEN)
    trie.shrink(tokens * TOKEN)
    seen: list[tuple[int, ...]] = []
    for text in lines:
        if rng.random() < 0.3:
            trie.shrink(tokens * TOKEN)
        found, held, known = trie.match(text)
        longest = max((common(text, other) for other in seen), default=0)
        assert known == longest
        assert held <= known
        assert held == longest or tokens < 10**6
        assert copied(found) == kv(text, 0, held)[0, 0, 0, :, 0].tolist()
        trie.insert(text, lambda start, stop, text=text: kv(text, start, stop))
        seen.append(text)
        assert trie.used <= tokens * TOKEN
        assert trie.used == sum(twig.chunk.untyped_storage().nbytes() for twig in trie.recent if twig.chunk is not None)
        for twig in trie.recent:  # a chunk's ancestors hold theirs
            while twig.parent is not None:
                assert twig.chunk is not None
                assert twig.chunk.shape[3] == len(twig.tokens)
                twig = twig.parent
    trie.clear()
    assert trie.used == 0
    assert trie.match(lines[0])[1:] == (0, 0)


def test_least_recently_used_goes_first() -> None:
    trie = RadixTree(TOKEN)
    trie.shrink(8 * TOKEN)
    a, b, c = (1,) * 4, (2,) * 4, (3,) * 4
    for text in (a, b):
        trie.insert(text, lambda start, stop, text=text: kv(text, start, stop))
    trie.match(a)
    trie.insert(c, lambda start, stop: kv(c, start, stop))
    assert [trie.match(text)[1] for text in (a, b, c)] == [4, 0, 4]
    assert trie.match(b)[2] == 4  # known, but dropped


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_common(a: list[int], b: list[int]) -> None:
    n = common(tuple(a), tuple(b))
    assert a[:n] == b[:n]
    assert (n == min(len(a), len(b)) or a[n] != b[n])
