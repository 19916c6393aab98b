"""Greedy answers of the reference model, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from bpe import EOS

from melt_edge.config import LoopConfig
from melt_edge.modeling import LoopLM
from melt_edge.tasks.greedy import greedy as greedy_answers


def view(model: LoopLM, config: LoopConfig) -> LoopLM:
    """The same weights (shared, not copied) run as another configuration says."""
    other = LoopLM(config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.eval()


def greedy(model: LoopLM, prompts: Sequence[Sequence[int]], max_tokens: int = 64) -> list[list[int]]:
    """Greedy continuations up to the end token (left out), in the order of the prompts."""
    answers = dict(greedy_answers(model, prompts, end_tokens={EOS}, max_tokens=max_tokens))
    return [answers[index] for index in range(len(prompts))]
