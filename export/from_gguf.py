"""A float GGUF file -> the checkpoint folder it was made from, so that other exporters can read it.

The way back of gguf.py for what it writes as f32, f16 or bf16; quantised files have lost what a checkpoint holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from melt_edge.checkpoint import save_checkpoint
from melt_edge.config import LoopConfig
from melt_edge.errors import FormatError
from melt_edge.export.tokenizer import PRE_TOKENIZERS
from melt_edge.names import checkpoint_name
from melt_edge.runtime.gguf_check import GGUFInfo, TensorEntry, check_gguf, config_from_gguf
from melt_edge.spec import tensor_specs
from melt_edge.weights import STORAGE, FloatArray, to_float32

_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@contextmanager
def unpacked_gguf(path: str | Path) -> Iterator[Path]:
    """The checkpoint folder of a GGUF file, named as the file and removed afterwards. Raises: as below."""
    with tempfile.TemporaryDirectory(prefix="melt-edge-") as folder:
        yield checkpoint_from_gguf(path, Path(folder) / Path(path).stem)


def checkpoint_from_gguf(path: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Write a float GGUF file as a float32 checkpoint folder: configuration, weights, tokenizer, chat template.

    Raises: FormatError for a file that is damaged, quantised, or has another tokenizer than the exporter writes;
    SpecError if a tensor is missing, as the exit gate may be; ConfigError if ``out`` exists and ``force`` is false.
    """
    info = check_gguf(path)
    quantised = [tensor for tensor in info.tensors if tensor.type not in STORAGE]
    if quantised:
        raise FormatError(
            f"{path}: tensor {quantised[0].name} is stored as {quantised[0].type}, expected F32, F16 or BF16; "
            "export from the checkpoint or from a float file"
        )
    config = config_from_gguf(info)
    tokenizer = _tokenizer(info)
    tokens = info.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)  # checked by check_gguf
    named = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    tokenizer_config: dict[str, Any] = {f"{role}_token": tokens[i] for role, i in named.items() if i is not None}
    tokenizer_config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    if "tokenizer.chat_template" in info.metadata:
        tokenizer_config["chat_template"] = info.metadata["tokenizer.chat_template"]
    sampling = {}
    for name, key in _SAMPLING.items():
        value = info.metadata.get(f"general.sampling.{name}")
        if isinstance(value, int | float):  # 7 digits: the decimal number, not its float32 neighbour
            sampling[key] = float(f"{value:.7g}") if isinstance(value, float) else value
    return save_checkpoint(
        out,
        config,
        _Tensors(info, config),
        tokenizer_json=tokenizer.to_str(),
        tokenizer_config=tokenizer_config,
        generation_config=sampling or None,
        force=force,
    )


class _Tensors(Mapping[str, FloatArray]):
    """A file's tensors by checkpoint name, each read when it is asked for."""

    def __init__(self, info: GGUFInfo, config: LoopConfig) -> None:
        self._info = info
        self._entries: dict[str, TensorEntry] = {checkpoint_name(tensor.name): tensor for tensor in info.tensors}
        self._specs = tensor_specs(config)

    def __getitem__(self, name: str) -> FloatArray:
        entry = self._entries[name]
        raw = np.fromfile(
            self._info.path, STORAGE[entry.type][0], entry.n_values, offset=self._info.data_offset + entry.offset
        )
        return to_float32(raw, entry.type).reshape(self._specs[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _tokenizer(info: GGUFInfo) -> Tokenizer:
    """The tokenizer that splits as llama.cpp does with these keys."""
    meta: Mapping[str, Any] = info.metadata
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    steps = {name: (shape, ignores) for shape, (name, ignores) in PRE_TOKENIZERS.items()}
    pre = meta["tokenizer.ggml.pre"]
    if pre not in steps:
        raise FormatError(f"{info.path}: key 'tokenizer.ggml.pre' is {pre!r}, expected one of {', '.join(steps)}")
    shape, ignore_merges = steps[pre]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_step(name) for name in shape])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    if meta.get("tokenizer.ggml.add_bos_token"):
        bos = tokens[meta["tokenizer.ggml.bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def _step(name: str) -> Any:
    """A pre-tokenizer step by its word in PRE_TOKENIZERS; any other word is the regular expression to split with."""
    if name == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if name == "gpt2-regex":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "bytes":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Split(Regex(name), "isolated")
