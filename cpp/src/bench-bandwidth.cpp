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

// Bytes per second of reading all of it once, by all threads at the same time. 0 if there are no threads for it.
LLAMA_API double melt_edge_bandwidth_read(struct melt_edge_bandwidth * bandwidth);

} // extern "C"

using bench_clock = std::chrono::steady_clock;

static constexpr size_t N_LANES = 16; // independent sums, so that loads and not additions are waited for

struct bench_part {
    std::unique_ptr<uint64_t[]> data;
    bench_clock::time_point     start;
    bench_clock::time_point     end;
    volatile uint64_t           sum = 0; // kept, so that the reads are not dropped by the compiler
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

// Each part's work in a thread of its own; it begins when all threads run. Throws what std::thread throws.
template <class F>
static void bench_run(std::vector<bench_part> & parts, F && work) {
    std::atomic<size_t>      n_waiting{parts.size()};
    std::vector<std::thread> threads;
    try {
        for (bench_part & part : parts) {
            threads.emplace_back([&] {
                --n_waiting;
                while (n_waiting > 0) {
                    std::this_thread::yield();
                }
                work(part);
            });
        }
    } catch (const std::exception &) {
        n_waiting = 0;
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
        bench_run(bandwidth->parts, [n](bench_part & part) { std::fill_n(part.data.get(), n, n); });
        bandwidth->n_part = n;
        return bandwidth.release();
    } catch (const std::exception &) { // no memory, no thread
        return nullptr;
    }
}

void melt_edge_bandwidth_free(melt_edge_bandwidth * bandwidth) {
    delete bandwidth;
}

double melt_edge_bandwidth_read(melt_edge_bandwidth * bandwidth) {
    std::vector<bench_part> & parts = bandwidth->parts;
    try {
        bench_run(parts, [n = bandwidth->n_part](bench_part & part) {
            part.start = bench_clock::now();
            part.sum   = bench_read(part.data.get(), n);
            part.end   = bench_clock::now();
        });
    } catch (const std::exception &) {
        return 0.0;
    }

    auto start = parts[0].start;
    auto end   = parts[0].end;
    for (const bench_part & part : parts) {
        start = std::min(start, part.start);
        end   = std::max(end, part.end);
    }
    const double seconds = std::chrono::duration<double>(end - start).count();
    return seconds > 0.0 ? double(parts.size()) * bandwidth->n_part * sizeof(uint64_t) / seconds : 0.0;
}
