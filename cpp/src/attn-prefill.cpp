// Attention of a prompt at the speed of arithmetic. The lanes of a vector hold one value of VF_N query rows, so that
// scores, softmax and weighted sums take the cells of the cache as they lie: scores = K q, weights = exp(scores - M),
// out = V^T weights, with a running maximum M and sum S per query row (online softmax, arXiv 1805.02867). A tile of K
// and V is made float once for all query rows of a unit. ggml's kernel makes it float for every 64 of them, a value at
// a time, and takes a quantized cache row by row for each query.

#include "attn-prefill.h"

#define GGML_COMMON_DECL_CPP
#include "attn-node.h"
#include "float-vectors.h"
#include "ggml-common.h"
#include "ggml-cpu.h"
#include "kernel-common.h"
#include "ops.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

enum {
    MIN_TOKENS = 6,   // fewer are faster one by one (attn-decode.cpp)
    CELLS      = 96,  // of a tile
    COLUMNS    = 256, // query rows of a unit of work at most

    // whose products are summed in registers: so many rows of K or V and vectors of queries
    N_ROWS = VF_N == 8 ? 6 : 8, // AVX2 has 16 registers, the others 32
    N_VECTORS = 2,
    PANEL     = N_VECTORS * VF_N, // query rows
};

// A node. A column is a query row that shares one head of K and V: one of its query heads, one token.
struct attn_prefill : attn_node {
    int64_t n_columns;    // of each stream and head of K and V
    int64_t unit_columns; // whole panels
    int64_t n_units;      // of each stream and head of K and V
};

// Where a thread keeps its things in the work buffer.
struct unit_memory {
    float * q;      // [panel][n_embd_k][PANEL], the last panel as narrow as it can be
    float * out;    // [panel][n_embd_v][PANEL]
    float * k;      // [CELLS][n_embd_k]
    float * v;      // [CELLS][n_embd_v]
    float * scores; // [CELLS][PANEL]
    float * bias;   // [CELLS][PANEL]: the mask

    static size_t n_bytes(const attn_node & a) {
        const size_t n = (COLUMNS + CELLS) * (a.n_embd_k + a.n_embd_v) + 2 * CELLS * PANEL;
        return GGML_PAD(n * sizeof(float), CACHE_LINE_SIZE) + CACHE_LINE_SIZE;
    }

    unit_memory(const attn_node & a, char * work) {
        q      = (float *) GGML_PAD((uintptr_t) work, CACHE_LINE_SIZE);
        out    = q + COLUMNS * a.n_embd_k;
        k      = out + COLUMNS * a.n_embd_v;
        v      = k + CELLS * a.n_embd_k;
        scores = v + CELLS * a.n_embd_v;
        bias   = scores + CELLS * PANEL;
    }
};

static bool has_floats(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

static bool attn_prefill_init(attn_prefill & a, const ggml_tensor * dst, int n_threads) {
    if (!a.init(dst) || a.n_tokens < MIN_TOKENS || !has_floats(a.k->type) || !has_floats(a.v->type)) {
        return false;
    }
    a.n_columns = a.n_tokens * (a.n_head / a.n_head_kv);

    // four units for each thread, if there are as many panels
    const int64_t n_panels = (a.n_columns + PANEL - 1) / PANEL;
    const int64_t n_parts  = std::max<int64_t>(1, 4 * n_threads / (a.n_head_kv * a.n_streams));
    a.unit_columns         = std::clamp<int64_t>(n_panels / n_parts, 1, COLUMNS / PANEL) * PANEL;
    a.n_units              = (a.n_columns + a.unit_columns - 1) / a.unit_columns;
    return true;
}

size_t melt_attn_prefill_work_bytes(const ggml_tensor * dst, int n_threads) {
    attn_prefill a;
    return attn_prefill_init(a, dst, n_threads) ? n_threads * unit_memory::n_bytes(a) : 0;
}

static void blocks_to_float(const block_q8_0 * x, int64_t n, float * y) {
    for (int64_t j = 0; j < n; j += VF_N) {
        const block_q8_0 & b = x[j / QK8_0];
        vf_store(y + j, vf_mul(vf_set(GGML_CPU_FP16_TO_FP32(b.d)), vf_load_i8(b.qs + j % QK8_0)));
    }
}

static void blocks_to_float(const block_q4_0 * x, int64_t n, float * y) {
    constexpr int N_HALF = QK4_0 / 2;
    for (; n > 0; n -= QK4_0, x++, y += QK4_0) {
        const vf d = vf_set(GGML_CPU_FP16_TO_FP32(x->d));
        for (int j = 0; j < N_HALF; j += VF_N) {
            vf lo, hi;
            vf_load_i4(x->qs + j, lo, hi);
            vf_store(y + j, vf_mul(d, lo));
            vf_store(y + j + N_HALF, vf_mul(d, hi));
        }
    }
}

static void to_float(ggml_type type, const char * row, int64_t n, float * y) {
    switch (type) {
        case GGML_TYPE_F32: memcpy(y, row, n * sizeof(float)); break;
        case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, y, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) row, y, n); break;
        case GGML_TYPE_Q8_0: blocks_to_float((const block_q8_0 *) row, n, y); break;
        case GGML_TYPE_Q4_0: blocks_to_float((const block_q4_0 *) row, n, y); break;
        default: ggml_get_type_traits(type)->to_float(row, y, n);
    }
}

// A tile of one head of K or V, x its first row; the tile after it, if there is one, is asked for.
static void tile_to_float(const ggml_tensor * kv, const char * x, int n_cells, bool has_next, float * y) {
    const int64_t n       = kv->ne[0];
    const size_t  n_bytes = ggml_row_size(kv->type, n);
    for (int c = 0; c < n_cells; c++) {
        to_float(kv->type, x + c * kv->nb[1], n, y + c * n);
        if (has_next) {
            fetch_bytes(x + (CELLS + c) * kv->nb[1], n_bytes);
        }
    }
}

enum seen { ALL, NONE, SOME };

// How many of n_cells cells some columns see.
static seen cells_seen(const ggml_fp16_t * const * mask, int n_columns, int64_t first, int n_cells) {
    uint16_t bits = 0;
    for (int i = 0; i < n_columns; i++) {
        for (int c = 0; c < n_cells; c++) {
            bits |= mask[i][first + c];
        }
    }
    if (bits == 0) {
        return ALL;
    }
    for (int i = 0; i < n_columns; i++) {
        const ggml_fp16_t * m = mask[i] + first;
        if (std::any_of(m, m + n_cells, [](ggml_fp16_t x) { return x != 0xFC00; })) { // -inf
            return SOME;
        }
    }
    return NONE;
}

// The work on NV vectors of columns and one tile.
template <int NV>
struct panel {
    static constexpr int N    = NV * VF_N;
    static constexpr int ROWS = N_ROWS * N_VECTORS / NV;

    // out[i] = shrink * out[i] + sum over j < n_terms of x(i, j) * y[j], i < n_out; no shrink: nothing was in out
    template <class X>
    static ALWAYS_INLINE void multiply(int n_out, int n_terms, X && x, const float * y, const vf * shrink,
                                       float * out) {
        for_parts<ROWS>(n_out, [&](auto n_rows, int first) {
            vf sum[n_rows][NV];
            for (int i = 0; i < n_rows; i++) {
                for (int r = 0; r < NV; r++) {
                    sum[i][r] = shrink ? vf_mul(vf_load(out + (first + i) * N + r * VF_N), shrink[r]) : vf_zero();
                }
            }
            for (int j = 0; j < n_terms; j++) {
                vf b[NV];
                for (int r = 0; r < NV; r++) {
                    b[r] = vf_load(y + j * N + r * VF_N);
                }
                for (int i = 0; i < n_rows; i++) {
                    const vf a = vf_set(x(first + i, j));
                    for (int r = 0; r < NV; r++) {
                        sum[i][r] = vf_fma(a, b[r], sum[i][r]);
                    }
                }
            }
            for (int i = 0; i < n_rows; i++) {
                for (int r = 0; r < NV; r++) {
                    vf_store(out + (first + i) * N + r * VF_N, sum[i][r]);
                }
            }
        });
    }

    // Scores become weights, M and S go on. shrink: what the sums so far are worth now.
    static void soft_max(int n_cells, const float * bias, float * scores, float * M, float * S, vf * shrink) {
        for (int r = 0; r < NV; r++) {
            float *  s   = scores + r * VF_N;
            const vf old = vf_load(M + r * VF_N);
            vf       max = old;
            for (int c = 0; c < n_cells; c++) {
                if (bias) {
                    vf_store(s + c * N, vf_add(vf_load(s + c * N), vf_load(bias + c * N + r * VF_N)));
                }
                max = vf_max(max, vf_load(s + c * N));
            }
            vf_store(M + r * VF_N, max);
            max = vf_max(max, vf_set(-FLT_MAX)); // of a row that has seen nothing yet: no weights, not -inf - -inf

            vf sum = vf_zero();
            for (int c = 0; c < n_cells; c++) {
                const vf weight = vf_exp(vf_sub(vf_load(s + c * N), max));
                vf_store(s + c * N, weight);
                sum = vf_add(sum, weight);
            }
            shrink[r] = vf_exp(vf_sub(old, max));
            vf_store(S + r * VF_N, vf_fma(vf_load(S + r * VF_N), shrink[r], sum));
        }
    }

    static void add_tile(const attn_node & a, const unit_memory & mem, int n_cells, const float * q, const float * bias,
                         float * M, float * S, float * out) {
        const int n_k = a.n_embd_k;
        const int n_v = a.n_embd_v;
        vf        shrink[NV];
        multiply(n_cells, n_k, [&](int c, int j) { return mem.k[c * n_k + j]; }, q, nullptr, mem.scores);
        soft_max(n_cells, bias, mem.scores, M, S, shrink);
        multiply(n_v, n_cells, [&](int j, int c) { return mem.v[c * n_v + j]; }, mem.scores, shrink, out);
    }
};

// The columns from `first` on, of one stream and one head of K and V.
static void attn_prefill_unit(const attn_prefill & a, int64_t stream, int64_t head_kv, int64_t first, char * work) {
    const unit_memory mem(a, work);
    const int         n_columns = std::min(a.unit_columns, a.n_columns - first);

    const char * k = a.cache(a.k, stream) + head_kv * a.k->nb[2];
    const char * v = a.cache(a.v, stream) + head_kv * a.v->nb[2];

    const auto token = [&](int i) {
        return (first + i) % a.n_tokens;
    };
    const auto head = [&](int i) {
        return head_kv * (a.n_head / a.n_head_kv) + (first + i) / a.n_tokens;
    };
    // columns of the panel that begins with this one: all its vectors
    const auto width = [&](int p) {
        return n_columns - p > VF_N ? +PANEL : +VF_N;
    };
    // where the values of column i begin, width(p) apart, if each has n_embd
    const auto at = [&](int i, int64_t n_embd) {
        return i / PANEL * PANEL * n_embd + i % PANEL;
    };

    float               M[COLUMNS];
    float               S[COLUMNS];
    const ggml_fp16_t * mask[COLUMNS];
    std::fill(M, M + COLUMNS, -INFINITY);
    std::fill(S, S + COLUMNS, 0.0f);
    std::fill(mem.q, mem.q + COLUMNS * a.n_embd_k, 0.0f);
    std::fill(mem.out, mem.out + COLUMNS * a.n_embd_v, 0.0f);
    for (int i = 0; i < n_columns; i++) {
        const float * from   = a.query(token(i), head(i), stream);
        float *       to     = mem.q + at(i, a.n_embd_k);
        const int     stride = width(i / PANEL * PANEL);
        for (int64_t j = 0; j < a.n_embd_k; j++) {
            to[j * stride] = from[j] * a.scale;
        }
        mask[i] = a.mask_row(token(i), stream);
    }

    for (int64_t cell = 0; cell < a.n_kv; cell += CELLS) {
        const int n_cells  = std::min<int64_t>(CELLS, a.n_kv - cell);
        bool      is_float = false;
        for (int p = 0; p < n_columns; p += PANEL) {
            const int  n    = std::min<int>(PANEL, n_columns - p);
            const seen seen = a.mask ? cells_seen(mask + p, n, cell, n_cells) : ALL;
            if (seen == NONE) {
                continue;
            }
            if (!is_float) {
                // the tile after this one has as many rows, or fewer
                const bool has_next = cell + CELLS + n_cells <= a.n_kv;
                tile_to_float(a.k, k + cell * a.k->nb[1], n_cells, has_next, mem.k);
                tile_to_float(a.v, v + cell * a.v->nb[1], n_cells, has_next, mem.v);
                is_float = true;
            }
            const float * bias = nullptr;
            if (seen == SOME) {
                bias = mem.bias;
                std::fill(mem.bias, mem.bias + n_cells * width(p), 0.0f);
                for (int i = 0; i < n; i++) {
                    for (int c = 0; c < n_cells; c++) {
                        mem.bias[c * width(p) + i] = GGML_CPU_FP16_TO_FP32(mask[p + i][cell + c]);
                    }
                }
            }
            const auto add_tile = width(p) == PANEL ? panel<N_VECTORS>::add_tile : panel<1>::add_tile;
            add_tile(a, mem, n_cells, mem.q + at(p, a.n_embd_k), bias, M + p, S + p, mem.out + at(p, a.n_embd_v));
        }
    }

    for (int i = 0; i < n_columns; i++) {
        const float * from   = mem.out + at(i, a.n_embd_v);
        float *       to     = a.out(token(i), head(i), stream);
        const int     stride = width(i / PANEL * PANEL);
        const float   weight = S[i] == 0.0f ? 0.0f : 1.0f / S[i];
        for (int64_t j = 0; j < a.n_embd_v; j++) {
            to[j] = from[j * stride] * weight;
        }
    }
}

bool melt_attn_prefill(const ggml_compute_params * params, ggml_tensor * dst) {
    attn_prefill a;
    if (!attn_prefill_init(a, dst, params->nth)) {
        return false;
    }
    // each thread begins with the unit of its own number, then takes whatever is next
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    char *        work    = (char *) params->wdata + params->ith * unit_memory::n_bytes(a);
    const int64_t n_units = a.n_streams * a.n_head_kv * a.n_units;
    for (int64_t i = params->ith; i < n_units; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i_head = i / a.n_units;
        attn_prefill_unit(a, i_head / a.n_head_kv, i_head % a.n_head_kv, i % a.n_units * a.unit_columns, work);
    }
    return true;
}
