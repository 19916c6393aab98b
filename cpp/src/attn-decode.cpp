// Decode attention at the speed of memory. A row of the cache holds one token's K (or V) of all heads, so each thread
// walks its own range of rows front to back, once, for all heads, and keeps a partial softmax per head: running
// maximum M, sum S and the weighted sum of V (online softmax, arXiv 1805.02867). After a barrier the threads' partial
// results are merged. ggml's kernels walk the whole cache once per head, in steps of one head's share of a row.

#include "attn-decode.h"

#include "attn-decode-kernels.h"
#include "attn-node.h"
#include "ggml-cpu.h"
#include "one-token.h"
#include "ops.h"
#include "vec.h"

#include <algorithm>
#include <cmath>

enum {
    MAX_ROWS   = 32,        // query rows; above, the partial results take more memory than they are worth
    TILE_BYTES = 160 << 10, // of a quantized V, which is fetched into the L2 cache while K is read
    PAGE       = 4096, // a thread's processor fetches ahead as far as here, and takes what it meets from the others
};

// The kernel of K's type; none: ggml's own products are used.
static dot_cells_t get_dot_cells(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return dot_cells_in_order<dot_float<load_f32>>;
        case GGML_TYPE_F16: return dot_cells_in_order<dot_float<load_f16>>;
        case GGML_TYPE_BF16: return dot_cells_in_order<dot_float<load_bf16>>;
#ifdef MELT_Q_BLOCKS
        case GGML_TYPE_Q8_0: return dot_cells_in_order<dot_blocks<block_8>>;
        case GGML_TYPE_Q4_0: return dot_cells_in_order<dot_blocks<block_4>>;
#endif
        default: return nullptr;
    }
}

// The kernel of V's type; none: rows are made float first.
static add_cells_t get_add_cells(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return add_cells_float<load_f32>;
        case GGML_TYPE_F16: return add_cells_float<load_f16>;
        case GGML_TYPE_BF16: return add_cells_float<load_bf16>;
        case GGML_TYPE_Q8_0: return add_cells_q8_0;
        case GGML_TYPE_Q4_0: return add_cells_q4_0;
        default: return nullptr;
    }
}

// A node, and where each thread keeps its things in the work buffer.
struct attn_decode : attn_node {
    int64_t n_rows; // query rows of all streams

    dot_cells_t                  dot;
    add_cells_t                  add;
    const ggml_type_traits_cpu * k_traits;
    const ggml_type_traits_cpu * q_traits; // of the type that K's products take

    int    n_tile;       // cells of a tile
    size_t q_bytes;      // a head's query as the products want it; 0: as it is
    size_t q_tmp_bytes;  // while it is made
    size_t part_floats;  // M, S and the weighted sum of all heads, for one row and thread
    size_t parts_at;     // bytes: after a thread's scores, queries, float rows of V
    size_t thread_bytes; // with the parts of all rows
};

static size_t pad_line(size_t n_bytes) {
    return GGML_PAD(n_bytes, CACHE_LINE_SIZE);
}

static bool attn_decode_init(attn_decode & a, const ggml_tensor * dst) {
    if (!a.init(dst)) {
        return false;
    }
    a.n_rows = a.n_tokens * a.n_streams;
    if (a.n_rows > MAX_ROWS) {
        return false;
    }
    a.dot      = get_dot_cells(a.k->type);
    a.add      = get_add_cells(a.v->type);
    a.k_traits = ggml_get_type_traits_cpu(a.k->type);
    a.q_traits = ggml_get_type_traits_cpu(a.k_traits->vec_dot_type);
    if ((!a.dot && !a.k_traits->vec_dot) || (!a.add && !ggml_get_type_traits(a.v->type)->to_float)) {
        return false;
    }

    // a tile of a quantized V has to stay in the L2 cache until it is used
    a.n_tile = TILE;
    if (ggml_is_quantized(a.v->type)) {
        const size_t row_bytes = ggml_row_size(a.v->type, a.n_embd_v) * a.n_head_kv;
        a.n_tile               = std::clamp<size_t>(TILE_BYTES / row_bytes / N_CELLS * N_CELLS, N_CELLS, TILE_Q);
    }

    a.q_bytes = a.q_tmp_bytes = 0;
    if (ggml_is_quantized(a.k->type)) {
        a.q_bytes = ggml_row_size(a.k_traits->vec_dot_type, a.n_embd_k);
#ifdef MELT_Q_BLOCKS
        if (a.dot) {
            a.q_tmp_bytes = a.q_bytes;
            a.q_bytes     = a.n_embd_k / 32 * sizeof(q_block);
        }
#endif
    }
    const size_t v_bytes = a.add ? 0 : sizeof(float) * a.n_tile * a.n_embd_v;
    a.part_floats        = pad_line(sizeof(float) * a.n_head * (2 + a.n_embd_v)) / sizeof(float);
    a.parts_at = pad_line(sizeof(float) * a.n_head * TILE) + pad_line(a.n_head * a.q_bytes) + pad_line(a.q_tmp_bytes) +
                 pad_line(v_bytes);
    a.thread_bytes = GGML_PAD(a.parts_at + a.n_rows * a.part_floats * sizeof(float), PAGE);
    return true;
}

size_t melt_attn_decode_work_bytes(const ggml_tensor * dst, int n_threads) {
    attn_decode a;
    if (!attn_decode_init(a, dst)) {
        return 0;
    }
    return PAGE + n_threads * a.thread_bytes;
}

// The cells that one row may see, in order.
struct open_cells {
    const ggml_fp16_t * mask; // none: all
    int64_t             next;

    bool is_open(int64_t cell) const { return mask == nullptr || mask[cell] != 0xFC00; } // -inf

    // of the next n cells
    int64_t count(int64_t n) const {
        if (mask == nullptr) {
            return n;
        }
        int32_t n_open = 0;
        for (int64_t i = next; i < next + n; i++) {
            n_open += is_open(i);
        }
        return n_open;
    }

    void skip(int64_t n) {
        while (n >= TILE) { // there are as many cells, at least
            n -= count(TILE);
            next += TILE;
        }
        take(n, nullptr);
    }

    // writes n of them, or skips them
    void take(int64_t n, int64_t * cells) {
        for (int64_t i = 0; i < n; next++) {
            if (is_open(next)) {
                if (cells) {
                    cells[i] = next;
                }
                i++;
            }
        }
    }
};

struct tile {
    int     n_cells;
    int     n_padded; // with rows whose weight is 0
    int64_t cells[TILE];

    void take(open_cells & open, int64_t n) {
        n_cells  = n;
        n_padded = GGML_PAD(n, N_CELLS);
        open.take(n, cells);
        std::fill(cells + n_cells, cells + n_padded, cells[n - 1]);
    }
};

// s = scale * s + bias; returns the maximum
static float scale_scores(int n, float * s, float scale, const float * bias) {
    vf    max  = vf_set(-INFINITY);
    float tail = -INFINITY;
    int   c    = 0;
    for (; c + VF_N <= n; c += VF_N) {
        const vf x = vf_fma(vf_load(s + c), vf_set(scale), vf_load(bias + c));
        max        = vf_max(max, x);
        vf_store(s + c, x);
    }
    for (; c < n; c++) {
        s[c] = s[c] * scale + bias[c];
        tail = std::max(tail, s[c]);
    }
    return std::max(tail, vf_hmax(max));
}

// One thread's share of one query row. work: parts_at bytes. part: M[n_head], S[n_head], weighted sums
// [n_head][n_embd_v].
static void attn_decode_row(const attn_decode & a, int64_t row, int ith, int nth, char * work, float * part) {
    const int64_t i1  = row % a.n_tokens;
    const int64_t i3  = row / a.n_tokens;
    const int     n_q = a.n_head / a.n_head_kv; // query heads that share one of K and V

    const char * k = a.cache(a.k, i3);
    const char * v = a.cache(a.v, i3);

    open_cells open = {a.mask_row(i1, i3), 0};

    float * score = (float *) work; // [n_head][TILE]
    char *  q_mem = work + pad_line(sizeof(float) * a.n_head * TILE);
    char *  q_tmp = q_mem + pad_line(a.n_head * a.q_bytes);
    float * v_mem = (float *) (q_tmp + pad_line(a.q_tmp_bytes));

    const char * q        = (const char *) a.query(i1, 0, i3);
    size_t       q_stride = a.q->nb[2];
    if (a.q_bytes) {
        for (int64_t h = 0; h < a.n_head; h++) {
            const float * from = (const float *) (q + h * q_stride);
            char *        to   = q_mem + h * a.q_bytes;
            a.q_traits->from_float(from, a.dot ? q_tmp : to, a.n_embd_k);
#ifdef MELT_Q_BLOCKS
            if (a.dot) {
                q_blocks_from_q8_0(a.n_embd_k, a.k->type == GGML_TYPE_Q8_0 ? block_8::OFFSET : block_4::OFFSET,
                                   (const block_q8_0 *) q_tmp, (q_block *) to);
            }
#endif
        }
        q        = q_mem;
        q_stride = a.q_bytes;
    }

    float * M   = part;
    float * S   = part + a.n_head;
    float * sum = part + 2 * a.n_head;
    std::fill(M, M + a.n_head, -INFINITY);
    std::fill(S, sum + a.n_head * a.n_embd_v, 0.0f);

    // the threads share the cells that this row may see, not the cells that there are
    const int64_t n_open = open.count(a.n_kv);
    const int64_t first  = n_open * ith / nth;
    int64_t       left   = n_open * (ith + 1) / nth - first;
    open.skip(first);

    const size_t v_bytes = ggml_row_size(a.v->type, a.n_embd_v); // of one head
    const bool   fetch_v = ggml_is_quantized(a.v->type); // with K; else the first rows, which ask for the others
    const char * k_rows[TILE];
    const char * v_rows[TILE];
    for (tile now; left > 0; left -= now.n_cells) {
        now.take(open, std::min<int64_t>(left, a.n_tile));
        for (int c = 0; c < now.n_padded; c++) {
            k_rows[c] = k + now.cells[c] * a.k->nb[1];
            v_rows[c] = v + now.cells[c] * a.v->nb[1];
        }

        for (int c = 0; c < now.n_padded; c += N_CELLS) {
            if (a.dot) {
                const cache_rows part = {k_rows + c, a.k->nb[2], (int) a.n_head_kv, (int) a.n_embd_k};
                a.dot(part, q, q_stride, n_q, score + c, {v_rows + c, a.v->nb[2], fetch_v ? v_bytes : 0});
                continue;
            }
            for (int64_t h = 0; h < a.n_head; h++) {
                for (int j = c; j < c + N_CELLS; j++) {
                    a.k_traits->vec_dot(a.n_embd_k, score + h * TILE + j, 0, k_rows[j] + h / n_q * a.k->nb[2], 0,
                                        q + h * q_stride, 0, 1);
                }
            }
        }

        float bias[TILE]; // the mask, and no weight for the rows that fill up
        for (int c = 0; c < now.n_padded; c++) {
            bias[c] = open.mask ? GGML_CPU_FP16_TO_FP32(open.mask[now.cells[c]]) : 0.0f;
        }
        std::fill(bias + now.n_cells, bias + now.n_padded, -INFINITY);
        const next_rows first_v = {v_rows, a.v->nb[2], v_bytes};
        for (int64_t h = 0; h < a.n_head; h++) {
            if (!fetch_v) {
                first_v.fetch_part(h, a.n_head, a.n_head_kv);
            }
            float *     s   = score + h * TILE;
            const float max = std::max(M[h], scale_scores(now.n_padded, s, a.scale, bias));
            if (max > M[h]) {
                const float shrink = expf(M[h] - max);
                ggml_vec_scale_f32(a.n_embd_v, sum + h * a.n_embd_v, shrink);
                S[h] *= shrink;
                M[h] = max;
            }
            S[h] += ggml_vec_soft_max_f32(now.n_padded, s, s, max);
        }

        if (a.add) {
            a.add({v_rows, a.v->nb[2], (int) a.n_head_kv, (int) a.n_embd_v}, now.n_padded, score, n_q, sum);
            continue;
        }
        for (int64_t h = 0; h < a.n_head_kv; h++) {
            const char * rows[TILE];
            for (int c = 0; c < now.n_padded; c++) {
                float * row = v_mem + c * a.n_embd_v;
                ggml_get_type_traits(a.v->type)->to_float(v_rows[c] + h * a.v->nb[2], row, a.n_embd_v);
                rows[c] = (const char *) row;
            }
            add_cells_float<load_f32>({rows, 0, 1, (int) a.n_embd_v}, now.n_padded, score + h * n_q * TILE, n_q,
                                      sum + h * n_q * a.n_embd_v);
        }
    }
}

// Merges the threads' partial results of one head of one row. part_0: that of thread 0.
static void attn_decode_merge(const attn_decode & a, const float * part_0, int nth, int64_t h, float * out) {
    const size_t stride = a.thread_bytes / sizeof(float);
    float        M      = -INFINITY;
    for (int t = 0; t < nth; t++) {
        M = std::max(M, part_0[t * stride + h]);
    }
    std::fill(out, out + a.n_embd_v, 0.0f);
    float S = 0.0f;
    for (int t = 0; t < nth; t++) {
        const float * part = part_0 + t * stride;
        if (part[a.n_head + h] == 0.0f) {
            continue; // a thread without cells
        }
        const float weight = expf(part[h] - M);
        ggml_vec_mad_f32(a.n_embd_v, out, part + 2 * a.n_head + h * a.n_embd_v, weight);
        S += part[a.n_head + h] * weight;
    }
    ggml_vec_scale_f32(a.n_embd_v, out, S == 0.0f ? 0.0f : 1.0f / S);
}

bool melt_attn_decode(const ggml_compute_params * params, ggml_tensor * dst) {
    attn_decode a;
    if (!attn_decode_init(a, dst)) {
        return false;
    }
    const int ith  = params->ith;
    const int nth  = params->nth;
    char *    work = (char *) GGML_PAD((uintptr_t) params->wdata, PAGE); // [nth][thread_bytes]

    const auto part = [&](int thread, int64_t row) {
        return (float *) (work + thread * a.thread_bytes + a.parts_at) + row * a.part_floats;
    };
    for (int64_t row = 0; row < a.n_rows; row++) {
        attn_decode_row(a, row, ith, nth, work + ith * a.thread_bytes, part(ith, row));
    }
    melt_meet(params);

    for (int64_t i = ith; i < a.n_rows * a.n_head; i += nth) {
        const int64_t row = i / a.n_head;
        const int64_t h   = i % a.n_head;
        attn_decode_merge(a, part(0, row), nth, h, a.out(row % a.n_tokens, h, row / a.n_tokens));
    }
    return true;
}
