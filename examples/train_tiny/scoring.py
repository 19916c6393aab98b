"""Greedy answers of the reference model, one token at a time, and how many of them are right."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bpe import EOS, prompt_text
from problems import Problem, is_correct
from tokenizers import Tokenizer

from melt_edge.config import LoopConfig
from melt_edge.modeling import KVCache, LoopLM


@dataclass(frozen=True)
class Score:
    """Right answers out of ``count``, with the Wilson interval of the share at 95 %."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Right answers per question, 0..1."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the share. Source: Wilson (1927), z = 1.96."""
        z2 = 1.96**2
        middle = (self.right + z2 / 2) / (self.count + z2)
        half = 1.96 / (self.count + z2) * math.sqrt(self.right * (self.count - self.right) / self.count + z2 / 4)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} % ({self.right}/{self.count}, 95 %: {100 * low:.1f} to {100 * high:.1f})"


def view(model: LoopLM, config: LoopConfig) -> LoopLM:
    """The same weights (shared, not copied) run as another configuration says."""
    other = LoopLM(config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.eval()


@torch.no_grad()
def greedy(model: LoopLM, prompts: Sequence[Sequence[int]], max_tokens: int = 64) -> list[list[int]]:
    """Greedy continuations up to the end token (left out), prompts of one length at a time.

    The prompt is cut as the configuration says, then one token at a time, as generation does.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in by_length.values():
        cache = KVCache(model.config)
        tokens = torch.tensor([list(prompts[i]) for i in indices])
        running = torch.ones(len(indices), dtype=torch.bool)
        for _ in range(max_tokens):
            tokens = model(tokens, cache).logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            running &= tokens[:, 0] != EOS
            if not running.any():
                break
            for row, index in enumerate(indices):
                if running[row]:
                    answers[index].append(int(tokens[row, 0]))
    return answers


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
