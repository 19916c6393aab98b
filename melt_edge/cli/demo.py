"""`melt-edge demo`: the two shipped models answer questions: an Ouro, and the MELT distilled from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from melt_edge.cli.console import human_bytes, human_count, out, show_library_warnings, write_text
from melt_edge.cli.options import Debug, Threads
from melt_edge.models import SHIPPED_MODEL, SHIPPED_TEACHER, shipped_model_path
from melt_edge.models.demo_questions import DEMO_QUESTIONS

if TYPE_CHECKING:
    from melt_edge import Model


@dataclass
class _Side:
    """One of the two models: how its cache is laid out, and its decode speed so far."""

    name: str
    model: Model
    tokens: int = 0
    seconds: float = 0.0

    def answer(self, question: str, max_tokens: int) -> None:
        """Stream the answer to a question on one line."""
        out().print(f"  [cyan]{self.name:<11}[/]", end="")
        stream = self.model.chat_stream([{"role": "user", "content": question}], temperature=0.0, max_tokens=max_tokens)
        for piece in stream:
            write_text(piece.replace("\n", " "))
        write_text("\n")
        timings = stream.completion.timings
        if timings.decode_tps > 0:
            self.tokens += timings.decode_tokens
            self.seconds += timings.decode_tokens / timings.decode_tps

    @property
    def decode_tps(self) -> float:
        """Tokens per second over all answers."""
        return self.tokens / self.seconds if self.seconds else 0.0


def demo(
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", metavar="TEXT", show_default=False, help="Ask this instead; may be repeated."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Stop an answer after so many tokens.")
    ] = 60,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """See it work: the two small models that come with melt-edge answer questions.

    Each question is answered twice: by ouro-tiny, with a cache row for every
    loop, and by melt-tiny, distilled from it, with one row that all loops
    share. Then the bytes of the two caches, as the library reports them.

    Examples:

      melt-edge demo
      melt-edge demo -q "What is 40 + 2?" -q "Who are you?"
    """
    import melt_edge

    show_library_warnings()
    # So small a model loses more by waiting for a second thread than it gains.
    n_threads = threads or 1
    with (
        melt_edge.load(shipped_model_path(SHIPPED_TEACHER), n_threads=n_threads) as ouro,
        melt_edge.load(shipped_model_path(SHIPPED_MODEL), n_threads=n_threads) as melt,
    ):
        sides = (_Side("Ouro", ouro), _Side("MELT", melt))
        _introduce(ouro, melt)
        for text in question or tuple(DEMO_QUESTIONS):
            out().print(f"\n[bold]{'Q':<13}[/]", end="")
            write_text(text + "\n")
            for side in sides:
                side.answer(text, max_tokens)
        _compare(sides)
    out().print(
        f"\nNext: [bold]melt-edge chat {SHIPPED_MODEL}[/], or with a checkpoint of your own:\n"
        "      [bold]melt-edge export gguf Ouro-1.4B-Thinking ouro.gguf --type q8_0[/]"
    )


def _introduce(ouro: Model, melt: Model) -> None:
    info = ouro.info
    out().print(
        f"[bold]{SHIPPED_TEACHER}[/], {human_count(info.n_params)} parameters: {info.n_layer} layers, "
        f"run {info.num_loops} times, a cache row for each loop.\n"
        f"[bold]{SHIPPED_MODEL}[/], {human_count(melt.info.n_params)} parameters: distilled from it, "
        "one cache row for all loops."
    )


def _compare(sides: tuple[_Side, _Side]) -> None:
    n_ctx = sides[0].model.info.n_ctx
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("KV cache")
    table.add_column(f"bytes at {n_ctx} tokens", justify="right")
    table.add_column("", justify="right")
    table.add_column("per token", justify="right")
    table.add_column("tokens/s", justify="right")
    for side in sides:
        kv_bytes = side.model.memory().kv_bytes
        table.add_row(
            "one row per loop (Ouro)" if side is sides[0] else "one row for all (MELT)",
            f"{kv_bytes:,}",
            human_bytes(kv_bytes),
            human_bytes(kv_bytes / n_ctx),
            f"{side.decode_tps:.0f}",
        )
    console = out()
    console.print()
    console.print(table)
    ratio = sides[0].model.memory().kv_bytes / sides[1].model.memory().kv_bytes
    console.print(
        f"[bold green]{ratio:.3g} times less cache[/] for {sides[0].model.info.num_loops} loops. "
        "The model card beside the files says\nhow often each of them is right."
    )
