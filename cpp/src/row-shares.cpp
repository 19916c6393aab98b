// Which rows a thread multiplies next; see row-shares.h.

#include "row-shares.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "one-token.h"

#include <algorithm>
#include <atomic>
#include <new>

static constexpr size_t LINE = 64; // bytes, so that threads do not write to each other's

// Groups of one thread's share, of each product since the threads met: low half those that it took from the front,
// high half those that others took from the back.
struct alignas(LINE) row_share {
    std::atomic<uint64_t> taken[MELT_MAX_SAME_INPUT] = {};
};

size_t melt_row_shares_bytes(int n_threads) {
    return LINE + n_threads * sizeof(row_share);
}

static row_share * row_shares(const ggml_compute_params * params) {
    char * end = (char *) params->wdata + params->wsize;
    return (row_share *) GGML_PAD((uintptr_t) (end - melt_row_shares_bytes(params->nth)), LINE);
}

bool melt_begin_rows(ggml_compute_params * params) {
    if (!melt_one_token_enabled()) {
        return false;
    }
    if (params->same_input) {
        params->i_product++;
        return true;
    }
    new (&row_shares(params)[params->ith]) row_share(); // none is taken
    params->i_product = 0;
    melt_meet(params);
    return true;
}

int64_t melt_next_rows(const ggml_compute_params * params, int64_t n_groups, size_t group_bytes, int64_t * group) {
    const int      nth      = params->nth;
    const bool     apart    = nth == 1 || ggml_is_numa(); // another's rows lie in another's memory
    const uint32_t min_step = std::max<uint32_t>(1, MELT_MIN_STEP / group_bytes);

    for (int i = 0; i < (apart ? 1 : nth); ++i) {
        const int      owner = (params->ith + i) % nth;
        const int64_t  first = n_groups * owner / nth;
        const uint32_t n     = n_groups * (owner + 1) / nth - first;

        std::atomic<uint64_t> & taken = row_shares(params)[owner].taken[params->i_product];

        uint64_t was = taken.load(std::memory_order_relaxed);
        for (;;) {
            const uint32_t front = (uint32_t) was;
            const uint32_t back  = (uint32_t) (was >> 32);
            const uint32_t left  = n - front - back;
            if (left == 0 || (i > 0 && left < min_step)) {
                break;
            }
            const uint64_t step = apart ? left : std::min(left, std::max((left + 1) / 2, min_step));
            if (taken.compare_exchange_weak(was, was + (i == 0 ? step : step << 32), std::memory_order_relaxed)) {
                *group = first + (i == 0 ? front : n - back - step);
                return step;
            }
        }
    }
    return 0;
}
