"""Options that several commands share, and what they mean to the library."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melt_edge.cli.console import status
from melt_edge.cli.errors import want_debug
from melt_edge.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from melt_edge import Model

_MODEL, _SAMPLING = "Model", "Sampling"


def option(*names: str, panel: str | None = None, show: bool = False, **more: Any) -> Any:
    """A typer option in one of the help's panels; its default is shown only if asked, most are None."""
    return typer.Option(*names, rich_help_panel=panel, show_default=show, **more)


def check_kv_type(name: str | None) -> str | None:
    """Callback of --kv-type. Raises: BadParameter, which is a wrong command line, for a type there is not."""
    from melt_edge.runtime.memory import KV_TYPES

    if name is not None and name not in KV_TYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(KV_TYPES)}")
    return name


Debug = Annotated[
    bool,
    option("--debug", callback=want_debug, is_eager=True, help="Show a traceback when something fails."),
]
Force = Annotated[bool, option("--force", "-f", help="Overwrite the output if it exists.")]
Json = Annotated[bool, option("--json", help="Print one JSON object on standard output, nothing else.")]
System = Annotated[str | None, option("--system", metavar="TEXT", help="System message of the chat template.")]

ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A GGUF file or ONNX folder of an Ouro or MELT, or melt-tiny."
    ),
]
Loops = Annotated[
    int | None,
    option(
        "--loops",
        metavar="N",
        min=1,
        max=64,
        panel=_MODEL,
        help="Passes over the layers, 1 to 64. (default: the file's, as trained)",
    ),
]
ChunkSize = Annotated[
    int | None,
    option(
        "--chunk-size",
        metavar="N",
        min=1,
        panel=_MODEL,
        help="Prompt tokens per chunk; a MELT's result depends on it. (default: the file's, as trained)",
    ),
]
NCtx = Annotated[
    int | None,
    option(
        "--n-ctx",
        "-c",
        metavar="N",
        min=0,
        panel=_MODEL,
        help="Tokens the KV cache has room for; 0: all the model knows. (default: that, up to 4096)",
    ),
]
KvType = Annotated[
    str | None,
    option(
        "--kv-type",
        metavar="TYPE",
        panel=_MODEL,
        callback=check_kv_type,
        help="Type of the KV cache: f32, f16, q8_0 or q4_0. (default: f16; an ONNX folder's own)",
    ),
]
Threads = Annotated[
    int | None,
    option("--threads", "-t", metavar="N", min=1, panel=_MODEL, help="CPU threads. (default: one per physical core)"),
]
GpuLayers = Annotated[
    int | None,
    option(
        "--n-gpu-layers",
        metavar="N",
        min=-1,
        panel=_MODEL,
        help="Layers on the GPU, -1 for all. (default: all with Metal, else 0)",
    ),
]
ExitThreshold = Annotated[
    float | None,
    option(
        "--exit-threshold",
        metavar="P",
        min=1e-5,
        max=1.0,
        panel=_MODEL,
        help="ONNX: end a MELT's loops once its exit gate adds up to P. (default: never)",
    ),
]
Provider = Annotated[
    str | None,
    option(
        "--provider",
        metavar="NAME",
        panel=_MODEL,
        help="ONNX: where it runs, cpu, coreml, dml, cuda or qnn. (default: cpu)",
    ),
]
MaxTokens = Annotated[
    int,
    option("--max-tokens", "-n", metavar="N", min=1, panel=_SAMPLING, show=True, help="Stop after so many tokens."),
]
Temperature = Annotated[
    float | None,
    option(
        "--temperature",
        "--temp",
        metavar="X",
        min=0.0,
        panel=_SAMPLING,
        help="0 always takes the likeliest token. (default of this and the next: the file's)",
    ),
]
TopK = Annotated[
    int | None, option("--top-k", metavar="K", min=0, panel=_SAMPLING, help="Keep the k likeliest; 0 keeps all.")
]
TopP = Annotated[
    float | None,
    option("--top-p", metavar="P", min=0.0, max=1.0, panel=_SAMPLING, help="Keep the likeliest that add up to p."),
]
MinP = Annotated[
    float | None,
    option("--min-p", metavar="P", min=0.0, max=1.0, panel=_SAMPLING, help="Drop those below p times the likeliest."),
]
RepeatPenalty = Annotated[
    float | None,
    option("--repeat-penalty", metavar="X", min=0.01, panel=_SAMPLING, help="Above 1 makes repeats less likely."),
]
Seed = Annotated[
    int | None,
    option(
        "--seed",
        metavar="N",
        min=0,
        max=2**32 - 2,
        panel=_SAMPLING,
        help="The same seed gives the same text. (default: another each time)",
    ),
]
Stop = Annotated[
    list[str] | None,
    option("--stop", metavar="TEXT", panel=_SAMPLING, help="End at this text; may be repeated."),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those left out keep the library's or the file's default."""
    return {name: value for name, value in options.items() if value is not None}


def is_onnx(path: Path) -> bool:
    """True for a folder that melt-edge export onnx wrote."""
    from melt_edge.runtime.onnx_folder import is_onnx_folder

    return is_onnx_folder(path)


def model_path(path: Path) -> Path:
    """The path of a model file or an ONNX folder, or of the shipped model of that name.

    Raises: FormatError that says what to do if it is none of them.
    """
    return path if is_onnx(path) else model_file(path)


def model_file(path: Path) -> Path:
    """The path of a model file, or of the shipped model of that name.

    Raises: FormatError that says what to do if it is neither.
    """
    if path.is_dir():
        if is_onnx(path):
            raise FormatError(f"{path}: is an ONNX folder, this command takes a .gguf file")
        if (path / "config.json").is_file():
            target = f"{path.resolve().name}.gguf"
            raise FormatError(
                f"{path}: is a checkpoint folder, not a model file; write one with: "
                f"melt-edge export gguf {path} {target} --type q8_0"
            )
        raise FormatError(f"{path}: is a folder, expected a .gguf file or one that melt-edge export onnx wrote")
    if path.exists():
        return path
    if len(path.parts) == 1 and not path.suffix:
        from melt_edge.models import shipped_model_path

        with suppress(ConfigError):
            return shipped_model_path(path.name)
    raise FormatError(
        f"{path}: no such file; expected a .gguf file written by melt-edge export gguf, or melt-tiny, or ouro-tiny"
    )


def check_new_file(path: Path) -> None:
    """Raises: ConfigError for a file to write at the end that could not be written now, before the work begins."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists already and is not overwritten; choose another path")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; create {path.parent} first")


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of a file the user named. Raises: ConfigError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read as {what} ({err.strerror or err})") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: {what} is not UTF-8 text ({err})") from err


def open_model(path: Path, **options: Any) -> Model:
    """Load a model with the options that were given, with a spinner on a terminal."""
    import melt_edge

    path = model_path(path)
    with status(f"loading {path.name}"):
        return melt_edge.load(path, **given(**options))
