"""Mutants of ONNX folders: a working model or a typed error, never a dead or hanging process."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from .onnx_mutate import GRAPHS, OnnxMutator
from .run import describe, make_onnx_base, run_mutants

N_MUTANTS = 500


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_seed_same_mutant_and_every_file_is_hit(melt_onnx: Path, tmp_path: Path) -> None:
    mutator = OnnxMutator(melt_onnx)
    for seed in range(28):
        words = {mutator.write(seed, tmp_path / name) for name in ("a", "b")}
        assert len(words) == 1
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
    words = "\n".join(mutator.write(seed, tmp_path / "a") for seed in range(300))
    for name in (*GRAPHS, "manifest", "weights", "tokenizer.gguf", "GroupQueryAttention num_heads", "is a link"):
        assert name in words


@pytest.mark.parametrize(("arch", "precision"), [("ouro", "fp32"), ("melt", "int4")])
def test_check_alone_is_typed(arch: str, precision: str, tmp_path: Path) -> None:
    base = make_onnx_base(arch, tmp_path, precision=precision)
    verdicts = run_mutants(base, range(N_MUTANTS, N_MUTANTS + 140), check_only=True, n_workers=1)
    assert len(verdicts) == 140
    assert not [describe(verdict, base) for verdict in verdicts if not verdict.is_good]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "precision"), [("ouro", "fp32"), ("melt", "fp32"), ("melt", "int4")])
def test_mutants_work_or_are_refused(arch: str, precision: str, tmp_path: Path) -> None:
    base = make_onnx_base(arch, tmp_path, precision=precision)
    verdicts = run_mutants(base, range(N_MUTANTS))
    assert len(verdicts) == N_MUTANTS
    assert not [describe(verdict, base) for verdict in verdicts if not verdict.is_good]
    ends = collections.Counter(verdict.end for verdict in verdicts)
    # Neither a guard that refuses everything nor one that lets everything through would pass.
    assert ends["works"] > N_MUTANTS // 40
    assert ends["refused"] > N_MUTANTS // 2
