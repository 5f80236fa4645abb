"""What the optimizer steps of one forest have shown: gauges, norms, losses, and what became of every leaf."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.gauges import merge, surrogate
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.weights import Selection
from ramulus.look.cost.ledger import IDLE, TRAINED


@dataclass
class StepStatistics:
    """Gauges, gradient norms, losses, token counts and leaf fates of a forest's updates, added row by row and update by update."""

    parts: int  # of the forest, each meant for one update
    rate: float  # learning rate of these updates
    rows: list[dict[str, float]] = field(default_factory=list)  # gauges
    norms: list[float] = field(default_factory=list)  # of gradients that were applied
    mismatch: list[float] = field(
        default_factory=list
    )  # of the rows before the first update, whose tokens these weights sampled
    losses: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # tokens
    fates: list[dict[int, int]] = field(default_factory=list)  # of each tree, as the ledger's Fate
    empty: int = 0  # parts without signal
    bad: int = 0  # updates left out since a gradient was not finite

    def add_row(self, gauges: dict[str, float], losses: list[float], counts: dict[str, int]) -> None:
        """One row that has given its gradient."""
        worst = gauges.pop("mismatch_max", 0.0)
        self.mismatch += [] if self.norms else [worst]
        self.rows.append({name: value for name, value in gauges.items() if not (self.norms and name.startswith("mismatch"))})
        self.losses += losses
        self.counts.update(counts)

    def add_update(self, updated: dict[str, float]) -> None:
        """What the policy said of an update."""
        self.bad += int(updated["skipped"])
        self.norms += [updated["grad_norm"]] if not updated["skipped"] else []

    def add_fates(self, selection: Selection, mix: Mix, learns: bool) -> None:
        """What becomes of the leaves of a part; of one without signal all are left out."""
        fates: list[dict[int, int]] = [{} for _ in selection.idle]
        for part, trained in zip(mix.terms, selection.terms, strict=True):
            used, unused = (sum(flags[author] for author in part.authors) for flags in (TRAINED, IDLE))
            for fate, leaves, idle in zip(fates, trained, selection.idle, strict=True):
                for leaf in leaves:
                    fate[leaf] = fate.get(leaf, 0) | (used if learns and leaf not in idle else unused)
        self.fates += fates

    def metrics(self) -> dict[str, float]:
        """The numbers of them all."""
        numbers = merge(self.rows) | {"mismatch_max": max(self.mismatch, default=0.0)}
        if self.norms:
            numbers["grad_norm"] = max(self.norms)
        if self.losses:
            numbers["loss"] = sum(self.losses) / max(self.parts - self.empty, 1)
        tokens = {name: self.counts[name] for name in ("trained", "zero_credit", "packed", "flattened")}
        skipped = {"skipped": self.empty + self.bad, "not_finite": self.bad}
        return numbers | tokens | {"updates": len(self.norms), "lr": self.rate} | skipped


def loss(
    mix: Mix, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch, values: Tensor | None = None
) -> list[float]:
    """The textbook loss of a row, where every mask and reference of the mix knows it; rows add up."""
    total = surrogate(mix, tempered, plain, entropy, batch, values)
    return [] if total is None else [total]
