"""Decode time of MELT and Ouro against one pass over the same layers: the price of the loops, in one run.

    python benchmarks/decode_ratio.py [--json FILE] [--check]

Writes random Q4_0 weights of Ouro-1.4B's and MELT-1.6B's shape into a temporary folder (1.8 GB), then times
tokens one at a time with two threads and an almost empty cache, the models in turn. The floor of each ratio is
that of the bytes read per token. --check fails when a ratio is above its limit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

import melt_edge
from melt_edge.config import LoopConfig
from melt_edge.export.metadata import add_config
from melt_edge.names import gguf_name
from melt_edge.spec import tensor_specs

LIMITS = {"melt": 4.3, "ouro": 3.8}
ROUNDS, N_TOKENS, N_THREADS = 5, 16, 2


def shape(model_type: str) -> LoopConfig:
    """Ouro-1.4B, or MELT-1.6B, which adds the gates."""
    return LoopConfig(
        model_type=model_type,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=5632,
        vocab_size=49152,
        num_loops=4,
        kv_gate="elementwise" if model_type == "melt" else "none",
    )


def write_random_gguf(path: Path, config: LoopConfig) -> None:
    """A Q4_0 file with random weights; its vocabulary is the 256 bytes and numbered fillers."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, config.model_type)
    add_config(writer, config, exit_gate=True)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(2)
    alphabet = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(256 - len(alphabet))]
    fillers = [f"<filler{i}>" for i in range(config.vocab_size - 258)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", *alphabet, *fillers, "aa"])
    writer.add_token_types([3, *[1] * 256, *[5] * len(fillers), 1])
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(0)

    for name, spec in tensor_specs(config).items():
        if len(spec.shape) == 1 or spec.role in ("norm", "bias", "exit"):
            values = np.ones(spec.shape, np.float32) if spec.role == "norm" else np.zeros(spec.shape, np.float32)
            writer.add_tensor(gguf_name(name), values)
            continue
        rows, columns = spec.shape
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), np.uint8)  # a float16 scale, then 32 nibbles
        blocks[:, :, :2] = np.float16(0.2 / columns**0.5).reshape(1).view(np.uint8)
        data = blocks.reshape(rows, -1)
        writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode_ms(model: melt_edge.Model, seed: int) -> float:
    """Milliseconds per token, over N_TOKENS tokens after a short prompt."""
    completion = model.generate("a", max_tokens=N_TOKENS, temperature=1.0, seed=seed)
    return 1000.0 / completion.timings.decode_tps


def main() -> None:
    """Measure, print, and check if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {arch: Path(folder) / f"{arch}.gguf" for arch in ("ouro", "melt")}
        for arch, path in paths.items():
            print(f"writing random weights of the {arch} shape ...", flush=True)
            write_random_gguf(path, shape(arch))
        # one pass over Ouro's layers is the dense model of the same layers
        models = {
            "dense": melt_edge.load(paths["ouro"], loops=1, n_ctx=512, n_threads=N_THREADS),
            "ouro": melt_edge.load(paths["ouro"], n_ctx=512, n_threads=N_THREADS),
            "melt": melt_edge.load(paths["melt"], n_ctx=512, n_threads=N_THREADS),
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            decode_ms(model, seed=0)  # the first tokens page the weights in
        for seed in range(ROUNDS):
            for name, model in models.items():
                times[name].append(decode_ms(model, seed))
        result = {
            "machine": f"{platform.machine()}, {N_THREADS} threads",
            "unix_time": int(time.time()),
            "decode_ms": {name: round(statistics.median(values), 2) for name, values in times.items()},
            "kv_bytes": {name: model.memory().kv_bytes for name, model in models.items()},
            "weights_bytes": {name: model.memory().weights_bytes for name, model in models.items()},
        }
        for model in models.values():
            model.close()
    failed = False
    for name, ms in result["decode_ms"].items():
        pairs = zip(times[name], times["dense"], strict=True)
        ratio = statistics.median(ours / dense for ours, dense in pairs)
        result.setdefault("ratio", {})[name] = round(ratio, 3)
        limit = LIMITS.get(name)
        failed |= limit is not None and ratio > limit
        note = f"limit {limit}" if limit else ""
        print(f"{name:5}  {ms:7.1f} ms/token  {1000 / ms:6.2f} tok/s  {ratio:5.2f} x dense  {note}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.check and failed:
        raise SystemExit("error: a ratio is above its limit")


if __name__ == "__main__":
    main()
