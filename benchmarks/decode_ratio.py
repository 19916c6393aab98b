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

import melt_edge
from melt_edge.compare.random_model import write_random_gguf
from melt_edge.compare.shapes import shape_config
from provenance import provenance

LIMITS = {"melt": 4.3, "ouro": 3.8}
# Short rounds: a shared host's memory changes its speed within seconds.
ROUNDS, N_TOKENS, N_THREADS = 20, 4, 2


def decode_ms(model: melt_edge.Model, seed: int) -> float:
    """Milliseconds per token, of N_TOKENS after a short prompt, which gives the first."""
    completion = model.generate("a", max_tokens=N_TOKENS, temperature=1.0, seed=seed)
    return 1000.0 / completion.timings.decode_tps


def measure(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Times, sizes and ratios of the models, written into a folder and timed in turn."""
    paths = {arch: folder / f"{arch}.gguf" for arch in ("ouro", "melt")}
    for arch, path in paths.items():
        print(f"writing random weights of the {arch} shape ...", flush=True)
        write_random_gguf(path, shape_config("tiny" if tiny else "ouro-1.4b", arch))
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
