"""The command line `melt-edge`: one file per group of commands, and the only place that prints.

Nothing here imports torch or llama.cpp before a command needs it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from melt_edge.cli import chat, compare, convert, demo, distill, eval, inspect, quality, run, serve
from melt_edge.cli.errors import MeltGroup
from melt_edge.cli.options import Debug

app = typer.Typer(
    name="melt-edge",
    cls=MeltGroup,
    help=(
        "Looped language models (Ouro, MELT) on a laptop, with a KV cache that does not grow with the loops.\n\n"
        "First steps:\n\n"
        "  melt-edge demo\n"
        "  melt-edge export gguf Ouro-1.4B-Thinking ouro.gguf --type q8_0\n"
        "  melt-edge chat ouro.gguf"
    ),
    epilog="Each command has its own help with examples: melt-edge run --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from melt_edge import __version__

        sys.stdout.write(f"melt-edge {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    debug: Debug = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.add_typer(convert.export_app, name="export")
app.command("quantize")(convert.quantize)
app.command("distill")(distill.distill)
app.command("inspect")(inspect.inspect)
app.command("eval")(eval.evaluate)
app.command("perplexity")(quality.perplexity)
app.command("kl")(quality.kl)
app.command("compare")(compare.compare)


def main() -> None:
    """Run the process's command line and exit."""
    app(prog_name="melt-edge")
