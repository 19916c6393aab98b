// Attention of few tokens over a long cache, on the CPU.

#pragma once

#include "ggml.h"

struct ggml_compute_params;

// As melt_attn and melt_attn_work_bytes of attn.h, for nodes with few query rows.
bool   melt_attn_decode(const ggml_compute_params * params, ggml_tensor * dst);
size_t melt_attn_decode_work_bytes(const ggml_tensor * dst, int n_threads);
