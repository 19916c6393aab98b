// What attn-decode.cpp does with rows of the cache: products of K rows with queries, weighted sums of V rows.
// Float types here, 8 and 4 bits in attn-decode-avx2.h where the CPU has it, else here as well.

#pragma once

#define GGML_COMMON_DECL_CPP
#include "float-vectors.h"
#include "ggml-common.h"
#include "ggml.h"

enum {
    N_CELLS = 8,  // rows that are read side by side; a tile is filled up to a multiple of it
    TILE    = 64, // the most rows between two updates of the softmax
};

// Rows that will be needed next: the kernels ask for n_bytes of each while they work, so that the memory never waits
// for arithmetic. As many rows as the kernel works on.
struct next_rows {
    const char * const * rows;
    size_t               n_bytes;

    void fetch(int row) const {
        for (size_t i = 0; i < n_bytes; i += 64) {
            fetch_line(row, i);
        }
    }

    void fetch_line(int row, size_t offset) const {
#if defined(__GNUC__) || defined(__clang__)
        __builtin_prefetch(rows[row] + offset, 0, 2);
#endif
    }
};

// Scores of N_CELLS rows of one K head against the n_q query heads that share it: s[i*TILE + c] = q[i] . k[c]
using dot_cells_t = void (*)(int n, const char * const * k, const char * q, size_t q_stride, int n_q, float * s,
                             next_rows next);

// out[i] += sum over c < n_cells of w[i*TILE + c] * v[c], for the n_q query heads that share a V head; out: [n_q][n].
// n_cells is a multiple of N_CELLS.
using add_cells_t = void (*)(int n, const char * const * v, int n_cells, const float * w, int n_q, float * out,
                             next_rows next);

// GCC would load the value again for each use
#if defined(__GNUC__) && defined(__x86_64__)
#define KEEP_IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define KEEP_IN_REGISTER(x)
#endif

struct load_f32 {
    using type = float;
    static vf    load(const float * p) { return vf_load(p); }
    static float one(float x) { return x; }
};

struct load_f16 {
    using type = ggml_fp16_t;
    static vf    load(const ggml_fp16_t * p) { return vf_load_f16(p); }
    static float one(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }
};

struct load_bf16 {
    using type = ggml_bf16_t;
    static vf    load(const ggml_bf16_t * p) { return vf_load_bf16(&p->bits); }
    static float one(ggml_bf16_t x) { return GGML_BF16_TO_FP32(x); }
};

// NC rows and NQ queries, so many that their sums fit into the registers
template <class L, int NC, int NQ>
static void dot_floats(int n, const char * const * k, const char * q, size_t q_stride, float * s) {
    const typename L::type * x[NC];
    const float *            y[NQ];
    vf                       sum[NQ * NC];
    for (int c = 0; c < NC; c++) {
        x[c] = (const typename L::type *) k[c];
    }
    for (int i = 0; i < NQ; i++) {
        y[i] = (const float *) (q + i * q_stride);
    }
    for (vf & z : sum) {
        z = vf_zero();
    }
    int j = 0;
    for (; j + VF_N <= n; j += VF_N) {
        vf b[NQ];
        for (int i = 0; i < NQ; i++) {
            b[i] = vf_load(y[i] + j);
            KEEP_IN_REGISTER(b[i]);
        }
        for (int c = 0; c < NC; c++) {
            const vf a = L::load(x[c] + j);
            for (int i = 0; i < NQ; i++) {
                sum[i * NC + c] = vf_fma(a, b[i], sum[i * NC + c]);
            }
        }
    }
    float total[NQ * NC];
    for (int g = 0; g < NQ * NC; g += 4) {
        vf_sum_4(sum[g], sum[g + 1], sum[g + 2], sum[g + 3], total + g);
    }
    for (; j < n; j++) {
        for (int g = 0; g < NQ * NC; g++) {
            total[g] += y[g / NC][j] * L::one(x[g % NC][j]);
        }
    }
    for (int g = 0; g < NQ * NC; g++) {
        s[g / NC * TILE + g % NC] = total[g];
    }
}

template <class L>
static void dot_cells_float(int n, const char * const * k, const char * q, size_t q_stride, int n_q, float * s,
                            next_rows next) {
    for (int c = 0; c < N_CELLS; c++) {
        next.fetch(c);
    }
    int i = 0;
    for (; i + 4 <= n_q; i += 4) {
        for (int c = 0; c < N_CELLS; c += 2) {
            dot_floats<L, 2, 4>(n, k + c, q + i * q_stride, q_stride, s + i * TILE + c);
        }
    }
    for (; i + 2 <= n_q; i += 2) {
        for (int c = 0; c < N_CELLS; c += 4) {
            dot_floats<L, 4, 2>(n, k + c, q + i * q_stride, q_stride, s + i * TILE + c);
        }
    }
    for (; i < n_q; i++) {
        dot_floats<L, 8, 1>(n, k, q + i * q_stride, q_stride, s + i * TILE);
    }
}

// 4 rows, NQ queries, and NV vectors at a time
template <class L, int NQ, int NV>
static void add_floats(int n, const char * const * v, const float * w, float * out) {
    const typename L::type * x[4];
    vf                       weight[NQ * 4];
    for (int c = 0; c < 4; c++) {
        x[c] = (const typename L::type *) v[c];
        for (int i = 0; i < NQ; i++) {
            weight[i * 4 + c] = vf_set(w[i * TILE + c]);
        }
    }
    int j = 0;
    for (; j + NV * VF_N <= n; j += NV * VF_N) {
        vf a[4][NV];
        for (int c = 0; c < 4; c++) {
            for (int k = 0; k < NV; k++) {
                a[c][k] = L::load(x[c] + j + k * VF_N);
            }
        }
        for (int i = 0; i < NQ; i++) {
            vf sum[NV];
            for (int k = 0; k < NV; k++) {
                sum[k] = vf_load(out + i * n + j + k * VF_N);
            }
            for (int c = 0; c < 4; c++) {
                // for four queries the registers are too few to hold the weights
                const vf z = NQ < 4 ? weight[i * 4 + c] : vf_set(w[i * TILE + c]);
                for (int k = 0; k < NV; k++) {
                    sum[k] = vf_fma(z, a[c][k], sum[k]);
                }
            }
            for (int k = 0; k < NV; k++) {
                vf_store(out + i * n + j + k * VF_N, sum[k]);
            }
        }
    }
    for (; j < n; j++) {
        for (int i = 0; i < NQ; i++) {
            for (int c = 0; c < 4; c++) {
                out[i * n + j] += w[i * TILE + c] * L::one(x[c][j]);
            }
        }
    }
}

template <class L>
static void add_cells_float(int n, const char * const * v, int n_cells, const float * w, int n_q, float * out,
                            next_rows next) {
    for (int c = 0; c < n_cells; c += 4) {
        for (int k = 0; k < 4; k++) {
            next.fetch(c + k);
        }
        int i = 0;
        for (; i + 4 <= n_q; i += 4) {
            add_floats<L, 4, 2>(n, v + c, w + i * TILE + c, out + i * n);
        }
        for (; i + 2 <= n_q; i += 2) {
            add_floats<L, 2, 1>(n, v + c, w + i * TILE + c, out + i * n);
        }
        for (; i < n_q; i++) {
            add_floats<L, 1, 1>(n, v + c, w + i * TILE + c, out + i * n);
        }
    }
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "attn-decode-avx2.h"

#else

static void add_cells_q8_0(int n, const char * const * v, int n_cells, const float * w, int n_q, float * out,
                           next_rows next) {
    for (int c = 0; c < n_cells; c += 4) {
        for (int k = 0; k < 4; k++) {
            next.fetch(c + k);
        }
        for (int b = 0; b < n / QK8_0; b++) {
            const block_q8_0 * x[4];
            float              d[4];
            for (int k = 0; k < 4; k++) {
                x[k] = (const block_q8_0 *) v[c + k] + b;
                d[k] = GGML_CPU_FP16_TO_FP32(x[k]->d);
            }
            for (int i = 0; i < n_q; i++) {
                for (int j = 0; j < QK8_0; j += VF_N) {
                    float * p   = out + i * n + b * QK8_0 + j;
                    vf      sum = vf_load(p);
                    for (int k = 0; k < 4; k++) {
                        sum = vf_fma(vf_set(w[i * TILE + c + k] * d[k]), vf_load_i8(x[k]->qs + j), sum);
                    }
                    vf_store(p, sum);
                }
            }
        }
    }
}

static void add_cells_q4_0(int n, const char * const * v, int n_cells, const float * w, int n_q, float * out,
                           next_rows next) {
    for (int c = 0; c < n_cells; c += 4) {
        for (int k = 0; k < 4; k++) {
            next.fetch(c + k);
        }
        for (int b = 0; b < n / QK4_0; b++) {
            const block_q4_0 * x[4];
            float              d[4];
            for (int k = 0; k < 4; k++) {
                x[k] = (const block_q4_0 *) v[c + k] + b;
                d[k] = GGML_CPU_FP16_TO_FP32(x[k]->d);
            }
            for (int i = 0; i < n_q; i++) {
                for (int j = 0; j < QK4_0 / 2; j += VF_N) {
                    float * p      = out + i * n + b * QK4_0 + j;
                    vf      sum_lo = vf_load(p);
                    vf      sum_hi = vf_load(p + QK4_0 / 2);
                    for (int k = 0; k < 4; k++) {
                        const vf weight = vf_set(w[i * TILE + c + k] * d[k]);
                        vf       lo, hi;
                        vf_load_i4(x[k]->qs + j, lo, hi);
                        sum_lo = vf_fma(weight, lo, sum_lo);
                        sum_hi = vf_fma(weight, hi, sum_hi);
                    }
                    vf_store(p, sum_lo);
                    vf_store(p + QK4_0 / 2, sum_hi);
                }
            }
        }
    }
}

#endif
