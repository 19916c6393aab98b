"""Does the written file compute what the reference computes? Asked before the file is put in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from melt_edge.checkpoint import Checkpoint, reference_model
from melt_edge.config import LoopConfig
from melt_edge.errors import ParityError
from melt_edge.quality.divergence import kl_from_logs
from melt_edge.quality.numeric import log_softmax

if TYPE_CHECKING:
    from melt_edge.modeling import LoopLM

FloatArray = npt.NDArray[np.float32]
# prompt, one-token steps -> logits (n, V)
FoundLogits = Callable[[list[int], list[int]], FloatArray]

N_STEPS = 4
MAX_PROMPT = 600
# float32 files (GGUF's name and ONNX's): largest difference of a logit, in standard deviations of the reference's.
EXACT_TYPES = ("f32", "fp32")
MAX_STD_F32 = 1e-3
# Other types: mean KL divergence from the reference over all positions, in nats. Calibrated on random
# weights, where every loop amplifies the rounding: twice the worst of 66 tiny checkpoints. A trained model
# stays far below; logits that have nothing to do with the reference's are near 4.
MAX_MEAN_KL = {
    "f16": 1e-4,
    "bf16": 2e-3,
    "q8_0": 0.05,
    "q6_k": 0.1,
    "q5_k_m": 0.4,
    "q5_k_s": 0.4,
    "q5_1": 0.4,
    "q5_0": 0.4,
    "q4_k_m": 1.5,
    "q4_k_s": 1.5,
    "q4_1": 1.5,
    "q4_0": 1.8,
    "iq4_nl": 1.5,
    "iq4_xs": 1.5,
    "q3_k_l": 2.0,
    "q3_k_m": 2.0,
    "q3_k_s": 2.0,
    "q2_k": 3.0,
    # ONNX, twice the worst of 20 such checkpoints (int4: with zero points 2.9); fp16 has activations and cache so too
    "fp16": 1e-3,
    "int8": 0.1,
    "int4": 3.5,
}


def verify_file(source: Checkpoint, config: LoopConfig, path: Path, type: str, *, exit_gate: bool) -> None:
    """Compare a GGUF file's logits with the reference's on a prompt of several chunks and one-token steps.

    Raises: ParityError with the largest difference if it is above the type's limit;
    BackendUnavailableError if torch or the patched library is missing.
    """
    if not exit_gate:  # a file without the gate reads the last loop
        config = replace(config, early_exit_threshold=1.0)
    verify_logits(source, config, type, lambda prompt, steps: _file_logits(path, prompt, steps))


def verify_logits(source: Checkpoint, config: LoopConfig, type: str, found: FoundLogits) -> None:
    """Compare logits with the reference's on a prompt of several chunks and one-token steps.

    found: gives the logits of a prompt and of the steps after it, (n, V). Raises: as verify_file.
    """
    prompt, steps = _split(_tokens(config))
    model = reference_model(source, config)
    compare(_reference_logits(model, prompt, steps), found(prompt, steps), type, what=str(source.path))


def compare(expected: FloatArray, found: FloatArray, type: str, *, what: str) -> None:
    """Raise ParityError if logits differ by more than the type allows. Shapes: (n, V) both."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise ParityError(f"{what}: the file's logits are not finite or have shape {found.shape}, not {expected.shape}")
    if type in EXACT_TYPES:
        worst = float(np.abs(found - expected).max() / expected.std())
        limit, measure = MAX_STD_F32, "largest difference in standard deviations"
    else:
        worst = float(kl_divergence(expected, found).mean())
        limit, measure = MAX_MEAN_KL[type], "mean KL divergence in nats"
    if not worst <= limit:
        raise ParityError(
            f"{what}: the {type} file does not compute what the reference does ({measure} {worst:.3g}, "
            f"expected at most {limit:g}); nothing was written, report this with the checkpoint's config.json"
        )


def kl_divergence(expected: FloatArray, found: FloatArray) -> npt.NDArray[np.float64]:
    """KL(expected || found) of each row's softmax, in nats. Shapes: (n, V) -> (n,)."""
    return kl_from_logs(log_softmax(expected), log_softmax(found))


def _tokens(config: LoopConfig) -> list[int]:
    """A prompt of more than one chunk, as far as the context goes, and the one-token steps after it."""
    room = min(config.max_position_embeddings, MAX_PROMPT + N_STEPS)
    wanted = (config.chunk_size if config.shares_kv else 8) + max(3, min(config.chunk_size, 16) // 2) + N_STEPS
    rng = np.random.default_rng(0)
    return [int(token) for token in rng.integers(0, config.vocab_size, min(room, wanted))]


def _split(tokens: list[int]) -> tuple[list[int], list[int]]:
    n_prompt = max(1, len(tokens) - N_STEPS)
    return tokens[:n_prompt], tokens[n_prompt:]


def _reference_logits(model: LoopLM, prompt: list[int], steps: list[int]) -> FloatArray:
    import torch

    from melt_edge.modeling import KVCache

    cache = KVCache(model.config)
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt]), cache).logits[0]]
        logits += [model(torch.tensor([[token]]), cache).logits[0] for token in steps]
        joined: FloatArray = torch.cat(logits).float().numpy()
    return joined


def _file_logits(path: Path, prompt: list[int], steps: list[int]) -> FloatArray:
    from melt_edge.runtime.llama import LlamaBackend
    from melt_edge.runtime.options import LoadOptions

    backend = LlamaBackend(path, LoadOptions(n_ctx=len(prompt + steps), kv_type="f32", n_gpu_layers=0))
    try:
        logits = [backend.logits(prompt)]
        for token in steps:
            backend.eval([token])
            logits.append(backend.last_logits()[None].copy())
    finally:
        backend.close()
    return np.concatenate(logits)
