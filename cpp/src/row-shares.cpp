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

// Groups of one thread's share since the threads met: low half those that it took from the front, high half those that
// others took from the back.
struct alignas(LINE) row_share {
    std::atomic<uint64_t> taken = 0;
};

size_t melt_vector_bytes(const ggml_tensor * node) {
    return GGML_PAD(ggml_row_size(GGML_TYPE_F16, node->src[0]->ne[0]), LINE); // no quantized row is as large
}

char * melt_vector(const ggml_compute_params * params, int vector) {
    return (char *) params->wdata + vector * melt_vector_bytes(params->melt->node[0]);
}

size_t melt_row_shares_bytes(int n_threads) {
    return LINE + n_threads * sizeof(row_share);
}

static row_share * row_shares(const ggml_compute_params * params) {
    char * end = (char *) params->wdata + params->wsize;
    return (row_share *) GGML_PAD((uintptr_t) (end - melt_row_shares_bytes(params->nth)), LINE);
}

void melt_begin_rows(const ggml_compute_params * params) {
    new (&row_shares(params)[params->ith]) row_share(); // none is taken
    melt_meet(params);
}

// Of n_groups the next ones of this thread's share, or of another's; false if none is left.
static bool take_groups(const ggml_compute_params * params, int64_t n_groups, uint32_t min_step, melt_rows * rows) {
    const int  nth   = params->nth;
    const bool apart = nth == 1 || ggml_is_numa(); // another's rows lie in another's memory

    for (int i = 0; i < (apart ? 1 : nth); ++i) {
        const int      owner = (params->ith + i) % nth;
        const int64_t  first = n_groups * owner / nth;
        const uint32_t n     = n_groups * (owner + 1) / nth - first;

        std::atomic<uint64_t> & taken = row_shares(params)[owner].taken;

        uint64_t was = taken.load(std::memory_order_relaxed);
        for (;;) {
            const uint32_t front = (uint32_t) was;
            const uint32_t back  = (uint32_t) (was >> 32);
            const uint32_t left  = n - front - back;
            if (left == 0 || (i > 0 && left < min_step)) {
                break;
            }
            const uint32_t part = i == 0 && front > 0 ? left - left / 4 : left - left / 2;
            const uint64_t step = apart ? left : std::min(left, std::max(part, min_step));
            if (taken.compare_exchange_weak(was, was + (i == 0 ? step : step << 32), std::memory_order_relaxed)) {
                rows->group     = first + (i == 0 ? front : n - back - step);
                rows->end_group = rows->group + step;
                return true;
            }
        }
    }
    return false;
}

bool melt_next_rows(const ggml_compute_params * params, int n_group, melt_rows * rows) {
    const melt_products & products = *params->melt;
    if (rows->group == rows->end_group) {
        int64_t n_groups = 0;
        for (int i = 0; i < products.n; ++i) {
            n_groups += products.node[i]->ne[0] / n_group;
        }
        const size_t group_bytes = n_group * products.node[0]->src[0]->nb[1];
        if (!take_groups(params, n_groups, std::max<uint32_t>(1, MELT_MIN_STEP / group_bytes), rows)) {
            return false;
        }
    }

    int     product = 0;
    int64_t before  = 0; // groups of the products before it
    int64_t n       = products.node[0]->ne[0] / n_group;
    while (rows->group >= before + n) {
        before += n;
        n = products.node[++product]->ne[0] / n_group;
    }
    const int64_t end = std::min(rows->end_group, before + n);
    rows->product     = product;
    rows->first       = (rows->group - before) * n_group;
    rows->end         = (end - before) * n_group;
    rows->group       = end;
    return true;
}
