// Every row of a product is taken by one thread, however fast each is, and not too many at a time (row-shares.h). Exit
// code 0: so it was.

#include "row-shares.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

static constexpr int N_ROUNDS = 40;

struct test_case {
    int     n_threads;
    int64_t n_groups;
    size_t  group_bytes;
};

// The most that one step takes of a share: half of it, or the smallest step.
static int64_t most_groups(const test_case & t) {
    const int64_t share = t.n_threads == 1 ? 2 * t.n_groups : t.n_groups / t.n_threads + 1;
    return std::max<int64_t>((share + 1) / 2, MELT_MIN_STEP / t.group_bytes);
}

// One thread's work: all products that may follow each other without a meeting.
static void take(ggml_compute_params params, const test_case & t, std::vector<std::atomic<int>> & taken,
                 std::atomic<bool> & wrong) {
    for (params.i_product = 0; params.i_product < MELT_MAX_SAME_INPUT; params.i_product++) {
        int64_t group = -1;
        for (int64_t n; (n = melt_next_rows(&params, t.n_groups, t.group_bytes, &group)) != 0;) {
            if (n < 0 || n > most_groups(t) || group < 0 || group + n > t.n_groups) {
                wrong = true;
                return;
            }
            for (int64_t i = group; i < group + n; i++) {
                taken[params.i_product * t.n_groups + i]++;
            }
        }
    }
}

// at_once: or each thread when the one before is done, so that the first takes all but the last steps.
static bool passes(const test_case & t, bool at_once) {
    std::vector<char>             work(melt_row_shares_bytes(t.n_threads));
    std::vector<std::atomic<int>> taken(MELT_MAX_SAME_INPUT * t.n_groups);
    std::atomic<bool>             wrong{false};
    std::atomic<int>              n_ready{0};
    std::vector<std::thread>      threads;
    for (int ith = 0; ith < t.n_threads; ith++) {
        ggml_compute_params params = {};
        params.ith                 = ith;
        params.nth                 = t.n_threads;
        params.wsize               = work.size();
        params.wdata               = work.data(); // of zeros: nothing is taken
        threads.emplace_back([&, params] {
            n_ready++;
            while (at_once && n_ready < t.n_threads) {
                std::this_thread::yield();
            }
            take(params, t, taken, wrong);
        });
        if (!at_once) {
            threads.back().join();
        }
    }
    for (std::thread & thread : threads) {
        if (thread.joinable()) {
            thread.join();
        }
    }
    return !wrong && std::all_of(taken.begin(), taken.end(), [](const auto & n) { return n == 1; });
}

int main() {
    int n_failed = 0;
    for (const int n_threads : {1, 2, 3, 5, 9}) {
        for (const int64_t n_groups : {0, 1, 2, 3, 64, 301}) {
            for (const size_t group_bytes : {(size_t) 1, (size_t) 9216, (size_t) 25344, (size_t) 100000}) {
                const test_case t  = {n_threads, n_groups, group_bytes};
                bool            ok = passes(t, false);
                for (int i = 0; i < N_ROUNDS && ok; i++) {
                    ok = passes(t, true);
                }
                if (!ok) {
                    printf("%d threads, %lld groups of %zu bytes: FAILED\n", n_threads, (long long) n_groups,
                           group_bytes);
                    n_failed++;
                }
            }
        }
    }
    return n_failed == 0 ? 0 : 1;
}
