// How close one token's attention comes to the memory's speed: our kernel, then ggml's, beside a plain read by the
// same number of threads, in one run. Build with -DMELT_BUILD_TOOLS=ON, target bench-attn-decode; arguments:
//   [threads=2] [heads=16] [kv_heads=16] [head_size=128] [rows=1] [MiB of all layers=256] [cells...]

#include "attn-decode.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// GB/s of n_threads that each read their share of a buffer, the best of several rounds
static double read_bandwidth(int n_threads, size_t n_bytes) {
    std::vector<uint64_t> data(n_bytes / sizeof(uint64_t), 1);
    std::vector<uint64_t> sums(n_threads * 8);
    double                best  = 0.0;
    const double          until = now() + 0.5;
    while (now() < until) {
        const double             start = now();
        std::vector<std::thread> threads;
        for (int t = 0; t < n_threads; t++) {
            threads.emplace_back([&, t] {
                uint64_t     s[16] = {};
                const size_t end   = data.size() * (t + 1) / n_threads;
                for (size_t i = data.size() * t / n_threads; i + 16 <= end; i += 16) {
                    for (int j = 0; j < 16; j++) {
                        s[j] += data[i + j];
                    }
                }
                for (uint64_t x : s) {
                    sums[t * 8] += x;
                }
            });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        best = std::max(best, n_bytes / (now() - start) / 1e9);
    }
    return sums[0] ? best : 0.0;
}

// Seconds for one attention over each layer's cache, the best of several rounds
static double time_graph(ggml_backend_t backend, ggml_cgraph * graph) {
    double       best  = 1e9;
    const double until = now() + 0.5;
    for (int round = 0; round < 3 || now() < until; round++) {
        const double start = now();
        ggml_backend_graph_compute(backend, graph);
        best = std::min(best, now() - start);
    }
    return best;
}

int main(int argc, char ** argv) {
    const auto arg = [&](int i, int other) {
        return argc > i ? atoi(argv[i]) : other;
    };
    const int            n_threads   = arg(1, 2);
    const int            n_head      = arg(2, 16);
    const int            n_head_kv   = arg(3, 16);
    const int            head_size   = arg(4, 128);
    const int            n_rows      = arg(5, 1);
    const size_t         cache_bytes = (size_t) arg(6, 256) << 20; // far more than the last-level cache
    std::vector<int64_t> lengths;
    for (int i = 7; i < argc; i++) {
        lengths.push_back(atoi(argv[i]));
    }
    if (lengths.empty()) {
        lengths = {256, 2048, 8192, 16384};
    }

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    const double limit = read_bandwidth(n_threads, cache_bytes);
    printf("%d threads read %.1f GB/s; %d heads of %d, %d of K and V, %d query rows\n", n_threads, limit, n_head,
           head_size, n_head_kv, n_rows);
    printf("type   cells    ours ms  GB/s  of limit    ggml ms  GB/s  of limit\n");
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        for (int64_t n_kv : lengths) {
            const size_t   row_bytes = ggml_row_size(type, head_size);
            const size_t   bytes     = 2 * row_bytes * n_head_kv * n_kv;
            const int      n_layers  = std::max<int>(1, cache_bytes / bytes);
            ggml_context * ctx =
                ggml_init({ggml_tensor_overhead() * (n_layers * 8 + 16) + ggml_graph_overhead(), nullptr, true});
            ggml_cgraph *              graph = ggml_new_graph(ctx);
            ggml_tensor *              q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_size, n_rows, n_head);
            ggml_tensor *              mask  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_rows);
            std::vector<ggml_tensor *> caches;
            for (int l = 0; l < n_layers; l++) {
                ggml_tensor * kv[2];
                for (ggml_tensor *& x : kv) {
                    caches.push_back(ggml_new_tensor_3d(ctx, type, head_size, n_head_kv, n_kv));
                    x = ggml_permute(ctx, caches.back(), 0, 2, 1, 3);
                }
                ggml_build_forward_expand(graph, ggml_flash_attn_ext(ctx, q, kv[0], kv[1], mask, 0.1f, 0.0f, 0.0f));
            }
            ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
            std::vector<float>    values(std::max<size_t>(ggml_nelements(caches[0]), ggml_nelements(q)));
            uint32_t              seed = 1;
            for (float & x : values) {
                seed = seed * 1664525u + 1013904223u;
                x    = (seed >> 8) / 8388608.0f - 1.0f;
            }
            std::vector<char> stored(ggml_nbytes(caches[0]));
            ggml_quantize_chunk(type, values.data(), stored.data(), 0, ggml_nrows(caches[0]), head_size, nullptr);
            for (ggml_tensor * cache : caches) {
                ggml_backend_tensor_set(cache, stored.data(), 0, stored.size());
            }
            ggml_backend_tensor_set(q, values.data(), 0, ggml_nbytes(q));
            ggml_backend_tensor_memset(mask, 0, 0, ggml_nbytes(mask));

            printf("%-5s %6d", ggml_type_name(type), (int) n_kv);
            for (bool ours : {true, false}) {
                melt_edge_attn_decode_enable(ours);
                const double seconds = time_graph(backend, graph) / n_layers;
                printf("   %8.3f %5.1f  %6.1f %%", seconds * 1e3, bytes / seconds / 1e9,
                       100 * bytes / seconds / 1e9 / limit);
                fflush(stdout);
            }
            printf("\n");
            ggml_backend_buffer_free(buffer);
            ggml_free(ctx);
        }
    }
    ggml_backend_free(backend);
    return 0;
}
