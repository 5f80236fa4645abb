"""Which of several servers is asked: the one that has computed a request's prefix before."""

from __future__ import annotations

from collections.abc import Sequence


class Affinity:
    """Texts that begin alike go to one server, so that a tree's prefixes are computed once; new ones to the server that has the fewest.

    Example:
        >>> affinity = Affinity()
        >>> first, second = (affinity((1, 2, n), [0, 1]) for n in (3, 4))
        >>> first != second, affinity((1, 2, 3, 9), [0, 1]) == first
        (True, True)
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """New weights: nothing is computed any more."""
        self.homes: dict[tuple[int, ...], int] = {}  # the first prefix of each family of texts -> its server
        self.lengths: list[int] = []  # of those prefixes, the longest first
        self.families: dict[int, int] = {}  # how many each server has

    def __call__(self, prefix: Sequence[int], servers: Sequence[int]) -> int:
        """The server, of the numbers in `servers`, that is asked for a prefix."""
        if len(servers) == 1:
            return servers[0]
        text = tuple(prefix)
        for length in self.lengths:
            if length <= len(text) and self.homes.get(text[:length]) in servers:
                return self.homes[text[:length]]
        home = min(servers, key=lambda server: self.families.get(server, 0))
        self.homes[text] = home
        self.families[home] = self.families.get(home, 0) + 1
        if len(text) not in self.lengths:
            self.lengths = sorted([*self.lengths, len(text)], reverse=True)
        return home
