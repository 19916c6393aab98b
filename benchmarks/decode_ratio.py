"""Decode time of MELT and Ouro against one pass over the same layers: the price of the loops, in one run.

    make bench          measures, and writes benchmarks/results/decode_ratio.json with the machine and the commit
    make bench-check    measures, and fails when a ratio is above its limit

Writes random Q4_0 weights of Ouro-1.4B's and MELT-1.6B's shape into a temporary folder (1.8 GB), then times
tokens one at a time with two threads and an almost empty cache, the models in turn. The floor of each ratio is
that of the bytes read per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import melt_edge
from melt_edge.config import LoopConfig
from melt_edge.export.metadata import add_config
from melt_edge.names import gguf_name
from melt_edge.spec import tensor_specs
from provenance import provenance

LIMITS = {"melt": 4.3, "ouro": 3.8}
ROUNDS, N_TOKENS, N_THREADS = 5, 16, 2


def shape(model_type: str, *, tiny: bool = False) -> LoopConfig:
    """Ouro-1.4B, or MELT-1.6B, which adds the gates; tiny: two narrow layers, to try the script."""
    return LoopConfig(
        model_type=model_type,
        hidden_size=128 if tiny else 2048,
        num_hidden_layers=2 if tiny else 24,
        num_attention_heads=2 if tiny else 16,
        num_key_value_heads=2 if tiny else 16,
        head_dim=64 if tiny else 128,
        intermediate_size=256 if tiny else 5632,
        vocab_size=512 if tiny else 49152,
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


def measure(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Times, sizes and ratios of the models, written into a folder and timed in turn."""
    paths = {arch: folder / f"{arch}.gguf" for arch in ("ouro", "melt")}
    for arch, path in paths.items():
        print(f"writing random weights of the {arch} shape ...", flush=True)
        write_random_gguf(path, shape(arch, tiny=tiny))
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
        "decode_ms": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "ratio": {name: round(median_ratio(values, times["dense"]), 3) for name, values in times.items()},
        "kv_bytes": {name: model.memory().kv_bytes for name, model in models.items()},
        "weights_bytes": {name: model.memory().weights_bytes for name, model in models.items()},
    }
    for model in models.values():
        model.close()
    return result


def median_ratio(times: Sequence[float], dense: Sequence[float]) -> float:
    """The median over the rounds, each against the dense model's time in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(times, dense, strict=True))


def above_limit(ratio: Mapping[str, float]) -> list[str]:
    """A sentence for each model whose ratio is above its limit."""
    return [
        f"{name} takes {ratio[name]:.2f} times as long as one pass, the limit is {limit}"
        for name, limit in LIMITS.items()
        if ratio[name] > limit
    ]


def show(result: Mapping[str, Any]) -> None:
    """Print one line per model."""
    for name, ms in result["decode_ms"].items():
        note = f"limit {LIMITS[name]}" if name in LIMITS else ""
        print(f"{name:5}  {ms:8.2f} ms/token  {1000 / ms:7.2f} tok/s  {result['ratio'][name]:5.2f} x dense  {note}")


def main() -> None:
    """Measure, print, write and check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, machine and commit to FILE")
    parser.add_argument("--check", action="store_true", help="fail when a ratio is above its limit")
    parser.add_argument("--tiny", action="store_true", help="a shape of seconds that only tries the script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), tiny=args.tiny)
    show(result)
    if args.json:
        about = {"unix_time": int(time.time()), "n_threads": N_THREADS, "tiny": args.tiny, **provenance()}
        args.json.write_text(json.dumps({**about, **result}, indent=2) + "\n")
    problems = above_limit(result["ratio"])
    if args.check and problems:
        raise SystemExit("error: " + "; ".join(problems))


if __name__ == "__main__":
    main()
