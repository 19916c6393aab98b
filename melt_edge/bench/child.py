"""One run in a process of its own: python -m melt_edge.bench.child '{"path": ..., ...}'.

Loads the model once and does its tests in turn. Prints one JSON object a line on standard output: the measured
fields of rows.BenchRow for each test in order, or {"error": sentence}, after which nothing follows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.bench.bandwidth import ReadBandwidth
from melt_edge.bench.fill import evaluate, fill
from melt_edge.bench.rows import BenchTest
from melt_edge.errors import MeltError
from melt_edge.runtime.base import Backend, ModelInfo, TimesParts
from melt_edge.runtime.loading import BACKENDS
from melt_edge.runtime.options import LoadOptions

# Tokens that page the weights in before anything is timed.
WARM_UP_TOKENS = 32
# Tokens of a test, all repetitions together, that are held against the memory's speed right before and after them.
PAIRED_TOKENS = 20
# The first of these is not timed.
PARTS_TOKENS = 4
_ATTENTION, _GATES = 0, 1


def run(
    path: Path, options: LoadOptions, tests: Sequence[BenchTest], *, backend: str, repetitions: int, parts: bool
) -> Iterator[dict[str, Any]]:
    """The measured fields of each test. Tokens are random, the same for every model of the same vocabulary.

    parts: also say where a generated token's time goes. Raises: as load, and as the backend's methods.
    """
    model = BACKENDS[backend](path, options)
    info = model.info
    longest = max(test.n_depth + test.n_tokens for test in tests)
    tokens = np.random.default_rng(0).integers(0, info.n_vocab, longest + PARTS_TOKENS).tolist()
    evaluate(model, tokens[: min(WARM_UP_TOKENS, longest)])
    evaluate(model, tokens[:1])
    model.reset()
    for test in tests:
        depth_from = fill(model, tokens[: test.n_depth])
        found = {**_about(info), "depth_from": depth_from, **_timed(model, test, tokens, repetitions)}
        memory = model.memory()
        found |= {
            "kv_bytes": memory.kv_bytes,
            "weights_bytes": memory.weights_bytes,
            "compute_bytes": memory.compute_bytes,
            "rss_bytes": memory.rss_bytes,
        }
        if parts and test.n_gen and isinstance(model, TimesParts):
            fill(model, tokens[: test.n_depth])
            found |= _parts(model.time_parts(tokens[-PARTS_TOKENS:]))
        yield found
    model.close()


def _about(info: ModelInfo) -> dict[str, Any]:
    return {
        "loops": info.num_loops,
        "kv_type": info.kv_type,
        "n_threads": info.n_threads,
        "n_ubatch": info.chunk_size,
        "model_size": info.file_bytes,
        "model_n_params": info.n_params,
        "weights_type": info.quantisation,
    }


def _timed(model: Backend, test: BenchTest, tokens: Sequence[int], repetitions: int) -> dict[str, Any]:
    """The repetitions of one test from the cache of its depth."""
    after = tokens[test.n_depth : test.n_depth + test.n_tokens]
    evaluate(model, after[:1])  # the first token after another depth builds the graph anew
    if test.n_gen:
        return _timed_tokens(model, tokens[: test.n_depth], after, repetitions)
    samples = []
    for _ in range(repetitions):
        fill(model, tokens[: test.n_depth])
        samples.append(elapsed_ns(model, after))
    return {"samples_ns": samples}


def _timed_tokens(model: Backend, before: Sequence[int], after: Sequence[int], repetitions: int) -> dict[str, Any]:
    """Tokens one by one; some of each repetition between two readings of the memory, whose time does not count."""
    paired = set(range(0, len(after), max(1, len(after) * repetitions // PAIRED_TOKENS)))
    samples, token_ns, bandwidths = [], [], []
    with ReadBandwidth(model.info.n_threads) as memory:
        for _ in range(repetitions):
            fill(model, before)
            sample = 0
            for i, token in enumerate(after):
                around = [memory.read()] if i in paired else []
                elapsed = elapsed_ns(model, [token])
                sample += elapsed
                if around:
                    around.append(memory.read())
                    token_ns.append(elapsed)
                    bandwidths.append(sum(around) / len(around))
            samples.append(sample)
    return {"samples_ns": samples, "token_ns": token_ns, "token_bandwidths": bandwidths}


def elapsed_ns(model: Backend, tokens: Sequence[int]) -> int:
    """Nanoseconds of evaluating tokens together, their last logits included."""
    start = time.perf_counter_ns()
    evaluate(model, tokens)
    return time.perf_counter_ns() - start


def _parts(seconds: Any) -> dict[str, Any]:
    """Times and shares of the parts [num_loops + 1, 3] of a token, as rows.BenchRow has them."""
    total = float(seconds.sum())
    return {
        "loop_ms": [round(1000.0 * float(loop.sum()), 3) for loop in seconds[:-1]],
        "head_ms": round(1000.0 * float(seconds[-1].sum()), 3),
        "parts_ms": round(1000.0 * total, 3),
        "parts_tokens": PARTS_TOKENS - 1,
        "attention_share": round(float(seconds[:, _ATTENTION].sum()) / total, 4),
        "gates_share": round(float(seconds[:, _GATES].sum()) / total, 4),
    }


def main() -> int:
    """Do the run in the first argument. Returns the exit status."""
    asked = json.loads(sys.argv[1])
    try:
        for found in run(
            Path(asked["path"]),
            LoadOptions(**asked["options"]),
            [BenchTest(**test) for test in asked["tests"]],
            backend=asked["backend"],
            repetitions=asked["repetitions"],
            parts=asked["parts"],
        ):
            _say(found)
    except MeltError as err:
        _say({"error": str(err)})
        return 1
    return 0


def _say(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def command(*, path: Path, options: LoadOptions, tests: Sequence[BenchTest], **more: Any) -> list[str]:
    """The command line of a child process that does this run."""
    asked = {"path": str(path.resolve()), "options": asdict(options), "tests": [asdict(test) for test in tests], **more}
    return [sys.executable, "-m", "melt_edge.bench.child", json.dumps(asked)]


if __name__ == "__main__":
    sys.exit(main())
