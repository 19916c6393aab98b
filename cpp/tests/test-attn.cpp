// Our attention against ggml's own kernels, for CPUs that Python does not run on: cross-compile it, run it under
// an emulator. tests/test_attn.py tests more, and against float64. Exit code 0: all within the limits.

#include "attn.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

struct test_case {
    ggml_type type;
    int       head_size, n_head, n_head_kv, n_kv, n_tokens, n_streams, n_threads;
};

static uint32_t seed = 1;

static float uniform() { // -1 to 1
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) / 8388608.0f - 1.0f;
}

static ggml_tensor * random_tensor(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2,
                                   int64_t ne3) {
    ggml_tensor *      x = ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    std::vector<float> values(ggml_nelements(x));
    for (float & value : values) {
        value = uniform();
    }
    ggml_quantize_chunk(type, values.data(), x->data, 0, ggml_nrows(x), ne0, nullptr);
    return ggml_permute(ctx, x, 0, 2, 1, 3);
}

static std::vector<float> compute(ggml_context * ctx, ggml_cgraph * graph, ggml_tensor * out, int n_threads,
                                  bool ours) {
    melt_edge_attn_enable(ours);
    ggml_graph_compute_with_ctx(ctx, graph, n_threads);
    const float * data = (const float *) out->data;
    return std::vector<float>(data, data + ggml_nelements(out));
}

static double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0.0;
    double power = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        power += b[i] * b[i];
    }
    return error / power;
}

static bool passes(const test_case & t) {
    ggml_context * ctx = ggml_init({(size_t) 256 << 20, nullptr, false});
    ggml_tensor *  q   = random_tensor(ctx, GGML_TYPE_F32, t.head_size, t.n_head, t.n_tokens, t.n_streams);
    ggml_tensor *  k   = random_tensor(ctx, t.type, t.head_size, t.n_head_kv, t.n_kv, t.n_streams);
    ggml_tensor *  v   = random_tensor(ctx, t.type, t.head_size, t.n_head_kv, t.n_kv, t.n_streams);

    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, t.n_kv, t.n_tokens, 1, t.n_streams);
    for (int64_t i = 0; i < ggml_nelements(mask); i++) {
        ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(i % t.n_kv == 0 || uniform() > -0.4f ? 0.0f : -INFINITY);
    }
    ggml_tensor * out   = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f / sqrtf(t.head_size), 0.0f, 0.0f);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);

    const std::vector<float> ours   = compute(ctx, graph, out, t.n_threads, true);
    const std::vector<float> theirs = compute(ctx, graph, out, t.n_threads, false);
    memset(v->data, 0, ggml_row_size(t.type, t.head_size)); // one row: it must be noticed
    const std::vector<float> other = compute(ctx, graph, out, t.n_threads, true);
    ggml_free(ctx);

    // ggml sums an f16 V in f16, and rounds the query to bf16 for a bf16 K; to 8 bits where we do so for few tokens
    const bool   is_rounded = ggml_is_quantized(t.type) && t.n_tokens > 5;
    const double limit      = t.type == GGML_TYPE_BF16 ? 1e-3 : t.type == GGML_TYPE_F16 || is_rounded ? 1e-4 : 1e-8;
    const double error      = nmse(ours, theirs);
    const bool   ok         = error < limit && nmse(other, ours) > error;
    printf("%s %-5s head size %3d, heads %d:%d, %4d cells, %d tokens, %d streams, %d threads: %.1e\n",
           ok ? "ok  " : "FAIL", ggml_type_name(t.type), t.head_size, t.n_head, t.n_head_kv, t.n_kv, t.n_tokens,
           t.n_streams, t.n_threads, error);
    return ok;
}

int main() {
    bool ok = true;
    for (ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        ok &= passes({type, 32, 1, 1, 1, 1, 1, 1});
        ok &= passes({type, 64, 4, 4, 33, 1, 1, 2});
        ok &= passes({type, 128, 4, 2, 257, 1, 1, 2});
        ok &= passes({type, 96, 8, 2, 65, 2, 1, 3});
        ok &= passes({type, 256, 8, 1, 100, 1, 2, 4});
        ok &= passes({type, 64, 7, 1, 1000, 3, 1, 2});
        ok &= passes({type, 64, 4, 4, 33, 6, 1, 2});
        ok &= passes({type, 128, 4, 2, 257, 70, 1, 2});
        ok &= passes({type, 96, 8, 2, 65, 20, 2, 3});
        ok &= passes({type, 64, 7, 1, 1000, 50, 1, 4});
    }
    return ok ? 0 : 1;
}
