"""What the quality commands take in: the text, one or two models with their settings, one vocabulary."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melt_edge.cli.console import status
from melt_edge.cli.options import model_path, open_model
from melt_edge.errors import ConfigError

if TYPE_CHECKING:
    from melt_edge import Model
    from melt_edge.quality.windows import Windows
    from melt_edge.runtime.header import ModelHeader

DEFAULT_CTX = 512
# The tokenizer counts bytes in 31 bits, and makes up to one token of each.
MAX_TEXT_BYTES = 2**30


@dataclass(frozen=True)
class Settings:
    """One side of a measurement: a checked model and how to run it; None is its own."""

    header: ModelHeader
    loops: int | None
    chunk_size: int | None
    kv_type: str | None
    share_kv: bool


def settings(
    model: Path, *, loops: int | None, chunk_size: int | None, kv_type: str | None, share_kv: bool
) -> Settings:
    """Read a model's header. Raises: FormatError, SpecError or ConfigError for a file that cannot run."""
    from melt_edge.runtime.header import read_header

    header = read_header(model_path(model))
    if share_kv and header.backend == "onnx":
        raise ConfigError(f"{header.path}: --share-kv rewrites a GGUF file; export the folder with --share-kv instead")
    return Settings(header, loops, chunk_size, kv_type, share_kv)


def window_size(wanted: int | None, *sides: Settings) -> int:
    """Tokens per window. Raises: ConfigError if a model was trained, or exported, for fewer than wanted."""
    header = min((side.header for side in sides), key=lambda each: each.most_ctx)
    most = header.most_ctx
    if wanted is None:
        return min(DEFAULT_CTX, most)
    if wanted > most:
        made = "trained" if most == header.config.max_position_embeddings else "exported"
        raise ConfigError(
            f"{header.path}: --ctx is {wanted}, but the model was {made} for {most} tokens; use --ctx {most} or less"
        )
    return wanted


@contextmanager
def opened(side: Settings, *, n_ctx: int, n_threads: int | None) -> Iterator[Model]:
    """The loaded model of one side; one that shares its cache runs from a temporary copy of the file."""
    path = side.header.path
    with ExitStack() as stack:
        if side.share_kv:
            from melt_edge.export.share_kv import share_kv_gguf

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="melt-edge-"))
            with status(f"writing {path.name} with one cache row for all loops"):
                path = share_kv_gguf(path, Path(folder) / f"{path.stem}-shared.gguf")
        model = open_model(
            path,
            n_ctx=n_ctx,
            loops=side.loops,
            chunk_size=side.chunk_size,
            kv_type=side.kv_type,
            n_threads=n_threads,
        )
        yield stack.enter_context(model)


def settings_json(side: Settings, model: Model) -> dict[str, Any]:
    """One side as ``--json`` prints it."""
    info = model.info
    return {
        "path": str(side.header.path),
        "architecture": info.architecture,
        "share_kv": side.share_kv,
        "num_loops": info.num_loops,
        "chunk_size": info.chunk_size,
        "kv_type": info.kv_type,
        "quantisation": info.quantisation,
        "n_threads": info.n_threads,
    }


def settings_line(side: Settings, model: Model) -> str:
    """One side in a line for people."""
    info = model.info
    layout = "shared" if info.architecture == "melt" else "per loop"
    return (
        f"{side.header.path.name}: {info.architecture}, {info.quantisation}, {info.num_loops} loops, "
        f"chunk {info.chunk_size}, cache {info.kv_type} {layout}"
    )


def check_same_vocabulary(model: ModelHeader, base: ModelHeader) -> None:
    """Raises: ConfigError with the first difference, if a token id stands for another text in each."""
    here, there = model.tokens, base.tokens
    advice = "only models of one vocabulary can be compared"
    if len(here) != len(there):
        raise ConfigError(f"{model.path}: has {len(here)} tokens, {base.path} has {len(there)}; {advice}")
    for token, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        if mine != theirs:
            raise ConfigError(f"{model.path}: token {token} is {mine!r}, in {base.path} it is {theirs!r}; {advice}")


def read_bytes(source: str) -> bytes:
    """The bytes of a text file, or of standard input for ``-``.

    Raises: ConfigError if it cannot be read, is empty, too large, or no UTF-8.
    """
    name = _name(source)
    try:
        if source == "-":
            data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            with open(source, "rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as err:
        raise ConfigError(f"{name}: cannot be read as a text ({err.strerror or err})") from err
    if not data:
        raise ConfigError(f"{name}: is empty, expected a text of some thousand words")
    if len(data) > MAX_TEXT_BYTES:
        raise ConfigError(f"{name}: is longer than {MAX_TEXT_BYTES // 2**20} MiB; measure a part of it")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{name}: is not UTF-8 text ({err})") from err
    return data


def windows_of(
    data: bytes, model: Model, *, n_ctx: int, stride: int | None, parse_special: bool, source: str
) -> Windows:
    """The tokens of a text read from ``source``, in windows. Raises: ConfigError if it is shorter than one."""
    from melt_edge.quality.windows import cut_windows

    with status("cutting the text into tokens"):
        tokens = model.tokenize(data, add_special=False, parse_special=parse_special)
        bos = _first_token(model)
        if bos is not None:
            tokens.insert(0, bos)
    return cut_windows(tokens, n_ctx, stride=stride, bos=bos, source=_name(source))


def _first_token(model: Model) -> int | None:
    """The token that this model's texts begin with, if any."""
    plain, begun = model.tokenize("a", add_special=False), model.tokenize("a")
    return begun[0] if begun[: len(plain)] != plain else None


def _name(source: str) -> str:
    return "standard input" if source == "-" else source
