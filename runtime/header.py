"""What a model on disk is before it is loaded, whichever backend will open it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from melt_edge.config import LoopConfig
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from melt_edge.runtime.gguf_file import GGUFInfo
from melt_edge.runtime.memory import Estimate
from melt_edge.runtime.onnx_folder import OnnxFolder, is_onnx_folder, open_folder
from melt_edge.runtime.options import LoadOptions, estimate_file, resolve
from melt_edge.runtime.ort_options import estimate_folder, resolve_folder


@dataclass(frozen=True)
class ModelHeader:
    """A checked GGUF file or ONNX folder. backend: the one that opens it."""

    source: GGUFInfo | OnnxFolder
    config: LoopConfig

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.source.path

    @property
    def backend(self) -> str:
        """The backend that opens it."""
        return "onnx" if isinstance(self.source, OnnxFolder) else "llama"

    @property
    def file_bytes(self) -> int:
        """Its size on disk."""
        return self.source.file_bytes

    @property
    def most_ctx(self) -> int:
        """The longest context it should be run with: what it was trained for, and a folder has room for."""
        most = self.config.max_position_embeddings
        return min(most, self.source.n_ctx) if isinstance(self.source, OnnxFolder) else most

    @property
    def kv_type(self) -> str | None:
        """The type of a folder's cache; None for a file, where it can be chosen."""
        return self.source.kv_type if isinstance(self.source, OnnxFolder) else None

    @property
    def tokens(self) -> list[str]:
        """The text of every token, as the file has it."""
        file = self.source.vocabulary if isinstance(self.source, OnnxFolder) else self.source
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list)
        return [str(token) for token in tokens]

    def needed(self, options: LoadOptions) -> Estimate:
        """The bytes it will need when loaded with these options. Raises: ConfigError if that cannot be."""
        if isinstance(self.source, OnnxFolder):
            return estimate_folder(self.source, resolve_folder(self.source, options))
        return estimate_file(self.source, resolve(self.source, options))


def read_header(path: Path) -> ModelHeader:
    """The header of what ``load`` can open. Raises: FormatError, SpecError or ConfigError for what it cannot."""
    if is_onnx_folder(path):
        folder = open_folder(path)
        return ModelHeader(folder, folder.config)
    file = check_gguf(path)
    return ModelHeader(file, config_from_gguf(file))
