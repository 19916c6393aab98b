"""Streaming an answer to the terminal, and the closing lines about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from melt_edge.cli.console import err, human_bytes, write_text
from melt_edge.errors import ConfigError

if TYPE_CHECKING:
    from melt_edge import Model
    from melt_edge.runtime.base import Completion
    from melt_edge.runtime.generate import TextStream


def start_answer(model: Model, text: str, *, system: str | None, raw: bool, options: dict[str, Any]) -> TextStream:
    """Begin the answer to a prompt: through the file's chat template if it has one, unless ``raw``.

    A cache that holds a loaded state is continued with the text as it is.
    Raises: ConfigError for a system message without a template to put it in.
    """
    if model.tokens:
        return model.stream(text, append=True, **options)
    if raw or not model.has_chat_template:
        if system is not None:
            why = "--raw is given" if raw else f"{model.info.path} has no chat template"
            raise ConfigError(f"--system needs a chat template, but {why}; put the text into the prompt")
        return model.stream(text, **options)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return model.chat_stream([*messages, {"role": "user", "content": text}], **options)


def print_stream(pieces: Iterator[str], written: list[str] | None = None) -> str:
    """Write the pieces as they come and return the whole text; ``written`` has them also when it is cut short.

    A stream computes only while it is read: one left half-way by Ctrl-C or a closed pipe needs no closing.
    """
    written = [] if written is None else written
    for piece in pieces:
        written.append(piece)
        write_text(piece)
    return "".join(written)


def closing_lines(completion: Completion, model: Model) -> None:
    """mlx_lm.generate's three lines, and the cache's, on standard error."""
    timings, memory = completion.timings, model.memory()
    console = err()
    for line in (
        f"Prompt: {timings.prompt_tokens} tokens, {timings.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {timings.decode_tokens} tokens, {timings.decode_tps:.3f} tokens-per-sec",
        f"Peak memory: {peak_memory_bytes(model) / 1e9:.3f} GB",
        f"KV cache: {human_bytes(memory.kv_bytes)} for {model.info.n_ctx} tokens "
        f"({model.info.architecture}, {model.info.num_loops} loops, {model.info.kv_type})",
    ):
        console.print(line, style="dim", soft_wrap=True)


def completion_json(completion: Completion, model: Model) -> dict[str, Any]:
    """One completion as `--json` prints it."""
    info = model.info
    return {
        "text": completion.text,
        "tokens": [int(token) for token in completion.tokens],
        "finish_reason": completion.finish_reason,
        "timings": asdict(completion.timings),
        "memory": {**asdict(model.memory()), "peak_rss_bytes": peak_memory_bytes(model)},
        "model": {
            "path": str(info.path),
            "architecture": info.architecture,
            "num_loops": info.num_loops,
            "chunk_size": info.chunk_size,
            "n_ctx": info.n_ctx,
            "kv_type": info.kv_type,
            "quantisation": info.quantisation,
        },
    }


def peak_memory_bytes(model: Model) -> int:
    """The most memory this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows has no getrusage
        return model.memory().rss_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
