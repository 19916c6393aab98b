"""`melt-edge export` and `melt-edge quantize`: from a checkpoint to what runs, from a file to a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from melt_edge.cli.console import Stopwatch, human_bytes, note, out, progress_bar, row, safe
from melt_edge.cli.describe import describe_gguf
from melt_edge.cli.options import Debug, Force, model_file
from melt_edge.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from melt_edge.export.gguf import ExportReport
    from melt_edge.export.onnx import OnnxReport

export_app = typer.Typer(help="Write a checkpoint as what runs: gguf, onnx.", no_args_is_help=True)


@export_app.callback()
def _export() -> None:
    pass


CheckpointFolder = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="Folder with config.json, *.safetensors and tokenizer.json, as Hugging Face lays it out.",
    ),
]
ShareKV = Annotated[
    bool,
    typer.Option("--share-kv", help="Write an Ouro with one cache row for all loops: 1/T of the cache, some loss."),
]
TrainedChunk = Annotated[
    int | None,
    typer.Option(
        "--chunk-size",
        metavar="N",
        min=1,
        show_default=False,
        help="Prompt tokens per chunk, for a MELT or --share-kv. (default: the checkpoint's, else 500)",
    ),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        show_default=False,
        help="Compare the file with the PyTorch reference. (default: below 100 M parameters)",
    ),
]


def _checked_type(name: str) -> str:
    """Callback of TYPE. Raises: BadParameter, which is a wrong command line, for a type that cannot be made."""
    from melt_edge.export.quantize import check_type

    try:
        return check_type(name)
    except ConfigError as err:
        raise typer.BadParameter(str(err)) from None


def _checked_precision(name: str) -> str:
    """Callback of PRECISION. Raises: BadParameter for one that there is not."""
    from melt_edge.export.onnx import PRECISIONS

    if name.lower() not in PRECISIONS:
        raise typer.BadParameter(f"precision is {name!r}, expected one of {', '.join(PRECISIONS)}")
    return name.lower()


@export_app.command("gguf")
def export_gguf(
    checkpoint: CheckpointFolder,
    output: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The GGUF file to write.")],
    file_type: Annotated[
        str,
        typer.Option(
            "--type",
            "-t",
            metavar="TYPE",
            callback=_checked_type,
            help="f32, f16, bf16, q8_0, q4_0, or a K-quant: q4_k_m, q5_k_m, q6_k ...",
        ),
    ] = "f16",
    share_kv: ShareKV = False,
    chunk_size: TrainedChunk = None,
    exit_gate: Annotated[
        bool,
        typer.Option("--exit-gate/--no-exit-gate", help="Keep the exit gate; without it other llama.cpp builds agree."),
    ] = True,
    verify: Verify = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Convert an Ouro or MELT checkpoint to a GGUF file.

    The checkpoint is checked in full before anything is written, and the file
    appears under its name only when it is complete. Tokenizer and chat
    template travel inside. 8-bit (q8_0) keeps the quality; 4-bit costs some,
    because its error is applied once per loop.

    Examples:

      melt-edge export gguf Ouro-1.4B-Thinking ouro.gguf --type q8_0
      melt-edge export gguf Ouro-1.4B-Thinking small.gguf --share-kv
      melt-edge export gguf my-melt melt.gguf --type q4_k_m
    """
    from melt_edge.export.gguf import export_gguf as write_gguf

    _check_folder(checkpoint)
    watch = Stopwatch()
    with progress_bar() as progress:
        report = write_gguf(
            checkpoint,
            output,
            type=file_type,
            share_kv=share_kv,
            chunk_size=chunk_size,
            exit_gate=exit_gate,
            verify=verify,
            force=force,
            progress=progress,
        )
    _written(Path(report.path), watch)
    _checked(report)
    out().print(f"Next: melt-edge chat {escape(safe(str(report.path)))}", soft_wrap=True)


@export_app.command("onnx")
def export_onnx(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            show_default=False,
            help="A checkpoint folder as Hugging Face lays it out; or a float GGUF file, or ouro-tiny.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT_DIR", show_default=False, help="The folder to write.")],
    precision: Annotated[
        str,
        typer.Option(
            "--precision", "-p", metavar="TYPE", callback=_checked_precision, help="fp32, fp16, int8 or int4."
        ),
    ] = "fp32",
    n_ctx: Annotated[
        int | None,
        typer.Option(
            "--n-ctx",
            "-c",
            metavar="N",
            min=1,
            show_default=False,
            help="Tokens the K/V state has room for. (default: the model's context, up to 4096)",
        ),
    ] = None,
    share_kv: ShareKV = False,
    chunk_size: TrainedChunk = None,
    layout: Annotated[
        str,
        typer.Option("--layout", metavar="NAME", help="loop-step, or genai: whole decoders for onnxruntime-genai."),
    ] = "loop-step",
    loops: Annotated[
        str | None,
        typer.Option(
            "--loops",
            metavar="LIST",
            show_default=False,
            help="With --layout genai, numbers of loops to write a decoder for. (default: 1,2,4 and the trained one)",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            metavar="N",
            show_default=False,
            help="Values that share a scale in int8 and int4: 16, 32, 64, 128 or 256. (default: 32)",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            show_default=False,
            help="Whether blocks of int8 and int4 have no zero point of their own. (default: symmetric)",
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            "--accuracy-level",
            metavar="N",
            show_default=False,
            help="How int8 and int4 products compute: 0 or 1 in float32, 4 with activations in int8. (default: 4)",
        ),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Also write graphs with no symbolic dimension, for NPU compilers.")
    ] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="Use the operators of the ONNX standard alone (opset 24); slower.")
    ] = False,
    verify: Verify = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Convert an Ouro or MELT checkpoint to ONNX graphs for one loop step.

    The folder holds the graphs of the embedding, of one pass over the layers
    and of the head, their weights in one file, the tokenizer, and
    melt_edge.json, which describes them. A runtime runs the loop's graph as
    often as it wants, with the K/V state bound in place.

    Examples:

      melt-edge export onnx Ouro-1.4B-Thinking ouro-onnx --precision int4
      melt-edge export onnx my-melt melt-onnx --precision fp16 --n-ctx 8192
      melt-edge export onnx ouro-tiny tiny-onnx --share-kv --n-ctx 512
      melt-edge export onnx my-melt melt-genai --layout genai --loops 1,2,4
    """
    from melt_edge.export.genai import export_genai
    from melt_edge.export.onnx import export_onnx as write_onnx

    own = _layout_options(layout, loops=loops, portable=portable, static=static)
    watch = Stopwatch()
    with _folder(checkpoint) as folder, progress_bar() as progress:
        report = (export_genai if layout == "genai" else write_onnx)(
            folder,
            output,
            precision=precision,
            n_ctx=n_ctx,
            share_kv=share_kv,
            chunk_size=chunk_size,
            block_size=block_size,
            symmetric=symmetric,
            accuracy_level=accuracy_level,
            verify=verify,
            force=force,
            progress=progress,
            **own,
        )
    out().print(
        f"[bold green]wrote[/] [bold]{escape(safe(str(report.path)))}[/] in {watch.seconds:.1f} s", soft_wrap=True
    )
    row("size", human_bytes(report.bytes))
    row("K/V state", f"{human_bytes(report.state_bytes)} for {report.n_ctx} tokens")
    _checked(report)


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", show_default=False, help="A GGUF file, f32, f16 or bf16.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The GGUF file to write.")],
    file_type: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            show_default=False,
            callback=_checked_type,
            help="q8_0, q6_k, q5_k_m, q4_k_m, q4_0 ...",
        ),
    ],
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Also take a file that is quantised already; loses quality.")
    ] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Make a smaller GGUF file from a larger one, with llama.cpp's quantizer.

    Examples:

      melt-edge quantize ouro-f16.gguf ouro-q4_k_m.gguf q4_k_m
      melt-edge quantize ouro-f16.gguf ouro-q8_0.gguf q8_0 --force
    """
    from melt_edge.export.quantize import quantize_gguf

    watch = Stopwatch()
    with progress_bar() as progress:
        written = quantize_gguf(
            model_file(source),
            output,
            file_type,
            force=force,
            allow_requantize=allow_requantize,
            progress=progress,
        )
    _written(Path(written), watch)


def _layout_options(layout: str, *, loops: str | None, portable: bool, static: bool) -> dict[str, Any]:
    """The options that one layout alone has. Raises: ConfigError for another layout's, or an unknown layout."""
    if layout == "loop-step":
        if loops is not None:
            raise ConfigError(
                f"--loops is {loops!r} without --layout genai; the loop-step layout runs any number of loops"
            )
        return {"portable": portable, "static": static}
    if layout != "genai":
        raise ConfigError(f"--layout is {layout!r}, expected loop-step or genai")
    for option, given in (("--portable", portable), ("--static", static)):
        if given:
            raise ConfigError(f"{option} was given with --layout genai, which has no such graphs; drop one of them")
    if loops is None:
        return {}
    counts = [part.strip() for part in loops.split(",")]
    if not all(part.isascii() and part.isdigit() for part in counts):
        raise ConfigError(f"--loops is {loops!r}, expected numbers with commas between them, such as 1,2,4")
    return {"loops": [int(part) for part in counts]}


@contextmanager
def _folder(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint folder, or what a float GGUF file or a shipped model unpacks to."""
    if checkpoint.is_dir():
        yield checkpoint
        return
    if not checkpoint.exists() and (len(checkpoint.parts) > 1 or checkpoint.suffix):
        raise FormatError(f"{checkpoint}: no such file or folder; expected a checkpoint folder or a float .gguf file")
    from melt_edge.export.from_gguf import unpacked_gguf

    with unpacked_gguf(model_file(checkpoint)) as folder:
        yield folder


def _check_folder(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        hint = "is a file" if checkpoint.exists() else "no such folder"
        raise FormatError(f"{checkpoint}: {hint}; expected a checkpoint folder with config.json and *.safetensors")


def _checked(report: ExportReport | OnnxReport) -> None:
    """Print whether what was written was compared with the reference, and the notes."""
    row("verified", "yes, against the PyTorch reference" if report.verified else "no")
    for text in report.notes:
        note(text)


def _written(path: Path, watch: Stopwatch) -> None:
    found = describe_gguf(path)
    out().print(f"[bold green]wrote[/] [bold]{escape(safe(str(path)))}[/] in {watch.seconds:.1f} s", soft_wrap=True)
    row("size", f"{human_bytes(found['file_bytes'])}, {found['bits_per_weight']} bits per weight")
    if "kv_cache" in found:
        cache, model = found["kv_cache"], found["model"]
        here = human_bytes(cache["bytes_per_token"]["f16"])
        if cache["shared_between_loops"]:
            other = f"Ouro with {model['num_loops']} loops: {human_bytes(cache['per_loop']['bytes_per_token'])}"
        else:
            other = f"with --share-kv: {human_bytes(cache['shared']['bytes_per_token'])}"
        row("KV cache", f"{here} per token in f16 ({other})")
