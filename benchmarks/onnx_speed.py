"""Int4 ONNX graphs in onnxruntime against Q4_0 in llama.cpp: decode, prefill, and what room in the K/V state costs.

    python benchmarks/onnx_speed.py --json benchmarks/results/onnx_speed.json
    python benchmarks/onnx_speed.py --check

Writes random weights of MELT-1.6B's shape into a temporary folder (2.3 GB), then times both backends in turn with two
threads. Room: a stack of ROOM_LAYERS such layers with 128 tokens in the state, room for 512 and for 16 384.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.bench.fill import evaluate
from melt_edge.compare.random_model import write_random_gguf
from melt_edge.compare.random_onnx import write_random_onnx
from melt_edge.compare.shapes import shape_config
from melt_edge.config import LoopConfig
from melt_edge.export.onnx_ops import Layout
from melt_edge.runtime.base import SamplingParams
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.options import LoadOptions
from melt_edge.runtime.ort_buffers import Memory
from melt_edge.runtime.ort_loop import LoopRunner
from melt_edge.runtime.ort_session import open_sessions
from melt_edge.runtime.sampling import ChainSampler
from provenance import provenance

LEAST_DECODE, LEAST_PREFILL, MOST_ROOM, MOST_OWN_WORK = 0.6, 0.5, 1.1, 0.05
ROUNDS, DECODE_ROUNDS, N_TOKENS, N_PROMPT, N_THREADS = 3, 12, 8, 128, 2
ROOMS, ROOM_LAYERS = (512, 16384), 6


def prompt_seconds(runner: LoopRunner) -> float:
    """Seconds for a prompt of N_PROMPT tokens in one chunk, from an empty state."""

    def prompt() -> None:
        runner.run_chunk(np.zeros(N_PROMPT, np.int64), 0)
        runner.read_last(N_PROMPT)

    return seconds(prompt)


def llama_prompt_seconds(backend: LlamaBackend) -> float:
    """The same in llama.cpp."""
    backend.reset()
    return seconds(lambda: evaluate(backend, [0] * N_PROMPT))


def step_seconds(runner: LoopRunner, sampler: ChainSampler) -> float:
    """Seconds per token, over N_TOKENS tokens after a prompt, each sampled from all logits of the one before."""
    return seconds(lambda: [step(runner, sampler, N_PROMPT + i) for i in range(N_TOKENS)]) / N_TOKENS


def llama_step_seconds(backend: LlamaBackend, sampler: ChainSampler) -> float:
    """The same in llama.cpp, after the prompt that its cache holds."""

    def steps() -> None:
        for _ in range(N_TOKENS):
            evaluate(backend, [sampler.sample(backend.last_logits())])

    backend.truncate(N_PROMPT)
    evaluate(backend, [0])  # the first token after another number of them builds the graph anew
    return seconds(steps) / N_TOKENS


def step(runner: LoopRunner, sampler: ChainSampler, n_past: int) -> None:
    """One token, as melt_edge.runtime.generate computes it: a folder of random weights has no tokenizer to load."""
    token = sampler.sample(runner.last_row)
    runner.run_chunk(np.asarray([token], np.int64), n_past)
    runner.read_last(1)


def seconds(work: Callable[[], object]) -> float:
    """The time some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write_folder(folder: Path, config: LoopConfig, n_ctx: int, options: Mapping[str, Any]) -> LoopRunner:
    """Random int4 graphs of these sizes, loaded as the backend loads them."""
    folder.mkdir()
    write_random_onnx(folder, config, Layout("int4", n_ctx, **options))
    graphs = {name: (folder / f"{name}.onnx").read_bytes() for name in ("embed", "loop", "head")}
    return LoopRunner(
        open_sessions(folder, graphs, provider="cpu", n_threads=N_THREADS),
        config,
        n_ctx=n_ctx,
        chunk=N_PROMPT,
        dtype="float32",
        memory=Memory("cpu"),
        exit_rule=None,
    )


def make_sampler(config: LoopConfig) -> ChainSampler:
    """llama.cpp's sampler with its defaults."""
    return ChainSampler(None, config.vocab_size, SamplingParams(seed=1), [])


def measure_speed(folder: Path, shape: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens per second of both backends, measured in turn, and the ratio in each round."""
    config = shape_config(shape, "melt")
    write_random_gguf(folder / "melt.gguf", config)
    runner = write_folder(folder / "melt", config, 512, options)
    sampler = make_sampler(config)
    rates: dict[str, dict[str, list[float]]] = {
        phase: {"onnxruntime": [], "llama.cpp": []} for phase in ("decode", "prefill")
    }
    llama_options = LoadOptions(n_ctx=512, n_threads=N_THREADS, chunk_size=N_PROMPT)
    with closing(LlamaBackend(folder / "melt.gguf", llama_options)) as backend:
        llama_prompt_seconds(backend)  # the first tokens page the weights in
        llama_step_seconds(backend, sampler)
        prompt_seconds(runner)
        step_seconds(runner, sampler)
        for _ in range(ROUNDS):
            rates["prefill"]["llama.cpp"].append(N_PROMPT / llama_prompt_seconds(backend))
            rates["prefill"]["onnxruntime"].append(N_PROMPT / prompt_seconds(runner))
        for _ in range(DECODE_ROUNDS):
            rates["decode"]["llama.cpp"].append(1 / llama_step_seconds(backend, sampler))
            rates["decode"]["onnxruntime"].append(1 / step_seconds(runner, sampler))
    own_work = own_work_share(runner, sampler)
    sampler.close()
    return {
        "tokens_per_second": {
            phase: {k: round(statistics.median(v), 2) for k, v in r.items()} for phase, r in rates.items()
        },
        "ratio": {phase: round(median_ratio(r["onnxruntime"], r["llama.cpp"]), 3) for phase, r in rates.items()},
        "own_work": own_work,
    }


def measure_room(folder: Path, shape: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds per token at N_PROMPT tokens with little and with much room, in turn."""
    config = replace(
        shape_config(shape, "melt"), num_hidden_layers=min(ROOM_LAYERS, shape_config(shape, "melt").num_hidden_layers)
    )
    runners = {n_ctx: write_folder(folder / f"room-{n_ctx}", config, n_ctx, options) for n_ctx in ROOMS}
    times: dict[int, list[float]] = {n_ctx: [] for n_ctx in ROOMS}
    sampler = make_sampler(config)
    for runner in runners.values():
        prompt_seconds(runner)
        step_seconds(runner, sampler)
    for _ in range(DECODE_ROUNDS):
        for n_ctx, runner in runners.items():
            times[n_ctx].append(step_seconds(runner, sampler))
    sampler.close()
    return {
        "room_decode_ms": {str(n_ctx): round(1000 * statistics.median(t), 3) for n_ctx, t in times.items()},
        "room_ratio": round(median_ratio(times[ROOMS[1]], times[ROOMS[0]]), 3),
    }


def own_work_share(runner: LoopRunner, sampler: ChainSampler) -> float:
    """The share of a token's time that the runtime spends outside onnxruntime, sampling included: the median."""
    shares = []
    for i in range(ROUNDS * N_TOKENS):
        native_before = runner.counters.native_s
        total = seconds(lambda i=i: step(runner, sampler, N_PROMPT + N_TOKENS + i))
        shares.append(1 - (runner.counters.native_s - native_before) / total)
    return round(statistics.median(shares), 5)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds, each against the other in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def problems(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each ratio on the wrong side of its limit."""
    found = [
        f"{phase} is {result['ratio'][phase]:.2f} of llama.cpp's, expected at least {least}"
        for phase, least in (("decode", LEAST_DECODE), ("prefill", LEAST_PREFILL))
        if result["ratio"][phase] < least
    ]
    if result["room_ratio"] > MOST_ROOM:
        found.append(f"room for {ROOMS[1]} tokens costs {result['room_ratio']:.2f} times that for {ROOMS[0]}")
    if result["own_work"] > MOST_OWN_WORK:
        found.append(f"{100 * result['own_work']:.1f} % of a token's time is outside onnxruntime")
    return found


def main() -> None:
    """Measure, print, write and check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, machine and commit to FILE")
    parser.add_argument("--check", action="store_true", help="fail when a ratio is on the wrong side of its limit")
    parser.add_argument("--tiny", action="store_true", help="a shape of seconds that only tries the script")
    parser.add_argument("--block-size", type=int, default=32, metavar="N", help="values that share a scale")
    parser.add_argument("--asymmetric", action="store_true", help="blocks with zero points")
    args = parser.parse_args()
    shape = "tiny" if args.tiny else "ouro-1.4b"
    options = {"block_size": args.block_size, "symmetric": not args.asymmetric}
    with tempfile.TemporaryDirectory() as folder:
        result = measure_speed(Path(folder), shape, options)
        result |= measure_room(Path(folder), shape, options)
    for phase, rates in result["tokens_per_second"].items():
        told = "  ".join(f"{name} {rate:7.2f} tok/s" for name, rate in rates.items())
        print(f"{phase:8} {told}  ratio {result['ratio'][phase]:.2f}")
    told = "  ".join(f"room for {n_ctx} {ms:.2f} ms" for n_ctx, ms in result["room_decode_ms"].items())
    print(f"decode at {N_PROMPT} tokens, {ROOM_LAYERS} layers: {told}  ratio {result['room_ratio']:.3f}")
    print(f"decode: {100 * result['own_work']:.2f} % of a token's time is outside onnxruntime, sampling included")
    missed = problems(result)
    for problem in missed:
        print(f"MISSED {problem}")
    if args.json:
        about = {"unix_time": int(time.time()), "n_threads": N_THREADS, "tiny": args.tiny, **options, **provenance()}
        args.json.write_text(json.dumps({**about, **result, "missed": missed}, indent=2) + "\n")
    if args.check and missed:
        raise SystemExit("error: " + "; ".join(missed))


if __name__ == "__main__":
    main()
