"""`melt-edge serve`: an OpenAI-compatible server, through llama-cpp-python's own."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape

from melt_edge.cli.console import err, human_bytes, safe, show_library_warnings
from melt_edge.cli.options import (
    ChunkSize,
    Debug,
    GpuLayers,
    KvType,
    Loops,
    ModelPath,
    NCtx,
    Threads,
    is_onnx,
    model_file,
    open_model,
    option,
)
from melt_edge.errors import BackendUnavailableError, ConfigError, FormatError

if TYPE_CHECKING:
    from melt_edge import Model

# Ctrl-C waits this long for answers that are being written.
_GRACE_SECONDS = 3

Host = Annotated[
    str, option("--host", metavar="ADDRESS", show=True, help="Address to listen on; 0.0.0.0 lets other machines in.")
]
Port = Annotated[
    int, option("--port", metavar="N", min=0, max=65535, show=True, help="Port to listen on; 0 takes a free one.")
]
Alias = Annotated[str | None, option("--alias", metavar="NAME", help="Name in /v1/models. (default: the file's)")]
ApiKey = Annotated[
    str | None, option("--api-key", metavar="KEY", envvar="MELT_EDGE_API_KEY", help="Ask requests for this key.")
]


def serve(
    model: ModelPath,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    alias: Alias = None,
    api_key: ApiKey = None,
    n_ctx: NCtx = None,
    loops: Loops = None,
    chunk_size: ChunkSize = None,
    kv_type: KvType = None,
    threads: Threads = None,
    n_gpu_layers: GpuLayers = None,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients: chat completions, completions, models.

    One request is answered at a time. Ctrl-C stops the server.

    Examples:

      melt-edge serve ouro.gguf --port 8080
      curl localhost:8080/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'
    """
    show_library_warnings()
    if is_onnx(model):
        raise FormatError(
            f"{model}: is an ONNX folder, which serve cannot run: its server is llama.cpp's and takes a .gguf file; "
            "write one with: melt-edge export gguf CHECKPOINT OUT.gguf"
        )
    path = model_file(model)
    _require_server()
    listener = _listen(host, port)
    with (
        listener,
        open_model(
            path,
            n_ctx=n_ctx,
            loops=loops,
            chunk_size=chunk_size,
            kv_type=kv_type,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
        ) as loaded,
    ):
        app = make_app(loaded, alias=alias or path.stem, api_key=api_key)
        address = f"http://{_url_host(host)}:{listener.getsockname()[1]}"
        console = err()
        console.print(f"[bold green]serving[/] {escape(safe(str(path)))} at [bold]{address}/v1[/]", soft_wrap=True)
        console.print(
            f"{loaded.info.num_loops} loops, {loaded.info.n_ctx} tokens of context, "
            f"KV cache {human_bytes(loaded.memory().kv_bytes)}; Ctrl-C stops",
            style="dim",
            soft_wrap=True,
        )
        import uvicorn

        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS)
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has shut down
            uvicorn.Server(config).run(sockets=[listener])
        console.print("stopped", style="dim")


def make_app(model: Model, *, alias: str, api_key: str | None = None) -> Any:
    """The ASGI application that answers with this model.

    The server makes its own Llama from its settings; it gets ours instead, so that every check, the
    loops, the chunk size and the memory budget are those of `melt_edge.load`.
    """
    from llama_cpp.server import app as server
    from llama_cpp.server.model import LlamaProxy
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    from melt_edge.cli.serve_checks import request_check

    class LoadedModel(LlamaProxy):
        """A proxy of one model that is loaded already."""

        @staticmethod
        def load_llama_from_model_settings(settings: ModelSettings) -> Any:
            return model.llama

        def __call__(self, name: str | None = None) -> Any:
            """The one model, whatever name a request gives.

            A MELT's result depends on how the tokens were cut into chunks: reusing the rows of the
            request before would make the same request give another answer.
            """
            if model.info.architecture == "melt":
                model.llama.reset()
            return model.llama

        def free(self) -> None:
            """Nothing to free: `serve` closes the model."""

    # create_app names its proxy class by this module-level name and offers no other way in.
    original = server.LlamaProxy
    server.LlamaProxy = LoadedModel  # type: ignore[misc]
    try:
        app = server.create_app(
            server_settings=ServerSettings(api_key=api_key, interrupt_requests=False),
            model_settings=[ModelSettings(model=str(model.info.path), model_alias=alias)],
        )
    finally:
        server.LlamaProxy = original  # type: ignore[misc]
    app.dependency_overrides[server.authenticate] = request_check(model)
    return app


def _require_server() -> None:
    from melt_edge.runtime.library import import_llama_cpp

    import_llama_cpp()
    try:
        import llama_cpp.server.app  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as err:
        raise BackendUnavailableError(
            f'serve needs the package {err.name!r}, which is not installed; run: pip install "melt-edge[server]"'
        ) from err


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # whoever is told the address can connect at once
    except OSError as err:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({err.strerror or err}); choose another address with --host and --port"
        ) from err
    return listener


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
