"""What is said of a field that is not there: where it went, or what was probably meant."""

from __future__ import annotations

import difflib
from typing import Any

from ramulus.core.recipe_part import paths_to
from ramulus.run.config.short_names import FIELDS, NOT_TAKEN

MOVED = {
    ("Mix", "leash"): "mix.kl_coef",
    ("Run", "exam"): "final_evaluation",
    ("Local", "copy"): "engine.precision",
    ("AttentionForks", "delta"): "signals.0.delta: write signals=(ForwardInfluence(delta=...),) in a recipe file",
    ("EntropyForks", "words"): "signals.0.words: write signals=(Concluded(words=...),) in a recipe file, or set branching.closed=None for no words",
}
"""(class, field) that went elsewhere or has another name: what to write now."""

def unknown(name: str, owner: type, known: list[str], where: str, below: Any = None) -> str:
    """The sentence for a field `name` at the dotted path `where`, of a class with the `known` fields; `below` is the object that was searched."""
    if (owner.__name__, name) in MOVED:
        return f"{where}: {owner.__name__} has no field {name!r} any more, it is {MOVED[owner.__name__, name]}"
    before = where[: len(where) - len(name)]
    close = [f"{before}{near}" for near in difflib.get_close_matches(name, known, n=1, cutoff=0.7)]
    meant = [f"{before}{path}" for path in paths_to(name, below)] or close
    if not before and name in NOT_TAKEN:
        return f"{where}: {owner.__name__} has no field {name!r}: {NOT_TAKEN[name]}"
    if not before and name in FIELDS:  # in a recipe file; on the command line it is taken
        meant = list(FIELDS[name])
    guess = f" Did you mean {' or '.join(meant)}?" if meant else ""
    return f"{where}: {owner.__name__} has no field {name!r}.{guess} It has: {', '.join(known) or 'no fields'}"
