"""Checkpoint -> a folder that stock onnxruntime-genai runs: a graph for each number of loops over one weights file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melt_edge.checkpoint import Checkpoint
from melt_edge.config import MAX_LOOPS, LoopConfig
from melt_edge.errors import BackendUnavailableError, ConfigError
from melt_edge.export.gguf import check_disk, target_config
from melt_edge.export.metadata import provenance, sampling_values
from melt_edge.export.onnx import (
    OnnxReport,
    context_size,
    quantisation,
    verify_graphs,
    write_graph,
    write_json,
    write_tokenizer,
)
from melt_edge.export.quantize import Progress
from melt_edge.export.tokenizer import SpecialIds, read_tokenizer
from melt_edge.files import atomic_folder

if TYPE_CHECKING:
    from melt_edge.export.genai_graph import GenaiLayout

CONFIG_NAME = "genai_config.json"
DEFAULT_LOOPS = (1, 2, 4)
# llama.cpp's names of sampling values -> genai's; it has no min_p
_SEARCH = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "penalty_repeat": "repetition_penalty"}


def export_genai(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    n_ctx: int | None = None,
    loops: Sequence[int] | None = None,
    share_kv: bool = False,
    chunk_size: int | None = None,
    block_size: int | None = None,
    symmetric: bool | None = None,
    accuracy_level: int | None = None,
    verify: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> OnnxReport:
    """Write a checkpoint folder for onnxruntime-genai: whole decoders, genai_config.json, tokenizer.

    loops: numbers of loops to write a graph for, default 1, 2, 4 and the trained one, which genai_config.json names;
    loops-N.json is the overlay that chooses another. n_ctx: the longest cache, default the model's context up to 4096.
    Other arguments and errors as export_onnx.
    """
    try:
        from melt_edge.export.genai_graph import GenaiLayout, genai_graph
        from melt_edge.export.onnx_manifest import manifest, write_manifest
        from melt_edge.export.onnx_weights import WEIGHTS_NAME, WeightsFile
    except ImportError as err:
        raise BackendUnavailableError("writing ONNX needs the package onnx; install melt-edge[export]") from err

    out = Path(out)
    quantised = quantisation(precision, False, block_size, symmetric, accuracy_level)
    with Checkpoint.open(checkpoint) as source, atomic_folder(out, force=force) as folder:
        config = target_config(source.config, share_kv=share_kv, chunk_size=chunk_size)
        configs = {n: config.with_loops(n) for n in _counts(loops, config)}
        layout = GenaiLayout(precision, context_size(config, n_ctx), **quantised)
        tokenizer = read_tokenizer(source)
        state_bytes = int(config.kv_bytes_per_token(layout.activations.itemsize)) * layout.n_ctx
        report = OnnxReport(out, precision, 0, layout.n_ctx, state_bytes, [*source.notes, *tokenizer.notes])
        sampling = sampling_values(source)
        weights = WeightsFile(source)
        graphs = {f"loops-{n}": genai_graph(each, layout, weights) for n, each in configs.items()}
        check_disk(folder, weights.nbytes)
        sha256 = source.scan(None if progress is None else lambda done, total: progress(done, total, "checking"))
        weights.write(folder / WEIGHTS_NAME, progress)
        for name, graph in graphs.items():
            write_graph(folder / f"{name}.onnx", graph)
        for n, each in configs.items():
            write_json(folder / f"loops-{n}.json", {"model": {"decoder": _loops_keys(each)}})
        write_tokenizer(folder, source, config, tokenizer)
        do_sample = bool(source.generation_config.get("do_sample", False))
        write_json(folder / CONFIG_NAME, genai_config(config, layout, tokenizer.ids, sampling, do_sample=do_sample))
        keys = manifest(config, layout, graphs, {}, tokenizer.ids, sampling, provenance(source, sha256))
        keys["layout"] = "genai"
        write_manifest(folder, keys, None if progress is None else lambda done, total: progress(done, total, "hashing"))
        from melt_edge.export.genai_verify import decoder_logits

        for n, each in configs.items():
            logits = partial(decoder_logits, folder / f"loops-{n}.onnx", each)
            if not verify_graphs(source, each, layout, report, logits, asked=verify):
                break
        report.bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return report


def genai_config(
    config: LoopConfig, layout: GenaiLayout, ids: SpecialIds, sampling: dict[str, float | int], *, do_sample: bool
) -> dict[str, Any]:
    """genai_config.json. Source: onnxruntime-genai 0.18, which knows such a model under the type "decoder" alone."""
    search: dict[str, Any] = {name: sampling[key] for key, name in _SEARCH.items() if key in sampling}
    # The cache is one buffer of max_length rows, read and written in place.
    search |= {"do_sample": do_sample, "max_length": layout.n_ctx, "num_beams": 1, "past_present_share_buffer": True}
    if config.shares_kv:
        search["chunk_size"] = min(config.chunk_size, layout.n_ctx)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": ids.bos,
            "eos_token_id": [ids.eos],
            "pad_token_id": ids.eos if ids.pad is None else ids.pad,
            "vocab_size": config.vocab_size,
            "context_length": layout.n_ctx,
            "decoder": {
                "session_options": {},
                **_loops_keys(config),
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_size": config.head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": search,
    }


def _loops_keys(config: LoopConfig) -> dict[str, Any]:
    """What differs between numbers of loops: the graph and, for Ouro, the cache slots, which genai calls layers."""
    return {"filename": f"loops-{config.num_loops}.onnx", "num_hidden_layers": config.cache_slots}


def _counts(loops: Sequence[int] | None, config: LoopConfig) -> list[int]:
    asked = set(DEFAULT_LOOPS if loops is None else loops) | {config.num_loops}
    wrong = [n for n in asked if not 1 <= n <= MAX_LOOPS]
    if wrong:
        raise ConfigError(f"loops has {wrong[0]}, expected numbers from 1 to {MAX_LOOPS} (--loops)")
    return sorted(asked)
