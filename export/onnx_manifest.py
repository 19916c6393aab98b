"""melt_edge.json: what an ONNX folder holds, so that a runtime needs to read nothing else to use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from melt_edge import __version__
from melt_edge.config import LoopConfig
from melt_edge.export.onnx_builder import GraphBuilder, Value
from melt_edge.export.onnx_ops import Layout
from melt_edge.export.tokenizer import SpecialIds

MANIFEST_NAME = "melt_edge.json"
FORMAT_VERSION = 1
_READ_BYTES = 16 * 2**20


def manifest(
    config: LoopConfig,
    layout: Layout,
    graphs: dict[str, GraphBuilder],
    static: dict[int, dict[str, GraphBuilder]],
    ids: SpecialIds,
    sampling: dict[str, float | int],
    source: dict[str, str],
) -> dict[str, Any]:
    """All keys but "files", which ``write_manifest`` adds once they are written.

    graphs: by name; static: those of fixed shapes by the tokens of a chunk, maybe none.
    """
    float_name = layout.activations.name
    return {
        "format_version": FORMAT_VERSION,
        "architecture": config.model_type,
        "kv_gate": config.kv_gate,
        "kv_gate_init": config.kv_gate_init,
        "num_loops": config.num_loops,
        "chunk_size": config.chunk_size if config.shares_kv else None,
        "exit_threshold": config.early_exit_threshold,
        "shapes": {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "n_ctx": layout.n_ctx,
        },
        "precision": layout.precision,
        "quantisation": _quantisation(layout),
        "dtypes": {"activations": float_name, "kv": float_name},
        "opset": max(graph.opset for graph in graphs.values()),
        "portable": layout.portable,
        "versions": {"melt_edge": __version__, "onnx": onnx.__version__},
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "sampling": sampling,
        "graphs": _graphs(graphs),
        "static": {str(chunk): _graphs(of_chunk, chunk) for chunk, of_chunk in static.items()},
        "source": source,
    }


def write_manifest(folder: Path, keys: dict[str, Any], progress: Callable[[int, int], None] | None) -> None:
    """Write the manifest of a folder whose other files are all there, with their sizes and sha256."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file: file.stat().st_size for file in files}
    total, done = sum(sizes.values()), 0
    listed = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        listed[file.relative_to(folder).as_posix()] = {"size": sizes[file], "sha256": digest.hexdigest()}
    text = json.dumps({**keys, "files": listed}, indent=1, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def graph_file(name: str, chunk: int | None = None) -> str:
    """A graph's file name. chunk: the tokens of a chunk of fixed size."""
    return f"{name}.onnx" if chunk is None else f"{name}.{chunk}.onnx"


def _quantisation(layout: Layout) -> dict[str, int | bool] | None:
    fmt = layout.block_format
    if fmt is None:
        return None
    return {
        "bits": fmt.bits,
        "block_size": fmt.block_size,
        "symmetric": fmt.symmetric,
        "accuracy_level": layout.accuracy_level,
    }


def _graphs(graphs: dict[str, GraphBuilder], chunk: int | None = None) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "file": graph_file(name, chunk),
            "inputs": [_value(value) for value in graph.inputs],
            "outputs": [_value(value) for value in graph.outputs],
        }
        for name, graph in graphs.items()
    }


def _value(value: Value) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype.name, "shape": list(value.shape)}
