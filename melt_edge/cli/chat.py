"""`melt-edge chat`: a conversation, one question per line."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from melt_edge.cli.console import err, error_line, human_bytes, out, show_library_warnings
from melt_edge.cli.generation import print_stream
from melt_edge.cli.options import (
    ChunkSize,
    Debug,
    ExitThreshold,
    GpuLayers,
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
    given,
    open_model,
)
from melt_edge.errors import MeltError

if TYPE_CHECKING:
    from melt_edge import Model

HELP = """\
/help           this list
/reset          forget the conversation
/system TEXT    set the system message and forget the conversation
/info           the model, its loops and its cache
/exit           leave (so do Ctrl-D and Ctrl-C)

Ctrl-C while an answer is written stops that answer."""


@dataclass
class Conversation:
    """The messages so far. A question whose answer failed is taken back, so that the next one can be asked."""

    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """System message, if any, then the turns."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, model: Model, question: str, options: dict[str, Any]) -> None:
        """Stream the answer to a question and keep both; on Ctrl-C what was written so far is kept."""
        self.turns.append({"role": "user", "content": question})
        written: list[str] = []
        try:
            print_stream(model.chat_stream(self.messages, **options), written)
        except KeyboardInterrupt:
            err().print("\n[dim](stopped)[/]", end="")
        finally:
            if written:
                self.turns.append({"role": "assistant", "content": "".join(written)})
            else:
                self.turns.pop()


def chat(
    model: ModelPath,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    n_ctx: NCtx = None,
    loops: Loops = None,
    chunk_size: ChunkSize = None,
    kv_type: KvType = None,
    threads: Threads = None,
    n_gpu_layers: GpuLayers = None,
    exit_threshold: ExitThreshold = None,
    provider: Provider = None,
    debug: Debug = False,
) -> None:
    """Talk with a model, several turns.

    Ctrl-C stops an answer, Ctrl-D or /exit leaves, /help lists the commands.
    With standard input from a pipe each line is a question.

    Examples:

      melt-edge chat ouro.gguf
      melt-edge chat melt.gguf --temp 0 --system "Answer in one sentence."
      printf 'What is 2 + 3?\\nAnd 4 + 4?\\n' | melt-edge chat melt-tiny
    """
    show_library_warnings()
    options = given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        stop=stop or None,
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
        if sys.stdin.isatty():
            _show_info(loaded)
            err().print("[dim]/help lists the commands, Ctrl-D leaves[/]")
        _converse(loaded, Conversation(system), options)


def _converse(model: Model, conversation: Conversation, options: dict[str, Any]) -> None:
    while True:
        try:
            line = _read_line()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                out().print()
            return
        question = line.strip()
        if question.startswith("/"):
            if not _command(model, conversation, question):
                return
        elif question:
            try:
                conversation.ask(model, question, options)
                out().print()
            except MeltError as failure:
                error_line(f"{failure} (/reset starts anew)")


def _command(model: Model, conversation: Conversation, line: str) -> bool:
    """Carry out a /command; False if it was /exit."""
    name, _, text = line.partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/reset":
        conversation.turns.clear()
        model.reset()
        err().print("[dim]forgotten[/]")
    elif name == "/system":
        conversation.system = text.strip() or None
        conversation.turns.clear()
        model.reset()
        err().print("[dim]system message set, conversation forgotten[/]")
    elif name == "/info":
        _show_info(model)
    else:
        if name != "/help":
            error_line(f"no command {name}; these are there:")
        err().print(HELP)
    return True


def _read_line() -> str:
    """The next line of standard input, with a prompt and line editing on a terminal.

    Raises: EOFError at the end of the input.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (its import gives input() history and editing)
        return input(">>> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _show_info(model: Model) -> None:
    info, memory = model.info, model.memory()
    err().print(
        f"[bold]{info.architecture}[/] {info.quantisation}, {info.num_loops} loops, "
        f"{info.n_ctx} tokens of context, weights {human_bytes(memory.weights_bytes)}, "
        f"KV cache {human_bytes(memory.kv_bytes)}",
        soft_wrap=True,
    )
