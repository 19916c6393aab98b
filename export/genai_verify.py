"""Runs a whole decoder in onnxruntime as onnxruntime-genai does, for the comparison with the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from melt_edge.config import LoopConfig
from melt_edge.errors import BackendUnavailableError
from melt_edge.export.onnx_verify import open_session


class Decoder:
    """A graph and its cache: each slot's past and present are one buffer. batch: sequences of one length."""

    def __init__(self, path: Path, config: LoopConfig, rows: int, *, batch: int = 1, n_threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError as err:
            raise BackendUnavailableError("comparing needs onnxruntime; install melt-edge[onnx]") from err
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        self.session = open_session(path, options)
        self.n_past = 0
        kind = np.float16 if self.session.get_inputs()[2].type == "tensor(float16)" else np.float32
        shape = (batch, config.num_key_value_heads, rows, config.head_dim)
        self.cache = {
            f"{slot}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind))
            for slot in range(config.cache_slots)
            for part in ("key", "value")
        }

    def chunk(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of one chunk that follows the tokens before. Shapes: (B, C) -> (B, C, V)."""
        self.n_past += tokens.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens))
        binding.bind_cpu_input("attention_mask", np.ones((len(tokens), self.n_past), np.int64))
        binding.bind_output("logits")
        for name, rows in self.cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", rows)
            binding.bind_ortvalue_output(f"present.{name}", rows)
        self.session.run_with_iobinding(binding)
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits


def decoder_logits(
    path: Path, config: LoopConfig, prompt: list[int], steps: list[int], chunk_size: int
) -> npt.NDArray[np.float32]:
    """Logits of a prompt cut into chunks and of the steps after it. Shapes: (n, V)."""
    decoder = Decoder(path, config, len(prompt) + len(steps))
    chunks = [prompt[start : start + chunk_size] for start in range(0, len(prompt), chunk_size)]
    chunks += [[token] for token in steps]
    return np.concatenate([decoder.chunk(np.array([chunk], np.int64))[0] for chunk in chunks])
