// Attention of a prompt on the CPU: many tokens of a sequence against the same cells of the cache.

#pragma once

#include "ggml.h"

struct ggml_compute_params;

// As melt_attn and melt_attn_work_bytes of attn.h, for nodes with so many tokens that arithmetic takes their time.
bool   melt_attn_prefill(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t melt_attn_prefill_work_bytes(const struct ggml_tensor * dst, int n_threads);
