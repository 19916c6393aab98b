"""What `inspect` tells about a model file or a checkpoint folder, as one JSON-ready dictionary.

Reads headers only: no weights, no llama.cpp, no torch. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from melt_edge.config import LoopConfig
from melt_edge.errors import FormatError, MeltError

# Bytes per cached value: q8_0 and q4_0 keep 32 values in 34 and 18 bytes.
KV_TYPE_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# llama.cpp's llama_ftype numbers, as general.file_type stores them.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}


def describe(path: Path) -> dict[str, Any]:
    """Everything the headers of a GGUF file, an ONNX or a checkpoint folder tell.

    "check" says whether melt-edge would run it, and if not why.
    Raises: FormatError, ConfigError or SpecError if its headers cannot be read at all.
    """
    from melt_edge.runtime.onnx_folder import is_onnx_folder

    if is_onnx_folder(path):
        return describe_onnx(path)
    if path.is_dir():
        return describe_checkpoint(path)
    if not path.exists():
        raise FormatError(f"{path}: no such file; expected a .gguf file, an ONNX or a checkpoint folder")
    return describe_gguf(path)


def describe_gguf(path: Path) -> dict[str, Any]:
    """The header, metadata and tensor table of a GGUF file."""
    from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
    from melt_edge.runtime.gguf_file import read_gguf

    info = read_gguf(path)
    problem = _problem_of(lambda: check_gguf(path))
    tensors = [{"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.nbytes} for t in info.tensors]
    found: dict[str, Any] = {
        "path": str(path),
        "kind": "gguf",
        "architecture": info.arch,
        "name": _text(info.metadata.get("general.name")),
        "check": {"ok": problem is None, "error": problem},
        "parameters": info.n_params,
        "file_bytes": info.file_bytes,
        **_weights(tensors),
        "quantisation": _FILE_TYPES.get(_int(info.metadata.get("general.file_type"))),
    }
    try:
        config = config_from_gguf(info)
    except MeltError:
        config = None
    if config is not None:
        found["model"] = _model(config, has_exit_gate=any(t["name"] == "exit_gate.weight" for t in tensors))
        found["kv_cache"] = kv_cache(config)
    found["tokenizer"] = _tokenizer(info.metadata)
    found["chat_template"] = "tokenizer.chat_template" in info.metadata
    found["provenance"] = provenance(info.metadata)
    found["metadata"] = {
        key: value
        for key, value in info.metadata.items()
        if not isinstance(value, list) and key != "tokenizer.chat_template"
    }
    found["tensors"] = tensors
    return found


def describe_onnx(path: Path) -> dict[str, Any]:
    """The manifest and the graphs of an ONNX folder, all checked; the weights' contents are not looked at."""
    from melt_edge.runtime.onnx_folder import open_folder

    folder = open_folder(path)
    config, vocabulary = folder.config, folder.vocabulary.metadata
    stored = {weight.name: weight for graph in folder.graphs.values() for weight in graph.weights}
    tensors = [
        {"name": name, "shape": list(weight.shape), "type": weight.dtype, "bytes": weight.length}
        for name, weight in stored.items()
    ]
    about: dict[str, Any] = {}
    for key in ("source", "versions"):
        part = folder.manifest.get(key)
        about |= part if isinstance(part, dict) else {}
    return {
        "path": str(path),
        "kind": "onnx",
        "architecture": config.model_type,
        "name": folder.name,
        "check": {"ok": True, "error": None},
        "parameters": folder.n_params,
        "file_bytes": folder.file_bytes,
        **_weights(tensors),
        "bits_per_weight": round(8 * sum(weight.length for weight in stored.values()) / folder.n_params, 3),
        "quantisation": folder.precision,
        "model": {**_model(config, has_exit_gate=True), "tied_head": folder.is_tied},
        "kv_cache": kv_cache(config, kv_type=folder.kv_type, n_ctx=folder.n_ctx),
        "tokenizer": _tokenizer(vocabulary),
        "chat_template": "tokenizer.chat_template" in vocabulary,
        "provenance": {key: str(value) for key, value in about.items() if key != "name"},
        "metadata": {key: value for key, value in folder.manifest.items() if key not in ("graphs", "files")},
        "tensors": tensors,
    }


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The configuration and the tensor tables of a checkpoint folder."""
    from melt_edge.checkpoint import Checkpoint

    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
        tensors = [
            {"name": t.name, "shape": list(t.shape), "type": t.dtype, "bytes": t.nbytes}
            for t in checkpoint.tensors.values()
        ]
        files = sorted({t.file.name for t in checkpoint.tensors.values()})
        return {
            "path": str(path),
            "kind": "checkpoint",
            "architecture": config.model_type,
            "name": path.resolve().name,
            "check": {"ok": True, "error": None},
            "parameters": sum(t.n_elements for t in checkpoint.tensors.values()),
            "file_bytes": sum((path / name).stat().st_size for name in files),
            **_weights(tensors),
            "quantisation": None,
            "model": _model(config, has_exit_gate=True),
            "kv_cache": kv_cache(config),
            "tokenizer": {
                "model": "tokenizer.json" if checkpoint.tokenizer_path is not None else None,
                "tokens": config.vocab_size,
                "bos_token_id": config.bos_token_id,
                "eos_token_id": config.eos_token_id,
            },
            "chat_template": "chat_template" in checkpoint.tokenizer_config or (path / "chat_template.jinja").is_file(),
            "provenance": {"files": ", ".join(files)},
            "metadata": config.to_dict(),
            "tensors": tensors,
        }


def kv_cache(config: LoopConfig, *, kv_type: str = "f16", n_ctx: int | None = None) -> dict[str, Any]:
    """Cache bytes per token and at the full context, beside those of a cache with a row per loop.

    n_ctx: default the model's. Units: bytes, for values of kv_type unless the key names another type.
    """
    size, n_ctx = KV_TYPE_BYTES[kv_type], n_ctx or config.max_position_embeddings
    own = config.kv_bytes_per_token(size)
    per_loop = own * (config.num_loops if config.shares_kv else 1)
    shared = own / (1 if config.shares_kv else config.num_loops)
    return {
        "shared_between_loops": config.shares_kv,
        "type": kv_type,
        "n_ctx": n_ctx,
        "bytes_per_token": {name: config.kv_bytes_per_token(each) for name, each in KV_TYPE_BYTES.items()},
        "bytes_at_n_ctx": own * n_ctx,
        "shared": {"bytes_per_token": shared, "bytes_at_n_ctx": shared * n_ctx},
        "per_loop": {"bytes_per_token": per_loop, "bytes_at_n_ctx": per_loop * n_ctx},
    }


def provenance(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The keys that say where a file came from: source, digest, versions, license."""
    found = {}
    for key, value in metadata.items():
        about = key.removeprefix("general.").removeprefix("melt_edge.")
        if about != key and isinstance(value, str) and about not in ("architecture", "type", "name", "size_label"):
            found[about] = value
    return found


def _model(config: LoopConfig, *, has_exit_gate: bool) -> dict[str, Any]:
    return {
        "num_loops": config.num_loops,
        "layers": config.num_hidden_layers,
        "cache_slots": config.cache_slots,
        "chunk_size": config.chunk_size if config.shares_kv else None,
        "kv_gate": config.kv_gate if config.shares_kv else None,
        "kv_gate_init": config.kv_gate_init if config.has_gate else None,
        "exit_gate": has_exit_gate,
        "exit_threshold": config.early_exit_threshold,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "tied_head": config.tie_word_embeddings,
        "n_ctx_train": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
    }


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": _text(metadata.get("tokenizer.ggml.model")),
        "pre": _text(metadata.get("tokenizer.ggml.pre")),
        "tokens": _length(metadata.get("tokenizer.ggml.tokens")),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _weights(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    mix: dict[str, dict[str, int]] = {}
    values = total = 0
    for tensor in tensors:
        entry = mix.setdefault(tensor["type"], {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor["bytes"]
        total += tensor["bytes"]
        count = 1
        for size in tensor["shape"]:
            count *= size
        values += count
    by_size = dict(sorted(mix.items(), key=lambda item: -item[1]["bytes"]))
    return {"bits_per_weight": round(8 * total / values, 3) if values else None, "types": by_size}


def _problem_of(check: Any) -> str | None:
    try:
        check()
    except MeltError as err:
        return str(err)
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _int(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None
