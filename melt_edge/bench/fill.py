"""A cache that holds as many tokens as wanted, with little computing where the backend can."""

from __future__ import annotations

from collections.abc import Sequence

from melt_edge.runtime.base import Backend, EditsRows

# Rows that are computed before they are repeated.
SEED_TOKENS = 64


def fill(model: Backend, tokens: Sequence[int]) -> str | None:
    """Make the cache hold as many tokens as these; returns "evaluated" or "repeated", None for none at all.

    Repeated rows belong to the first tokens only; they take as long to read as any others.
    """
    depth = len(tokens)
    if not isinstance(model, EditsRows):
        model.reset()
        if depth:
            evaluate(model, tokens)
        return "evaluated" if depth else None
    if model.n_tokens > depth:
        model.truncate(depth)
    seed = min(depth, SEED_TOKENS)
    if model.n_tokens < seed:
        evaluate(model, tokens[model.n_tokens : seed])
    if model.n_tokens < depth:
        model.repeat_rows(depth)
    return None if not depth else "repeated" if depth > seed else "evaluated"


def evaluate(model: Backend, tokens: Sequence[int]) -> None:
    """Evaluate tokens and wait for the last one's logits."""
    model.eval(tokens)
    model.last_logits()
