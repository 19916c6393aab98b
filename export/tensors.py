"""How each tensor of a checkpoint is stored in a GGUF file, and its values encoded block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from melt_edge.checkpoint import Checkpoint
from melt_edge.errors import FormatError
from melt_edge.names import gguf_name
from melt_edge.spec import tensor_specs
from melt_edge.weights import FloatArray, bfloat16_bits

# type name -> how matrices are stored, and the file type llama.cpp shows
DIRECT_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# Above these a value or its block's scale becomes Inf; the largest bfloat16 stands for its rounding.
_LARGEST = {
    GGMLQuantizationType.F32: math.inf,
    GGMLQuantizationType.F16: 65504.0,
    GGMLQuantizationType.BF16: 3.3895e38,
    GGMLQuantizationType.Q8_0: 65504.0 * 127,
    GGMLQuantizationType.Q4_0: 65504.0 * 8,
}
# llama.cpp takes norms, biases and the exit gate in float32 only.
_ALWAYS_F32 = ("norm", "bias", "exit")
_BLOCK_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file. shape: as stored by torch (GGUF's ne is reversed)."""

    source: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded values."""
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def plan_tensors(checkpoint: Checkpoint, type_name: str, *, exit_gate: bool, notes: list[str]) -> list[TensorPlan]:
    """Every tensor that is written, in the order of a token's path; matrices all get the asked type."""
    asked, _ = DIRECT_TYPES[type_name]
    plans = []
    fallen_back = 0
    for name, spec in tensor_specs(checkpoint.config).items():
        if name.startswith("model.early_exit_gate.") and not exit_gate:
            continue
        stored = asked
        if spec.role in _ALWAYS_F32:
            stored = GGMLQuantizationType.F32
        elif spec.shape[-1] % GGML_QUANT_SIZES[asked][0]:
            stored = GGMLQuantizationType.F16
            fallen_back += 1
        plans.append(TensorPlan(name, gguf_name(name), spec.shape, stored))
    if fallen_back:
        block = GGML_QUANT_SIZES[asked][0]
        notes.append(f"{fallen_back} matrices have rows that are no multiple of {block} values and are stored as f16")
    return plans


def encoded_blocks(checkpoint: Checkpoint, plan: TensorPlan) -> Iterator[npt.NDArray[Any]]:
    """The tensor's bytes in file order, some rows at a time.

    Raises: FormatError if a value is NaN or Inf, or becomes so in the stored type.
    """
    rows = plan.shape[0]
    step = max(1, _BLOCK_ELEMENTS // math.prod(plan.shape[1:]))
    for start in range(0, rows, step):
        values = checkpoint.read_rows(plan.source, start, min(rows, start + step))
        largest = float(max(values.max(), -values.min()))
        if largest > _LARGEST[plan.type]:
            raise FormatError(
                f"{checkpoint.tensors[plan.source].file}: tensor {plan.source} holds {largest:g}, more than "
                f"{plan.type.name} can store ({_LARGEST[plan.type]:g}); export as bf16 or f32"
            )
        yield _encode(values, plan.type)


def _encode(values: FloatArray, stored: GGMLQuantizationType) -> npt.NDArray[Any]:
    if stored == GGMLQuantizationType.F32:
        return values.astype("<f4", copy=False)
    if stored == GGMLQuantizationType.F16:
        return values.astype("<f2")
    if stored == GGMLQuantizationType.BF16:
        return bfloat16_bits(values).astype("<u2", copy=False)
    # A block of denormals divides by zero inside; its scale is zero then, and so is what it decodes to.
    with np.errstate(all="ignore"):
        return quantize(values, stored)
