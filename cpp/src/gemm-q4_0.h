// Many vectors times a q4_0 matrix on the CPU: what ggml's product of repacked weights calls before its own kernel.

#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// s[i*bs + j], i < nr, j < nc: the nc rows of n values in vx (block_q4_0x8, as ggml repacks them) times the nr vectors
// in vy (block_q8_0x4). Returns false, with nothing written, where this CPU has no kernel here or the environment says
// MELT_GEMM_Q4_0=0.
bool melt_gemm_q4_0_8x8(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);

#ifdef __cplusplus
}
#endif
