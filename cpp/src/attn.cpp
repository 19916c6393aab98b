// Which of our kernels takes a node of attention; see attn.h.

#include "attn.h"

#include "attn-decode.h"
#include "attn-prefill.h"
#include "env-flag.h"
#include "ggml-cpu-impl.h"

#include <algorithm>
#include <atomic>

static std::atomic<bool> & attn_enabled() {
    static std::atomic<bool> enabled = melt_env_flag("MELT_ATTN");
    return enabled;
}

void melt_edge_attn_enable(bool enabled) {
    attn_enabled() = enabled;
}

size_t melt_attn_work_bytes(const ggml_tensor * dst, int n_threads) {
    return std::max(melt_attn_prefill_work_bytes(dst, n_threads), melt_attn_decode_work_bytes(dst, n_threads));
}

bool melt_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !attn_enabled()) {
        return false;
    }
    return melt_attn_prefill(params, dst) || melt_attn_decode(params, dst);
}
