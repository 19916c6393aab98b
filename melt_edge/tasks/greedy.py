"""Greedy decoding with the reference model: prompts of one length run together, one token at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import torch

from melt_edge.modeling import LoopLM

# Prompts that run together: enough for a matrix product to be worth it, few enough for progress to be seen.
BATCH = 128


def greedy(
    model: LoopLM,
    prompts: Sequence[Sequence[int]],
    *,
    end_tokens: Collection[int],
    max_tokens: int,
    chunk_size: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(index of the prompt, its continuation without the end token), as they are done.

    chunk_size: how the prompt is cut, default as the model's configuration says; what follows is computed
    one token at a time, as generation does.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            rows = [list(prompts[index]) for index in batch]
            yield from zip(batch, _continue(model, rows, end_tokens, max_tokens, chunk_size), strict=True)


@torch.no_grad()
def _continue(
    model: LoopLM, rows: list[list[int]], end_tokens: Collection[int], max_tokens: int, chunk_size: int | None
) -> list[list[int]]:
    cache = model.new_cache()
    tokens = torch.tensor(rows, device=model.lm_head.weight.device)
    answers: list[list[int]] = [[] for _ in rows]
    running = set(range(len(rows)))
    for _ in range(max_tokens):
        tokens = model(tokens, cache, chunk_size=chunk_size).logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
        running -= {row for row in running if int(tokens[row, 0]) in end_tokens}
        if not running:
            break
        for row in running:
            answers[row].append(int(tokens[row, 0]))
    return answers
