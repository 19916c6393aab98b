"""What load was asked for, checked against an ONNX folder, and the memory that will take."""

from __future__ import annotations

from melt_edge.config import REAL_LIMITS
from melt_edge.errors import ConfigError
from melt_edge.runtime.base import ModelInfo
from melt_edge.runtime.memory import KV_TYPES, Estimate
from melt_edge.runtime.onnx_folder import OnnxFolder
from melt_edge.runtime.onnx_graphs import has_free_n_ctx
from melt_edge.runtime.options import (
    LoadOptions,
    Settings,
    checked_chunk,
    checked_ctx,
    checked_threads,
    settings_info,
    with_loops,
)
from melt_edge.runtime.ort_loop import ExitRule
from melt_edge.runtime.ort_session import checked_provider
from melt_edge.runtime.text import shown


def resolve_folder(folder: OnnxFolder, options: LoadOptions) -> Settings:
    """The settings for a checked folder. Raises: ConfigError naming an argument that cannot be."""
    trained = folder.config
    config = with_loops(trained, options.loops)
    everything = options.n_ctx is None or (type(options.n_ctx) is int and options.n_ctx == 0)
    n_ctx = checked_ctx(folder.n_ctx if everything else options.n_ctx, trained.max_position_embeddings)
    if n_ctx > folder.n_ctx:
        raise ConfigError(
            f"n_ctx is {n_ctx}, {folder.path} was exported for {folder.n_ctx} tokens; "
            f"export it again with --n-ctx {n_ctx}"
        )
    if not has_free_n_ctx(folder.graphs["loop"].model):
        n_ctx = folder.n_ctx  # the graph's own operators count the rows
    wanted_chunk = checked_chunk(options.chunk_size, trained, n_ctx)
    chunk = min(wanted_chunk, n_ctx)
    if options.kv_type not in (None, folder.kv_type):
        raise ConfigError(
            f"kv_type is {shown(options.kv_type)}, {folder.path} stores its cache in {folder.kv_type}; leave kv_type "
            "out, or export with another --precision"
        )
    for name in ("n_gpu_layers", "flash_attn"):
        value = getattr(options, name)
        if value is not None:
            raise ConfigError(
                f"{name} is {shown(value)}, but only a GGUF file has that choice; leave it out "
                "(an ONNX folder runs where provider says)"
            )
    return Settings(
        trained=trained,
        config=config,
        n_ctx=n_ctx,
        chunk=chunk,
        wanted_chunk=wanted_chunk,
        n_batch=chunk,
        kv_type=folder.kv_type,
        n_threads=checked_threads(options.n_threads),
        n_gpu_layers=None,
        flash_attn=None,
        exit_threshold=_checked_threshold(options.exit_threshold),
        provider=checked_provider(options.provider),
    )


def exit_rule(settings: Settings) -> ExitRule | None:
    """Which loop a token's output is read from, and whether its loops end there.

    The file's own threshold only chooses the output, as in llama.cpp; the argument also ends a MELT's loops.
    """
    trained, asked = settings.trained, settings.exit_threshold
    threshold = trained.early_exit_threshold if asked is None else asked
    if threshold >= 1.0:
        return None
    return ExitRule(threshold, stops=asked is not None and trained.shares_kv)


def estimate_folder(folder: OnnxFolder, settings: Settings) -> Estimate:
    """The bytes of weights, cache and buffers.

    Weights and cache are exact; the buffers are a bound fitted to what onnxruntime's arena grows to: the widest
    states of one chunk, its attention matrix over the whole context, and the tensors between the graphs.
    """
    config, chunk = settings.config, settings.chunk
    value_bytes = KV_TYPES[folder.kv_type][2]
    d, ff = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    width = 6 * d + 3 * ff + 4 * (heads + 2 * config.num_key_value_heads * config.head_dim)
    latents = config.num_hidden_layers if config.has_gate else 0
    states = value_bytes * chunk * (width + (1 + latents) * d)
    attention = 4 * chunk * config.num_attention_heads * settings.n_ctx * 2
    logits = 4 * config.vocab_size
    kv = int(config.kv_bytes_per_token(value_bytes)) * settings.n_ctx
    return Estimate(folder.weights_bytes, kv, states + attention + logits + 32 * 2**20)


def folder_info(folder: OnnxFolder, settings: Settings) -> ModelInfo:
    """What Model.info shows of a folder opened with these settings."""
    return settings_info(folder, settings, name=folder.name, quantisation=folder.precision, backend="onnx")


def _checked_threshold(threshold: float | None) -> float | None:
    if threshold is None:
        return None
    low, high = REAL_LIMITS["early_exit_threshold"]
    ok = isinstance(threshold, int | float) and not isinstance(threshold, bool) and low <= threshold <= high
    if not ok:
        raise ConfigError(f"exit_threshold is {shown(threshold)}, expected a number from {low:g} to {high:g}")
    return float(threshold)
