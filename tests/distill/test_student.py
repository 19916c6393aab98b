"""The training's forward is the reference's, at both ends of the transition, for every cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import MakeCheckpoint
from distill.common import student_of
from melt_edge.checkpoint import load_model
from melt_edge.distill.data import Batch
from melt_edge.distill.student import StudentLM, TransitionCache
from melt_edge.distill.unroll import Plan, unroll
from melt_edge.export.gguf import export_gguf
from melt_edge.modeling import KVCache
from parity.native import context, sequence
from parity.reference import distance
from tiny import tiny_checkpoint, tiny_config

WHOLE = 64
CHUNKS = [1, 7, WHOLE]
LIMIT = 1e-4  # standard deviations of the logits
N_TOKENS = 23


def tokens_of(rows: int = 1, n: int = N_TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 301, (rows, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained_logits(student: StudentLM, tokens: torch.Tensor, chunk: int, alpha: float) -> torch.Tensor:
    """Chunk by chunk as the trainer does it, with rows handed from one cache to the next. (n, V)."""
    past, logits = [], []
    for piece in tokens.split(chunk, dim=1):
        cache = TransitionCache(student.config, alpha, past, keep=False)
        logits.append(student.chunk_logits(piece, cache, torch.ones_like(piece, dtype=torch.bool)))
        past.append(cache.last_rows)
    return torch.cat(logits)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("gate", "init"), [("elementwise", "zeros"), ("elementwise", "input"), ("none", "zeros")])
def test_training_reference_and_file_give_the_same_logits(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, gate: str, init: str, chunk: int
) -> None:
    """Trainer = reference with cache = exported GGUF in llama.cpp, float32, tokens of the answer one at a time."""
    config = tiny_config("melt", kv_gate=gate, kv_gate_init=init)
    tokens = tokens_of()
    trained = trained_logits(student_of(config), tokens, chunk, alpha=1.0).numpy()
    with torch.no_grad():
        reference = load_model(make_checkpoint(config))(tokens, KVCache(config), chunk_size=chunk).logits[0].numpy()
    path = tmp_path / "melt.gguf"
    export_gguf(make_checkpoint(config), path, type="f32", verify=False)
    with context(path, chunk_size=chunk) as ctx:
        native = ctx.logits(sequence(tokens[0].tolist()))
    assert distance(trained, reference) < LIMIT
    assert distance(native, reference) < LIMIT
    assert distance(native, trained) < LIMIT


@pytest.mark.parametrize("chunk", CHUNKS)
def test_alpha_0_is_the_teacher_bit_for_bit(make_checkpoint: MakeCheckpoint, chunk: int) -> None:
    """A student with the teacher's weights, whatever its gates hold."""
    ouro, melt = tiny_config("ouro"), tiny_config("melt")
    teacher = load_model(make_checkpoint(ouro))
    student = student_of(melt, seed=3)
    student.load_state_dict(teacher.state_dict(), strict=False)
    tokens = tokens_of(rows=2)
    with torch.no_grad():
        expected = teacher(tokens, chunk_size=chunk).logits
        cache = TransitionCache(melt, alpha=0.0)
        got = student(tokens, cache, chunk_size=chunk).logits
    assert torch.equal(got, expected)
    assert cache.nbytes == 2 * N_TOKENS * ouro.kv_bytes_per_token(4)  # nothing of MELT's stream is kept


@pytest.mark.parametrize("chunk", CHUNKS)
def test_alpha_1_is_melt_bit_for_bit(make_checkpoint: MakeCheckpoint, chunk: int) -> None:
    config = tiny_config("melt")
    tokens = tokens_of(rows=2)
    cache = TransitionCache(config, alpha=1.0)
    with torch.no_grad():
        expected = load_model(make_checkpoint(config))(tokens, chunk_size=chunk).logits
        assert torch.equal(student_of(config)(tokens, cache, chunk_size=chunk).logits, expected)
    assert cache.nbytes == 2 * N_TOKENS * config.kv_bytes_per_token(4)  # nor of the LoopLM's


def test_between_the_ends_both_streams_are_mixed() -> None:
    """The logits move with alpha, without a jump at either end."""
    student, tokens = student_of(tiny_config("melt")), tokens_of()
    alphas = [0.0, 1e-4, 0.5, 1 - 1e-4, 1.0]
    at = {a: trained_logits(student, tokens, 4, a) for a in alphas}
    assert distance(at[1e-4].numpy(), at[0.0].numpy()) < 0.05
    assert distance(at[1 - 1e-4].numpy(), at[1.0].numpy()) < 0.05
    assert distance(at[0.5].numpy(), at[0.0].numpy()) > 0.1
    assert distance(at[0.5].numpy(), at[1.0].numpy()) > 0.1


def test_mixed_rows_are_the_formula() -> None:
    """alpha * KV_MELT + (1 - alpha) * KV_LoopLM, for rows of the past and of the chunk, by hand."""
    config = tiny_config("melt", layers=1, num_loops=2)
    cache = TransitionCache(config, alpha=0.25)
    shape = (1, config.num_key_value_heads, 3, config.head_dim)
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(shape, generator=random) for _ in range(8)]
    for loop_idx in range(2):  # the first chunk: MELT keeps the last loop's, the LoopLM both
        melt, loop = rows[2 * loop_idx], rows[2 * loop_idx + 1]
        cache.mix(cache.slot(loop_idx, 0), (melt, melt), (loop, loop))
    cache.commit()
    k, v = cache.mix(cache.slot(0, 0), (rows[4], rows[4]), (rows[5], rows[5]))
    past, here = 0.25 * rows[2] + 0.75 * rows[1], 0.25 * rows[4] + 0.75 * rows[5]
    assert torch.allclose(k, torch.cat((past, here), dim=2))
    assert torch.equal(k, v)


def batch_of(tokens: torch.Tensor) -> Batch:
    learned = torch.ones_like(tokens, dtype=torch.bool)
    learned[:, : tokens.shape[1] // 2] = False
    return Batch(tokens, learned, torch.ones_like(learned))


def gradients(plan: Plan) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ouro, melt = tiny_config("ouro", num_loops=2), tiny_config("melt", num_loops=2)
    student, teacher = student_of(melt, seed=1), student_of(ouro)
    sums = unroll(student, teacher, batch_of(tokens_of(rows=2, n=12)), plan)
    (sums.kd + sums.alignment).backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return found, (sums.kd + sums.alignment).detach()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_computing_chunks_again_gives_the_same_gradients(alpha: float) -> None:
    kept, kept_loss = gradients(Plan(alpha, True, 3, detach=False, recompute=False))
    again, again_loss = gradients(Plan(alpha, True, 3, detach=False, recompute=True))
    assert torch.allclose(kept_loss, again_loss, rtol=1e-6)
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        assert torch.allclose(gradient, again[name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


def test_the_gradient_flows_through_the_chunks_unless_detached() -> None:
    flowing, loss = gradients(Plan(1.0, True, 3, detach=False, recompute=True))
    for recompute in (False, True):
        cut, same_loss = gradients(Plan(1.0, True, 3, detach=True, recompute=recompute))
        name = "model.layers.0.self_attn.kv_gate.h_proj.weight"
        assert torch.allclose(loss, same_loss, rtol=1e-6)
        assert not torch.allclose(flowing[name], cut[name], rtol=1e-2)


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences in float64, for a gate's weight and a key projection's, in the middle of the transition."""
    ouro, melt = tiny_config("ouro", num_loops=2, layers=1), tiny_config("melt", num_loops=2, layers=1)
    student, teacher = student_of(melt, seed=1).double(), student_of(ouro).double()
    batch = batch_of(tokens_of(n=8))
    plan = Plan(0.6, True, 3, detach=False, recompute=True)

    def loss() -> torch.Tensor:
        sums = unroll(student, teacher, batch, plan)
        return sums.kd + 0.1 * sums.alignment

    loss().backward()
    for name in ("self_attn.kv_gate.x_proj.weight", "self_attn.k_proj.weight"):
        weight = student.get_parameter(f"model.layers.0.{name}")
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, 0] += sign * 1e-3
                slopes.append(float(loss().detach()))
                weight[0, 0] -= sign * 1e-3
        assert (slopes[0] - slopes[1]) / 2e-3 == pytest.approx(float(weight.grad[0, 0]), rel=1e-2)


def test_the_students_attention_outputs_are_those_compared() -> None:
    """A student at alpha 0 with the teacher's weights has no loss of either kind."""
    ouro, melt = tiny_config("ouro"), tiny_config("melt")
    teacher, student = student_of(ouro), student_of(melt, seed=5)
    student.load_state_dict(teacher.state_dict(), strict=False)
    batch = batch_of(tokens_of())
    with torch.no_grad():
        same = unroll(student, teacher, batch, Plan(0.0, True, 5, detach=False, recompute=False))
        other = unroll(student, teacher, batch, Plan(1.0, True, 5, detach=False, recompute=False))
    assert float(same.alignment) < 1e-8
    assert abs(float(same.kd)) < 1e-4
    assert float(other.alignment) > 1


def test_padding_at_the_end_changes_nothing() -> None:
    ouro, melt = tiny_config("ouro", num_loops=2), tiny_config("melt", num_loops=2)
    student, teacher = student_of(melt, seed=1), student_of(ouro)
    batch = batch_of(tokens_of(n=9))
    padded = Batch(*(torch.cat((t, torch.zeros(1, 4, dtype=t.dtype)), dim=1) for t in vars(batch).values()))
    plan = Plan(0.5, True, 2, detach=False, recompute=False)
    with torch.no_grad():
        short, long = unroll(student, teacher, batch, plan), unroll(student, teacher, padded, plan)
    assert torch.allclose(short.kd, long.kd, rtol=1e-5)
    assert torch.allclose(short.alignment, long.alignment, rtol=1e-5)


def test_a_checkpoint_written_by_the_reference_is_read_as_a_student(tmp_path: Path) -> None:
    from melt_edge.distill.models import load_student

    config = tiny_config("melt")
    folder = tiny_checkpoint(tmp_path / "melt", config)
    tokens = tokens_of()
    with torch.no_grad():
        got = load_student(folder)(tokens, chunk_size=3).logits
        assert torch.equal(got, load_model(folder)(tokens, chunk_size=3).logits)
