"""ONNX folders with random weights at given sizes: for measuring memory and speed, never for text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.checkpoint import Checkpoint
from melt_edge.config import LoopConfig
from melt_edge.export.onnx import write_graph
from melt_edge.export.onnx_graph import build_graphs
from melt_edge.export.onnx_manifest import graph_file, manifest, write_manifest
from melt_edge.export.onnx_ops import Layout
from melt_edge.export.onnx_weights import WEIGHTS_NAME, StoredTensor, WeightsFile
from melt_edge.export.tokenizer import SpecialIds
from melt_edge.spec import tensor_specs
from melt_edge.weights import TensorInfo

# The standard deviation of uniform nibbles and uniform bytes.
_STEPS_STD = {4: 4.6, 8: 73.9}


def write_random_onnx(folder: Path, config: LoopConfig, layout: Layout) -> None:
    """The graphs of these sizes, a manifest and random weights, without a tokenizer, in an empty folder.

    Quantised blocks are drawn as they are stored, which takes seconds for 1.6 B parameters.
    """
    weights = RandomWeights(config, layout)
    graphs = build_graphs(config, layout, weights)
    weights.write(folder / WEIGHTS_NAME, None)
    for name, graph in graphs.items():
        write_graph(folder / graph_file(name), graph)
    keys = manifest(config, layout, graphs, {}, SpecialIds(0, 0, None, None), {}, {"name": "random"})
    write_manifest(folder, keys, None)


class RandomWeights(WeightsFile):
    """Fills the tensors that graphs placed with noise of a length that keeps states near 1."""

    def __init__(self, config: LoopConfig, layout: Layout) -> None:
        nowhere = Path("random")
        tensors = {name: TensorInfo(name, "F32", spec.shape, nowhere, 0) for name, spec in tensor_specs(config).items()}
        super().__init__(Checkpoint(nowhere, config, tensors, []))
        self._layout = layout
        self._rng = np.random.default_rng(0)

    def write(self, path: Path, progress: Any) -> None:
        """Draw every placed tensor."""
        with path.open("wb") as stream:
            for tensor in self.tensors():
                stream.seek(tensor.offset)
                stream.write(self._values(tensor).data)
            stream.truncate(self.nbytes)

    def _values(self, tensor: StoredTensor) -> Any:
        if tensor.dtype == np.uint8:
            return self._rng.integers(0, 256, tensor.shape, np.uint8)
        if tensor.name.endswith("scales"):
            fmt = self._layout.block_format
            assert fmt is not None
            columns = tensor.shape[1] * fmt.block_size
            return np.full(tensor.shape, 0.92 / columns**0.5 / _STEPS_STD[fmt.bits], tensor.dtype)
        if len(tensor.shape) == 1:
            return np.full(tensor.shape, 0.0 if tensor.name.endswith("bias") else 1.0, tensor.dtype)
        if tensor.name.startswith("rotary"):
            return np.ones(tensor.shape, tensor.dtype)
        noise = np.resize(self._rng.standard_normal(2**20).astype(tensor.dtype), tensor.shape)
        return noise * tensor.dtype.type(0.92 / min(tensor.shape) ** 0.5)
