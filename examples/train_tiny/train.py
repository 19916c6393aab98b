"""The training of ouro-tiny: the model, its curriculum, the loop. ``make_models.py`` is the command.

Same seed, machine, torch version and thread count: same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
from bpe import BOS, EOS, PAD, tokenizer_config, train_tokenizer
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rows import FRAME, Batch, Mixture, batches, sums
from scoring import view
from tokenizers import Tokenizer

from melt_edge.checkpoint import save_checkpoint
from melt_edge.config import LoopConfig
from melt_edge.distill.pretrain import guided_loss, loop_loss
from melt_edge.modeling import LoopLM
from melt_edge.tasks import ALL_TASKS, test_problems
from melt_edge.tasks.evaluate import by_steps, by_task, evaluate
from melt_edge.tasks.solvers import ReferenceSolver

# Cosine down to this share of the peak learning rate.
FINAL_LR_SHARE = 0.02
WARMUP_STEPS = 100
# Cuts of a batch that runs with a shared cache row, at most.
MAX_CUTS = 8
# The first share of the training finds out how to look up: problems of FIRST_STEPS steps at most, many in a row.
LOOKUP_SHARE = 0.2
FIRST_STEPS = 2
# So long each loop is told the next station, and a problem has at most as many steps as there are loops.
GUIDED_SHARE = 0.6
# How strongly the first heads look back at the start.
LOOK_BACK_CHANNEL = 2.0
LOOK_BACK_GAIN = 1.5
# Steps between two checkpoints.
SAVE_EVERY = 300
# Of the second stage's problems, half are pointers: the task that such a model learns.
MORE_TASKS = ("pointers", "pointers", "chain", "nested")


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    steps: of the first stage, which learns to take steps. more_steps: of the second, for the sums.
    batch_tokens: of a step, padding included. shared_kv_share: of the batches, run with one cache row for all
    loops. half_loops_share: the first share of the first stage runs half the loops: they cost half as much and
    teach as much at first.
    """

    steps: int = 3000
    more_steps: int = 3000
    batch_tokens: int = 2000
    learning_rate: float = 4e-3
    more_learning_rate: float = 3e-3
    seed: int = 1
    threads: int = 1
    vocab_size: int = 512
    hidden_size: int = 96
    layers: int = 2
    intermediate_size: int = 256
    heads: int = 4
    head_dim: int = 32
    loops: int = 4
    mixture: Mixture = field(default_factory=lambda: Mixture(max_steps=4))
    more_mixture: Mixture = field(default_factory=lambda: Mixture(sums_share=0.75, tasks=MORE_TASKS, max_steps=4))
    shared_kv_share: float = 0.25
    half_loops_share: float = 0.2

    def config(self) -> LoopConfig:
        """The model's configuration."""
        return LoopConfig(
            model_type="ouro",
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.head_dim,
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
    look_back(model)


@torch.no_grad()
def look_back(model: LoopLM) -> None:
    """Let the first layer's heads start out reading the tokens 1, 2, 3.. before.

    To see which tokens stand together is the first thing that every task needs, and what takes a looped
    model of this size longest to find: with it a table of pointers is learned six times sooner. Channel 0 of every
    embedding starts at one value, and q and k of such a head at a turn of that channel alone, so that
    q . R(j - i) k = sum of cos(f (i - j - back)) over the frequencies f is largest ``back`` tokens before.
    """
    config = model.config
    model.model.embed_tokens.weight[:, 0] = LOOK_BACK_CHANNEL
    attention = model.model.layers[0].self_attn
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    for head in range(config.num_attention_heads):
        turn = freqs * (head + 1)
        q, k = (p.weight[head * config.head_dim :][: config.head_dim] for p in (attention.q_proj, attention.k_proj))
        for matrix in (q, k):
            matrix *= 0.3
            matrix[:, 0] = 0.0
        k[:half, 0] = LOOK_BACK_GAIN
        q[:half, 0] = LOOK_BACK_GAIN * turn.cos()
        q[half:, 0] = -LOOK_BACK_GAIN * turn.sin()


@dataclass(frozen=True)
class Stage:
    """A part of the training, with optimisers and learning rates of its own.

    guided_share, half_loops_share: of its steps, from the first on. mixture: of the rows at a share of the steps.
    """

    steps: int
    learning_rate: float
    guided_share: float
    half_loops_share: float
    mixture: Callable[[float], Mixture]

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine."""
        if step < WARMUP_STEPS:
            return self.learning_rate * (step + 1) / WARMUP_STEPS
        done = (step - WARMUP_STEPS) / max(1, self.steps - WARMUP_STEPS)
        return self.learning_rate * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def mixture_at(done: float, mixture: Mixture, loops: int) -> Mixture:
    """The mixture at this share of the training: problems of few steps at first."""
    if done < LOOKUP_SHARE:
        sums_share = min(0.15, mixture.sums_share)
        return replace(mixture, sums_share=sums_share, walk_share=0.35, list_share=0.9, max_steps=FIRST_STEPS)
    if done < GUIDED_SHARE:
        most = min(loops, mixture.max_steps)
        grown = FIRST_STEPS + int((most + 1 - FIRST_STEPS) * (done - LOOKUP_SHARE) / (GUIDED_SHARE - LOOKUP_SHARE))
        return replace(mixture, max_steps=min(most, grown))
    return mixture


def cuts_of(rng: Random, length: int) -> list[int]:
    """Where a batch is cut into chunks: a few places anywhere."""
    return sorted({rng.randint(1, length - 1) for _ in range(rng.randint(1, MAX_CUTS))})


def train(
    settings: Settings, console: Console, save: Callable[[LoopLM, Tokenizer], None] | None = None
) -> tuple[LoopLM, Tokenizer]:
    """The trained model and its tokenizer. save: called now and then on the way."""
    torch.set_num_threads(settings.threads)
    rng = Random(f"train {settings.seed}")
    # The tasks' texts are left out: a token that joined two of their signs would hide both.
    texts = ["".join(p + a for p, a in sums(rng)) for _ in range(20000)]
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    model = LoopLM(settings.config())
    initialise(model, torch.Generator().manual_seed(settings.seed))
    run_stage(first_stage(settings), model, tokenizer, settings, rng, console, save)
    if settings.more_steps:
        rng = Random(f"train {settings.seed} more")
        run_stage(second_stage(settings), model, tokenizer, settings, rng, console, save)
    return model.eval(), tokenizer


def first_stage(settings: Settings) -> Stage:
    """Problems of ever more steps, guided at first."""
    return Stage(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        guided_share=GUIDED_SHARE,
        half_loops_share=settings.half_loops_share,
        mixture=lambda done: mixture_at(done, settings.mixture, settings.loops),
    )


def second_stage(settings: Settings) -> Stage:
    """Mostly sums, by Ouro's objective alone."""
    return Stage(
        steps=settings.more_steps,
        learning_rate=settings.more_learning_rate,
        guided_share=0.0,
        half_loops_share=0.0,
        mixture=lambda done: settings.more_mixture,
    )


def run_stage(
    stage: Stage,
    model: LoopLM,
    tokenizer: Tokenizer,
    settings: Settings,
    rng: Random,
    console: Console,
    save: Callable[[LoopLM, Tokenizer], None] | None,
) -> None:
    """Train the model for the steps of a stage."""
    config = model.config
    phases = {}  # one set of weights, run by four configurations: half or all loops, own or shared rows
    for loops in (max(1, config.num_loops // 2), config.num_loops):
        runs = config.with_loops(loops)
        phases[loops] = (view(model, runs), view(model, runs.share_kv()))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("model.layers")]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("model.layers"))]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    waiting: list[Batch] = []
    began, trained = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=stage.steps)
        for step in range(stage.steps):
            done = step / stage.steps
            loops = min(phases) if done < stage.half_loops_share else max(phases)
            if not waiting:
                waiting = list(batches(rng, tokenizer, settings.batch_tokens, stage.mixture(done), config.num_loops))
            batch = waiting.pop()
            share = rng.random() < settings.shared_kv_share
            cuts = cuts_of(rng, batch.tokens.shape[1] - 1)
            run = phases[loops][share]
            if done < stage.guided_share:
                loss, losses = guided_loss(run, batch.tokens, batch.guide[:loops], cuts if share else [])
            else:
                loss, losses = loop_loss(run, batch.tokens, batch.is_answer, cuts if share else [])
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step(stage.rate(step))
            adam.param_groups[0]["lr"] = stage.rate(step)
            adam.step()
            trained += batch.tokens.numel()
            progress.update(task, advance=1, description=f"training, last loop's loss {losses[-1]:.3f}")
            last = step + 1 == stage.steps
            if step % 100 == 0 or last:
                told = " ".join(f"{value:.3f}" for value in losses.tolist())
                speed = trained / (time.monotonic() - began)
                cache = "  shared cache" if share else ""
                progress.console.print(f"step {step:5d}  {speed:.0f} tokens/s  loss of each loop: {told}{cache}")
            if save is not None and ((step + 1) % SAVE_EVERY == 0 or last):
                save(model, tokenizer)
                progress.console.print(f"step {step:5d}  {glance(model, tokenizer)}")


def glance(model: LoopLM, tokenizer: Tokenizer, count: int = 240) -> str:
    """Accuracy on a few validation problems of every task, with all loops and with one."""
    model.eval()
    told = []
    for loops in sorted({1, model.config.num_loops}):
        run = view(model, model.config.with_loops(loops))
        solver = ReferenceSolver(run, tokenizer, frame=FRAME, end_tokens=frozenset({EOS}), max_tokens=1)
        scores = evaluate(solver, test_problems(ALL_TASKS, 0, count, "validation"))
        parts = [f"{name} {score.share:.2f}" for name, score in by_task(scores).items()]
        told.append(
            f"T={loops}: {', '.join(parts)}; steps {' '.join(f'{s.share:.2f}' for s in by_steps(scores).values())}"
        )
    model.train()
    return "  ".join(told)


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
