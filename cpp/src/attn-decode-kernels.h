// What attn-decode.cpp does with rows of the cache: products of K rows with queries, weighted sums of V rows.
// Float types here, 8 and 4 bits here too where CPUs have no kernel of their own (attn-decode-blocks-*.h).

#pragma once

#define GGML_COMMON_DECL_CPP
#include "float-vectors.h"
#include "ggml-common.h"
#include "kernel-common.h"

#include <algorithm>

enum {
    N_CELLS = 8,    // rows that are read side by side; a tile is filled up to a multiple of it
    TILE    = 256,  // the most rows of K that are read before their V: each change makes the memory start anew
    TILE_Q  = 64,   // of a quantized V: the weights of a tile share one scale of 16 bits
    AHEAD   = 8192, // bytes: far enough to hide the memory
};

// Rows of K or V, one for each cell, with n values for each of their heads.
struct cache_rows {
    const char * const * rows;
    size_t               head_stride; // bytes
    int                  n_head;
    int                  n;

    const char * head(int cell, int h) const { return rows[cell] + h * head_stride; }
};

// Rows that will be needed next: a kernel asks for n_bytes of each head while it works, so that the memory never waits
// for arithmetic.
struct next_rows {
    const char * const * rows;
    size_t               head_stride;
    size_t               n_bytes; // 0: nothing to ask for

    ALWAYS_INLINE void fetch(int row, int h) const { fetch_bytes(rows[row] + h * head_stride, n_bytes); }

    // part i of n of N_CELLS rows, in the order of memory
    ALWAYS_INLINE void fetch_part(int i, int n, int n_head) const {
        const int end = (i + 1) * N_CELLS * n_head / n;
        int       j   = i * N_CELLS * n_head / n;
        for (int row = j / n_head, h = j % n_head; j < end; j++) {
            fetch(row, h);
            if (++h == n_head) {
                h = 0;
                row++;
            }
        }
    }
};

// Scores of N_CELLS rows of K against the n_q query heads that share each of their heads: s[(h*n_q + i)*TILE + c]
using dot_cells_t = void (*)(const cache_rows & k, const char * q, size_t q_stride, int n_q, float * s,
                             const next_rows & next);

// out[(h*n_q + i)*n] += sum over c < n_cells of w[(h*n_q + i)*TILE + c] * v[c], for the n_q query heads that share each
// head of V. n_cells is a multiple of N_CELLS.
using add_cells_t = void (*)(const cache_rows & v, int n_cells, const float * w, int n_q, float * out);

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

// One head's products with NQ queries.
template <class L>
struct dot_float {
    using sum_t = vf;

    // in lanes, of what fills whole vectors
    template <int NQ>
    static ALWAYS_INLINE void head(int n, const char * k, const char * q, size_t q_stride, vf * sum) {
        const typename L::type * x = (const typename L::type *) k;
        vf                       a[NQ][2];
        for (int i = 0; i < NQ; i++) {
            a[i][0] = a[i][1] = vf_zero();
        }
        const auto query = [&](int i, int j) {
            return vf_load((const float *) (q + i * q_stride) + j);
        };
        int j = 0;
        for (; j + 2 * VF_N <= n; j += 2 * VF_N) {
            const vf b[2] = {L::load(x + j), L::load(x + j + VF_N)};
            for (int i = 0; i < NQ; i++) {
                a[i][0] = vf_fma(b[0], query(i, j), a[i][0]);
                a[i][1] = vf_fma(b[1], query(i, j + VF_N), a[i][1]);
            }
        }
        for (; j + VF_N <= n; j += VF_N) {
            const vf b = L::load(x + j);
            for (int i = 0; i < NQ; i++) {
                a[i][0] = vf_fma(b, query(i, j), a[i][0]);
            }
        }
        for (int i = 0; i < NQ; i++) {
            sum[i] = vf_add(a[i][0], a[i][1]);
        }
    }

    static vf   zero() { return vf_zero(); }
    static void sum_4(const vf * x, float * y) { vf_sum_4(x[0], x[1], x[2], x[3], y); }

    static bool  has_rest(int n) { return n % VF_N != 0; }
    static float rest(int n, const char * k, const char * q) {
        float sum = 0.0f;
        for (int j = n / VF_N * VF_N; j < n; j++) {
            sum += ((const float *) q)[j] * L::one(((const typename L::type *) k)[j]);
        }
        return sum;
    }
};

// The scores s[i*TILE] of NH heads with NQ queries each, four or fewer together: they are added up over their lanes at
// once.
template <class D, int NH, int NQ>
static ALWAYS_INLINE void dot_heads(int n, const char * k, size_t k_stride, const char * q, size_t q_stride,
                                    float * s) {
    typename D::sum_t sum[4];
    for (int h = 0; h < NH; h++) {
        D::template head<NQ>(n, k + h * k_stride, q + h * NQ * q_stride, q_stride, sum + h * NQ);
    }
    for (int i = NH * NQ; i < 4; i++) {
        sum[i] = D::zero();
    }
    float total[4];
    D::sum_4(sum, total);
    for (int i = 0; i < NH * NQ; i++) {
        s[i * TILE] = total[i];
    }
    if (D::has_rest(n)) {
        for (int i = 0; i < NH * NQ; i++) {
            s[i * TILE] += D::rest(n, k + i / NQ * k_stride, q + i * q_stride);
        }
    }
}

// Row after row, head after head: where a row is read in its order, the processor fetches it at the memory's speed
// unasked.
template <class D, int N>
static void dot_cells_in_order(const cache_rows & k, const char * q, size_t q_stride, int n_q, float * s,
                               const next_rows & next) {
    const int    n        = N ? N : k.n;
    const int    n_head   = k.n_head;
    const size_t k_stride = k.head_stride;
    for (int c = 0; c < N_CELLS; c++) {
        const char * k_h = k.rows[c];
        const char * q_h = q;
        float *      s_h = s + c;
        int          h   = 0;
        for (; n_q == 1 && h + 4 <= n_head; h += 4) {
            dot_heads<D, 4, 1>(n, k_h, k_stride, q_h, q_stride, s_h);
            for (int i = 0; i < 4; i++) {
                next.fetch(c, h + i);
            }
            k_h += 4 * k_stride;
            q_h += 4 * q_stride;
            s_h += 4 * TILE;
        }
        for (; h < n_head; h++) {
            next.fetch(c, h);
            for_parts<4>(n_q, [&](auto nq, int i) {
                dot_heads<D, 1, nq>(n, k_h, k_stride, q_h + i * q_stride, q_stride, s_h + i * TILE);
            });
            k_h += k_stride;
            q_h += n_q * q_stride;
            s_h += n_q * TILE;
        }
    }
}

template <class D>
static void dot_cells_in_order(const cache_rows & k, const char * q, size_t q_stride, int n_q, float * s,
                               const next_rows & next) {
    switch (k.n) {
        case 64: return dot_cells_in_order<D, 64>(k, q, q_stride, n_q, s, next);
        case 128: return dot_cells_in_order<D, 128>(k, q, q_stride, n_q, s, next);
        default: return dot_cells_in_order<D, 0>(k, q, q_stride, n_q, s, next);
    }
}

// N_CELLS rows of one head and NQ queries, from value j on, NV vectors at a time. Returns the first value that is left.
template <class L, int NQ, int NV>
static ALWAYS_INLINE int add_vectors(const cache_rows & v, int n, int h, int j, const float * w, float * out) {
    const typename L::type * x[N_CELLS];
    for (int c = 0; c < N_CELLS; c++) {
        x[c] = (const typename L::type *) v.head(c, h);
    }
    for (; j + NV * VF_N <= n; j += NV * VF_N) {
        vf sum[NQ][NV];
        for (int i = 0; i < NQ; i++) {
            for (int k = 0; k < NV; k++) {
                sum[i][k] = vf_load(out + i * n + j + k * VF_N);
            }
        }
        for (int c = 0; c < N_CELLS; c++) {
            vf a[NV];
            for (int k = 0; k < NV; k++) {
                a[k] = L::load(x[c] + j + k * VF_N);
            }
            for (int i = 0; i < NQ; i++) {
                const vf z = vf_set(w[i * TILE + c]);
                for (int k = 0; k < NV; k++) {
                    sum[i][k] = vf_fma(z, a[k], sum[i][k]);
                }
            }
        }
        for (int i = 0; i < NQ; i++) {
            for (int k = 0; k < NV; k++) {
                vf_store(out + i * n + j + k * VF_N, sum[i][k]);
            }
        }
    }
    return j;
}

template <class L, int NQ>
static ALWAYS_INLINE void add_head(const cache_rows & v, int n, int h, const float * w, float * out) {
    // a line of the row, or half of it where the registers are too few for the sums
    constexpr int NV = std::max<int>(1, 64 / sizeof(typename L::type) / VF_N / (NQ == 4 && VF_N < 16 ? 2 : 1));
    int           j  = add_vectors<L, NQ, NV>(v, n, h, 0, w, out);
    j                = add_vectors<L, NQ, 1>(v, n, h, j, w, out);
    for (; j < n; j++) {
        for (int i = 0; i < NQ; i++) {
            for (int c = 0; c < N_CELLS; c++) {
                out[i * n + j] += w[i * TILE + c] * L::one(((const typename L::type *) v.head(c, h))[j]);
            }
        }
    }
}

// N_CELLS rows at a time, which spares their sums the way through the L1 cache: add(the rows, the number of the first,
// head) for each head. Rows to come are asked for in the order of memory.
template <class F>
static inline void for_heads(const cache_rows & v, int n_cells, size_t head_bytes, F && add) {
    const int ahead = std::max<int>(1, AHEAD / (v.n_head * head_bytes) / N_CELLS) * N_CELLS;
    for (int c = 0; c < n_cells; c += N_CELLS) {
        const cache_rows part = {v.rows + c, v.head_stride, v.n_head, v.n};
        const next_rows  next = {v.rows + c + ahead, v.head_stride, head_bytes};
        for (int h = 0; h < v.n_head; h++) {
            if (c + ahead < n_cells) {
                next.fetch_part(h, v.n_head, v.n_head);
            }
            add(part, c, h);
        }
    }
}

// Row after row, for one query a head.
template <class L, int N>
static void add_cells_in_order(const cache_rows & v, int n_cells, const float * w, float * out) {
    const int    n           = N ? N : v.n;
    const int    n_head      = v.n_head;
    const size_t head_stride = v.head_stride;
    for (int c = 0; c < n_cells; c++) {
        const typename L::type * x   = (const typename L::type *) v.rows[c];
        const float *            w_h = w + c;
        float *                  o_h = out;
        for (int h = 0; h < n_head; h++) {
            const vf z = vf_set(*w_h);
            int      j = 0;
            for (; j + VF_N <= n; j += VF_N) {
                vf_store(o_h + j, vf_fma(z, L::load(x + j), vf_load(o_h + j)));
            }
            for (; j < n; j++) {
                o_h[j] += *w_h * L::one(x[j]);
            }
            x = (const typename L::type *) ((const char *) x + head_stride);
            w_h += TILE;
            o_h += n;
        }
    }
}

template <class L, int N>
static void add_cells_float(const cache_rows & v, int n_cells, const float * w, int n_q, float * out) {
    if (n_q == 1) {
        return add_cells_in_order<L, N>(v, n_cells, w, out);
    }
    const int n = N ? N : v.n;
    for_heads(v, n_cells, n * sizeof(typename L::type), [&](const cache_rows & part, int c, int h) {
        const float * w_h = w + h * n_q * TILE + c;
        float *       o_h = out + h * n_q * n;
        for_parts<4>(n_q, [&](auto nq, int i) { add_head<L, nq>(part, n, h, w_h + i * TILE, o_h + i * n); });
    });
}

template <class L>
static void add_cells_float(const cache_rows & v, int n_cells, const float * w, int n_q, float * out) {
    switch (v.n) {
        case 64: return add_cells_float<L, 64>(v, n_cells, w, n_q, out);
        case 128: return add_cells_float<L, 128>(v, n_cells, w, n_q, out);
        default: return add_cells_float<L, 0>(v, n_cells, w, n_q, out);
    }
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "attn-decode-blocks-x86.h"

#else

// -- 8 and 4 bits, in floats

struct load_q8_0 {
    using type = block_q8_0;
    static void load(const type & x, vf * y) {
        for (int k = 0; k < QK8_0 / VF_N; k++) {
            y[k] = vf_load_i8(x.qs + k * VF_N);
        }
    }
};

struct load_q4_0 {
    using type = block_q4_0;
    static void load(const type & x, vf * y) {
        constexpr int N_HALF = QK4_0 / 2 / VF_N;
        for (int k = 0; k < N_HALF; k++) {
            vf_load_i4(x.qs + k * VF_N, y[k], y[N_HALF + k]);
        }
    }
};

// N_CELLS blocks and NQ queries
template <class B, int NQ>
static inline void add_block(const typename B::type * const * x, const float * w, float * out, int n) {
    constexpr int NV = 32 / VF_N;
    float         weight[NQ][N_CELLS];
    for (int c = 0; c < N_CELLS; c++) {
        const float d = GGML_CPU_FP16_TO_FP32(x[c]->d);
        for (int i = 0; i < NQ; i++) {
            weight[i][c] = w[i * TILE + c] * d;
        }
    }
    vf sum[NQ][NV];
    for (int i = 0; i < NQ; i++) {
        for (int k = 0; k < NV; k++) {
            sum[i][k] = vf_load(out + i * n + k * VF_N);
        }
    }
    for (int c = 0; c < N_CELLS; c++) {
        vf a[NV];
        B::load(*x[c], a);
        for (int i = 0; i < NQ; i++) {
            const vf z = vf_set(weight[i][c]);
            for (int k = 0; k < NV; k++) {
                sum[i][k] = vf_fma(z, a[k], sum[i][k]);
            }
        }
    }
    for (int i = 0; i < NQ; i++) {
        for (int k = 0; k < NV; k++) {
            vf_store(out + i * n + k * VF_N, sum[i][k]);
        }
    }
}

template <class B>
static void add_cells_blocks_float(const cache_rows & v, int n_cells, const float * w, int n_q, float * out) {
    using block        = typename B::type;
    const int n_blocks = v.n / 32;
    for_heads(v, n_cells, n_blocks * sizeof(block), [&](const cache_rows & part, int c, int h) {
        for (int b = 0; b < n_blocks; b++) {
            const block * x[N_CELLS];
            for (int k = 0; k < N_CELLS; k++) {
                x[k] = (const block *) part.head(k, h) + b;
            }
            const float * w_b = w + h * n_q * TILE + c;
            float *       o_b = out + h * n_q * v.n + b * 32;
            for_parts<2>(n_q, [&](auto nq, int i) { add_block<B, nq>(x, w_b + i * TILE, o_b + i * v.n, v.n); });
        }
    });
}

static const add_cells_t add_cells_q8_0 = add_cells_blocks_float<load_q8_0>;
static const add_cells_t add_cells_q4_0 = add_cells_blocks_float<load_q4_0>;
#endif
