"""Checkpoint -> ONNX folder: everything is checked, streamed into a temporary folder, compared with the reference,
and only then put in place."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from melt_edge.checkpoint import Checkpoint
from melt_edge.config import LoopConfig
from melt_edge.errors import BackendUnavailableError, ConfigError
from melt_edge.export.gguf import VERIFY_BELOW_PARAMS, check_disk, target_config, write_vocabulary
from melt_edge.export.metadata import provenance, sampling_values
from melt_edge.export.quantize import Progress
from melt_edge.export.tokenizer import CheckpointTokenizer, read_tokenizer
from melt_edge.files import atomic_folder
from melt_edge.spec import tensor_specs

if TYPE_CHECKING:
    from melt_edge.export.onnx_builder import GraphBuilder
    from melt_edge.export.onnx_ops import Layout

DEFAULT_N_CTX = 4096
# prompt, one-token steps, chunk size -> logits (n, V)
ChunkedLogits = Callable[[list[int], list[int], int], npt.NDArray[np.float32]]
PRECISIONS = ("fp32", "fp16", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 4)


@dataclass
class OnnxReport:
    """What was written. state_bytes: of the K/V state for n_ctx tokens.

    verified: True after the comparison with the reference, None if it was not made.
    """

    path: Path
    precision: str
    bytes: int
    n_ctx: int
    state_bytes: int
    notes: list[str] = field(default_factory=list)
    verified: bool | None = None


def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    n_ctx: int | None = None,
    share_kv: bool = False,
    chunk_size: int | None = None,
    block_size: int | None = None,
    symmetric: bool | None = None,
    accuracy_level: int | None = None,
    static: bool = False,
    portable: bool = False,
    verify: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> OnnxReport:
    """Write a checkpoint folder as ONNX graphs for one loop step, with one file of weights.

    precision: fp32, fp16, or matrices in blocks of int8 or int4. n_ctx: rows of the K/V state, default the model's
    context up to 4096. share_kv, chunk_size, verify: as export_gguf.
    block_size, symmetric, accuracy_level: of int8 and int4, see onnx_ops.Layout; None takes what was measured best.
    static: also write graphs with no symbolic dimension, for one token and for chunk_size tokens.
    portable: operators of the ONNX standard alone, fp32 or fp16.
    Raises: ConfigError, SpecError, FormatError before anything is in place; ParityError if the graphs do not
    compute what the reference does; BackendUnavailableError without onnx, or if verify lacks onnxruntime.
    """
    try:
        from melt_edge.export.onnx_graph import build_graphs
        from melt_edge.export.onnx_manifest import graph_file, manifest, write_manifest
        from melt_edge.export.onnx_ops import Layout
        from melt_edge.export.onnx_weights import WEIGHTS_NAME, WeightsFile
    except ImportError as err:
        raise BackendUnavailableError("writing ONNX needs the package onnx; install melt-edge[export]") from err

    out = Path(out)
    quantised = quantisation(precision, portable, block_size, symmetric, accuracy_level)
    with Checkpoint.open(checkpoint) as source, atomic_folder(out, force=force) as folder:
        config = target_config(source.config, share_kv=share_kv, chunk_size=chunk_size)
        layout = Layout(precision, context_size(config, n_ctx), portable, **quantised)
        tokenizer = read_tokenizer(source)
        state_bytes = int(config.kv_bytes_per_token(layout.activations.itemsize)) * layout.n_ctx
        report = OnnxReport(out, precision, 0, layout.n_ctx, state_bytes, [*source.notes, *tokenizer.notes])
        sampling = sampling_values(source)
        weights = WeightsFile(source)
        graphs = build_graphs(config, layout, weights)
        sizes = sorted({1, min(config.chunk_size, layout.n_ctx)}) if static else []
        of_fixed_shape = {size: build_graphs(config, layout.static(size), weights) for size in sizes}
        assert weights.used == set(source.tensors), "a tensor of the checkpoint is in no graph"
        if layout.block_format is not None and graphs["embed"].nodes[0].op_type == "Gather":
            report.notes.append(
                f"rows of {config.hidden_size} values do not fill blocks of {layout.block_size}: the embedding "
                f"stays {layout.activations.name}; a smaller block size would do"
            )
        check_disk(folder, weights.nbytes)
        sha256 = source.scan(None if progress is None else lambda done, total: progress(done, total, "checking"))
        weights.write(folder / WEIGHTS_NAME, progress)
        for name, graph in graphs.items():
            write_graph(folder / graph_file(name), graph)
        for size, of_size in of_fixed_shape.items():
            for name, graph in of_size.items():
                write_graph(folder / graph_file(name, size), graph)
        write_tokenizer(folder, source, config, tokenizer)
        keys = manifest(config, layout, graphs, of_fixed_shape, tokenizer.ids, sampling, provenance(source, sha256))
        write_manifest(folder, keys, None if progress is None else lambda done, total: progress(done, total, "hashing"))
        from melt_edge.export.onnx_verify import folder_logits

        verify_graphs(source, config, layout, report, partial(folder_logits, folder), asked=verify)
        report.bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return report


def context_size(config: LoopConfig, n_ctx: int | None) -> int:
    """Rows of the K/V state. Raises: ConfigError for more than the model's context."""
    most = config.max_position_embeddings
    if n_ctx is None:
        return min(most, DEFAULT_N_CTX)
    if not 1 <= n_ctx <= most:
        raise ConfigError(f"n_ctx is {n_ctx}, expected 1 to {most}, the model's context (--n-ctx)")
    return n_ctx


def quantisation(
    precision: str, portable: bool, block_size: int | None, symmetric: bool | None, accuracy_level: int | None
) -> dict[str, Any]:
    """Layout's fields for quantised matrices. Raises: ConfigError for an unknown precision, or for a
    field that it does not have.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    given = {"block_size": block_size, "symmetric": symmetric, "accuracy_level": accuracy_level}
    if precision not in ("int8", "int4"):
        asked = [key for key, value in given.items() if value is not None]
        if asked:
            raise ConfigError(f"{asked[0]} is of int8 and int4, but precision is {precision}; leave it out")
        return {}
    if portable:
        raise ConfigError(
            f"precision is {precision}, whose operators are onnxruntime's own; with portable use fp32 or fp16"
        )
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise ConfigError(f"block_size is {block_size}, expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if accuracy_level is not None and accuracy_level not in ACCURACY_LEVELS:
        raise ConfigError(f"accuracy_level is {accuracy_level}, expected one of {', '.join(map(str, ACCURACY_LEVELS))}")
    return {key: value for key, value in given.items() if value is not None}


def write_graph(path: Path, graph: GraphBuilder) -> None:
    """Write a graph whose weights are there already. Its stated shapes must be what onnx infers."""
    import onnx

    model = graph.model()
    onnx.save_model(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True), path)
    onnx.checker.check_model(path, full_check=True)


def write_tokenizer(folder: Path, source: Checkpoint, config: LoopConfig, tokenizer: CheckpointTokenizer) -> None:
    """Write the checkpoint's tokenizer files, special tokens put right, and the vocabulary as llama.cpp reads it."""
    assert source.tokenizer_path is not None
    shutil.copyfile(source.tokenizer_path, folder / "tokenizer.json")
    ids, tokens = tokenizer.ids, tokenizer.vocabulary.tokens
    roles = {role: value for role, value in (("bos", ids.bos), ("eos", ids.eos), ("pad", ids.pad)) if value is not None}
    write_json(
        folder / "tokenizer_config.json",
        {**source.tokenizer_config, **{f"{role}_token": tokens[value] for role, value in roles.items()}},
    )
    write_json(
        folder / "generation_config.json",
        {**source.generation_config, **{f"{role}_token_id": value for role, value in roles.items()}},
    )
    if isinstance(tokenizer.template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")
    write_vocabulary(folder / "tokenizer.gguf", config, tokenizer)


def write_json(path: Path, keys: dict[str, Any]) -> None:
    """Write an object as readable JSON."""
    path.write_text(json.dumps(keys, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_graphs(
    source: Checkpoint,
    config: LoopConfig,
    layout: Layout,
    report: OnnxReport,
    logits: ChunkedLogits,
    *,
    asked: bool | None,
) -> bool:
    """Compare written graphs with the reference; asked: None does so for small models alone. Returns whether it did."""
    n_params = sum(math.prod(spec.shape) for spec in tensor_specs(config).values())
    if asked is False or (asked is None and n_params >= VERIFY_BELOW_PARAMS):
        return False
    from melt_edge.export.verify import verify_logits

    chunk_size = min(config.chunk_size, layout.n_ctx) if config.shares_kv else layout.n_ctx
    try:
        verify_logits(source, config, layout.precision, lambda prompt, steps: logits(prompt, steps, chunk_size))
    except BackendUnavailableError as err:
        if asked:
            raise
        report.notes.append(f"not compared with the reference: {err}")
        return False
    report.verified = True
    return True
