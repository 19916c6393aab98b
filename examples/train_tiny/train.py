"""The training of ouro-tiny on generated sums: the model and the loop. ``make_models.py`` is the command.

Same seed, machine, torch version and thread count: same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from bpe import BOS, EOS, PAD, prompt_text, tokenizer_config, train_tokenizer
from muon import Muon
from problems import training_problem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scoring import view
from tokenizers import Tokenizer
from torch import Tensor

from melt_edge.checkpoint import save_checkpoint
from melt_edge.config import LoopConfig
from melt_edge.distill.pretrain import loop_loss
from melt_edge.modeling import LoopLM

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# Cosine down to this share of the peak learning rate.
FINAL_LR_SHARE = 0.02
WARMUP_STEPS = 100
# Share of the batches that run with one cache row for all loops, and how many cuts those get.
SHARED_KV_SHARE = 0.5
MAX_CUTS = 4
# The first share of the steps runs half the loops: they cost half as much and teach as much at first.
HALF_LOOPS_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 4e-3
    seed: int = 1
    threads: int = 1
    vocab_size: int = 512
    hidden_size: int = 128
    layers: int = 2
    intermediate_size: int = 512
    heads: int = 4
    loops: int = 4

    def config(self) -> LoopConfig:
        """The model's configuration."""
        return LoopConfig(
            model_type="ouro",
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden_size // self.heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            num_loops=self.loops,
            rope_theta=10000.0,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )


def conversation(rng: Random) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of one training row: mostly one question, sometimes two in a row."""
    turns = 2 if rng.random() < 0.2 else 1
    pairs = [(prompt_text(p.question), p.answer) for p in (training_problem(rng) for _ in range(turns))]
    if rng.random() < 0.05:
        pairs[0] = (SYSTEM + pairs[0][0], pairs[0][1])
    return pairs


def encode_row(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A row's tokens, and for each whether it belongs to an answer (its end token included)."""
    tokens: list[int] = []
    is_answer: list[bool] = []
    for i, (prompt, answer) in enumerate(pairs):
        asked = tokenizer.encode(("\n" if i else "") + prompt).ids
        told = [*tokenizer.encode(answer).ids, EOS]
        tokens += asked + told
        is_answer += [False] * len(asked) + [True] * len(told)
    return tokens, is_answer


def batches(rng: Random, tokenizer: Tokenizer, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of rows of like length. Shapes: tokens (B, n) int64, is_answer (B, n) bool."""
    group = 8  # rows are sorted by length within this many batches
    while True:
        rows = sorted(
            (encode_row(conversation(rng), tokenizer) for _ in range(group * batch_size)), key=lambda r: len(r[0])
        )
        order = list(range(group))
        rng.shuffle(order)
        for i in order:
            part = rows[i * batch_size : (i + 1) * batch_size]
            longest = max(len(row) for row, _ in part)
            tokens = torch.full((batch_size, longest), PAD)
            is_answer = torch.zeros(batch_size, longest, dtype=torch.bool)
            for b, (row, mask) in enumerate(part):
                tokens[b, : len(row)] = torch.tensor(row)
                is_answer[b, : len(row)] = torch.tensor(mask)
            yield tokens, is_answer


def initialise(model: LoopLM, generator: torch.Generator) -> None:
    """Seeded weights; the norms that close a sub-layer start small, so that a loop starts near the identity."""
    config = model.config
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("layernorm_2.weight"):
                parameter.fill_(1 / math.sqrt(2 * config.num_hidden_layers))
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            elif "early_exit_gate" in name:
                parameter.zero_()
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
                if "lm_head" in name:
                    parameter.mul_(0.1)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine."""
    if step < WARMUP_STEPS:
        return settings.learning_rate * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, settings.steps - WARMUP_STEPS)
    return settings.learning_rate * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def cuts_of(rng: Random, is_answer: Tensor) -> list[int]:
    """Where a batch is cut into chunks: a few places from the first answer on."""
    first = int(is_answer.any(0).to(torch.int8).argmax())
    last = is_answer.shape[1] - 2
    return sorted({rng.randint(min(first, last), last) for _ in range(rng.randint(1, MAX_CUTS))})


def train(settings: Settings, console: Console) -> tuple[LoopLM, Tokenizer]:
    """The trained model and its tokenizer."""
    torch.set_num_threads(settings.threads)
    rng = Random(f"train {settings.seed}")
    texts = ["".join(p + a for p, a in conversation(rng)) for _ in range(20000)]
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    config = settings.config()
    model = LoopLM(config)
    initialise(model, torch.Generator().manual_seed(settings.seed))
    phases = {}  # one set of weights, run by four configurations: half or all loops, own or shared rows
    for loops in (max(1, config.num_loops // 2), config.num_loops):
        runs = config.with_loops(loops)
        phases[loops] = (view(model, runs), view(model, runs.share_kv()))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("model.layers")]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("model.layers"))]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    data = batches(rng, tokenizer, settings.batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.steps)
        for step in range(settings.steps):
            tokens, is_answer = next(data)
            share = rng.random() < SHARED_KV_SHARE
            cuts = cuts_of(rng, is_answer)
            few = step < HALF_LOOPS_SHARE * settings.steps
            run = phases[min(phases) if few else max(phases)][share]
            loss, losses = loop_loss(run, tokens, is_answer, cuts if share else [])
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step(learning_rate(step, settings))
            adam.param_groups[0]["lr"] = learning_rate(step, settings)
            adam.step()
            progress.update(task, advance=1, description=f"training, last loop's loss {losses[-1]:.3f}")
            if step % 100 == 0 or step + 1 == settings.steps:
                told = " ".join(f"{value:.3f}" for value in losses.tolist())
                progress.console.print(f"step {step:5d}  loss of each loop: {told}{'  shared cache' if share else ''}")
    return model.eval(), tokenizer


def save_teacher(path: Path, model: LoopLM, tokenizer: Tokenizer) -> None:
    """Write the checkpoint folder, over one that is there."""
    save_checkpoint(
        path,
        model.config,
        model.state_dict(),
        tokenizer_json=tokenizer.to_str(),
        tokenizer_config=tokenizer_config(model.config.max_position_embeddings),
        generation_config={"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False},
        force=True,
    )
