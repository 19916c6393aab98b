"""The teacher's objective: a distribution over the loops, and a loss that trains loops and exit gate."""

from __future__ import annotations

import torch

from distill.common import small_teacher, student_of
from melt_edge.distill.pretrain import exit_distribution, guided_loss, loop_loss
from melt_edge.modeling import KVCache, LoopLM


def test_the_exit_distribution_adds_up_to_1_and_the_last_loop_takes_the_rest() -> None:
    exits = torch.tensor([[0.5, 0.0, 1.0], [0.5, 0.0, 0.3], [0.9, 0.1, 0.2]])
    expected = torch.tensor([[0.5, 0.0, 1.0], [0.25, 0.0, 0.0], [0.25, 1.0, 0.0]])
    assert torch.allclose(exit_distribution(exits), expected)


def model_and_row() -> tuple[LoopLM, torch.Tensor, torch.Tensor]:
    config = small_teacher()
    model = LoopLM(config)
    model.load_state_dict(student_of(config).state_dict())
    tokens = torch.arange(12)[None] % 7
    is_answer = torch.zeros(1, 12, dtype=torch.bool)
    is_answer[:, 5:] = True
    return model, tokens, is_answer


def test_the_loss_is_the_formula() -> None:
    model, tokens, is_answer = model_and_row()
    with torch.no_grad():
        loss, losses = loop_loss(model, tokens, is_answer, entropy_weight=0.3)
        states, exits = model.forward_chunk(tokens[:, :-1], KVCache(model.config))
        log_q = torch.log_softmax(model.lm_head(states), -1)  # (T, 1, n, V)
        by_hand = [
            sum(-log_q[t, 0, i, tokens[0, i + 1]] for i in range(4, 11)) / 7 for t in range(model.config.num_loops)
        ]
        p = exit_distribution(exits[:, 0, 4:])
        each = torch.stack([torch.stack([-log_q[t, 0, i, tokens[0, i + 1]] for i in range(4, 11)]) for t in range(2)])
        entropy = -(p * p.log()).sum(0)
    assert torch.allclose(losses, torch.stack(by_hand))
    assert torch.allclose(loss, (each[-1] + (p * each).sum(0) - 0.3 * entropy).mean())


def test_loops_and_exit_gate_learn() -> None:
    model, tokens, is_answer = model_and_row()
    loss, _ = loop_loss(model, tokens, is_answer)
    loss.backward()
    for name in ("model.early_exit_gate.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
        assert float(model.get_parameter(name).grad.abs().sum()) > 0, name


def test_cuts_matter_for_a_shared_cache_alone() -> None:
    model, tokens, is_answer = model_and_row()
    with torch.no_grad():
        whole, cut = loop_loss(model, tokens, is_answer)[0], loop_loss(model, tokens, is_answer, [3, 7])[0]
        assert torch.allclose(whole, cut, atol=1e-5)
        model.config = model.config.share_kv()
        for layer in model.model.layers:
            layer.self_attn.config = model.config
        shared = loop_loss(model, tokens, is_answer, [3, 7])[0]
    assert not torch.allclose(whole, shared, atol=1e-3)


def test_a_guided_loop_is_told_what_to_say() -> None:
    model, tokens, _ = model_and_row()
    guide = torch.full((2, 1, 11), -1)
    guide[:, 0, 4], guide[1, 0, 7] = torch.tensor([3, 5]), 6  # the first loop is told nothing at place 7
    with torch.no_grad():
        loss, losses = guided_loss(model, tokens, guide)
        states, _ = model.forward_chunk(tokens[:, :-1], KVCache(model.config))
        log_q = torch.log_softmax(model.lm_head(states), -1)  # (T, 1, n, V)
    expected = torch.stack([-log_q[0, 0, 4, 3], -(log_q[1, 0, 4, 5] + log_q[1, 0, 7, 6]) / 2])
    assert torch.allclose(losses, expected)
    assert torch.allclose(loss, expected.mean() + expected[-1])
    with torch.no_grad():
        assert torch.allclose(loss, guided_loss(model, tokens, guide, [3, 7])[0], atol=1e-5)
