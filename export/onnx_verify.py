"""Runs an exported folder's graphs in onnxruntime, for the comparison with the reference: no product backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from melt_edge.errors import BackendUnavailableError
from melt_edge.export.onnx_manifest import MANIFEST_NAME

if TYPE_CHECKING:
    import onnxruntime


class LoopSteps:
    """The graphs of a folder and the state between chunks. Every state tensor is bound once, in place.

    fixed: take the graphs of chunks of this many tokens, and pad to that.
    """

    def __init__(
        self, folder: Path, *, loops: int | None = None, batch: int = 1, n_threads: int = 1, fixed: int | None = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as err:
            raise BackendUnavailableError("comparing needs onnxruntime; install melt-edge[onnx]") from err
        self.ort = onnxruntime
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        graphs = self.manifest["graphs"] if fixed is None else self.manifest["static"][str(fixed)]
        self.fixed = fixed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        # Each session has threads of its own; spinning ones take the cores from the session that runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions: dict[str, onnxruntime.InferenceSession] = {
            name: open_session(folder / graph["file"], options) for name, graph in graphs.items()
        }
        self.loops = loops or self.manifest["num_loops"]
        self.n_layers: int = self.manifest["shapes"]["num_hidden_layers"]
        self.batch = batch
        self.n_past = 0
        n_slots = self.n_layers * (1 if self.manifest["architecture"] == "melt" else self.loops)
        specs = {value["name"]: value for value in graphs["loop"]["inputs"]}
        self.specs = specs
        shape = [batch, *specs["past.0.key"]["shape"][1:]]
        self.slots = [
            {kind: self._value(np.zeros(shape, specs["past.0.key"]["dtype"])) for kind in ("key", "value")}
            for _ in range(n_slots)
        ]

    def chunk(self, tokens: npt.NDArray[np.int64], *, last_only: bool = False) -> npt.NDArray[np.float32]:
        """Logits of one chunk that follows the tokens before. Shapes: (B, C) -> (B, C, V), or (B, 1, V)."""
        n_tokens = tokens.shape[1]
        if self.fixed is not None:
            tokens = np.pad(tokens, ((0, 0), (0, self.fixed - n_tokens)))
        (x,) = self.sessions["embed"].run(None, {"input_ids": tokens})
        total = self.n_past + tokens.shape[1]  # rows of padding are written too, and overwritten by the next chunk
        self.n_past += n_tokens
        fixed: dict[str, Any] = {
            "x": self._value(x),
            "seqlens_k": self._value(np.full(self.batch, total - 1, np.int32)),
            "total_sequence_length": self._value(np.array(total, np.int32)),
        }
        for name in self.specs:
            if name.startswith("h."):
                fixed[name] = self._value(np.zeros_like(x))
        exit_prob = self._value(np.zeros(tokens.shape, np.float32))
        states, exits = [], []
        for loop_idx in range(self.loops):
            if "first_loop" in self.specs:
                fixed["first_loop"] = self._value(np.array(loop_idx == 0))
            self._run_loop(loop_idx, fixed, exit_prob)
            states.append(fixed["x"].numpy().copy())
            exits.append(exit_prob.numpy().copy())
        x = self._leaving(np.stack(states), np.stack(exits))
        logits: npt.NDArray[np.float32]
        (logits,) = self.sessions["head"].run(None, {"x": x[:, -1:] if last_only else x})
        return logits[:, :n_tokens]

    def _run_loop(self, loop_idx: int, fixed: dict[str, Any], exit_prob: Any) -> None:
        binding = self.sessions["loop"].io_binding()
        for name, value in fixed.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("x_out", fixed["x"])
        binding.bind_ortvalue_output("exit_prob", exit_prob)
        first_slot = 0 if self.manifest["architecture"] == "melt" else loop_idx * self.n_layers
        for layer_idx in range(self.n_layers):
            if f"h.{layer_idx}" in fixed:
                binding.bind_ortvalue_output(f"h_out.{layer_idx}", fixed[f"h.{layer_idx}"])
            for kind, rows in self.slots[first_slot + layer_idx].items():
                binding.bind_ortvalue_input(f"past.{layer_idx}.{kind}", rows)
                binding.bind_ortvalue_output(f"present.{layer_idx}.{kind}", rows)
        self.sessions["loop"].run_with_iobinding(binding)

    def _leaving(self, states: npt.NDArray[Any], exits: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """modeling.select_exit on arrays. Shapes: (T, B, C, D), (T, B, C) -> (B, C, D)."""
        threshold = self.manifest["exit_threshold"]
        last: npt.NDArray[Any] = states[-1]
        if threshold >= 1.0:
            return last
        leaves = 1 - np.cumprod(1 - exits.astype(np.float64), axis=0) >= threshold
        leaves[-1] = True
        read: npt.NDArray[Any] = np.take_along_axis(states, leaves.argmax(axis=0)[None, ..., None], axis=0)[0]
        return read

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def open_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on the CPU. Raises: BackendUnavailableError if this onnxruntime does not know the graph's operators."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as err:  # its exceptions have no common base
        raise BackendUnavailableError(
            f"onnxruntime {onnxruntime.__version__} does not load {path.name} ({str(err)[:200]}); "
            "operators of opset 24 need a newer one"
        ) from err


def folder_logits(folder: Path, prompt: list[int], steps: list[int], chunk_size: int) -> npt.NDArray[np.float32]:
    """Logits of a prompt cut into chunks and of the steps after it. Shapes: (n, V)."""
    runner = LoopSteps(folder)
    chunks = [prompt[start : start + chunk_size] for start in range(0, len(prompt), chunk_size)]
    chunks += [[token] for token in steps]
    return np.concatenate([runner.chunk(np.array([chunk], np.int64))[0] for chunk in chunks])
