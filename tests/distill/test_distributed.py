"""Two processes with sharded weights compute what one process computes with the same batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.common import CPU, small_teacher, tiny_settings, write_prompts
from melt_edge.distill.distributed import World, pick_device
from melt_edge.distill.run import distill
from melt_edge.errors import ConfigError
from tiny import tiny_checkpoint


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(f"{out}.train/log.jsonl").read_text().splitlines()]


def torchrun(*arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    result = subprocess.run(
        [*command, "-m", "melt_edge", "distill", *map(str, arguments), "--device", "cpu", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo")
@pytest.mark.parametrize("recompute", [False, True])
def test_two_processes_are_one(tmp_path: Path, recompute: bool) -> None:
    """Answers of unequal length, two micro-batches a process, and a run that one process begins and two end."""
    teacher = tiny_checkpoint(tmp_path / "ouro", small_teacher())
    data = write_prompts(tmp_path / "prompts.jsonl")
    keys = {"sequence_length": 90, "micro_batch_size": 1, "chunk_size": (20, 33), "recompute_chunks": recompute}
    settings = tiny_settings(data, **keys)
    (tmp_path / "settings.json").write_text(json.dumps(settings.to_dict()))
    distill(teacher, tmp_path / "one", settings, CPU)
    torchrun(teacher, "-o", tmp_path / "two", "--config", tmp_path / "settings.json")
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=2e-4), name

    class Stopped(Exception):
        pass

    def stop(report: object) -> None:
        if getattr(report, "step") == 2:  # noqa: B009
            raise Stopped

    with pytest.raises(Stopped):
        distill(teacher, tmp_path / "parts", settings, CPU, report=stop)
    torchrun(teacher, "-o", tmp_path / "parts", "--config", tmp_path / "settings.json", "--resume")
    steps = log_of(tmp_path / "parts")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert steps[-1]["loss"] == pytest.approx(log_of(tmp_path / "one")[-1]["loss"], rel=1e-4)


def test_the_batch_must_divide_among_the_processes(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path / "ouro", small_teacher())
    settings = tiny_settings(write_prompts(tmp_path / "prompts.jsonl"), sequence_length=90, micro_batch_size=4)
    world = type("Alone", (World,), {"wait": lambda self: None})(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match="batch_size / micro_batch_size is 1, expected a multiple of the 3 processes"):
        distill(teacher, tmp_path / "melt", settings, world)


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is unknown; expected auto, cpu, cuda or mps"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"device 'cuda' is not there .* use --device cpu"):
            pick_device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
