"""The AMX path of ggml's CPU back end: wide products are right, and GCC keeps the tile configuration.

GCC 12 dropped the stores to the tile configuration, so the first quantised product of a prompt killed the
process on CPUs with AMX (cpp/patches/ggml-cpu-amx-tile-config-barrier.patch).
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "ggml/src/ggml-cpu/amx/mmq.cpp"
VOCAB, WIDTH, N_FF, N_HEAD, N_LAYER, N_TOKENS = 288, 512, 1024, 4, 2, 64

# Runs in a process of its own: a wrong tile configuration ends it. Prints nothing, writes the logits.
WORKER = """
import ctypes, sys
import numpy as np
from melt_edge.runtime.library import import_llama_cpp
L = import_llama_cpp()
path, out, extra, n_tokens = sys.argv[1], sys.argv[2], sys.argv[3] == "1", int(sys.argv[4])
params = L.llama_model_default_params()
params.use_extra_bufts, params.n_gpu_layers = extra, 0
model = L.llama_model_load_from_file(path.encode(), params)
cparams = L.llama_context_default_params()
cparams.n_ctx = cparams.n_batch = cparams.n_ubatch = n_tokens
cparams.n_threads = cparams.n_threads_batch = 2
context = L.llama_init_from_model(model, cparams)
tokens = (ctypes.c_int32 * n_tokens)(*[(7 * i) % 256 for i in range(n_tokens)])
assert L.llama_decode(context, L.llama_batch_get_one(tokens, n_tokens)) == 0
n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
logits = np.ctypeslib.as_array(L.llama_get_logits_ith(context, -1), shape=(n_vocab,))
np.save(out, logits)
"""


def write_dense_model(path: Path, kind: GGMLQuantizationType) -> None:
    """A stock `llama` model with random weights, its matrices in ``kind``."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // N_HEAD)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            return
        weight = rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[1]))
        writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", VOCAB, WIDTH)
    for i in range(N_LAYER):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", WIDTH, WIDTH)
        for name, shape in {"ffn_gate": (N_FF, WIDTH), "ffn_up": (N_FF, WIDTH), "ffn_down": (WIDTH, N_FF)}.items():
            add(f"blk.{i}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Path, *, extra_buffers: bool) -> NDArray[np.float32]:
    """The last token's logits (V,), with or without the weights repacked for AMX and its like."""
    out = model.with_suffix(f".{int(extra_buffers)}.npy")
    command = [sys.executable, "-c", WORKER, str(model), str(out), str(int(extra_buffers)), str(N_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-2000:]}"
    result: NDArray[np.float32] = np.load(out)
    return result


def nmse(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """sum((a - b)^2) / sum(b^2)."""
    return float(np.square(a - b).sum() / np.square(b).sum())


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)
def test_wide_product_is_the_same_with_repacked_weights(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    model = tmp_path / "dense.gguf"
    write_dense_model(model, kind)
    plain, repacked = logits(model, extra_buffers=False), logits(model, extra_buffers=True)
    assert np.isfinite(plain).all()
    assert plain.std() > 0.1
    assert nmse(repacked, plain) < 1e-3  # both round activations to 8 bits, in blocks of their own
    assert nmse(np.roll(repacked, 1), plain) > 0.5


def pristine_source(folder: Path) -> Path:
    """The pinned, unpatched file that configures the tiles."""
    spec = importlib.util.spec_from_file_location("prepare_llama_cpp", ROOT / "cpp" / "cmake" / "prepare_llama_cpp.py")
    assert spec is not None
    assert spec.loader is not None
    prepare: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    lock = prepare.read_lock(ROOT / "cpp" / "llama.cpp.lock")
    with tarfile.open(prepare.fetch(lock)) as tar:
        for member in tar:
            if member.name.endswith(f"{lock['subdir']}/{SOURCE}"):
                file = tar.extractfile(member)
                assert file is not None
                (folder / SOURCE).parent.mkdir(parents=True)
                (folder / SOURCE).write_bytes(file.read())
                return folder / SOURCE
    raise AssertionError(f"{SOURCE} is not in the archive")


PROBED = ("struct tile_config_t", "inline void ggml_tile_config_init")
PROBE = """
#include <cstdint>
#include <cstdio>
#include <immintrin.h>
extern "C" { uint8_t seen[64]; }
%s
__attribute__((noinline)) void configure() { ggml_tile_config_init(); }
__attribute__((noinline)) static void fill_stack() { volatile uint8_t junk[4096]; for (auto & b : junk) b = 0xAA; }
int main() {
    fill_stack();
    configure();
    for (uint8_t b : seen) printf("%%02x", b);
}
"""


def loaded_configuration(source: Path, folder: Path) -> bytes:
    """The 64 bytes that the compiled function hands to ldtilecfg, on any x86-64 CPU.

    The instruction is replaced, in the compiler's output, by a copy of the bytes at its operand.
    """
    code = source.read_text()
    parts = [re.search(rf"^{start}.*?\n}};?\n", code, re.DOTALL | re.MULTILINE) for start in PROBED]
    assert all(parts)
    folder.mkdir()
    probe, assembly = folder / "probe.cpp", folder / "probe.s"
    probe.write_text(PROBE % "".join(part.group() for part in parts if part))
    subprocess.run(["g++", "-O3", "-std=c++17", "-mamx-tile", "-S", str(probe), "-o", str(assembly)], check=True)

    def copy(match: re.Match[str]) -> str:
        offset, register = match["offset"] or "0", match["register"]
        moves = [f"movq {8 * i}+{offset}({register}), %r11; movq %r11, seen+{8 * i}(%rip)" for i in range(8)]
        return "\n".join(moves)

    text, found = re.subn(r"ldtilecfg\s+(?P<offset>-?\d+)?\((?P<register>%\w+)\)", copy, assembly.read_text())
    assert found >= 1
    assembly.write_text(text)
    subprocess.run(["g++", str(assembly), "-o", str(folder / "probe")], check=True)
    return bytes.fromhex(subprocess.run([folder / "probe"], capture_output=True, text=True, check=True).stdout)


if platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux" and shutil.which("g++"):

    def test_compiler_keeps_the_tile_configuration(tmp_path: Path) -> None:
        source = pristine_source(tmp_path)
        rows, widths = [8, 8, 16, 16, 16, 16, 16, 16], [64, 64, 32, 32, 64, 64, 64, 64]
        expected = bytes([1, 0]) + bytes(14) + np.array(widths + [0] * 8, "<u2").tobytes() + bytes(rows + [0] * 8)

        version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
        if version.split(".")[0].strip() == "12":  # the fault itself
            assert loaded_configuration(source, tmp_path / "before") != expected

        patch = ROOT / "cpp" / "patches" / "ggml-cpu-amx-tile-config-barrier.patch"
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
        assert loaded_configuration(source, tmp_path / "after") == expected
