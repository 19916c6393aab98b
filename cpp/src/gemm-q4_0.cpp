// q4_0 weights times many tokens, for CPUs with AVX2, and with VNNI where they have it. ggml's kernel spends most of
// its instructions on the sign of the weights and on shuffles that pair rows with tokens. Here weights stay without
// sign, 0 to 15, each sum of products begins with what their offset of 8 will add too much, and a row's two sums of
// four values each lie side by side until the last block is done.

#include "gemm-q4_0.h"

#include "env-flag.h"
#include "kernel-common.h"

#define GGML_COMMON_DECL_CPP
#include "float-vectors.h"
#include "ggml-common.h"
#include "ggml-impl.h"
#include "repack.h"

#include <algorithm>
#include <cstring>

#if (defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)) || \
    (!defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))

// A vector holds 32-bit sums or floats of N_ROWS rows of the weights, two of each: of values 0 to 3 and of 4 to 7 out
// of every eight.
enum { N_ROWS = VF_N / 2 };

#ifdef __AVX512F__

using ints = __m512i;

// the products that are summed in registers: of so many times N_ROWS rows with so many tokens
enum {
    GROUPS = 2,
    TOKENS = 8,
};

static inline ints load_weights(const void * p) {
    return _mm512_loadu_si512(p);
}
// 0 to 15, out of the 4 bits with a sign that repacking has made of them
static inline ints low_halves(ints w) {
    return _mm512_ternarylogic_epi32(w, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6A); // (a & b) ^ c
}
static inline ints high_halves(ints w) {
    return low_halves(_mm512_srli_epi16(w, 4));
}
static inline ints repeat_8(const void * p) {
    long long x;
    memcpy(&x, p, sizeof(x));
    return _mm512_set1_epi64(x);
}
static inline ints dot_32(ints sum, const ints * w, const ints * y) {
#ifdef __AVX512VNNI__
    for (int i = 0; i < 4; i++) {
        sum = _mm512_dpbusd_epi32(sum, w[i], y[i]);
    }
    return sum;
#else
    // in 16 bits at most 8 * 15 * 128
    ints s = _mm512_maddubs_epi16(w[0], y[0]);
    for (int i = 1; i < 4; i++) {
        s = _mm512_add_epi16(s, _mm512_maddubs_epi16(w[i], y[i]));
    }
    return _mm512_add_epi32(sum, _mm512_madd_epi16(s, _mm512_set1_epi16(1)));
#endif
}
static inline vf to_floats(ints x) {
    return _mm512_cvtepi32_ps(x);
}
// each of N_ROWS scales, twice
static inline vf load_scales(const ggml_half * d) {
    const __m128i x = _mm_loadu_si128((const __m128i *) d);
    return _mm512_cvtph_ps(_mm256_set_m128i(_mm_unpackhi_epi16(x, x), _mm_unpacklo_epi16(x, x)));
}
// y[N_ROWS] = each row's two sums, or more by them
static inline void store_rows(vf x, float * y, bool add) {
    const __m512 pairs = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
    const __m256 rows  = _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, pairs));
    _mm256_storeu_ps(y, add ? _mm256_add_ps(rows, _mm256_loadu_ps(y)) : rows);
}

#else

using ints = __m256i;

enum {
    GROUPS = 1,
    TOKENS = 4,
};

static inline ints load_weights(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}
static inline ints low_halves(ints w) {
    return _mm256_xor_si256(_mm256_and_si256(w, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
static inline ints high_halves(ints w) {
    return low_halves(_mm256_srli_epi16(w, 4));
}
static inline ints repeat_8(const void * p) {
    long long x;
    memcpy(&x, p, sizeof(x));
    return _mm256_set1_epi64x(x);
}
static inline ints dot_32(ints sum, const ints * w, const ints * y) {
#ifdef __AVXVNNI__
    for (int i = 0; i < 4; i++) {
        sum = _mm256_dpbusd_avx_epi32(sum, w[i], y[i]);
    }
    return sum;
#else
    ints s = _mm256_maddubs_epi16(w[0], y[0]);
    for (int i = 1; i < 4; i++) {
        s = _mm256_add_epi16(s, _mm256_maddubs_epi16(w[i], y[i]));
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(s, _mm256_set1_epi16(1)));
#endif
}
static inline vf to_floats(ints x) {
    return _mm256_cvtepi32_ps(x);
}
static inline vf load_scales(const ggml_half * d) {
    const __m128i x = _mm_loadl_epi64((const __m128i *) d);
    return _mm256_cvtph_ps(_mm_unpacklo_epi16(x, x));
}
static inline void store_rows(vf x, float * y, bool add) {
    const __m256 pairs = _mm256_hadd_ps(x, x); // rows 0, 1, 0, 1, 2, 3, 2, 3
    const __m128 rows  = _mm_movelh_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm_storeu_ps(y, add ? _mm_add_ps(rows, _mm_loadu_ps(y)) : rows);
}

#endif

enum {
    MAX_BLOCKS = 256,       // of a token whose scales lie on the stack; a longer row is added up in parts
    L2_BYTES   = 256 << 10, // of weights that all tokens are multiplied with before the next ones
};

// Of TOKENS tokens' blocks: value = d * qs; zero: where a row's two sums begin, minus what the weights' offset adds.
struct token_blocks {
    float   d[MAX_BLOCKS][TOKENS];
    int32_t zero[MAX_BLOCKS][TOKENS][2];

    // four tokens, whose blocks lie together: eight values of each, the next eight of each, ...
    void load_4(const block_q8_0x4 * y, int nb, int first) {
        for (int b = 0; b < nb; b++) {
            __m256i sum = _mm256_setzero_si256();
            for (int i = 0; i < 4; i++) {
                const __m256i qs = _mm256_loadu_si256((const __m256i *) y[b].qs + i);
                const __m256i s  = _mm256_maddubs_epi16(_mm256_set1_epi8(8), qs); // in 16 bits at most 16 * 128
                sum              = _mm256_sub_epi32(sum, _mm256_madd_epi16(s, _mm256_set1_epi16(1)));
            }
            _mm256_storeu_si256((__m256i *) zero[b][first], sum);
            _mm_storeu_ps(d[b] + first, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *) y[b].d)));
        }
    }
};

// A product of rows with tokens, or a part of it: nb of all blocks.
struct part {
    int                  nb;
    size_t               stride; // blocks of a whole row, of eight of them or of four tokens
    const block_q4_0x8 * x;      // eight rows together
    const block_q8_0x4 * y;      // four tokens together
    float *              s;      // [token][row]
    size_t               s_stride;
    bool                 add; // to what s holds
};

// R times N_ROWS rows, of which the first is that many times N_ROWS, with T tokens.
template <int R, int T>
static void multiply(const part & p, const token_blocks & t, int first) {
    const block_q4_0x8 * x[R];
    int                  half[R]; // of the eight rows, where a vector holds four
    vf                   sum[R][T];
    for (int r = 0; r < R; r++) {
        x[r]    = p.x + (size_t) (first + r) * N_ROWS / 8 * p.stride;
        half[r] = (first + r) * N_ROWS % 8 / 4;
        for (int i = 0; i < T; i++) {
            sum[r][i] = vf_zero();
        }
    }
    for (int b = 0; b < p.nb; b++) {
        ints w[R][4];
        vf   d[R];
        for (int r = 0; r < R; r++) {
            // values 0 to 7 of eight rows, then 8 to 15; each byte has one 16 values later, too
            for (int i = 0; i < 2; i++) {
                const ints both = load_weights(x[r][b].qs + i * 64 + half[r] * 32);
                w[r][i]         = low_halves(both);
                w[r][2 + i]     = high_halves(both);
            }
            d[r] = load_scales(x[r][b].d + half[r] * 4);
        }
        for (int i = 0; i < T; i++) {
            const int8_t * qs = p.y[i / 4 * p.stride + b].qs + i % 4 * 8;
            ints           y[4];
            for (int j = 0; j < 4; j++) {
                y[j] = repeat_8(qs + j * 32);
            }
            const ints start = repeat_8(t.zero[b][i]);
            const vf   dy    = vf_set(t.d[b][i]);
            for (int r = 0; r < R; r++) {
                sum[r][i] = vf_fma(vf_mul(to_floats(dot_32(start, w[r], y)), d[r]), dy, sum[r][i]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < T; i++) {
            store_rows(sum[r][i], p.s + i * p.s_stride + (first + r) * N_ROWS, p.add);
        }
    }
}

bool melt_gemm_q4_0_8x8(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    static const bool enabled = melt_env_flag("MELT_GEMM_Q4_0");
    if (!enabled || nc % 8 != 0 || nr % 4 != 0) {
        return false;
    }
    const block_q4_0x8 * x      = (const block_q4_0x8 *) vx;
    const block_q8_0x4 * y      = (const block_q8_0x4 *) vy;
    const size_t         nb     = n / QK8_0;
    const int            n_rows = 8 * std::max<int>(1, L2_BYTES / (nb * sizeof(block_q4_0x8)));
    token_blocks         t;
    for (size_t b = 0; b < nb; b += MAX_BLOCKS) {
        for (int row = 0; row < nc; row += n_rows) {
            part p = {
                (int) std::min<size_t>(MAX_BLOCKS, nb - b), nb, x + row / 8 * nb + b, nullptr, nullptr, bs, b > 0};
            for_parts<TOKENS / 4>(nr / 4, [&](auto n_fours, int four) {
                p.y = y + four * nb + b;
                p.s = s + 4 * four * bs + row;
                for (int i = 0; i < n_fours; i++) {
                    t.load_4(p.y + i * nb, p.nb, 4 * i);
                }
                for_parts<GROUPS>(std::min(n_rows, nc - row) / N_ROWS,
                                  [&](auto n_groups, int first) { multiply<n_groups, 4 * n_fours>(p, t, first); });
            });
        }
    }
    return true;
}

#else

bool melt_gemm_q4_0_8x8(int, float *, size_t, const void *, const void *, int, int) {
    return false;
}

#endif
