// How close one token's attention comes to the memory's speed: our kernel, ggml's, and a plain read of the same bytes
// by the same threads, in turn, each over caches that are in no processor cache any more. The fastest tenth of many
// samples of a millisecond counts, so other work on the machine disturbs little. `make tools` builds it; arguments:
//   [threads=2] [heads=16] [kv_heads=16] [head_size=128] [rows=1] [seconds=2] [cells...]

#include "attn.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

static const size_t ALL_BYTES = 512u << 20; // of the caches that are used in turn

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// each thread reads its share of K and of V
static void read_all(ggml_tensor * dst, int ith, int nth, void * sink) {
    uint64_t sum[16] = {};
    for (int i = 0; i < 2; i++) {
        const uint64_t * data = (const uint64_t *) dst->src[i]->data;
        const size_t     n    = ggml_nbytes(dst->src[i]) / sizeof(uint64_t);
        for (size_t j = n * ith / nth; j + 16 <= n * (ith + 1) / nth; j += 16) {
            for (int k = 0; k < 16; k++) {
                sum[k] += data[j + k];
            }
        }
    }
    for (uint64_t x : sum) {
        ((volatile uint64_t *) sink)[8 * ith] = x;
    }
}

static ggml_tensor * random_cache(ggml_context * ctx, ggml_type type, int head_size, int n_head_kv, int64_t n_kv) {
    ggml_tensor *      x = ggml_new_tensor_3d(ctx, type, head_size, n_head_kv, n_kv);
    std::vector<float> row(head_size * n_head_kv);
    uint32_t           seed = 1;
    for (int64_t i = 0; i < n_kv; i++) {
        for (float & value : row) {
            seed  = seed * 1664525u + 1013904223u;
            value = (seed >> 8) / 8388608.0f - 1.0f;
        }
        ggml_quantize_chunk(type, row.data(), (char *) x->data + i * x->nb[2], 0, n_head_kv, head_size, nullptr);
    }
    return x;
}

static ggml_cgraph * graph_of(ggml_context * ctx, ggml_tensor * node) {
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 16, false);
    ggml_build_forward_expand(graph, node);
    return graph;
}

// seconds that the fastest tenth of the samples took at most
static double fast(std::vector<double> & samples) {
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 10];
}

int main(int argc, char ** argv) {
    const auto arg = [&](int i, int other) {
        return argc > i ? atoi(argv[i]) : other;
    };
    const int            n_threads = arg(1, 2);
    const int            n_head    = arg(2, 16);
    const int            n_head_kv = arg(3, 16);
    const int            head_size = arg(4, 128);
    const int            n_rows    = arg(5, 1);
    const int            seconds   = arg(6, 2);
    std::vector<int64_t> lengths;
    for (int i = 7; i < argc; i++) {
        lengths.push_back(atoi(argv[i]));
    }
    if (lengths.empty()) {
        lengths = {256, 2048, 8192};
    }

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    std::vector<uint64_t> sink(8 * 512);
    printf("%d threads, %d heads of %d, %d of K and V, %d query rows\n", n_threads, n_head, head_size, n_head_kv,
           n_rows);
    printf("type   cells   read ms  GB/s    ours ms  of read    ggml ms  of read\n");
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        for (int64_t n_kv : lengths) {
            const size_t   bytes    = 2 * ggml_row_size(type, head_size) * n_head_kv * n_kv;
            const int      n_caches = std::max<int>(2, ALL_BYTES / bytes);
            const size_t   n_out    = sizeof(float) * head_size * n_head * n_rows;
            ggml_context * ctx      = ggml_init({n_caches * (bytes + n_out) + ((size_t) 64 << 20), nullptr, false});
            ggml_tensor *  q        = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_size, n_rows, n_head);
            ggml_tensor *  mask     = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_rows);
            ggml_set_f32(q, 0.5f);
            ggml_set_zero(mask);

            std::vector<ggml_cgraph *> read, attention;
            for (int i = 0; i < n_caches; i++) {
                ggml_tensor * kv[2];
                for (ggml_tensor *& x : kv) {
                    x = random_cache(ctx, type, head_size, n_head_kv, n_kv);
                }
                read.push_back(graph_of(ctx, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, kv, 2, read_all,
                                                            GGML_N_TASKS_MAX, sink.data())));
                ggml_tensor * k = ggml_permute(ctx, kv[0], 0, 2, 1, 3);
                ggml_tensor * v = ggml_permute(ctx, kv[1], 0, 2, 1, 3);
                attention.push_back(graph_of(ctx, ggml_flash_attn_ext(ctx, q, k, v, mask, 0.1f, 0.0f, 0.0f)));
            }

            std::vector<double> samples[3]; // read, ours, ggml's
            const double        until = now() + seconds;
            for (size_t i = 0; now() < until || samples[2].size() < 3; i++) {
                const int kind = i % 3;
                melt_edge_attn_enable(kind == 1);
                ggml_cgraph * graph = (kind == 0 ? read : attention)[i % n_caches];
                const double  start = now();
                ggml_backend_graph_compute(backend, graph);
                samples[kind].push_back(now() - start);
            }
            const double t[3] = {fast(samples[0]), fast(samples[1]), fast(samples[2])};
            printf("%-5s %6d  %8.3f %5.1f   %8.3f  %6.1f %%   %8.3f  %6.1f %%\n", ggml_type_name(type), (int) n_kv,
                   t[0] * 1e3, bytes / t[0] / 1e9, t[1] * 1e3, 100 * t[0] / t[1], t[2] * 1e3, 100 * t[0] / t[2]);
            fflush(stdout);
            ggml_free(ctx);
        }
    }
    ggml_backend_free(backend);
    return 0;
}
