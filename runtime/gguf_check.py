"""The strict check of a GGUF file before llama.cpp sees it.

llama.cpp asserts on many file values, and an assert kills the Python process. Each of those is decided
here from the header and the tensor table; the tensor data is left to llama.cpp's check_tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from melt_edge.config import ARCHITECTURES, DEFAULT_CHUNK_SIZE, LoopConfig
from melt_edge.errors import ConfigError, FormatError, SpecError
from melt_edge.names import gguf_name
from melt_edge.runtime.gguf_file import GGUFInfo, MetaValue, TensorEntry, read_gguf
from melt_edge.runtime.gguf_keys import (
    ARCH_KEYS,
    GENERAL_KEYS,
    INTERPRETED_NAMES,
    MAX_TEMPLATE_BYTES,
    MELT_KEYS,
    ROLE_TYPES,
    TOKENIZER_KEYS,
    KeyRule,
)
from melt_edge.runtime.gguf_vocab import check_vocabulary
from melt_edge.spec import MAX_GAPS_SHOWN, tensor_specs

_EXIT_GATE = ("exit_gate.weight", "exit_gate.bias")
_HEAD = "output.weight"
_T = TypeVar("_T")

__all__ = ["GGUFInfo", "TensorEntry", "check_gguf", "check_vocabulary_gguf", "config_from_gguf", "inspect_gguf"]


def inspect_gguf(path: str | Path) -> GGUFInfo:
    """Header, metadata and tensor table of an ouro or melt file; values are not checked beyond that.

    Raises: FormatError if the file is damaged, is one of several splits, or holds another architecture.
    """
    info = read_gguf(path)
    if info.arch not in ARCHITECTURES:
        arch = repr(info.arch) if info.arch else "unnamed"
        raise FormatError(
            f"{path}: key 'general.architecture': this is a model of the architecture {arch}; "
            f"melt-edge runs {' and '.join(ARCHITECTURES)}, use llama.cpp for this file"
        )
    n_splits = info.metadata.get("split.count", 0)
    if n_splits not in (0, 1):
        raise FormatError(
            f"{path}: key 'split.count' is {n_splits!r}: the model is cut into several files; "
            "join them with llama.cpp's llama-gguf-split --merge"
        )
    return info


def check_gguf(path: str | Path) -> GGUFInfo:
    """The file's header and tensor table, if llama.cpp can load it without harm.

    Raises: FormatError for a damaged file or a key that does not belong; ConfigError for a value that
        the architecture cannot have; SpecError listing every tensor that is missing, surplus or wrong.
    """
    info = inspect_gguf(path)
    _check_tensors(info, _check_metadata(info))
    return info


def check_vocabulary_gguf(path: str | Path) -> tuple[GGUFInfo, LoopConfig]:
    """A file that holds a configuration and a tokenizer but no weights, as an ONNX folder has it.

    The configuration says nothing of a tied head. Raises: as check_gguf.
    """
    info = inspect_gguf(path)
    if info.tensors:
        raise FormatError(f"{path}: has {len(info.tensors)} tensors, expected a tokenizer alone; export it again")
    return info, _check_metadata(info)


def _check_metadata(info: GGUFInfo) -> LoopConfig:
    """Every key and the vocabulary; returns the configuration they describe."""
    for key in info.metadata:
        _check_key(info, key)
    for key, rule in _rules(info.arch).items():
        if rule.required and key not in info.metadata:
            raise FormatError(f"{info.path}: key {key!r} is missing; export the file again")
    _check_name(info)
    config = config_from_gguf(info)
    check_vocabulary(info, config.vocab_size)
    return config


def config_from_gguf(info: GGUFInfo) -> LoopConfig:
    """The configuration a file describes.

    Raises: FormatError for a missing or mistyped key; ConfigError for values outside what the runtimes
        support, or that contradict each other.
    """
    arch, tensors = info.arch, {tensor.name for tensor in info.tensors}

    def size(key: str, default: int | None = None) -> int:
        return _get(info, f"{arch}.{key}", int, default)

    def real(key: str, default: float | None = None) -> float:
        # 7 digits: the decimal number that was in config.json, not its float32 neighbour.
        return float(f"{_get(info, f'{arch}.{key}', float, default):.7g}")

    tokens = _get(info, "tokenizer.ggml.tokens", list, None)
    n_embd, n_head = size("embedding_length"), size("attention.head_count")
    default_head_dim = n_embd // n_head if n_head else 0
    head_dim = size("attention.key_length", default_head_dim)
    _same(info, "attention.value_length", size("attention.value_length", default_head_dim), "the key length", head_dim)
    _same(info, "rope.dimension_count", size("rope.dimension_count", head_dim), "the head size", head_dim)
    _same(info, "vocab_size", size("vocab_size", len(tokens)), "the number of tokens", len(tokens))
    is_melt = arch == "melt"
    try:
        return LoopConfig(
            model_type=arch,
            hidden_size=n_embd,
            num_hidden_layers=size("block_count"),
            num_attention_heads=n_head,
            num_key_value_heads=size("attention.head_count_kv", n_head),
            head_dim=head_dim,
            intermediate_size=size("feed_forward_length"),
            vocab_size=len(tokens),
            num_loops=size("num_loops"),
            rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
            rope_theta=real("rope.freq_base"),
            max_position_embeddings=size("context_length"),
            tie_word_embeddings=_HEAD not in tensors,
            early_exit_threshold=real("exit_threshold", 1.0),
            bos_token_id=_get(info, "tokenizer.ggml.bos_token_id", int, -1) if _has(info, "bos") else None,
            eos_token_id=_get(info, "tokenizer.ggml.eos_token_id", int, -1) if _has(info, "eos") else None,
            pad_token_id=_get(info, "tokenizer.ggml.padding_token_id", int, -1) if _has(info, "padding") else None,
            kv_gate=_get(info, "melt.kv_gate", str, None) if is_melt else "none",
            kv_gate_init=_get(info, "melt.kv_gate_init", str, "zeros") if is_melt else "zeros",
            chunk_size=size("chunk_size", DEFAULT_CHUNK_SIZE) if is_melt else DEFAULT_CHUNK_SIZE,
        )
    except ConfigError as err:
        raise ConfigError(f"{info.path}: {_gguf_words(arch, str(err))}") from None


# LoopConfig speaks of config.json's keys; a message about a GGUF file must name the GGUF key.
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "total_ut_steps": "num_loops",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "early_exit_threshold": "exit_threshold",
    "vocab_size": "vocab_size",
    "chunk_size": "chunk_size",
    "kv_gate": "kv_gate",
    "kv_gate_init": "kv_gate_init",
}
_GGUF_TOKEN_KEYS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def _gguf_words(arch: str, message: str) -> str:
    for key, name in _GGUF_KEYS.items():
        message = message.replace(f"key {key!r}", f"key '{arch}.{name}'")
    for key, name in _GGUF_TOKEN_KEYS.items():
        message = message.replace(f"key {key!r}", f"key 'tokenizer.ggml.{name}'")
    return message


def _has(info: GGUFInfo, name: str) -> bool:
    return f"tokenizer.ggml.{name}_token_id" in info.metadata


def _get(info: GGUFInfo, key: str, kind: type[_T], default: _T | None) -> _T:
    value = info.metadata.get(key, default)
    if value is None:
        raise FormatError(f"{info.path}: key {key!r} is missing; export the file again")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{info.path}: key {key!r} is {_show(value)}, expected {kind.__name__}")
    return value


def _same(info: GGUFInfo, key: str, found: int, what: str, expected: int) -> None:
    if found != expected:
        raise ConfigError(f"{info.path}: key '{info.arch}.{key}' is {found}, expected {expected} ({what})")


def _rules(arch: str) -> dict[str, KeyRule]:
    rules = {f"{arch}.{name}": rule for name, rule in ARCH_KEYS.items()}
    if arch == "melt":
        rules.update({f"melt.{name}": rule for name, rule in MELT_KEYS.items()})
    rules.update({f"general.{name}": rule for name, rule in GENERAL_KEYS.items()})
    rules.update(TOKENIZER_KEYS)
    return rules


def _check_key(info: GGUFInfo, key: str) -> None:
    rule = _rules_of(info.arch).get(key)
    if rule is not None:
        _check_value(info, key, rule)
    elif key.startswith("tokenizer.chat_template."):  # named templates: tool_use, rag
        _check_value(info, key, TOKENIZER_KEYS["tokenizer.chat_template"])
    elif key.startswith((f"{info.arch}.", "xielu.")):
        # llama.cpp's model saver writes every key it knows; "off" is what these architectures have anyway.
        if not _is_off(info.metadata[key]):
            raise FormatError(
                f"{info.path}: key {key!r} is {_show(info.metadata[key])}: "
                f"{info.arch} has no such feature, the file would not run as meant"
            )
    elif key.startswith(("general.", "melt_edge.", "quantize.")):
        is_harmless = not info.types[key].startswith("arr[") or info.types[key] == "arr[str]"
        if not is_harmless or key.startswith("general.tensor_extra."):
            raise FormatError(
                f"{info.path}: key {key!r} is {info.types[key]}, expected a scalar, a text or a list of texts"
            )
    elif not key.startswith("split."):  # split.count <= 1 was checked: the others then have no meaning
        raise FormatError(f"{info.path}: key {key!r} does not belong into an {info.arch} file; export it again")
    if key.startswith("tokenizer.chat_template"):
        _check_template(info, key)


_RULES = {arch: _rules(arch) for arch in ARCHITECTURES}


def _rules_of(arch: str) -> Mapping[str, KeyRule]:
    return _RULES[arch]


def _check_value(info: GGUFInfo, key: str, rule: KeyRule) -> None:
    value, type_name = info.metadata[key], info.types[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number if rule.type == "number" else type_name == rule.type):
        raise FormatError(f"{info.path}: key {key!r} is {type_name} {_show(value)}, expected {rule.type}")
    if rule.choices is not None:
        if value not in rule.choices:
            choices = " or ".join(map(_show, rule.choices))
            raise ConfigError(f"{info.path}: key {key!r} is {_show(value)}, expected {choices}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not rule.in_range(value):
        raise ConfigError(f"{info.path}: key {key!r} is {value}, expected {rule.range_text}")


def _check_template(info: GGUFInfo, key: str) -> None:
    value = info.metadata[key]
    texts = value if isinstance(value, list) else [value]
    n_bytes = sum(len(str(text).encode()) for text in texts)
    if n_bytes > MAX_TEMPLATE_BYTES:
        raise FormatError(f"{info.path}: key {key!r} has {n_bytes} bytes, expected at most {MAX_TEMPLATE_BYTES}")


def _check_name(info: GGUFInfo) -> None:
    name = str(info.metadata.get("general.name", "")).lower()
    for word in INTERPRETED_NAMES:
        if word in name:
            raise ConfigError(
                f"{info.path}: key 'general.name' contains {word!r}, "
                "from which llama.cpp derives another tokenizer; export the checkpoint again, which writes another name"
            )


def _check_tensors(info: GGUFInfo, config: LoopConfig) -> None:
    """Names, shapes and types against the configuration; all gaps in one SpecError."""
    found = {tensor.name: tensor for tensor in info.tensors}
    specs = {gguf_name(name): spec for name, spec in tensor_specs(config).items()}
    if not any(name in found for name in _EXIT_GATE):  # both or none: files without are valid
        for name in _EXIT_GATE:
            del specs[name]
    gaps = [f"{name}: missing, expected shape {list(spec.shape)}" for name, spec in specs.items() if name not in found]
    for name, tensor in found.items():
        if name not in specs:
            gaps.append(f"{name}: not a tensor of {info.arch} with this configuration")
            continue
        spec = specs[name]
        if _trimmed(tensor.shape) != _trimmed(spec.shape):
            gaps.append(f"{name}: shape {list(tensor.shape)}, expected {list(spec.shape)}")
        if tensor.type not in ROLE_TYPES[spec.role]:
            gaps.append(f"{name}: type {tensor.type}, expected one of {', '.join(ROLE_TYPES[spec.role])}")
    if gaps:
        shown = gaps[:MAX_GAPS_SHOWN]
        if len(gaps) > len(shown):
            shown.append(f"... and {len(gaps) - len(shown)} more")
        raise SpecError(f"{info.path}: {len(gaps)} tensor(s) do not match the metadata:\n  " + "\n  ".join(shown))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without leading ones: ggml pads to four dimensions and writes only those that count."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _is_off(value: MetaValue) -> bool:
    if isinstance(value, list):
        return all(item in (0, False) for item in value)
    return value in (0, False)


def _show(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
