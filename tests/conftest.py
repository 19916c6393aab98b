"""Fixtures shared by all tests: seeded tiny checkpoints and their GGUF files, built once a session.

Test modules import helpers as ``from tiny import ...``: pytest puts this folder on the path.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from melt_edge.config import LoopConfig
from tiny import tiny_checkpoint, tiny_config

# The same examples in every run; --hypothesis-profile explore draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("fixed")

# A shell's job in the background ignores Ctrl-C and hands that on to its children; some tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeCheckpoint = Callable[..., Path]
MakeGGUF = Callable[..., Path]
MakeOnnx = Callable[..., Path]


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """make_checkpoint(config, seed=0, dtype="F32", shards=1) -> folder, built once; do not write into it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(config: LoopConfig, seed: int = 0, dtype: str = "F32", shards: int = 1) -> Path:
        folder = root / _key(config, seed, dtype, shards)
        return folder if folder.exists() else tiny_checkpoint(folder, config, seed, dtype, shards)

    return make


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> MakeGGUF:
    """make_gguf(config, type="f32", seed=0, **export_options) -> file, built once; do not write to it."""
    root = tmp_path_factory.mktemp("gguf")

    def make(config: LoopConfig, type: str = "f32", seed: int = 0, **options: Any) -> Path:
        from melt_edge.export.gguf import export_gguf

        path = root / f"{config.model_type}-{_key(config, type, seed, sorted(options.items()))}.gguf"
        if not path.exists():
            export_gguf(make_checkpoint(config, seed), path, type=type, **{"verify": False, **options})
        return path

    return make


@pytest.fixture(scope="session")
def make_onnx(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> MakeOnnx:
    """make_onnx(config, seed=0, **export_options) -> folder, built once; do not write into it."""
    from melt_edge.export.onnx import export_onnx

    return _folder_maker(tmp_path_factory.mktemp("onnx"), make_checkpoint, export_onnx)


@pytest.fixture(scope="session")
def make_genai(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> MakeOnnx:
    """make_genai(config, seed=0, **export_options) -> genai folder, a graph for the config's loops."""
    from melt_edge.export.genai import export_genai

    return _folder_maker(tmp_path_factory.mktemp("genai"), make_checkpoint, export_genai, loops=[])


def _folder_maker(root: Path, make_checkpoint: MakeCheckpoint, export: Callable[..., Any], **defaults: Any) -> MakeOnnx:
    def make(config: LoopConfig, seed: int = 0, **options: Any) -> Path:
        path = root / f"{config.model_type}-{_key(config, seed, sorted(options.items()))}"
        if not path.exists():
            export(make_checkpoint(config, seed), path, **{"n_ctx": 128, "verify": False, **defaults, **options})
        return path

    return make


@pytest.fixture(scope="session")
def melt_checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    """A gated MELT: 4 loops, 2 layers, GQA 2:1, chunk size 8, 301 tokens."""
    return make_checkpoint(tiny_config("melt"))


@pytest.fixture(scope="session")
def ouro_checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    """An Ouro of the same shape."""
    return make_checkpoint(tiny_config("ouro"))


@pytest.fixture(scope="session")
def melt_gguf(make_gguf: MakeGGUF) -> Path:
    """The gated MELT as a float32 GGUF file."""
    return make_gguf(tiny_config("melt"))


@pytest.fixture(scope="session")
def ouro_gguf(make_gguf: MakeGGUF) -> Path:
    """The Ouro as a float32 GGUF file."""
    return make_gguf(tiny_config("ouro"))


@pytest.fixture(scope="session")
def melt_onnx(make_onnx: MakeOnnx) -> Path:
    """The gated MELT as a float32 ONNX folder with room for 128 tokens."""
    return make_onnx(tiny_config("melt"))


@pytest.fixture(scope="session")
def ouro_onnx(make_onnx: MakeOnnx) -> Path:
    """The Ouro as a float32 ONNX folder with room for 128 tokens."""
    return make_onnx(tiny_config("ouro"))
