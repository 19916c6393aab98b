"""What the tests of the training share: models made on the fly, tiny settings, data files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch

from melt_edge.config import LoopConfig
from melt_edge.distill.distributed import World
from melt_edge.distill.settings import Settings
from melt_edge.distill.student import StudentLM, load_weights
from tiny import tiny_config, tiny_tensors

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives

CPU = World(0, 1, torch.device("cpu"))


def student_of(config: LoopConfig, gate: str | None = None, seed: int = 0) -> StudentLM:
    """A StudentLM with the tiny weights of a configuration, float32."""
    with torch.device("meta"):
        model = StudentLM(config, gate or (config.kv_gate if config.shares_kv else "none"))
    load_weights(model, {name: torch.from_numpy(t) for name, t in tiny_tensors(config, seed).items()})
    return model.eval()


def write_prompts(path: Path, count: int = 40) -> Path:
    """A JSONL file of small sums."""
    rng = Random(1)
    lines = []
    for _ in range(count):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        lines.append(json.dumps({"prompt": f"{a}+{b}?", "answer": str(a + b)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_texts(path: Path, count: int = 30) -> Path:
    """A JSONL file of short texts."""
    rng = Random(2)
    lines = [json.dumps({"text": "".join(rng.choices("abc def ", k=rng.randint(5, 30)))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_settings(file: Path, **more: object) -> Settings:
    """Two steps of each phase on a few rows."""
    keys = {
        "data": (str(file),),
        "chunk_size": (3, 4),
        "transition_steps": 2,
        "alignment_steps": 2,
        "learning_rate": 1e-3,
        "gate_learning_rate": 1e-2,
        "warmup_steps": 1,
        "sequence_length": 12,
        "batch_size": 4,
        "micro_batch_size": 4,
        "recompute_chunks": False,
        "save_every": 1,
        "precision": "float32",
    }
    return Settings(**{**keys, **more})  # type: ignore[arg-type]


def small_teacher(**more: object) -> LoopConfig:
    """An Ouro small enough to train in a test."""
    keys = {"hidden_size": 16, "head_dim": 8, "n_head": 2, "n_head_kv": 1, "num_loops": 2, "vocab": 301}
    return tiny_config("ouro", **{**keys, **more})  # type: ignore[arg-type]
