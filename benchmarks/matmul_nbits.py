"""Time of one quantised product in onnxruntime: what block size, accuracy level and zero points cost.

    python benchmarks/matmul_nbits.py

Five matrices of the 1.6 B shape's feed-forward (5632 x 2048) in one graph, more than the caches hold, with two threads;
1 row as in decoding, 256 as in a prompt. The line fp32 is the product of floats.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from melt_edge.export.onnx_quantize import BlockFormat

K, N, N_MATRICES, N_THREADS = 2048, 5632, 5, 2
# bits, block size, accuracy level, symmetric
CASES = (
    (4, 32, 4, True),
    (4, 32, 4, False),
    (4, 64, 4, True),
    (4, 64, 4, False),
    (4, 128, 4, True),
    (4, 128, 4, False),
    (4, 32, 1, True),
    (8, 32, 4, True),
    (8, 32, 4, False),
    (8, 32, 1, True),
)


def product_model(case: tuple[int, int, int, bool] | None, rng: np.random.Generator) -> ModelProto:
    """N_MATRICES products of one x with random matrices; None for floats."""
    nodes, initializers, outputs = [], [], []
    for i in range(N_MATRICES):
        if case is None:
            tensors = {"w": rng.standard_normal((K, N)).astype(np.float32)}
            node = helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"])
        else:
            bits, block_size, accuracy_level, symmetric = case
            fmt = BlockFormat(bits, block_size, symmetric)
            tensors = {
                "w": rng.integers(0, 256, fmt.data_shape(N, K), np.uint8),
                "s": np.full(fmt.scales_shape(N, K), 0.001, np.float32),
            }
            if not symmetric:
                tensors["z"] = rng.integers(0, 256, fmt.zeros_shape(N, K), np.uint8)
            node = helper.make_node(
                "MatMulNBits",
                ["x", *(f"{name}{i}" for name in tensors)],
                [f"y{i}"],
                domain="com.microsoft",
                K=K,
                N=N,
                bits=bits,
                block_size=block_size,
                accuracy_level=accuracy_level,
            )
        nodes.append(node)
        initializers += [numpy_helper.from_array(values, f"{name}{i}") for name, values in tensors.items()]
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", N]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "products", [x], outputs, initializers), opset_imports=opsets, ir_version=10
    )


def product_ms(session: onnxruntime.InferenceSession, n_rows: int, rounds: int) -> float:
    """Milliseconds of one product, the fastest of some rounds."""
    x = np.random.default_rng(0).standard_normal((n_rows, K)).astype(np.float32)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - started)
    return 1000 * min(times[1:]) / N_MATRICES


def main() -> None:
    """Measure every case and print a line for each."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = N_THREADS
    rng = np.random.default_rng(0)
    for case in (*CASES, None):
        session = onnxruntime.InferenceSession(product_model(case, rng).SerializeToString(), options)
        one, many = product_ms(session, 1, 12), product_ms(session, 256, 2)
        if case is None:
            about = "fp32"
        else:
            bits, block_size, accuracy_level, symmetric = case
            zeros = "symmetric" if symmetric else "zero points"
            about = f"int{bits}, blocks of {block_size:3}, accuracy level {accuracy_level}, {zeros}"
        print(f"{about:50} 1 row {one:6.2f} ms   256 rows {many:7.2f} ms", flush=True)


if __name__ == "__main__":
    main()
