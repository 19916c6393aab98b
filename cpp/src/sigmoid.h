// The gates' sigmoid on the CPU: ggml calls expf for each value, which takes longer than the rest of a gate's sums.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// dst = sigmoid of its source, for rows of float32. Returns false, with nothing written, for other types and where this
// CPU has no kernel here.
bool melt_sigmoid(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
