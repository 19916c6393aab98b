// The cosines and sines of a position, which ggml makes anew for each node of RoPE: those of one token's graph, two in
// each layer of each loop, all have the same.

#pragma once

#include <cstdint>
#include <cstring>

// What ggml makes the table from, where no factor for each frequency comes on top.
struct melt_rope_key {
    int64_t position;
    int64_t n; // values
    float   freq_scale, corr_low, corr_high, ext_factor, attn_factor, sin_sign, theta_scale;
    float   unused = 0.0f; // keys are compared byte by byte
};

// Makes *table the thread's own, of key.n values. True if it holds this key's already, else the caller has to fill it.
// A longer one stays where it is.
static inline bool melt_rope_table(const melt_rope_key & key, float ** table) {
    static_assert(sizeof(key) == 2 * sizeof(int64_t) + 8 * sizeof(float), "there is no padding");
    constexpr int64_t MAX_VALUES = 512;

    struct kept {
        melt_rope_key key = {};
        float         values[MAX_VALUES];
    };

    static thread_local kept last;
    if (key.n > MAX_VALUES) {
        return false;
    }
    *table = last.values;
    if (memcmp(&key, &last.key, sizeof(key)) == 0) {
        return true;
    }
    last.key = key;
    return false;
}
