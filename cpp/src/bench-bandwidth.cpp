// The speed at which this machine's cores read memory: what decoding is compared with by `melt-edge bench`.

#include "huge-pages.h"
#include "llama.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

extern "C" {

// Memory that is read, each thread its own part.
struct melt_edge_bandwidth;

// n_bytes has to be many times the caches. Null if the memory or the threads cannot be had.
LLAMA_API struct melt_edge_bandwidth * melt_edge_bandwidth_new(uint64_t n_bytes, uint32_t n_threads);
LLAMA_API void                         melt_edge_bandwidth_free(struct melt_edge_bandwidth * bandwidth);

// Bytes per second of reading all of it, by all threads at the same time: the median of n_passes, since new threads may
// share a core at first. 0 if there are no threads for it.
LLAMA_API double melt_edge_bandwidth_read(struct melt_edge_bandwidth * bandwidth, uint32_t n_passes);

} // extern "C"

using bench_clock = std::chrono::steady_clock;

static constexpr size_t N_LANES = 16; // independent sums, so that loads and not additions are waited for

struct bench_part {
    std::unique_ptr<uint64_t[]>          data;
    std::vector<bench_clock::time_point> start; // of each pass
    std::vector<bench_clock::time_point> end;
    volatile uint64_t                    sum = 0; // kept, so that the reads are not dropped by the compiler
};

struct melt_edge_bandwidth {
    std::vector<bench_part> parts;
    size_t                  n_part; // numbers in each
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

// Each part's work in a thread of its own, n_passes times; a pass begins when all threads are there. Throws what
// std::thread throws.
template <class F>
static void bench_run(std::vector<bench_part> & parts, uint32_t n_passes, F && work) {
    std::atomic<size_t>      n_arrived{0};
    std::atomic<bool>        stopped{false};
    std::vector<std::thread> threads;
    try {
        for (bench_part & part : parts) {
            threads.emplace_back([&, n_parts = parts.size()] {
                for (uint32_t pass = 0; pass < n_passes; ++pass) {
                    ++n_arrived;
                    while (n_arrived < (pass + 1) * n_parts && !stopped) {
                        std::this_thread::yield();
                    }
                    work(part, pass);
                }
            });
        }
    } catch (const std::exception &) {
        stopped = true;
        for (std::thread & thread : threads) {
            thread.join();
        }
        throw;
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

melt_edge_bandwidth * melt_edge_bandwidth_new(uint64_t n_bytes, uint32_t n_threads) {
    try {
        auto bandwidth = std::make_unique<melt_edge_bandwidth>();
        bandwidth->parts.resize(std::max(n_threads, 1u));

        const size_t n = n_bytes / sizeof(uint64_t) / bandwidth->parts.size() / N_LANES * N_LANES;
        for (bench_part & part : bandwidth->parts) {
            part.data.reset(new uint64_t[n]);
            melt_ask_for_huge_pages(part.data.get(), n * sizeof(uint64_t)); // as ggml's memory, see ggml.c
        }
        // written by the thread that reads it: pages are placed where they are first touched
        bench_run(bandwidth->parts, 1, [n](bench_part & part, uint32_t) { std::fill_n(part.data.get(), n, n); });
        bandwidth->n_part = n;
        return bandwidth.release();
    } catch (const std::exception &) { // no memory, no thread
        return nullptr;
    }
}

void melt_edge_bandwidth_free(melt_edge_bandwidth * bandwidth) {
    delete bandwidth;
}

double melt_edge_bandwidth_read(melt_edge_bandwidth * bandwidth, uint32_t n_passes) {
    std::vector<bench_part> & parts = bandwidth->parts;
    try {
        for (bench_part & part : parts) {
            part.start.resize(n_passes);
            part.end.resize(n_passes);
        }
        bench_run(parts, n_passes, [n = bandwidth->n_part](bench_part & part, uint32_t pass) {
            part.start[pass] = bench_clock::now();
            part.sum         = bench_read(part.data.get(), n);
            part.end[pass]   = bench_clock::now();
        });
    } catch (const std::exception &) {
        return 0.0;
    }

    std::vector<double> seconds;
    for (uint32_t pass = 0; pass < n_passes; ++pass) {
        auto start = parts[0].start[pass];
        auto end   = parts[0].end[pass];
        for (const bench_part & part : parts) {
            start = std::min(start, part.start[pass]);
            end   = std::max(end, part.end[pass]);
        }
        seconds.push_back(std::chrono::duration<double>(end - start).count());
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds.empty() ? 0.0 : seconds[seconds.size() / 2];
    return median > 0.0 ? double(parts.size()) * bandwidth->n_part * sizeof(uint64_t) / median : 0.0;
}
