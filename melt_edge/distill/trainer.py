"""The training loop: batches, the two losses, two learning rates, a checkpoint every few steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melt_edge.distill import schedule
from melt_edge.distill.data import Batch, Batches, collate
from melt_edge.distill.distributed import World, collect, collect_weights, full_tensor, like, shard
from melt_edge.distill.settings import Settings
from melt_edge.distill.state import TrainingState, save_state
from melt_edge.distill.student import StudentLM, is_gate_parameter
from melt_edge.distill.text import Row
from melt_edge.distill.unroll import Plan, unroll
from melt_edge.errors import ConfigError, TrainingError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Report:
    """One optimizer step.

    loss, kd, alignment: means over the tokens of the whole batch, kd in nats; the alignment before its
    weight beta. gate_means: z of each loop. seconds: of the step; tokens: read by the student.
    """

    step: int
    phase: str
    alpha: float
    chunk_size: int
    loss: float
    kd: float
    alignment: float
    learning_rate: float
    gate_learning_rate: float
    grad_norm: float
    gate_means: list[float]
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The line of the log."""
        line = dict(vars(self))
        line["tokens_per_second"] = self.tokens / self.seconds
        return line


class Trainer:
    """A student on its way, one optimizer step at a time."""

    def __init__(
        self,
        teacher: StudentLM,
        student: StudentLM,
        batches: Batches,
        settings: Settings,
        world: World,
        *,
        teacher_id: str,
    ) -> None:
        self.settings, self.world, self.batches, self.teacher_id = settings, world, batches, teacher_id
        n_micro = settings.batch_size // settings.micro_batch_size
        if n_micro % world.size:
            raise ConfigError(
                f"batch_size / micro_batch_size is {n_micro}, expected a multiple of the {world.size} processes"
            )
        self.teacher = teacher.to(world.device).eval().requires_grad_(False)
        self.student = student.to(world.device).train()
        shard(self.student, world)
        self.optimizer = _optimizer(self.student, settings)
        self.step = 0

    def restore(self, state: TrainingState) -> None:
        """Go on from a state. Raises: ConfigError if the data are others."""
        self.batches.restore(state.data)
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.copy_(like(state.weights[name], parameter))
                moments = {
                    key: state.optimizer[f"{key}/{name}"] for key in MOMENTS if f"{key}/{name}" in state.optimizer
                }
                if moments:
                    # the counter stays a plain tensor where torch keeps it
                    self.optimizer.state[parameter] = {
                        key: value if key == "step" else like(value, parameter) for key, value in moments.items()
                    }
        self.step = state.step

    def state(self) -> TrainingState:
        """Everything needed to go on, in the main process; all of them have to call it."""
        optimizer = {
            f"{key}/{name}": collect(self.optimizer.state[parameter][key], self.world)
            for name, parameter in self.student.named_parameters()
            for key in MOMENTS
            if self.optimizer.state.get(parameter)
        }
        settings = self.settings.to_dict()
        return TrainingState(
            self.step,
            collect_weights(self.student, self.world),
            optimizer,
            self.batches.state(),
            settings,
            self.teacher_id,
        )

    def run(self, folder: Path, report: Callable[[Report], None]) -> None:
        """All steps that are left, with a checkpoint in ``folder`` every ``save_every`` and at the end.

        Raises: TrainingError for a loss or gradient that is no finite number; the last checkpoint stays.
        """
        while self.step < self.settings.total_steps:
            try:
                report(self.train_step())
            except TrainingError as err:
                raise TrainingError(f"{err}; {_what_to_do(folder)}") from None
            if self.step % self.settings.save_every == 0 or self.step == self.settings.total_steps:
                state = self.state()
                if self.world.is_main:
                    save_state(folder, state)
                self.world.wait()

    def train_step(self) -> Report:
        """One optimizer step. Raises: TrainingError before the weights have changed."""
        began = time.perf_counter()
        settings, step = self.settings, self.step
        share = schedule.learning_rate_share(settings, step)
        rates = (settings.learning_rate * share, settings.gate_learning_rate * share)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        beta = schedule.beta(settings, step)
        plan = Plan(
            alpha=schedule.alpha(settings, step),
            aligned=beta > 0.0,
            chunk_size=schedule.chunk_size(settings, step),
            detach=settings.detach_chunks,
            recompute=settings.recompute_chunks,
        )
        rows = self.batches.next_rows()
        self.optimizer.zero_grad(set_to_none=True)
        kd, alignment, gate_means = self._backward(rows, plan, beta)
        loss = kd + beta * alignment
        self._check("loss", loss, f"divergence {kd:g}, alignment {alignment:g}")
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)))
        self._check("gradient's norm", norm, f"loss {loss:g}")
        self.optimizer.step()
        self.step += 1
        return Report(
            step=step,
            phase=schedule.phase(settings, step),
            alpha=plan.alpha,
            chunk_size=plan.chunk_size,
            loss=loss,
            kd=kd,
            alignment=alignment,
            learning_rate=rates[0],
            gate_learning_rate=rates[1],
            grad_norm=norm,
            gate_means=gate_means,
            tokens=sum(len(row.tokens) - 1 for row in rows),
            seconds=time.perf_counter() - began,
        )

    def _backward(self, rows: Sequence[Row], plan: Plan, beta: float) -> tuple[float, float, list[float]]:
        """Gradients of the whole batch's mean loss; its parts, and the gates' means of the last micro-batch."""
        world = self.world
        n_wanted = sum(sum(row.learned[1:]) for row in rows)
        n_read = sum(len(row.tokens) - 1 for row in rows)
        # Every process needs as many chunks as the others, or they would wait for each other's weights for ever.
        length = max(len(row.tokens) for row in rows) if world.size > 1 else None
        size = self.settings.micro_batch_size
        micro_batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        parts = torch.zeros(2, dtype=torch.float64)
        means = torch.zeros(0)
        for micro_batch in micro_batches[world.rank :: world.size]:
            batch = _to(collate(micro_batch, length=length), world.device)
            with _autocast(self.settings.precision, world.device):
                sums = unroll(self.student, self.teacher, batch, plan)
            kd, alignment = sums.kd / n_wanted, sums.alignment / n_read
            # FSDP averages the gradients of the processes, and the loss is a sum over them
            ((kd + beta * alignment) * world.size).backward()
            parts += torch.stack((kd.detach(), alignment.detach())).cpu().double()
            means = sums.gate_means
        kd_mean, alignment_mean = (
            world.sum(parts.float().to(world.device)).tolist() if world.size > 1 else parts.tolist()
        )
        return kd_mean, alignment_mean, means.tolist()

    def _check(self, what: str, value: float, context: str) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"step {self.step}: the {what} is {value:g} ({context}), which no training recovers from"
            )


def _optimizer(student: StudentLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW with two groups: the teacher's weights, and the gates', which start from nothing."""
    named = list(student.named_parameters())
    groups = [
        {"params": [p for name, p in named if is_gate_parameter(name) == gates], "lr": 0.0} for gates in (False, True)
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=settings.weight_decay)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    wanted = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if the hardware has bfloat16 matrix products; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.tokens.to(device), batch.learned.to(device), batch.present.to(device))


def _what_to_do(folder: Path) -> str:
    advice = "lower learning_rate or clip_norm"
    if any(folder.glob("step-*")):
        return f"the last good checkpoint is in {folder}; {advice} and start anew, or continue with --resume"
    return f"no checkpoint was written yet; {advice} and start anew"
