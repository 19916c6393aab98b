"""`melt-edge inspect`: what a model file or a checkpoint folder is, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from melt_edge.cli.console import human_bytes, human_count, out, print_json, row, safe
from melt_edge.cli.describe import describe
from melt_edge.cli.options import Debug, Json, model_file
from melt_edge.errors import FormatError


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", show_default=False, help="A GGUF file, an ONNX or checkpoint folder, or melt-tiny."
        ),
    ],
    as_json: Json = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor as well.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a model file is: sizes, loops, cache, tokenizer, provenance.

    Reads headers only, so a large file takes no longer than a small one. Of a
    checkpoint folder every tensor's name, shape and type is checked against
    config.json; of an ONNX folder everything but the weights' contents. Exit
    code 1 if melt-edge would refuse the file. With --json a value that is no
    finite number is the text "inf", "-inf" or "nan".

    Examples:

      melt-edge inspect ouro.gguf
      melt-edge inspect Ouro-1.4B-Thinking/
      melt-edge inspect ouro.gguf --json | jq .kv_cache
    """
    found = describe(path if path.exists() else model_file(path))
    if as_json:
        print_json(found if tensors else {key: value for key, value in found.items() if key != "tensors"})
    else:
        _show(found)
        if tensors:
            _show_tensors(found["tensors"])
    if not found["check"]["ok"]:
        raise FormatError(found["check"]["error"])


def _show(found: dict[str, Any]) -> None:
    kind = {"gguf": "GGUF file", "onnx": "ONNX folder", "checkpoint": "checkpoint folder"}[found["kind"]]
    out().print(f"[bold]{escape(safe(found['path']))}[/]  {kind}", soft_wrap=True)
    row("architecture", found["architecture"] or "not said")
    if found["name"]:
        row("name", found["name"])
    mix = ", ".join(f"{entry['tensors']} {name}" for name, entry in found["types"].items())
    row("parameters", f"{human_count(found['parameters'])} ({found['parameters']:,})")
    row("weights", f"{human_bytes(found['file_bytes'])}, {found['bits_per_weight']} bits per weight")
    row("tensors", f"{found['quantisation']}: {mix}" if found["quantisation"] and "," in mix else mix)
    if "model" in found:
        _show_model(found["model"])
        _show_cache(found)
    tokenizer = found["tokenizer"]
    if tokenizer["model"]:
        name = "/".join(part for part in (tokenizer["model"], tokenizer.get("pre")) if part)
        ends = f"bos {tokenizer['bos_token_id']}, eos {tokenizer['eos_token_id']}"
        row("tokenizer", f"{name}, {tokenizer['tokens']} tokens, {ends}")
    else:
        row("tokenizer", "none")
    row("chat template", "yes" if found["chat_template"] else "no")
    for key, value in found["provenance"].items():
        row(key, value)


def _show_model(model: dict[str, Any]) -> None:
    row("layers", f"{model['layers']} layers x {model['num_loops']} loops")
    row(
        "shape",
        f"hidden {model['hidden_size']}, feed-forward {model['intermediate_size']}, heads {model['heads']} "
        f"(KV {model['kv_heads']}) x {model['head_dim']}, vocabulary {model['vocab_size']}"
        + (", tied head" if model["tied_head"] else ""),
    )
    if model["kv_gate"] is not None:
        start = f", starts from {model['kv_gate_init']}" if model["kv_gate_init"] else ""
        row("KV gate", f"{model['kv_gate']}{start}")
        row("chunk size", f"{model['chunk_size']} tokens")
    row("exit gate", f"threshold {model['exit_threshold']:g}" if model["exit_gate"] else "none")
    row("context", f"{model['n_ctx_train']} tokens")


def _show_cache(found: dict[str, Any]) -> None:
    cache = found["kv_cache"]
    if cache["shared_between_loops"]:
        here, there, remark = "shared", "per_loop", "if each loop kept its own rows, as Ouro does"
    else:
        here, there, remark = "per_loop", "shared", "with one row for all loops (export with --share-kv)"
    row(f"KV cache {cache['type']}", _cache_line(cache[here], cache["n_ctx"]), style="bold")
    row("", f"{_cache_line(cache[there], cache['n_ctx'])} {remark}")


def _cache_line(cache: dict[str, float], n_ctx: int) -> str:
    each, full = human_bytes(cache["bytes_per_token"]), human_bytes(cache["bytes_at_n_ctx"])
    return f"{each} per token, {full} at {n_ctx} tokens"


def _show_tensors(tensors: list[dict[str, Any]]) -> None:
    console = out()
    width = max((len(tensor["name"]) for tensor in tensors), default=0)
    for tensor in tensors:
        shape = " x ".join(str(size) for size in tensor["shape"])
        line = f"  {tensor['name']:<{width}}  {tensor['type']:<6}  {shape:<14}  {human_bytes(tensor['bytes'])}"
        console.print(escape(safe(line)), soft_wrap=True)
