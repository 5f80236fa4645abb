"""Some whole responses first, then more from inside them: at steps that later ones attend to, at early steps, at surprising tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ramulus.core.tree import Author, Node, Tree
from ramulus.grow.branching import Bud, dice, paths
from ramulus.grow.points import at_random, by_score


@dataclass(frozen=True)
class AttentionForks:
    """`roots` paths, then `branches` more from each of `points` steps that the steps after them attend to (arXiv 2509.26628).

    A step reaches the `quantile` of the scores of its response; of such, the earliest that begin at token `distance` or later, the
    prompt counted, and lie `distance` tokens apart. Where these are too few the earliest steps fill up, and where a response has fewer
    steps than that, the earliest again; from a response of one step nothing grows. The step itself is sampled anew. `rounds`: how often
    the newest paths are branched; the paper does it once. The signal "influence" is that of ForwardInfluence, whose `delta` it is to choose.

    Example:
        >>> from ramulus import AttentionForks, Task, Tree
        >>> [bud.why for bud in AttentionForks(roots=2)(Tree.plant(Task("t", (1,), "t")))]
        ['root', 'root']
    """

    roots: int = 6
    points: int = 2
    branches: int = 2
    quantile: float = 0.8
    distance: int = 512
    rounds: int = 1

    needs: ClassVar[tuple[str, ...]] = ("steps", "influence")

    def __post_init__(self) -> None:
        check_counts(self, self.roots, self.points, self.branches, self.rounds, self.distance)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"AttentionForks' quantile must be in [0, 1], got {self.quantile}")

    def __call__(self, tree: Tree) -> list[Bud]:
        if tree.rounds == 0:
            return [Bud(tree.root, why="root") for _ in range(self.roots)]
        return [bud for leaf in newest(tree, self.rounds) for bud in self.fork(leaf)]

    def most_paths(self, more: int = 0) -> int:
        """Paths of a tree at most: all of a round may be branched in the next, those that a rule around this one began too."""
        return (self.roots + more) * sum((self.points * self.branches) ** n for n in range(self.rounds + 1))

    def fork(self, leaf: Node) -> list[Bud]:
        """The buds inside one path."""
        starts, base = steps_of(leaf), above(leaf)
        scores = [signal_of(leaf, "influence")[at] for at in starts]
        end = base + len(leaf.tokens)
        if not starts:
            return []
        steps = by_score(scores, [base + at for at in starts], end, self.points, self.quantile, self.distance)
        return buds(leaf, [starts[k] for k in steps], self.branches, "influence")


@dataclass(frozen=True)
class EarlyForks:
    """AttentionForks with its scores taken away: `points` steps at random from the first `early` share of each response.

    A control: most steps that AttentionForks takes are early ones, and whether attention adds anything to that was never tested.
    The rules of distance and the fallbacks are the same.

    Example:
        >>> from ramulus import EarlyForks, Task, Tree
        >>> len(EarlyForks(roots=4)(Tree.plant(Task("t", (1,), "t"))))
        4
    """

    roots: int = 6
    points: int = 2
    branches: int = 2
    early: float = 0.5
    distance: int = 512

    needs: ClassVar[tuple[str, ...]] = ("steps",)
    rounds: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_counts(self, self.roots, self.points, self.branches, self.rounds, self.distance)
        if not 0 < self.early <= 1:
            raise ValueError(f"EarlyForks' early is a share of the steps in (0, 1], got {self.early}")

    def __call__(self, tree: Tree) -> list[Bud]:
        if tree.rounds == 0:
            return [Bud(tree.root, why="root") for _ in range(self.roots)]
        return [bud for leaf in newest(tree, self.rounds) for bud in self.fork(tree, leaf)]

    def most_paths(self, more: int = 0) -> int:
        """Paths of a tree at most: each of the first round is branched, those that a rule around this one began too."""
        return (self.roots + more) * (1 + self.points * self.branches)

    def fork(self, tree: Tree, leaf: Node) -> list[Bud]:
        """The buds inside one path."""
        starts, base = steps_of(leaf), above(leaf)
        chance = dice(tree, f"early/{leaf.id}")
        end = base + len(leaf.tokens)
        steps = at_random([base + at for at in starts], end, self.points, self.early, self.distance, chance)
        return buds(leaf, [starts[k] for k in steps], self.branches, "early")


@dataclass(frozen=True)
class EntropyForks:
    """EPTree (arXiv 2506.11902, section 3.1): M `roots`; in each of L `rounds`, T `branches` at the N least expected tokens below each.

    `by`: the surprisal -log p of the sampled token, as in the released code, or the entropy of the distribution it came from. p is the
    tempered distribution before truncation, entropy the untempered one's. Never branched at: the first token of a node, which is where
    its siblings left, and tokens where the signal `closed` is not 0: "concluded", after the words of Concluded; None leaves all open. The
    token itself is sampled anew.
    `diverse`: among so many times N least expected tokens, the first and then whichever lies farthest from those taken, along the tree
    (an option of the released code, with 5, which measures positions inside nodes even across nodes).

    Example:
        >>> from ramulus import EntropyForks, Task, Tree
        >>> len(EntropyForks(roots=6)(Tree.plant(Task("t", (1,), "t"))))
        6
    """

    roots: int = 6
    points: int = 2
    rounds: int = 1
    branches: int = 2
    by: Literal["surprisal", "entropy"] = "surprisal"
    closed: str | None = "concluded"
    diverse: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, self.roots, self.points, self.branches, self.rounds)
        if self.by not in ("surprisal", "entropy"):
            raise ValueError(f"EntropyForks goes by 'surprisal' or 'entropy', got {self.by!r}")
        if self.diverse is not None and self.diverse < 1:
            raise ValueError(
                f"EntropyForks' diverse is how many times the points to choose from, at least 1, or None, got {self.diverse}"
            )

    @property
    def records(self) -> tuple[str, ...]:
        """What an engine must record for it."""
        return ("entropy",) if self.by == "entropy" else ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the signals that the rule reads."""
        return (self.closed,) if self.closed else ()

    def __call__(self, tree: Tree) -> list[Bud]:
        if tree.rounds == 0:
            return [Bud(tree.root, why="root") for _ in range(self.roots)]
        if tree.rounds > self.rounds:
            return []
        tops = [node for node in tree.root.children if node.author is Author.POLICY and expanded(tree, node)]
        return [bud for top in tops for bud in self.fork(top)]

    def most_paths(self, more: int = 0) -> int:
        """Paths of a tree at most: each round branches below each of the first, those that a rule around this one began too."""
        return (self.roots + more) * (1 + self.rounds * self.points * self.branches)

    def fork(self, top: Node) -> list[Bud]:
        """The buds below one root: the `points` highest scores, the earlier token in preorder where they are alike."""
        places = [(score, node, at) for node in top.walk() for at, score in self.scores(node)]
        places.sort(key=lambda one: -one[0])
        if self.diverse:
            places = farthest(places[: self.diverse * self.points], self.points)
        return [
            bud
            for score, node, at in places[: self.points]
            for bud in buds(node, [at], self.branches, f"{score:.2f} nats")
        ]

    def scores(self, node: Node) -> list[tuple[int, float]]:
        """(token, score) of the tokens of a node that may be branched at."""
        if node.author is not Author.POLICY or node.finish == "pruned" or len(node.tokens) < 2:
            return []
        if self.by == "entropy":
            scores = node.column("entropy")
            if len(scores) != len(node.tokens):
                raise ValueError(f"node {node.id} has no recorded entropies to branch by: sample with an engine that records them, or by='surprisal'")
        else:
            kept = node.kept or [0.0] * len(node.tokens)
            scores = [-(logp + mass) for logp, mass in zip(node.logprobs, kept, strict=True)]
        closed = signal_of(node, self.closed) if self.closed else [0.0] * len(scores)
        return [(at, scores[at]) for at in range(1, len(scores)) if not closed[at]]


def farthest(places: list[tuple[float, Node, int]], count: int) -> list[tuple[float, Node, int]]:
    """`count` of the (score, node, token): the first, then the one whose nearest neighbour among those taken is farthest; ties to the earlier."""
    left, taken = list(places), places[:1]
    del left[:1]
    while left and len(taken) < count:
        best = max(left, key=lambda one: min(apart(one, other) for other in taken))
        left.remove(best)
        taken.append(best)
    return taken


def apart(one: tuple[float, Node, int], other: tuple[float, Node, int]) -> int:
    """Tokens from one place in a tree to another: up to where their paths part, and down again."""
    mine, theirs = one[1].line(), other[1].line()
    shared = sum(a is b for a, b in zip(mine, theirs))
    parted = above(mine[shared]) if shared < min(len(mine), len(theirs)) else None
    here, there = above(one[1]) + one[2], above(other[1]) + other[2]
    return abs(here - there) if parted is None else here + there - 2 * parted


def check_counts(rule: object, roots: int, points: int, branches: int, rounds: int, distance: int = 0) -> None:
    """Raise ValueError for a rule that would grow nothing."""
    if min(roots, points, branches, rounds) < 1 or distance < 0:
        raise ValueError(f"{rule}: roots, points, branches and rounds must be at least 1, distance at least 0")


def newest(tree: Tree, rounds: int) -> list[Node]:
    """The paths of the last round that are to be grown from, none after `rounds` rounds of branching."""
    if tree.rounds > rounds:
        return []
    return [leaf for leaf in paths(tree) if leaf.id >= tree.fresh and leaf.finish != "pruned" and expanded(tree, leaf)]


def expanded(tree: Tree, node: Node) -> bool:
    """Whether no path below was ruled out by a schedule."""
    return not tree.unexpanded or all(leaf.id not in tree.unexpanded for leaf in node.leaves())


def steps_of(leaf: Node) -> list[int]:
    """Where the steps of a leaf's own tokens begin, offsets in them."""
    return [at for at, begins in enumerate(signal_of(leaf, "steps")) if begins]


def above(node: Node) -> int:
    """Tokens before those of a node, the prompt counted."""
    return sum(len(one.tokens) for one in node.line()[:-1])


def signal_of(node: Node, name: str) -> Sequence[float]:
    """A signal [L]; raises ValueError where it was not supplied."""
    if node.tokens and name not in node.signals:
        raise ValueError(f"node {node.id} has no signal {name!r}: supply it after each round, as `run` does")
    return node.column(name)


def buds(node: Node, offsets: Sequence[int], branches: int, why: str) -> list[Bud]:
    """`branches` buds before each of these tokens of a node, the earliest first."""
    return [Bud(node, len(node.tokens) - at, why=why) for at in sorted(offsets) for _ in range(branches)]
