"""What load was asked for, checked against the file: the settings a backend opens a model with."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from melt_edge.config import MAX_LOOPS, MAX_SLOTS, LoopConfig
from melt_edge.errors import ConfigError
from melt_edge.runtime.base import ModelInfo
from melt_edge.runtime.gguf_check import GGUFInfo, config_from_gguf
from melt_edge.runtime.machine import usable_cores
from melt_edge.runtime.memory import KV_TYPES, Estimate, estimate
from melt_edge.runtime.text import shown

if TYPE_CHECKING:
    from melt_edge.runtime.onnx_folder import OnnxFolder

logger = logging.getLogger(__name__)

# A context as long as the file allows can need more memory than the weights: the default stops here.
DEFAULT_MAX_CTX = 4096
DEFAULT_KV_TYPE = "f16"
# Prompt tokens per call of the library, in whole chunks; also ouro's chunk, llama.cpp's usual n_ubatch.
DEFAULT_BATCH = 512


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of load as given; None stands for the default."""

    n_ctx: int | None = None
    chunk_size: int | None = None
    loops: int | None = None
    kv_type: str | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    flash_attn: bool | None = None
    exit_threshold: float | None = None
    provider: str | None = None


@dataclass(frozen=True)
class Settings:
    """The checked values a model is opened with.

    trained: the file's configuration; config: the same with the loops asked for. chunk: never more than
    n_ctx; wanted_chunk: the same before that limit. n_batch: prompt tokens per call of the library, a
    multiple of chunk. n_gpu_layers: None leaves it to the backend. exit_threshold: the argument, where given.
    provider: onnxruntime's, for an ONNX folder.
    """

    trained: LoopConfig
    config: LoopConfig
    n_ctx: int
    chunk: int
    wanted_chunk: int
    n_batch: int
    kv_type: str
    n_threads: int
    n_gpu_layers: int | None
    flash_attn: bool | None
    exit_threshold: float | None = None
    provider: str | None = None


def resolve(file: GGUFInfo, options: LoadOptions) -> Settings:
    """The settings for a checked file. Raises: ConfigError naming an argument that cannot be."""
    trained = config_from_gguf(file)
    config = with_loops(trained, options.loops)
    n_ctx = checked_ctx(options.n_ctx, trained.max_position_embeddings)
    wanted_chunk = checked_chunk(options.chunk_size, trained, n_ctx)
    chunk = min(wanted_chunk, n_ctx)
    kv_type = DEFAULT_KV_TYPE if options.kv_type is None else options.kv_type
    _check_kv(kv_type, config.head_dim, options.flash_attn)
    if options.n_gpu_layers is not None:
        whole("n_gpu_layers", options.n_gpu_layers, -1, 2**31 - 1)
    for name in ("exit_threshold", "provider"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{name} is {shown(getattr(options, name))}, but llama.cpp runs every loop and chooses its devices "
                "itself; leave it out, or load an ONNX folder"
            )
    return Settings(
        trained=trained,
        config=config,
        n_ctx=n_ctx,
        chunk=chunk,
        wanted_chunk=wanted_chunk,
        n_batch=chunk * max(1, min(DEFAULT_BATCH, n_ctx) // chunk),
        kv_type=kv_type,
        n_threads=checked_threads(options.n_threads),
        n_gpu_layers=options.n_gpu_layers,
        flash_attn=options.flash_attn,
    )


def estimate_file(file: GGUFInfo, settings: Settings) -> Estimate:
    """The bytes a file will need when opened with these settings."""
    return estimate(
        file,
        settings.config,
        n_ctx=settings.n_ctx,
        n_ubatch=settings.chunk,
        n_batch=settings.n_batch,
        kv_type=settings.kv_type,
        flash_attn=settings.flash_attn is not False,
    )


def model_info(file: GGUFInfo, settings: Settings, *, backend: str) -> ModelInfo:
    """What Model.info shows of a file opened with these settings."""
    by_type: Counter[str] = Counter()
    for tensor in file.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            by_type[tensor.type] += tensor.nbytes
    name = file.metadata.get("general.name")
    return settings_info(
        file,
        settings,
        name=name if isinstance(name, str) else file.path.stem,
        quantisation=by_type.most_common(1)[0][0].lower(),
        backend=backend,
    )


def settings_info(
    source: GGUFInfo | OnnxFolder, settings: Settings, *, name: str, quantisation: str, backend: str
) -> ModelInfo:
    """What Model.info shows, for every backend."""
    config, trained = settings.config, settings.trained
    return ModelInfo(
        architecture=config.model_type,
        path=source.path,
        name=name,
        n_params=source.n_params,
        file_bytes=source.file_bytes,
        num_loops=config.num_loops,
        trained_loops=trained.num_loops,
        chunk_size=settings.chunk,
        trained_chunk_size=trained.chunk_size if trained.shares_kv else None,
        kv_gate=config.kv_gate,
        kv_gate_init=config.kv_gate_init,
        n_ctx=settings.n_ctx,
        n_ctx_train=config.max_position_embeddings,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_head_kv=config.num_key_value_heads,
        head_dim=config.head_dim,
        n_embd=config.hidden_size,
        n_vocab=config.vocab_size,
        quantisation=quantisation,
        kv_type=settings.kv_type,
        n_threads=settings.n_threads,
        backend=backend,
        provider=settings.provider,
        exit_threshold=settings.exit_threshold,
    )


def with_loops(trained: LoopConfig, loops: int | None) -> LoopConfig:
    """The configuration with the loops asked for. Raises: ConfigError if it cannot run so many."""
    if loops is None:
        return trained
    config = trained.with_loops(whole("loops", loops, 1, *_most_loops(trained)))
    if loops != trained.num_loops:
        logger.warning(
            "running with %d loops a model trained with %d: expect worse text, fewer loops first",
            loops,
            trained.num_loops,
        )
    return config


def _most_loops(trained: LoopConfig) -> tuple[int, str]:
    """The most loops this model can run, and the reason where that is fewer than any model can."""
    slots = MAX_SLOTS // trained.num_hidden_layers
    if trained.shares_kv or slots >= MAX_LOOPS:
        return MAX_LOOPS, ""
    return slots, f"{MAX_SLOTS} layer slots in llama.cpp / {trained.num_hidden_layers} layers"


def checked_ctx(n_ctx: int | None, n_ctx_train: int) -> int:
    """The tokens a conversation can hold; None and 0 as load has them. Raises: ConfigError."""
    if n_ctx is None:
        return min(n_ctx_train, DEFAULT_MAX_CTX)
    n_ctx = whole("n_ctx", n_ctx, 0, 2**31 - 1) or n_ctx_train
    if n_ctx > n_ctx_train:
        logger.warning(
            "n_ctx is %d, the model was trained for %d tokens: text may derail past those", n_ctx, n_ctx_train
        )
    return n_ctx


def checked_chunk(chunk_size: int | None, trained: LoopConfig, n_ctx: int) -> int:
    """The tokens computed together as asked for, before the limit n_ctx. Raises: ConfigError."""
    if chunk_size is not None:
        return whole("chunk_size", chunk_size, 1, n_ctx, "n_ctx")
    return trained.chunk_size if trained.shares_kv else DEFAULT_BATCH


def _check_kv(kv_type: str, head_dim: int, flash_attn: bool | None) -> None:
    if not isinstance(kv_type, str) or kv_type not in KV_TYPES:
        raise ConfigError(f"kv_type is {shown(kv_type)}, expected one of {', '.join(KV_TYPES)}")
    if not isinstance(flash_attn, bool | None):
        raise ConfigError(f"flash_attn is {shown(flash_attn)}, expected True, False or None")
    block = KV_TYPES[kv_type][1]
    if head_dim % block:
        raise ConfigError(
            f"kv_type {kv_type!r} needs a head size divisible by {block}, this model's is {head_dim}; use 'f16'"
        )
    if block > 1 and flash_attn is False:
        raise ConfigError(f"kv_type {kv_type!r} needs flash attention; leave flash_attn at None or use kv_type 'f16'")


def checked_threads(n_threads: int | None) -> int:
    """The threads to compute with. Raises: ConfigError."""
    return usable_cores() if n_threads is None else whole("n_threads", n_threads, 1, 512)


def whole(name: str, value: object, low: int, high: int, high_name: str = "") -> int:
    """The value, if it is a whole number from low to high. Raises: ConfigError naming the argument."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        limit = f"{high_name} = {high}" if high_name else str(high)
        raise ConfigError(f"{name} is {shown(value)}, expected a whole number from {low} to {limit}")
    return value
