"""Every knob of a distillation as one validated dataclass, and the named presets.

A run's settings are a preset, then a JSON file, then single options; each overrides the one before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from melt_edge.config import KV_GATE_INITS, read_json_object
from melt_edge.errors import ConfigError

# "elementwise" is MELT's gate, "none" keeps the last loop's row. The others are for experiments: no
# configuration of a model can name them, so that no exporter takes what they make.
GATES = ("elementwise", "none", "scalar", "mean", "ema")
PRECISIONS = ("auto", "float32", "bfloat16")
# A chunk size that means the whole sequence.
WHOLE = 0


def _integer(default: int, low: int, high: int = 2**31 - 1) -> Any:
    def check(value: object) -> object:
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return value if ok else _Wrong(f"an integer from {low} to {high}")

    return field(default=default, metadata={"check": check})


def _number(default: float, low: float, high: float = math.inf) -> Any:
    def check(value: object) -> object:
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        bounds = f"a number of at least {low:g}" if math.isinf(high) else f"a number from {low:g} to {high:g}"
        return float(value) if real and low <= value <= high else _Wrong(bounds)  # type: ignore[arg-type, operator]

    return field(default=default, metadata={"check": check})


def _choice(default: str, *choices: str) -> Any:
    def check(value: object) -> object:
        return value if value in choices else _Wrong(f"one of {', '.join(choices)}")

    return field(default=default, metadata={"check": check})


def _flag(default: bool) -> Any:
    return field(default=default, metadata={"check": lambda v: v if isinstance(v, bool) else _Wrong("true or false")})


def _chunk_sizes(value: object) -> object:
    sizes = value if isinstance(value, (list, tuple)) else (value,)
    if sizes and all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**31 for s in sizes):
        return tuple(sizes)
    return _Wrong("a chunk size, or a list of them to draw one from for every batch; 0 is the whole sequence")


def _names(value: object) -> object:
    names = (value,) if isinstance(value, str) else value
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names):
        return tuple(names)
    return _Wrong("a list of file names or task:NAME")


@dataclass(frozen=True)
class _Wrong:
    """What a check expected instead."""

    expected: str


@dataclass(frozen=True)
class Settings:
    """What a distillation depends on, besides the teacher. The defaults are the paper's where it names a value.

    data: JSONL and text files, or task:NAME for generated problems.
    gate, gate_init: how a row is carried from loop to loop (see ``gates``); ema_decay is the gate "ema"'s.
    gate_bias: where the gate starts: z is near sigmoid(gate_bias).
    chunk_size: tokens that run through the loops together, or a list to draw from for each batch; 0 is the
        whole sequence. model_chunk_size: what the model's file says; 0 takes the largest of chunk_size.
    transition_steps, alignment_steps: optimizer steps of phase 1 and phase 2.
    beta: weight of the attention alignment in phase 2; transition_beta: the same in phase 1.
    learning_rate, gate_learning_rate: peaks; warmup_steps of a linear warm-up, then a cosine down to
        final_learning_rate_share of the peak over both phases.
    sequence_length: tokens of a row at most; batch_size: rows of an optimizer step, over all processes;
    micro_batch_size: rows that run at once; sort_batches: batches whose rows are sorted by length.
    prompt_loss: also learn the teacher's logits on the tokens of prompts, not on answers alone.
    detach_chunks: cut the gradient between chunks. recompute_chunks: activation checkpointing per chunk.
    precision: "auto" is bfloat16 autocast where the hardware multiplies it natively.
    save_every: steps between two training checkpoints.
    Raises: ConfigError naming the key, what was found and what was expected.
    """

    data: tuple[str, ...] = field(default=(), metadata={"check": _names})
    gate: str = _choice("elementwise", *GATES)
    gate_init: str = _choice("zeros", *KV_GATE_INITS)
    gate_bias: float = _number(-3.5, -20.0, 20.0)
    ema_decay: float = _number(0.5, 0.0, 1.0)
    chunk_size: tuple[int, ...] = field(default=(500,), metadata={"check": _chunk_sizes})
    model_chunk_size: int = _integer(0, 0)
    transition_steps: int = _integer(500, 0)
    alignment_steps: int = _integer(300, 0)
    beta: float = _number(0.1, 0.0)
    transition_beta: float = _number(0.0, 0.0)
    learning_rate: float = _number(8e-6, 0.0)
    gate_learning_rate: float = _number(5e-4, 0.0)
    warmup_steps: int = _integer(20, 0)
    final_learning_rate_share: float = _number(0.1, 0.0, 1.0)
    weight_decay: float = _number(0.0, 0.0)
    adam_beta1: float = _number(0.9, 0.0, 0.9999)
    adam_beta2: float = _number(0.95, 0.0, 0.99999)
    clip_norm: float = _number(1.0, 1e-9)
    sequence_length: int = _integer(10_000, 2)
    batch_size: int = _integer(32, 1)
    micro_batch_size: int = _integer(1, 1)
    sort_batches: int = _integer(1, 1, 1024)
    prompt_loss: bool = _flag(False)
    detach_chunks: bool = _flag(False)
    recompute_chunks: bool = _flag(True)
    precision: str = _choice("auto", *PRECISIONS)
    seed: int = _integer(0, 0)
    save_every: int = _integer(50, 1)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            checked = item.metadata["check"](value)
            if isinstance(checked, _Wrong):
                raise ConfigError(f"key {item.name!r} is {value!r}, expected {checked.expected}")
            object.__setattr__(self, item.name, checked)
        if self.total_steps == 0:
            raise ConfigError("keys 'transition_steps' and 'alignment_steps' are both 0, expected at least one step")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"key 'micro_batch_size' is {self.micro_batch_size}, expected a divisor of batch_size = "
                f"{self.batch_size}"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both phases."""
        return self.transition_steps + self.alignment_steps

    @property
    def trained_chunk_size(self) -> int:
        """The chunk size that the model's file gets."""
        sizes = [self.sequence_length if size == WHOLE else size for size in self.chunk_size]
        return self.model_chunk_size or max(sizes)

    def to_dict(self) -> dict[str, Any]:
        """All knobs as JSON can write them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def changed(self, changes: Mapping[str, Any], *, source: str) -> Settings:
        """These settings with some keys replaced. source: named in messages.

        Raises: ConfigError for a key that is none, with the nearest ones, or a value out of bounds.
        """
        known = {item.name for item in fields(self)}
        for key in changes:
            if key not in known:
                raise ConfigError(f"{source}: {key!r} is no setting of a distillation; {_nearest(key, known)}")
        try:
            return replace(self, **changes)
        except ConfigError as err:
            raise ConfigError(f"{source}: {err}") from None


PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    # For models of a million parameters on a CPU, whose answers are decoded token by token.
    "tiny": Settings(
        data=("task:all",),
        chunk_size=(2, 4, 8),
        model_chunk_size=8,
        transition_steps=200,
        alignment_steps=200,
        # The alignment sums the squares of all channels: at 0.1 it outweighs the divergence a hundred times here. After
        # 60 steps from one teacher 0.059 nats a token were left at chunk 1, with 0.003 in both phases 0.044.
        beta=0.003,
        transition_beta=0.003,
        learning_rate=5e-4,
        gate_learning_rate=5e-3,
        warmup_steps=20,
        sequence_length=256,
        batch_size=32,
        micro_batch_size=32,
        sort_batches=8,
        recompute_chunks=False,
        save_every=20,
    ),
}


def preset(name: str) -> Settings:
    """A preset by name. Raises: ConfigError that lists them."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; expected {' or '.join(PRESETS)}")
    return PRESETS[name]


def read_settings(path: Path, base: Settings) -> Settings:
    """``base`` with the keys of a JSON file replaced. Raises: ConfigError naming the file and the key."""
    return base.changed(read_json_object(path), source=str(path))


def _nearest(key: str, known: set[str]) -> str:
    near = get_close_matches(key, sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(sorted(known))}"
