// Ways to write loops that our CPU kernels share.

#pragma once

#include <cstddef>
#include <type_traits>

// GCC takes a function that only prefetches for one without effect, and drops its calls before it inlines it
#if defined(__GNUC__) || defined(__clang__)
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#else
#define ALWAYS_INLINE inline
#endif

// Asks for what will be needed next, into the L2 cache.
static ALWAYS_INLINE void fetch_bytes(const char * p, size_t n_bytes) {
#if defined(__GNUC__) || defined(__clang__)
    for (size_t i = 0; i < n_bytes; i += 64) {
        __builtin_prefetch(p + i, 0, 2);
    }
#endif
}

// f(how many, the first) for n things, N at a time, the rest by halves of it; how many is known to the compiler.
template <int N, class F>
static ALWAYS_INLINE void for_parts(int n, F && f, int i = 0) {
    for (; i + N <= n; i += N) {
        f(std::integral_constant<int, N>(), i);
    }
    if constexpr (N > 1) {
        for_parts<N / 2>(n, f, i);
    }
}
