"""Teacher and student: from a checkpoint folder, to a checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from melt_edge.checkpoint import Checkpoint, save_checkpoint
from melt_edge.config import LoopConfig, read_json_object
from melt_edge.distill.gates import EmaGate, ScalarGate, start_gate
from melt_edge.distill.settings import GATES, Settings
from melt_edge.distill.student import StudentLM, load_weights, student_config
from melt_edge.errors import ConfigError
from melt_edge.export.tokenizer import chat_template
from melt_edge.files import atomic_folder
from melt_edge.modeling import KVGate
from melt_edge.weights import WEIGHTS_FILE

_EXPORTABLE = ("elementwise", "none")


def open_teacher(path: Path) -> Checkpoint:
    """A teacher's checkpoint. Raises: as Checkpoint.open; ConfigError if it is no LoopLM."""
    checkpoint = Checkpoint.open(path)
    if checkpoint.config.shares_kv:
        raise ConfigError(
            f"{path}: model_type is {checkpoint.config.model_type!r}, expected 'ouro': the teacher is the LoopLM that "
            "the student learns from"
        )
    return checkpoint


def make_teacher(checkpoint: Checkpoint) -> StudentLM:
    """The teacher, float32, at alpha = 0."""
    return _with_weights(checkpoint.config, "none", _read(checkpoint))


def make_student(checkpoint: Checkpoint, settings: Settings) -> StudentLM:
    """A student with the teacher's weights, its gates where training starts from."""
    config = student_config(
        checkpoint.config,
        gate=settings.gate,
        gate_init=settings.gate_init,
        chunk_size=settings.trained_chunk_size,
    )
    with torch.device("meta"):
        student = StudentLM(config, settings.gate, ema_decay=settings.ema_decay)
    tensors = _read(checkpoint)
    generator = torch.Generator().manual_seed(settings.seed)
    for name, module in student.named_modules():
        if isinstance(module, (KVGate, ScalarGate)):
            gate = module.to_empty(device="cpu")
            start_gate(gate, settings.gate_bias, generator)
            tensors |= {f"{name}.{key}": value for key, value in gate.state_dict().items()}
    load_weights(student, tensors)
    return student


def save_student(
    path: Path, student: StudentLM, weights: dict[str, Tensor], teacher: Checkpoint, *, force: bool = False
) -> None:
    """Write a student's checkpoint folder, with the teacher's tokenizer and chat template.

    An experiment's gate is named in config.json, so that no loader of models takes it for a MELT.
    Raises: FormatError for NaN or Inf; ConfigError if the folder exists and ``force`` is false.
    """
    config = replace(student.config, torch_dtype=teacher.config.torch_dtype)
    tokenizer_path = teacher.tokenizer_path
    tokenizer_config = dict(teacher.tokenizer_config)
    template = chat_template(teacher)
    if template is not None:
        tokenizer_config["chat_template"] = template
    if student.gate in _EXPORTABLE:
        save_checkpoint(
            path,
            config,
            weights,
            tokenizer_json=tokenizer_path.read_text(encoding="utf-8") if tokenizer_path else None,
            tokenizer_config=tokenizer_config or None,
            generation_config=teacher.generation_config or None,
            force=force,
        )
        return
    with atomic_folder(path, force=force) as folder:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
        keys = {**config.to_dict(), "kv_gate": student.gate, "ema_decay": _ema_decay(student)}
        _write_json(folder / "config.json", keys)
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
        if tokenizer_path:
            (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())


def load_student(path: Path) -> StudentLM:
    """A model that ``save_student`` wrote, an experiment's too, in eval mode, float32.

    Raises: as Checkpoint.open.
    """
    keys = read_json_object(path / "config.json")
    gate = keys.get("kv_gate")
    if gate in GATES and gate not in _EXPORTABLE:
        config = LoopConfig.from_dict({**keys, "kv_gate": "none"}, source=str(path / "config.json"))
        return _with_weights(config, gate, load_file(path / WEIGHTS_FILE), float(keys["ema_decay"])).eval()
    checkpoint = Checkpoint.open(path)
    return _with_weights(checkpoint.config, checkpoint.config.kv_gate, _read(checkpoint)).eval()


def _with_weights(config: LoopConfig, gate: str, tensors: dict[str, Tensor], ema_decay: float = 0.5) -> StudentLM:
    with torch.device("meta"):
        model = StudentLM(config, gate, ema_decay=ema_decay)
    load_weights(model, tensors)
    return model


def _read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}


def _ema_decay(student: StudentLM) -> float:
    return next((gate.decay for gate in student.modules() if isinstance(gate, EmaGate)), 0.0)


def _write_json(path: Path, keys: dict[str, Any]) -> None:
    path.write_text(json.dumps(keys, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
