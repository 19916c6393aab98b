// Attention on the CPU: what ggml's flash attention calls before its own kernels.

#pragma once

#include "ggml-backend.h"

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// Computes a GGML_OP_FLASH_ATTN_EXT node and returns true, or false for one that is left to ggml: ALiBi, logit
// soft-capping, sinks, a mask per head, types without a kernel here. Every thread of the pool calls it.
bool melt_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Bytes of params->wdata that it needs for this node with so many threads; 0 for a node that it leaves to ggml.
size_t melt_attn_work_bytes(const struct ggml_tensor * dst, int n_threads);

// Off, every node is left to ggml: to compare the two in one process. On by default, unless the environment says
// MELT_ATTN=0. Not to be called while a graph is computed.
GGML_BACKEND_API void melt_edge_attn_enable(bool enabled);

#ifdef __cplusplus
}
#endif
