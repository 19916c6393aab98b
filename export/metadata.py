"""The metadata keys of an exported GGUF file: what the model is, how to sample from it, where it comes from.

The tokenizer's keys are in tokenizer.py.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from pathlib import Path

from gguf import GGUFWriter

from melt_edge import __version__
from melt_edge.checkpoint import Checkpoint
from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError
from melt_edge.export.tensors import DIRECT_TYPES
from melt_edge.runtime.gguf_keys import GENERAL_KEYS, INTERPRETED_NAMES
from melt_edge.spec import tensor_specs

_SAMPLING_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def add_config(writer: GGUFWriter, config: LoopConfig, *, exit_gate: bool) -> None:
    """Write the keys that say what the model is: sizes, loops, and how its cache is shared."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    arch = config.model_type
    writer.add_uint32(f"{arch}.num_loops", config.num_loops)
    if exit_gate:
        writer.add_float32(f"{arch}.exit_threshold", config.early_exit_threshold)
    if config.shares_kv:
        writer.add_uint32(f"{arch}.chunk_size", config.chunk_size)
        writer.add_string(f"{arch}.kv_gate", config.kv_gate)
        writer.add_string(f"{arch}.kv_gate_init", config.kv_gate_init)


def sampling_values(source: Checkpoint) -> dict[str, float | int]:
    """Sampling defaults of generation_config.json under llama.cpp's names, checked.

    Raises: ConfigError for a value that the check of a GGUF file would refuse once it is written.
    """
    values: dict[str, float | int] = {}
    for key, name in _SAMPLING_KEYS.items():
        value = source.generation_config.get(key)
        if value is None:
            continue
        rule = GENERAL_KEYS[f"sampling.{name}"]
        whole = name == "top_k"
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and rule.in_range(value)
        if not number or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise ConfigError(
                f"{source.path / 'generation_config.json'}: key {key!r} is {value!r:.80}, "
                f"expected {kind} from {rule.range_text}; correct or remove it"
            )
        values[name] = int(value) if whole else float(value)
    return values


def add_sampling(writer: GGUFWriter, source: Checkpoint) -> None:
    """Sampling defaults of generation_config.json under the keys llama.cpp's tools read (see sampling_values)."""
    for name, value in sampling_values(source).items():
        if isinstance(value, int):
            writer.add_int32(f"general.sampling.{name}", value)
        else:
            writer.add_float32(f"general.sampling.{name}", value)


def provenance(source: Checkpoint, sha256: str) -> dict[str, str]:
    """Where a file comes from, no path of the machine that made it. sha256: of the checkpoint's weights."""
    about = {"name": source_name(source.path), "sha256": sha256, "melt_edge": __version__}
    license_name = _license(source.path)
    return {**about, "license": license_name} if license_name else about


def add_provenance(writer: GGUFWriter, source: Checkpoint, config: LoopConfig, type: str, sha256: str) -> list[str]:
    """Write where the file comes from; returns notes on what was changed."""
    about = provenance(source, sha256)
    name = harmless_name(about["name"])
    n_params = sum(math.prod(spec.shape) for spec in tensor_specs(config).values())
    _, file_type = DIRECT_TYPES[type]
    writer.add_name(name)
    writer.add_size_label(f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.3g}M")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    if "license" in about:
        writer.add_license(about["license"])
    writer.add_string("general.source", about["name"])
    writer.add_string("melt_edge.source_sha256", sha256)
    writer.add_string("melt_edge.version", about["melt_edge"])
    writer.add_string("melt_edge.gguf_version", importlib.metadata.version("gguf"))
    if name == about["name"]:
        return []
    return [f"the model is named {name} in the file: llama.cpp takes a model named {about['name']} for another one"]


def harmless_name(name: str) -> str:
    """The name without the words that llama.cpp's tokenizer takes for those of other models."""
    for word, instead in INTERPRETED_NAMES.items():
        name = re.sub(re.escape(word), instead, name, flags=re.IGNORECASE)
    return name


def source_name(path: Path) -> str:
    """A checkpoint folder's name, the model's in the Hugging Face cache."""
    path = path.resolve()
    if path.parent.name == "snapshots":  # the Hugging Face cache: models--owner--name/snapshots/revision
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def _license(folder: Path) -> str | None:
    """The license named in the front matter of the model card, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    front = re.match(r"---\n(.*?)\n---", head, flags=re.DOTALL)
    named = re.search(r"^license:[ \t]*(\S.*)$", front.group(1), flags=re.MULTILINE) if front else None
    return named.group(1).strip().strip("'\"") if named else None
