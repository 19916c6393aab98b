// One vector times a q4_0 matrix on the CPU: what ggml's product of repacked weights calls before its own kernel.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// s[nc] = the nc rows of n values in vx (block_q4_0x8, as ggml repacks them) times vy (block_q8_0). Returns false, with
// nothing written, where this CPU has no kernel here or the environment says MELT_GEMV_Q4_0=0.
bool melt_gemv_q4_0_8x8(int n, float * s, const void * vx, const void * vy, int nc);

#ifdef __cplusplus
}
#endif
