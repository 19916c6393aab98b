// The speed at which this machine's cores read memory: what decoding is compared with by `melt-edge bench`.

#include "huge-pages.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

extern "C" {

// Bytes per second that n_threads threads read together, each its own part of n_bytes: the best of n_passes. 0 if the
// memory cannot be had. n_bytes has to be many times the caches. Thread-safe.
LLAMA_API double melt_edge_read_bandwidth(uint64_t n_bytes, uint32_t n_threads, uint32_t n_passes);

} // extern "C"

using bench_clock = std::chrono::steady_clock;

static constexpr size_t N_LANES = 16; // independent sums, so that loads and not additions are waited for

struct bench_part {
    std::unique_ptr<uint64_t[]> data;
    bench_clock::time_point     start;
    bench_clock::time_point     end;
    uint64_t                    sum = 0; // kept, so that the reads are not dropped by the compiler
};

static uint64_t bench_read(const uint64_t * data, size_t n) {
    uint64_t sums[N_LANES] = {};
    for (size_t i = 0; i < n; i += N_LANES) {
        for (size_t j = 0; j < N_LANES; ++j) {
            sums[j] += data[i + j];
        }
    }

    uint64_t sum = 0;
    for (const uint64_t lane : sums) {
        sum += lane;
    }
    return sum;
}

static void bench_run(std::vector<bench_part> & parts, void (*work)(bench_part &, size_t), size_t n) {
    std::vector<std::thread> threads;
    for (bench_part & part : parts) {
        threads.emplace_back(work, std::ref(part), n);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static double bench_bandwidth(uint64_t n_bytes, uint32_t n_threads, uint32_t n_passes) {
    std::vector<bench_part> parts(std::max(n_threads, 1u));

    const size_t n = n_bytes / sizeof(uint64_t) / parts.size() / N_LANES * N_LANES;
    for (bench_part & part : parts) {
        part.data.reset(new uint64_t[n]);
        melt_ask_for_huge_pages(part.data.get(), n * sizeof(uint64_t)); // as ggml's memory, see ggml.c
    }

    // written by the thread that reads it: pages are placed where they are first touched
    const auto touch = [](bench_part & part, size_t n) {
        std::fill_n(part.data.get(), n, n);
    };
    const auto read = [](bench_part & part, size_t n) {
        part.start = bench_clock::now();
        part.sum += bench_read(part.data.get(), n);
        part.end = bench_clock::now();
    };

    bench_run(parts, touch, n);

    double            best = 0.0;
    volatile uint64_t sink = 0;
    for (uint32_t pass = 0; pass < n_passes; ++pass) {
        bench_run(parts, read, n);

        auto start = parts[0].start;
        auto end   = parts[0].end;
        for (const bench_part & part : parts) {
            start = std::min(start, part.start);
            end   = std::max(end, part.end);
            sink  = sink + part.sum;
        }
        const double seconds = std::chrono::duration<double>(end - start).count();
        if (seconds > 0.0) {
            best = std::max(best, double(parts.size()) * n * sizeof(uint64_t) / seconds);
        }
    }
    return best;
}

double melt_edge_read_bandwidth(uint64_t n_bytes, uint32_t n_threads, uint32_t n_passes) {
    try {
        return bench_bandwidth(n_bytes, n_threads, n_passes);
    } catch (const std::exception &) { // no memory, no thread
        return 0.0;
    }
}
