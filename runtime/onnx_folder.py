"""An ONNX folder as melt-edge export onnx writes it: its manifest, every file it names, and the graphs, checked.

Nothing here runs a graph or imports onnxruntime; what comes out may be given to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from melt_edge.config import LoopConfig, read_json_object
from melt_edge.errors import FormatError
from melt_edge.runtime.gguf_check import check_vocabulary_gguf
from melt_edge.runtime.gguf_file import GGUFInfo
from melt_edge.runtime.gguf_keys import GENERAL_KEYS
from melt_edge.runtime.onnx_files import (
    MAX_SMALL_BYTES,
    FileEntry,
    FloatRange,
    check_weights,
    checked_file,
    read_checked,
)
from melt_edge.runtime.onnx_graphs import CheckedGraph, Port, check_graph, expected_ports
from melt_edge.runtime.text import shown
from melt_edge.spec import tensor_specs

MANIFEST_NAME = "melt_edge.json"
VOCABULARY_NAME = "tokenizer.gguf"
FORMAT_VERSION = 1
GRAPHS = ("embed", "loop", "head")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
# Types of states and cache rows, by the names load and memory use.
FLOAT_TYPES = {"float32": "f32", "float16": "f16"}
_WEIGHTS_SUFFIXES = (".bin", ".onnx.data")
_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_FILES = 256


@dataclass(frozen=True)
class OnnxFolder:
    """A folder whose files are those that its manifest describes.

    config: as trained; tie_word_embeddings has no meaning. n_ctx: rows of the exported K/V state. activations:
    numpy's name of the type of states. graphs: by name, with their serialised bytes in ``graph_bytes``.
    """

    path: Path
    manifest: Mapping[str, Any]
    config: LoopConfig
    vocabulary: GGUFInfo
    n_ctx: int
    precision: str
    activations: str
    kv_type: str
    graphs: Mapping[str, CheckedGraph]
    graph_bytes: Mapping[str, bytes]
    weights: Path
    weights_entry: FileEntry
    digest: str
    file_bytes: int

    def check_weights(self) -> None:
        """Compare the weights' digest and look for NaN in them, once for each file (onnx_files.check_weights).

        Raises: FormatError.
        """
        floats = {
            (weight.offset, weight.length): FloatRange(weight.name, weight.dtype, weight.offset, weight.length)
            for graph in self.graphs.values()
            for weight in graph.weights
            if weight.dtype in FLOAT_TYPES
        }
        tables = {name: hashlib.sha256(data).hexdigest() for name, data in self.graph_bytes.items()}
        check_weights(self.weights, self.weights_entry, list(floats.values()), tables=tables)

    @property
    def name(self) -> str:
        """The checkpoint's name, or the folder's."""
        source = self.manifest.get("source")
        name = source.get("name") if isinstance(source, dict) else None
        return name if isinstance(name, str) and name else self.path.resolve().name

    @property
    def n_params(self) -> int:
        """Weights of the model; each physical tensor counts once, however often it is run."""
        total = sum(math.prod(spec.shape) for spec in tensor_specs(self.config).values())
        return total + (0 if self.is_tied else self.config.vocab_size * self.config.hidden_size)

    @property
    def is_tied(self) -> bool:
        """True if the head reads the embedding's table."""
        return not any(weight.name.startswith("lm_head.") for weight in self.graphs["head"].weights)

    @property
    def metadata(self) -> dict[str, Any]:
        """The vocabulary's keys and the sampling defaults, under GGUF's names."""
        sampling = {f"general.sampling.{key}": value for key, value in self.manifest["sampling"].items()}
        return {**self.vocabulary.metadata, **sampling}

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights the three graphs hold; a table that two of them read counts twice."""
        return sum(weight.length for graph in self.graphs.values() for weight in graph.weights)


def is_onnx_folder(path: Path) -> bool:
    """True for a folder with a manifest, whatever it says."""
    return path.is_dir() and (path / MANIFEST_NAME).exists()


def open_folder(path: Path) -> OnnxFolder:
    """The folder at ``path``, every file of it but the weights' contents compared with the manifest.

    Raises: FormatError or ConfigError naming the file and what is wrong; BackendUnavailableError without onnx.
    """
    return _Reader(path).read()


class _Reader:
    """Reads one folder; every failure names the manifest."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise FormatError(f"{path}: is no folder, expected one that melt-edge export onnx wrote")
        self.path = path
        self.source = path / MANIFEST_NAME
        if not self.source.exists():
            hint = "is a checkpoint" if (path / "config.json").is_file() else "has no melt_edge.json"
            raise FormatError(
                f"{path}: {hint}, not an ONNX folder; write one with: melt-edge export onnx CHECKPOINT OUT_DIR"
            )
        size = self.source.lstat().st_size
        checked_file(path, MANIFEST_NAME, FileEntry(size, ""), source=self.source)
        self.keys = read_json_object(self.source, max_bytes=_MAX_MANIFEST_BYTES)

    def fail(self, message: str) -> NoReturn:
        raise FormatError(f"{self.source}: {message}; export the folder again")

    def get(self, key: str, *kinds: type) -> Any:
        if key not in self.keys:
            self.fail(f"key {key!r} is missing")
        return self.kind(key, self.keys[key], *kinds)

    def kind(self, key: str, value: Any, *kinds: type) -> Any:
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            self.fail(f"key {key!r} is {shown(value)}, expected {names}")
        return value

    def read(self) -> OnnxFolder:
        if self.keys.get("layout") == "genai":
            raise FormatError(
                f"{self.path}: is a folder for onnxruntime-genai, which runs it as it is (examples/genai); for "
                "melt-edge export the model again without --layout genai"
            )
        version = self.get("format_version", int)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{self.source}: has format version {version}, this melt-edge reads {FORMAT_VERSION}; "
                "export the folder again or install the melt-edge that wrote it"
            )
        entries = self.files()
        files = {name: checked_file(self.path, name, entry, source=self.source) for name, entry in entries.items()}
        weights_name = self.weights_name(entries)
        data = {
            name: read_checked(files[name], entry)
            for name, entry in entries.items()
            if name != weights_name and (entry.size <= MAX_SMALL_BYTES or name.endswith(".onnx"))
        }
        if VOCABULARY_NAME not in files:
            self.fail(f"lists no {VOCABULARY_NAME}")
        vocabulary, config = check_vocabulary_gguf(files[VOCABULARY_NAME])
        n_ctx = self.agrees(config, vocabulary)
        activations = self.dtypes()
        names = self.graph_files(config, n_ctx, activations)
        ports = expected_ports(config, n_ctx=n_ctx, activations=activations)
        graphs = {}
        for graph, name in names.items():
            if name not in data:
                self.fail(f"graph {graph!r} is in {name[:80]!r}, which is not among its files")
            graphs[graph] = check_graph(
                data[name],
                files[name],
                ports[graph],
                config,
                n_ctx=n_ctx,
                weights=files[weights_name],
                weights_bytes=entries[weights_name].size,
            )
        return OnnxFolder(
            path=self.path,
            manifest=self.keys,
            config=config,
            vocabulary=vocabulary,
            n_ctx=n_ctx,
            precision=self.one_of("precision", self.get("precision", str), PRECISIONS),
            activations=activations,
            kv_type=FLOAT_TYPES[activations],
            graphs=graphs,
            graph_bytes={graph: data[name] for graph, name in names.items()},
            weights=files[weights_name],
            weights_entry=entries[weights_name],
            digest=_digest(entries),
            file_bytes=sum(entry.size for entry in entries.values()),
        )

    def one_of(self, key: str, value: str, allowed: Any) -> str:
        if value not in allowed:
            self.fail(f"key {key!r} is {shown(value)}, expected one of {', '.join(allowed)}")
        return value

    def files(self) -> dict[str, FileEntry]:
        entries = {}
        listed = self.get("files", dict)
        if len(listed) > _MAX_FILES:
            self.fail(f"lists {len(listed)} files, expected at most {_MAX_FILES}")
        for name, entry in listed.items():
            size = entry.get("size") if isinstance(entry, dict) else None
            sha256 = entry.get("sha256") if isinstance(entry, dict) else None
            if type(size) is not int or not 0 <= size < 2**62 or not _is_sha256(sha256):
                self.fail(f"file {name[:80]!r} is {shown(entry)}, expected its size and sha256")
            entries[name] = FileEntry(size, str(sha256))
        return entries

    def weights_name(self, entries: Mapping[str, FileEntry]) -> str:
        names = [name for name in entries if name.endswith(_WEIGHTS_SUFFIXES)]
        if len(names) != 1 or "/" in names[0]:
            self.fail(f"lists {len(names)} files of weights ({', '.join(_WEIGHTS_SUFFIXES)}), expected one")
        return names[0]

    def agrees(self, config: LoopConfig, vocabulary: GGUFInfo) -> int:
        """Every value that the manifest repeats must be the configuration's; returns n_ctx, which it has alone."""
        shapes = self.get("shapes", dict)
        wanted: dict[str, Any] = {
            "architecture": config.model_type,
            "num_loops": config.num_loops,
            "kv_gate": config.kv_gate,
            "kv_gate_init": config.kv_gate_init,
            "exit_threshold": config.early_exit_threshold,
        }
        if config.shares_kv:
            wanted["chunk_size"] = config.chunk_size
        for key, value in wanted.items():
            self.same(key, self.get(key, int, float, str), value)
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
        ):
            self.same(f"shapes.{key}", shapes.get(key), getattr(config, key))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            self.same(
                f"{name}_token_id",
                self.keys.get(f"{name}_token_id"),
                vocabulary.metadata.get(f"tokenizer.ggml.{key}_token_id"),
            )
        n_ctx = shapes.get("n_ctx")
        if type(n_ctx) is not int or not 1 <= n_ctx <= config.max_position_embeddings:
            self.fail(f"key 'shapes.n_ctx' is {shown(n_ctx)}, expected 1 to {config.max_position_embeddings}")
        for key, value in self.get("sampling", dict).items():
            rule = GENERAL_KEYS.get(f"sampling.{key}")
            if rule is None or type(value) not in (int, float) or not rule.in_range(value):
                self.fail(f"key 'sampling.{key[:40]}' is {shown(value)}, expected a sampling default in its range")
        return n_ctx

    def same(self, key: str, found: Any, expected: Any) -> None:
        # 7 digits: the vocabulary's file has float32
        equal = type(found) in (int, float) and isinstance(expected, float) and f"{found:.7g}" == f"{expected:.7g}"
        if not equal and (found != expected or isinstance(found, bool)):
            self.fail(f"key {key!r} is {shown(found)}, {VOCABULARY_NAME} says {shown(expected)}")

    def dtypes(self) -> str:
        """The one floating type of states and cache rows, by numpy's name."""
        dtypes = self.get("dtypes", dict)
        found = [self.one_of(f"dtypes.{key}", str(dtypes.get(key)), FLOAT_TYPES) for key in ("activations", "kv")]
        if found[0] != found[1]:
            self.fail(f"key 'dtypes.kv' is {found[1]}, expected {found[0]} as the activations")
        return found[0]

    def graph_files(self, config: LoopConfig, n_ctx: int, activations: str) -> dict[str, str]:
        """The file of each graph; the inputs and outputs it states must be those the configuration asks for."""
        graphs = self.get("graphs", dict)
        ports = expected_ports(config, n_ctx=n_ctx, activations=activations)
        found = {}
        for name in GRAPHS:
            graph = self.kind(f"graphs.{name}", graphs.get(name), dict)
            found[name] = self.kind(f"graphs.{name}.file", graph.get("file"), str)
            for kind, expected in (("inputs", ports[name].inputs), ("outputs", ports[name].outputs)):
                stated = self.kind(f"graphs.{name}.{kind}", graph.get(kind), list)
                if sorted(map(repr, stated)) != sorted(repr(_as_json(port)) for port in expected):
                    odd = [port.get("name") if isinstance(port, dict) else port for port in stated]
                    first = next(
                        (port.name for port in expected if _as_json(port) not in stated), shown(odd[-1]) if odd else ""
                    )
                    self.fail(f"key 'graphs.{name}.{kind}' is not what the configuration asks for (see {first})")
        return found


def _as_json(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _digest(entries: Mapping[str, FileEntry]) -> str:
    """What tells this model from others: the digests of all its files."""
    lines = sorted(f"{name} {entry.size} {entry.sha256}\n" for name, entry in entries.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
