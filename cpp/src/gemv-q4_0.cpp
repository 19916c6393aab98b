// q4_0 weights times one token, for CPUs with AVX2. ggml's kernel gives each product its sign by two more instructions
// and pairs rows by shuffles: some 95 vector instructions for 144 bytes of weights, fewer bytes than the memory brings.
// Here weights stay without sign, 0 to 15, and what their offset of 8 adds is taken off again by the sum of the
// token's values, which is the same for all rows: some 40 instructions.

#include "gemv-q4_0.h"

#include "env-flag.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "repack.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

enum {
    MAX_BLOCKS = 512,      // of the token whose scales lie on the stack; a longer row is added up in parts
    AHEAD      = 16 << 10, // bytes: far enough to hide a memory that all threads read, and half of an L1 cache
};

// What the memory brings next. A core with AVX-512 is faster if it is left to its own prefetcher (Zen 4: 96 % of a
// plain read, 90 % asked); without AVX-512 one is not (Zen 3: 63 %, asked 106 %).
static inline void fetch_ahead(const block_q4_0x8 * x) {
#ifdef __AVX512F__
    GGML_UNUSED(x);
#else
    for (size_t i = 0; i < sizeof(*x); i += 64) {
        _mm_prefetch((const char *) x + AHEAD + i, _MM_HINT_T0);
    }
#endif
}

// Sums of four neighbours, in 32 bits.
static inline __m256i sums_of_4(const block_q8_0 & y) {
    const __m256i qs = _mm256_loadu_si256((const __m256i *) y.qs);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), qs), _mm256_set1_epi16(1));
}

// Of eight of the token's blocks: value = d * qs, and what the weights' offset adds to a sum of products.
static inline void scales_of_8(const block_q8_0 * y, float * d, float * zero) {
    const __m256i s0123 = _mm256_hadd_epi32(_mm256_hadd_epi32(sums_of_4(y[0]), sums_of_4(y[1])),
                                            _mm256_hadd_epi32(sums_of_4(y[2]), sums_of_4(y[3])));
    const __m256i s4567 = _mm256_hadd_epi32(_mm256_hadd_epi32(sums_of_4(y[4]), sums_of_4(y[5])),
                                            _mm256_hadd_epi32(sums_of_4(y[6]), sums_of_4(y[7])));
    const __m256i sums =
        _mm256_add_epi32(_mm256_permute2x128_si256(s0123, s4567, 0x20), _mm256_permute2x128_si256(s0123, s4567, 0x31));
    const __m256 scale =
        _mm256_cvtph_ps(_mm_setr_epi16(y[0].d, y[1].d, y[2].d, y[3].d, y[4].d, y[5].d, y[6].d, y[7].d));
    _mm256_storeu_ps(d, scale);
    _mm256_storeu_ps(zero, _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(-8.0f), scale), _mm256_cvtepi32_ps(sums)));
}

// Of nb blocks. Once for every step of rows that a thread takes, so eight blocks at a time.
static void token_scales(const block_q8_0 * y, int nb, float * d, float * zero) {
    int b = 0;
    for (; b + 8 <= nb; b += 8) {
        scales_of_8(y + b, d + b, zero + b);
    }
    if (b < nb) {
        block_q8_0 rest[8] = {};
        float      rest_d[8], rest_zero[8];
        std::copy(y + b, y + nb, rest);
        scales_of_8(rest, rest_d, rest_zero);
        std::copy(rest_d, rest_d + nb - b, d + b);
        std::copy(rest_zero, rest_zero + nb - b, zero + b);
    }
}

// Eight values of the token, once for each of four rows.
static inline __m256i repeat_8(const int8_t * qs) {
    long long x;
    memcpy(&x, qs, sizeof(x));
    return _mm256_set1_epi64x(x);
}

// Sums of two products of 4 bits without sign: the low halves of w with y0, the high ones with y1. In 16 bits: at most
// 4 * 15 * 128, and twice that in dot_8_rows.
static inline __m256i dot_halves(__m256i w, __m256i y0, __m256i y1) {
    const __m256i lo = _mm256_and_si256(w, _mm256_set1_epi8(15));
    const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15));
    return _mm256_add_epi16(_mm256_maddubs_epi16(lo, y0), _mm256_maddubs_epi16(hi, y1));
}

// Eight rows, of which a block lies together: 8 values of rows 0 to 3, of rows 4 to 7, the next 8 of rows 0 to 3, ...;
// in each byte one of the block's first 16 values and one of its last. Returns rows 0, 1, 4, 5, 2, 3, 6, 7.
static inline __m256 dot_8_rows(const block_q4_0x8 * x, const block_q8_0 * y, const float * d, const float * zero,
                                int nb) {
    const __m256i plain = _mm256_set1_epi8((char) 0x88); // repacking made 0 to 15 a signed number
    __m256        sum   = _mm256_setzero_ps();
    for (int b = 0; b < nb; b++) {
        fetch_ahead(x + b);

        const __m256i * w = (const __m256i *) x[b].qs;
        __m256i         s0123, s4567;
        {
            const __m256i y0 = repeat_8(y[b].qs);
            const __m256i y1 = repeat_8(y[b].qs + 16);
            s0123            = dot_halves(_mm256_xor_si256(_mm256_loadu_si256(w + 0), plain), y0, y1);
            s4567            = dot_halves(_mm256_xor_si256(_mm256_loadu_si256(w + 1), plain), y0, y1);
        }
        {
            const __m256i y0 = repeat_8(y[b].qs + 8);
            const __m256i y1 = repeat_8(y[b].qs + 24);
            s0123 = _mm256_add_epi16(s0123, dot_halves(_mm256_xor_si256(_mm256_loadu_si256(w + 2), plain), y0, y1));
            s4567 = _mm256_add_epi16(s4567, dot_halves(_mm256_xor_si256(_mm256_loadu_si256(w + 3), plain), y0, y1));
        }
        const __m256i one    = _mm256_set1_epi16(1);
        const __m256i s      = _mm256_hadd_epi32(_mm256_madd_epi16(s0123, one), _mm256_madd_epi16(s4567, one));
        const __m256  value  = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_set1_ps(d[b]), _mm256_set1_ps(zero[b]));
        const __m128i halves = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) x[b].d), 0xD8); // in the order of s
        sum                  = _mm256_fmadd_ps(value, _mm256_cvtph_ps(halves), sum);
    }
    return sum;
}

bool melt_gemv_q4_0_8x8(int n, float * s, const void * vx, const void * vy, int nc) {
    static const bool enabled = melt_env_flag("MELT_GEMV_Q4_0");
    if (!enabled || nc % 8 != 0) {
        return false;
    }
    const block_q4_0x8 * x  = (const block_q4_0x8 *) vx;
    const block_q8_0 *   y  = (const block_q8_0 *) vy;
    const int            nb = n / QK8_0;
    float                d[MAX_BLOCKS];
    float                zero[MAX_BLOCKS];
    for (int b = 0; b < nb; b += MAX_BLOCKS) {
        const int part = std::min<int>(MAX_BLOCKS, nb - b);
        token_scales(y + b, part, d, zero);
        for (int r = 0; r < nc; r += 8) {
            __m256 sum = dot_8_rows(x + (size_t) (r / 8) * nb + b, y + b, d, zero, part);
            sum        = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sum), 0xD8)); // rows 0 to 7
            _mm256_storeu_ps(s + r, b == 0 ? sum : _mm256_add_ps(sum, _mm256_loadu_ps(s + r)));
        }
    }
    return true;
}

#else

bool melt_gemv_q4_0_8x8(int, float *, const void *, const void *, int) {
    return false;
}

#endif
