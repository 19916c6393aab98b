"""One batch, chunk by chunk: the student's loss with the gradient through all chunks, the teacher in step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from melt_edge.distill.data import Batch
from melt_edge.distill.losses import alignment_sum, kd_sum
from melt_edge.distill.settings import WHOLE
from melt_edge.distill.student import Rows, StudentLM, TransitionCache

# The teacher's result does not depend on the cut, so it runs over several small chunks at once.
TEACHER_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """How a batch is computed.

    aligned: attention outputs are compared with the teacher's. detach: no gradient between chunks.
    recompute: chunks are computed again in the backward pass instead of being kept.
    """

    alpha: float
    aligned: bool
    chunk_size: int
    detach: bool
    recompute: bool


@dataclass(frozen=True)
class Sums:
    """The parts of a batch's loss, summed over its tokens, and the mean of z of each loop ((T,) or empty)."""

    kd: Tensor
    alignment: Tensor
    gate_means: Tensor


@dataclass(frozen=True)
class _Piece:
    """A chunk and what the teacher did there.

    Shapes: tokens, wanted, present (B, C); logits (M, V); outputs (T * N, B, C, D) or None.
    """

    tokens: Tensor
    wanted: Tensor
    present: Tensor
    logits: Tensor
    outputs: Tensor | None


def unroll(student: StudentLM, teacher: StudentLM, batch: Batch, plan: Plan) -> Sums:
    """The loss parts of a batch; every token but the last is read, the next one is predicted."""
    zero = torch.zeros((), device=batch.tokens.device)
    kd, alignment = zero, zero
    means: list[list[Tensor]] = [[] for _ in range(student.config.num_loops)]
    past: list[Rows] = []
    kept = TransitionCache(student.config, plan.alpha)
    pieces = list(_cuts(batch.tokens.shape[1] - 1, plan.chunk_size))
    for index, piece in enumerate(_pieces(teacher, batch, plan)):
        watched = means if index == len(pieces) // 2 else None  # the gates cost twice where they are watched
        if plan.recompute:
            if plan.detach:
                past = [{key: (k.detach(), v.detach()) for key, (k, v) in rows.items()} for rows in past]
            rows, piece_kd, piece_alignment = checkpoint(
                _run_apart, student, piece, plan, past, watched, use_reentrant=False, preserve_rng_state=False
            )
            past = [*past, rows]
        else:
            if plan.detach:
                kept.detach()
            piece_kd, piece_alignment = _run(student, piece, plan, kept, watched)
        kd, alignment = kd + piece_kd, alignment + piece_alignment
    seen = [torch.stack(loop).mean() for loop in means if loop]
    return Sums(kd, alignment, torch.stack(seen) if seen else torch.zeros(0, device=kd.device))


def _run_apart(
    student: StudentLM, piece: _Piece, plan: Plan, past: list[Rows], watched: list[list[Tensor]] | None
) -> tuple[Rows, Tensor, Tensor]:
    """A chunk whose only inputs and outputs are rows and losses, so that it can be computed a second time.

    Rows are joined in here: a joined copy that every chunk kept would grow with the square of the length.
    """
    cache = TransitionCache(student.config, plan.alpha, past, keep=False)
    kd, alignment = _run(student, piece, plan, cache, watched)
    return cache.last_rows, kd, alignment


def _run(
    student: StudentLM, piece: _Piece, plan: Plan, cache: TransitionCache, watched: list[list[Tensor]] | None
) -> tuple[Tensor, Tensor]:
    cache.record, cache.gate_means = plan.aligned, watched
    logits = student.chunk_logits(piece.tokens, cache, piece.wanted)
    kd = kd_sum(logits, piece.logits)
    if piece.outputs is None:
        return kd, torch.zeros_like(kd)
    return kd, alignment_sum(cache.take_outputs(), piece.outputs, piece.present)


@torch.no_grad()
def _pieces(teacher: StudentLM, batch: Batch, plan: Plan) -> Iterator[_Piece]:
    """The chunks in order, the teacher run over as many at a time as fit into TEACHER_TOKENS."""
    # A row's last token is only predicted: where padding follows it is read too, but must not count.
    tokens, wanted, present = batch.tokens[:, :-1], batch.learned[:, 1:], batch.present[:, 1:]
    cache = TransitionCache(teacher.config, alpha=0.0, record=plan.aligned)
    size = plan.chunk_size if plan.chunk_size != WHOLE else tokens.shape[1]
    block = size * max(1, TEACHER_TOKENS // size)
    for first, last in _cuts(tokens.shape[1], block):
        states, _ = teacher.forward_chunk(tokens[:, first:last], cache)
        outputs = cache.take_outputs() if plan.aligned else None
        for a, b in _cuts(last - first, size):
            here = slice(first + a, first + b)
            yield _Piece(
                tokens[:, here],
                wanted[:, here],
                present[:, here],
                teacher.lm_head(states[-1][:, a:b][wanted[:, here]]),
                None if outputs is None else outputs[:, :, a:b],
            )


def _cuts(length: int, size: int) -> Iterator[tuple[int, int]]:
    """The bounds of the chunks of a sequence."""
    size = length if size == WHOLE else size
    for start in range(0, length, size):
        yield start, min(start + size, length)
