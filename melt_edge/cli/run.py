"""`melt-edge run`: one prompt, one answer, streamed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from melt_edge.cli.console import print_json, show_library_warnings, write_text
from melt_edge.cli.generation import closing_lines, completion_json, print_stream, start_answer
from melt_edge.cli.options import (
    ChunkSize,
    Debug,
    ExitThreshold,
    GpuLayers,
    Json,
    KvType,
    Loops,
    MaxTokens,
    MinP,
    ModelPath,
    NCtx,
    Provider,
    RepeatPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    check_new_file,
    given,
    open_model,
    option,
    read_text,
)
from melt_edge.errors import ConfigError

_GRAMMAR_PANEL = "Shape of the answer"
_STATE_PANEL = "State"


def run(
    model: ModelPath,
    prompt: Annotated[
        str | None,
        option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from standard input."),
    ] = None,
    file: Annotated[Path | None, option("--file", metavar="FILE", help="Read the prompt from this file.")] = None,
    system: System = None,
    raw: Annotated[bool, option("--raw", help="Continue the text as it is, without the file's chat template.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    grammar: Annotated[
        Path | None,
        option("--grammar", metavar="FILE", panel=_GRAMMAR_PANEL, help="GBNF grammar file."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        option("--json-schema", metavar="FILE", panel=_GRAMMAR_PANEL, help="JSON schema file to answer in."),
    ] = None,
    n_ctx: NCtx = None,
    loops: Loops = None,
    chunk_size: ChunkSize = None,
    kv_type: KvType = None,
    threads: Threads = None,
    n_gpu_layers: GpuLayers = None,
    exit_threshold: ExitThreshold = None,
    provider: Provider = None,
    load_state: Annotated[
        Path | None,
        option(
            "--load-state",
            metavar="FILE",
            panel=_STATE_PANEL,
            help="Continue a saved state; the prompt is added as it is.",
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        option("--save-state", metavar="FILE", panel=_STATE_PANEL, help="Save the state at the end; never overwrites."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, streaming.

    The text goes to standard output; speed and memory go to standard error.
    The prompt is put into the file's chat template if it has one, unless --raw.

    Examples:

      melt-edge run ouro.gguf -p "What is 12 + 30?"
      melt-edge run ouro.gguf --raw -p "Once upon a time" -n 100 --temp 0.8
      cat article.txt | melt-edge run melt.gguf -p - --loops 4
      melt-edge run melt.gguf -p "Two primes" --json-schema s.json --json
    """
    show_library_warnings()
    if load_state is not None and system is not None:
        raise typer.BadParameter("--system cannot go with --load-state: the saved state has its system message already")
    if save_state is not None:
        check_new_file(save_state)
    text = _prompt_text(prompt, file)
    options = given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        stop=stop or None,
        grammar=read_text(grammar, "a grammar") if grammar is not None else None,
        json_schema=read_text(json_schema, "a JSON schema") if json_schema is not None else None,
    )
    with open_model(
        model,
        n_ctx=n_ctx,
        loops=loops,
        chunk_size=chunk_size,
        kv_type=kv_type,
        n_threads=threads,
        n_gpu_layers=n_gpu_layers,
        exit_threshold=exit_threshold,
        provider=provider,
    ) as loaded:
        if load_state is not None:
            loaded.load_state(load_state)
        stream = start_answer(loaded, text, system=system, raw=raw, options=options)
        if as_json:
            print_json(completion_json(stream.result(), loaded))
        else:
            print_stream(stream)
            write_text("\n")
            closing_lines(stream.completion, loaded)
        if save_state is not None:
            loaded.save_state(save_state)


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise typer.BadParameter("give either --prompt or --file, not both")
    if file is not None:
        return read_text(file, "a prompt")
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("a prompt is missing: give -p TEXT, --file FILE, or pipe one in")
    if prompt is None or prompt == "-":
        try:
            return sys.stdin.read()
        except UnicodeDecodeError as err:
            raise ConfigError(f"standard input is not {sys.stdin.encoding} text ({err})") from err
    return prompt
