"""Training checkpoints: everything a run needs to go on, in a folder that is complete or not there.

Safetensors and JSON, no pickle. A new one takes its name by a rename, and the one before goes after that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from melt_edge.config import read_json_object
from melt_edge.errors import ConfigError, FormatError
from melt_edge.files import atomic_folder

VERSION = 1
_PREFIX = "step-"
_WEIGHTS, _OPTIMIZER, _KEYS = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """A run after ``step`` optimizer steps.

    optimizer: "NAME of the moment/NAME of the weight" -> tensor. data: the position in the data.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    data: dict[str, Any]
    settings: dict[str, Any]
    teacher: str


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write a state into the run's folder and remove older ones; returns its folder.

    Raises: ConfigError if it cannot be written; the older ones stay.
    """
    path = folder / f"{_PREFIX}{state.step:08d}"
    with atomic_folder(path, force=True) as part:
        _save(state.weights, part / _WEIGHTS)
        _save(state.optimizer, part / _OPTIMIZER)
        keys = {
            "version": VERSION,
            "step": state.step,
            "data": state.data,
            "settings": state.settings,
            "teacher": state.teacher,
        }
        (part / _KEYS).write_text(json.dumps(keys), encoding="utf-8")
    for old in _states(folder):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return path


def load_state(folder: Path) -> TrainingState | None:
    """The newest state in a run's folder, or None. Raises: FormatError if it is damaged."""
    states = _states(folder)
    if not states:
        return None
    path = states[-1]
    try:
        keys = read_json_object(path / _KEYS)
        weights, optimizer = load_file(path / _WEIGHTS), load_file(path / _OPTIMIZER)
        version = keys["version"]
        state = TrainingState(keys["step"], weights, optimizer, keys["data"], keys["settings"], keys["teacher"])
    except (OSError, SafetensorError, ConfigError, KeyError) as err:
        raise FormatError(
            f"{path}: a damaged training checkpoint ({err}); remove it, or {folder} to start anew"
        ) from err
    if version != VERSION:
        raise FormatError(f"{path}: version {version}, expected {VERSION}; remove {folder} to start anew")
    return state


def has_state(folder: Path) -> bool:
    """True if there is a run to continue."""
    return bool(_states(folder))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left under temporary names."""
    for part in folder.glob(f".{_PREFIX}*.part"):
        shutil.rmtree(part, ignore_errors=True)


def check_settings(state: TrainingState, settings: Mapping[str, Any], teacher: str, *, source: str) -> None:
    """Refuse to continue a run as another one. Raises: ConfigError naming the first setting that differs."""
    free = {"save_every", "data"}  # the data tell themselves apart by their contents
    for key, value in settings.items():
        if key not in free and state.settings.get(key) != value:
            raise ConfigError(
                f"{source}: the run began with {key} = {state.settings.get(key)!r}, not {value!r}; "
                "continue it with the settings it began with, or start anew with --force"
            )
    if state.teacher != teacher:
        raise ConfigError(f"{source}: the run began with another teacher; give that one, or start anew with --force")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as err:
        raise ConfigError(f"{path}: cannot be written ({err}); make room, then continue with --resume") from err


def _states(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))
