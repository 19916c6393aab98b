"""Decode time of the two ONNX layouts: one loop a step under our runner, and whole decoders in stock onnxruntime-genai.

    python benchmarks/genai_decode.py [--layers 6] [--json FILE]

The sizes of MELT-1.6B and Ouro-1.4B with fewer layers (a token's time is in proportion to them), random weights in
int4, 1 024 tokens in a cache of 4 096, two threads; the layouts take turns, and the median of their tokens counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from melt_edge.compare.random_onnx import RandomWeights, write_random_onnx
from melt_edge.compare.shapes import shape_config
from melt_edge.config import LoopConfig
from melt_edge.export.genai import CONFIG_NAME, genai_config
from melt_edge.export.genai_graph import GenaiLayout, genai_graph
from melt_edge.export.onnx import write_graph, write_json
from melt_edge.export.onnx_ops import Layout
from melt_edge.export.onnx_verify import LoopSteps
from melt_edge.export.onnx_weights import WEIGHTS_NAME
from melt_edge.export.tokenizer import SpecialIds
from provenance import provenance

N_CTX, N_CACHED, N_THREADS = 4096, 1024, 2
# Each layout computes some tokens before the other does: the threads of the one that waits spin for a while.
N_ROUNDS, N_TOKENS, N_WARM = 3, 10, 3
SHAPE = "ouro-1.4b"
VOCAB = 2048  # the head is the same in both layouts


def config(architecture: str, layers: int) -> LoopConfig:
    """The sizes of MELT-1.6B or Ouro-1.4B with ``layers`` layers."""
    return replace(shape_config(SHAPE, architecture), num_hidden_layers=layers, vocab_size=VOCAB)


def write_genai(folder: Path, sizes: LoopConfig) -> None:
    """A folder with random weights that stock onnxruntime-genai opens."""
    folder.mkdir()
    layout = GenaiLayout("int4", N_CTX)
    weights = RandomWeights(sizes, layout)
    graph = genai_graph(sizes, layout, weights)
    weights.write(folder / WEIGHTS_NAME, None)
    write_graph(folder / f"loops-{sizes.num_loops}.onnx", graph)
    keys = genai_config(sizes, layout, SpecialIds(0, 0, None, None), {}, do_sample=False)
    keys["model"]["decoder"]["session_options"] = {"intra_op_num_threads": N_THREADS}
    write_json(folder / CONFIG_NAME, keys)


def measure(folder: Path, sizes: LoopConfig) -> dict[str, Any]:
    """Median milliseconds per token of both layouts."""
    (folder / "step").mkdir()
    write_random_onnx(folder / "step", sizes, Layout("int4", N_CTX))
    write_genai(folder / "genai", sizes)
    steps = LoopSteps(folder / "step", n_threads=N_THREADS)
    steps.n_past = N_CACHED  # rows of zeros take as long as any
    model = og.Model(str(folder / "genai"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=N_CTX, min_length=N_CTX)
    generator = og.Generator(model, params)
    generator.append_tokens(np.arange(N_CACHED, dtype=np.int32) % VOCAB)
    times: dict[str, list[float]] = {"step": [], "genai": []}
    for _ in range(N_ROUNDS):
        for name, run in (("step", lambda: steps.chunk(np.array([[5]]))), ("genai", generator.generate_next_token)):
            for index in range(N_TOKENS):
                start = time.perf_counter()
                run()
                if index >= N_WARM:
                    times[name].append(1000 * (time.perf_counter() - start))
    step_ms, genai_ms = (statistics.median(times[name]) for name in ("step", "genai"))
    return {"step_ms": round(step_ms, 2), "genai_ms": round(genai_ms, 2), "ratio": round(genai_ms / step_ms, 3)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for architecture in ("melt", "ouro"):
        with tempfile.TemporaryDirectory() as folder:
            results[architecture] = measure(Path(folder), config(architecture, options.layers))
        print(architecture, results[architecture], flush=True)
    if options.json:
        conditions = {"layers": options.layers, "n_ctx": N_CTX, "n_cached": N_CACHED, "threads": N_THREADS}
        text = json.dumps({**provenance(), **conditions, "precision": "int4", "results": results}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
