"""Greedy answers of the reference model, one token at a time, and how many of them are right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bpe import EOS, prompt_text
from problems import Problem, is_correct
from tokenizers import Tokenizer

from melt_edge.config import LoopConfig
from melt_edge.modeling import LoopLM
from melt_edge.tasks.greedy import greedy as greedy_answers
from melt_edge.tasks.score import Score


def view(model: LoopLM, config: LoopConfig) -> LoopLM:
    """The same weights (shared, not copied) run as another configuration says."""
    other = LoopLM(config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.eval()


def greedy(model: LoopLM, prompts: Sequence[Sequence[int]], max_tokens: int = 64) -> list[list[int]]:
    """Greedy continuations up to the end token (left out), in the order of the prompts."""
    answers = dict(greedy_answers(model, prompts, end_tokens={EOS}, max_tokens=max_tokens))
    return [answers[index] for index in range(len(prompts))]


def score(model: LoopLM, tokenizer: Tokenizer, problems: Sequence[Problem]) -> dict[str, Score]:
    """The score of each kind of problem, and of "all" of them."""
    prompts = [tokenizer.encode(prompt_text(p.question)).ids for p in problems]
    right: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for problem, answer in zip(problems, greedy(model, prompts), strict=True):
        correct = is_correct(problem, tokenizer.decode(answer))
        for kind in (problem.kind, "all"):
            count[kind] += 1
            right[kind] += correct
    return {kind: Score(right[kind], count[kind]) for kind in count}
