"""How far a model's positions reach."""

from __future__ import annotations

from typing import Any

UNBOUNDED = 2**31
SHIFTING = ("dynamic", "longrope")
"""Rotary embeddings whose angles change for all tokens of a text when that becomes longer than the model's original context."""


def rope_limit(config: Any) -> int:
    """Tokens of a text up to which the angles of its tokens do not depend on how long it becomes: beyond, kept keys and trees would be wrong."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    shifting = [part for part in kinds if any(kind in str(part.get("rope_type")) for kind in SHIFTING)]
    limits = [
        part.get("original_max_position_embeddings") if part["rope_type"] == "longrope" else text.max_position_embeddings
        for part in shifting
    ]
    return min((int(limit) for limit in limits if limit), default=UNBOUNDED)


def context(config: Any) -> int:
    """Most tokens of a text: as many as there are positions, and no more than `rope_limit`."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(int(most or UNBOUNDED), rope_limit(config))


def beyond(config: Any) -> str:
    """What to say of texts longer than `context`: how it is extended, or why it cannot be."""
    if rope_limit(config) == UNBOUNDED:
        return "or extend its context: Pretrained(max_positions=..., rope=...)"
    return "as beyond that its rotary embedding turns the angles of all tokens of a text, which shared prefixes cannot follow"
