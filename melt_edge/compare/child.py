"""One measurement in a process of its own: python -m melt_edge.compare.child '{"path": ..., ...}'.

Loads the model, fills its context, and prints one JSON object on standard output: the measured fields of
points.Row, or {"error": sentence}. A fresh process has no memory of the point before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.bench.bandwidth import READ_BYTES, ReadBandwidth
from melt_edge.bench.fill import fill
from melt_edge.compare.process_memory import peak_rss_bytes, process_memory
from melt_edge.errors import BackendError, MeltError
from melt_edge.runtime.library import import_llama_cpp
from melt_edge.runtime.loading import BACKENDS
from melt_edge.runtime.machine import available_bytes
from melt_edge.runtime.options import LoadOptions
from melt_edge.runtime.ort_session import import_onnxruntime


def run(path: Path, options: LoadOptions, *, backend: str, n_decode: int, n_prefill: int | None) -> dict[str, Any]:
    """Load, prefill all but the last n_decode tokens of the context, decode those.

    n_prefill: tokens that are computed at most; their rows are repeated to fill the rest, and there is no time to a
    first token then. The tokens are random, the same for every model of the same vocabulary. Raises: as load.
    """
    import_llama_cpp()  # what the process weighs without a model
    if backend == "onnx":
        import_onnxruntime()
    result: dict[str, Any] = process_memory("before")
    model = BACKENDS[backend](path, options)
    result |= process_memory("loaded")
    tokens = np.random.default_rng(0).integers(0, model.info.n_vocab, model.info.n_ctx).tolist()
    context, rest = tokens[:-n_decode], tokens[-n_decode:]
    prompt = context[:n_prefill]
    # the first evaluation pages the weights in; a user waits for that once, not for every prompt
    model.eval(tokens[:1])
    model.reset()

    start = time.perf_counter()
    model.eval(prompt)
    model.last_logits().argmax()
    prefill_s = time.perf_counter() - start
    if len(prompt) < len(context):
        fill(model, context)
    peak = peak_rss_bytes()  # the memory that is read for its speed is none of the model's
    bandwidth_before = read_bandwidth(model.info.n_threads)
    native_before = model.native_s
    start = time.perf_counter()
    for token in rest:
        model.eval([token])
        model.last_logits().argmax()
    decode_s = time.perf_counter() - start
    native_after = model.native_s
    bandwidth_after = read_bandwidth(model.info.n_threads)

    memory = model.memory()
    result |= process_memory("filled")
    result |= {
        "weights_type": model.info.quantisation,
        "weights_bytes": memory.weights_bytes,
        "kv_bytes": memory.kv_bytes,
        "compute_bytes": memory.compute_bytes,
        "peak_rss_bytes": max(peak, result["rss_filled_bytes"] or 0) if peak is not None else None,
        "n_prefill": len(prompt),
        "ttft_ms": 1000.0 * prefill_s if len(prompt) == len(context) else None,
        "prefill_tps": len(prompt) / prefill_s,
        "decode_tps": len(rest) / decode_s,
    }
    if native_before is not None and native_after is not None:
        result["decode_overhead"] = 1.0 - (native_after - native_before) / decode_s
    if bandwidth_before is not None and bandwidth_after is not None:
        result["bandwidth"] = (bandwidth_before + bandwidth_after) / 2
    model.close()
    return result


def read_bandwidth(n_threads: int) -> float | None:
    """Bytes per second that n_threads threads read; None where the model has left no memory for that."""
    free = available_bytes()
    if free is not None and free < 2 * READ_BYTES:
        return None
    try:
        with ReadBandwidth(n_threads) as memory:
            return memory.read()
    except BackendError:
        return None


def main() -> int:
    """Measure the point in the first argument. Returns the exit status."""
    asked = json.loads(sys.argv[1])
    try:
        result = run(
            Path(asked["path"]),
            LoadOptions(**asked["options"]),
            backend=asked["backend"],
            n_decode=asked["n_decode"],
            n_prefill=asked["n_prefill"],
        )
    except MeltError as err:
        result = {"error": str(err)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
