"""Checkpoint -> GGUF: everything is checked, streamed into a temporary file, compared with the reference,
and only then put in place."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from melt_edge.checkpoint import Checkpoint
from melt_edge.config import LoopConfig
from melt_edge.errors import BackendUnavailableError, ConfigError
from melt_edge.export.metadata import add_config, add_provenance, add_sampling
from melt_edge.export.quantize import Progress, check_type, quantize_file
from melt_edge.export.tensors import DIRECT_TYPES, TensorPlan, encoded_blocks, plan_tensors
from melt_edge.export.tokenizer import CheckpointTokenizer, add_tokenizer, write_tokenizer
from melt_edge.files import atomic_output
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.spec import tensor_specs

# Below this the reference decodes in seconds, so every file is compared with it unless told otherwise.
VERIFY_BELOW_PARAMS = 100_000_000


@dataclass
class ExportReport:
    """What was written. verified: True after the comparison with the reference, None if it was not made."""

    path: Path
    type: str
    bytes: int
    notes: list[str] = field(default_factory=list)
    verified: bool | None = None


@dataclass(frozen=True)
class _Export:
    """One export: what is read, what the file describes, and who is told."""

    source: Checkpoint
    config: LoopConfig
    exit_gate: bool
    report: ExportReport
    progress: Progress | None


def export_gguf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    share_kv: bool = False,
    chunk_size: int | None = None,
    exit_gate: bool = True,
    verify: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint folder as one GGUF file.

    type: f32, f16, bf16, q8_0, q4_0, or one of llama.cpp's quantisations (quantize.QUANTIZE_TYPES).
    share_kv: an Ouro as a MELT without a gate, 1/T of its cache. chunk_size: tokens of a chunk (MELT).
    exit_gate: False leaves out the exit gate, for loaders that do not know it.
    verify: compare the file with the reference before it is put in place; None does so below 100 M
    parameters if torch and the patched library are there.
    Raises: ConfigError, SpecError, FormatError before anything is in place; ParityError if the file does
    not compute what the reference does; BackendUnavailableError if a K-quant or verify lacks the library.
    """
    out = Path(out)
    type = check_type(type)
    with Checkpoint.open(checkpoint) as source, atomic_output(out, force=force) as temporary:
        config = target_config(source.config, share_kv=share_kv, chunk_size=chunk_size)
        report = ExportReport(out, type, 0, list(source.notes))
        export = _Export(source, config, exit_gate, report, progress)
        if type in DIRECT_TYPES:
            _write(export, temporary, type)
        else:
            _write_quantized(export, temporary)
        check_gguf(temporary)
        n_params = sum(math.prod(spec.shape) for spec in tensor_specs(config).values())
        if verify or (verify is None and n_params < VERIFY_BELOW_PARAMS):
            _verify(export, temporary, asked=verify is True)
        report.bytes = temporary.stat().st_size
    return report


def target_config(config: LoopConfig, *, share_kv: bool, chunk_size: int | None) -> LoopConfig:
    """The configuration the file describes."""
    if share_kv:
        return config.share_kv(chunk_size)
    if chunk_size is None:
        return config
    if not config.shares_kv:
        raise ConfigError(f"chunk_size is {chunk_size}, but an Ouro's cache has no chunks; add share_kv (--share-kv)")
    return replace(config, chunk_size=chunk_size)


def _write(export: _Export, path: Path, type: str) -> None:
    """Write the whole file: header, keys, tensor table, then each tensor's rows, block by block."""
    source, config, notes, progress = export.source, export.config, export.report.notes, export.progress
    plans = plan_tensors(source, type, exit_gate=export.exit_gate, notes=notes)
    writer = GGUFWriter(None, config.model_type)
    add_config(writer, config, exit_gate=export.exit_gate)
    notes += write_tokenizer(writer, source)
    add_sampling(writer, source)
    total = sum(plan.nbytes for plan in plans)
    check_disk(path, total)
    sha256 = source.scan(None if progress is None else lambda done, size: progress(done, size, "checking"))
    notes += add_provenance(writer, source, config, type, sha256)
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.nbytes, raw_dtype=plan.type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        _stream(writer, source, plans, total, progress)
    finally:
        writer.close()


def write_vocabulary(path: Path, config: LoopConfig, tokenizer: CheckpointTokenizer) -> None:
    """Write a GGUF file with the configuration and the tokenizer alone: llama.cpp's tokenizer for another backend."""
    writer = GGUFWriter(None, config.model_type)
    add_config(writer, config, exit_gate=True)
    add_tokenizer(writer, tokenizer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _stream(
    writer: GGUFWriter, source: Checkpoint, plans: list[TensorPlan], total: int, progress: Progress | None
) -> None:
    assert writer.fout is not None
    (stream,) = writer.fout
    writer.write_padding(stream, stream.tell())
    done = 0
    for plan in plans:
        start = done
        for block in encoded_blocks(source, plan):
            stream.write(block.data)
            done += block.nbytes
            if progress is not None:
                progress(done, total, "writing")
        assert done - start == plan.nbytes
        writer.write_padding(stream, plan.nbytes)


def _write_quantized(export: _Export, path: Path) -> None:
    """Write the checkpoint's own precision beside the target, and let llama.cpp quantise that."""
    kept = {"F32": "f32", "F16": "f16", "BF16": "bf16"}[export.source.tensors["model.embed_tokens.weight"].dtype]
    full = path.with_name(path.name + ".full.gguf")
    try:
        _write(export, full, kept)
        quantize_file(full, path, export.report.type, progress=export.progress)
    finally:
        full.unlink(missing_ok=True)


def _verify(export: _Export, path: Path, *, asked: bool) -> None:
    from melt_edge.export.verify import verify_file

    try:
        verify_file(export.source, export.config, path, export.report.type, exit_gate=export.exit_gate)
    except BackendUnavailableError as err:
        if asked:
            raise
        export.report.notes.append(f"not compared with the reference: {err}")
        return
    export.report.verified = True


def check_disk(path: Path, needed: int) -> None:
    """Raises: ConfigError if the disk that ``path`` is on has no room for so many bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ConfigError(
            f"{path.parent}: {free / 2**20:.0f} MiB free, the export needs {needed / 2**20:.0f} MiB; "
            "choose another disk"
        )
