"""Upstream's own tests on the patched tree, for both architectures, and ours; `make test-upstream` builds them.

Exit codes are trusted, printed tables are not. The programs lie in build/bin, or in $MELT_UPSTREAM_BIN.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from parity.test_graph import METAL_OPS
from tiny import tiny_config

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("MELT_UPSTREAM_BIN", ROOT / "build" / "bin"))

pytestmark = pytest.mark.slow


def run(program: str, *arguments: str | Path, cwd: Path, **environment: str) -> None:
    """Run one of upstream's programs; fails with its output unless it exits with 0 within two minutes."""
    path = BIN / program
    assert path.exists(), f"{path} is missing: make upstream-tests builds it"
    done = subprocess.run(
        [path, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",  # tiny models speak in broken UTF-8
        timeout=120,
    )
    assert done.returncode == 0, f"{program} exited with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.fixture(
    params=[(arch, loops) for arch in ("melt", "ouro") for loops in (1, 3, 4)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def model(request, make_gguf) -> Path:
    """A tiny file of either architecture with 1, 3 and 4 loops."""
    arch, loops = request.param
    return make_gguf(tiny_config(arch, num_loops=loops))


@pytest.mark.parametrize(
    "program", ["test-gguf", "test-batch-alloc", "test-alloc", "test-barrier", "test-attn", "test-row-shares"]
)
def test_what_needs_no_model(tmp_path, program: str) -> None:
    """The patches left the rest of the library alone."""
    run(program, cwd=tmp_path)


@pytest.mark.parametrize("loops", ["1", "3", "4"])
@pytest.mark.parametrize("arch", ["melt", "ouro"])
def test_llama_archs(tmp_path, arch: str, loops: str) -> None:
    """Random weights, saved and loaded again, give the same logits."""
    run("test-llama-archs", "-a", arch, "-s", "42", cwd=tmp_path, LLAMA_TEST_NUM_LOOPS=loops)


def test_llama_archs_sees_the_loops(tmp_path) -> None:
    """The files it writes have the loops that it was asked for."""
    run("test-llama-archs", "-a", "melt", "-o", tmp_path, cwd=tmp_path, LLAMA_TEST_NUM_LOOPS="4")
    import gguf

    fields = gguf.GGUFReader(next(tmp_path.glob("melt*.gguf"))).fields
    assert fields["melt.num_loops"].contents() == 4
    assert fields["melt.block_count"].contents() == 2


@pytest.mark.parametrize("program", ["test-save-load-state", "test-state-restore-fragmented"])
def test_states(tmp_path, model: Path, program: str) -> None:
    """States saved, restored, and restored into a cache with holes."""
    run(program, "-m", model, cwd=tmp_path)


def test_threads(tmp_path, model: Path) -> None:
    """Several contexts on one model at a time."""
    arguments = ["-ngl", "0", "-p", "What is 2 + 3?", "-n", "32", "-c", "256", "-ub", "32", "-np", "4", "-t", "1"]
    run("test-thread-safety", "-m", model, *arguments, cwd=tmp_path)


@pytest.mark.parametrize("program", ["test-model-load-cancel", "test-autorelease"])
def test_loading(tmp_path, model: Path, program: str) -> None:
    """A load that is cancelled, and one in another thread."""
    run(program, model, cwd=tmp_path)


def test_metal_has_the_operations(tmp_path, model: Path) -> None:
    """The graph's operations as upstream exports them, among those in the Metal back end's source."""
    run("test-export-graph-ops", "-m", model, "-o", tmp_path / "ops.txt", cwd=tmp_path)
    assert (tmp_path / "ops.txt").read_text().strip()
    trees = sorted((ROOT / "build").glob("**/ggml-metal-device.m"))
    assert trees, "the patched tree is missing: make setup prepares it"
    source = trees[0].read_text()
    supported = source[source.index("bool ggml_metal_device_supports_op") :]
    supported = supported[: supported.index("\n}\n")]
    names = set(re.findall(r"case GGML_(?:UNARY_OP_|GLU_OP_|OP_)(\w+):", supported))
    assert names >= METAL_OPS - {"GLU"}
