// Kernels of attn-decode-kernels.h for q8_0 and q4_0 in whole numbers, for CPUs with AVX2, and with VNNI where they
// have it.

#pragma once

#define MELT_Q_BLOCKS // queries are made q_blocks for q8_0 and q4_0

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define MELT_VNNI
#endif

// A block of a query in 8 bits: value = d * qs. While they are multiplied, K's numbers are OFFSET more than they should
// be; what that adds is taken off.
struct q_block {
    float d;
#ifdef MELT_VNNI
    int32_t start[8]; // -OFFSET * sum of 4 qs
#else
    float zero; // -OFFSET * d * sum of qs, an eighth
#endif
    int8_t qs[32];
};

// ggml's 8 bits are rounded as its own products round them
static void q_blocks_from_q8_0(int n, int offset, const block_q8_0 * x, q_block * y) {
    for (int b = 0; b < n / QK8_0; b++) {
        int sums[8] = {};
        for (int j = 0; j < QK8_0; j++) {
            sums[j / 4] += x[b].qs[j];
        }
        y[b].d = GGML_CPU_FP16_TO_FP32(x[b].d);
        memcpy(y[b].qs, x[b].qs, sizeof(y[b].qs));
#ifdef MELT_VNNI
        for (int i = 0; i < 8; i++) {
            y[b].start[i] = -offset * sums[i];
        }
#else
        y[b].zero = 0.0f;
        for (int i = 0; i < 8; i++) {
            y[b].zero -= offset * y[b].d * sums[i] / 8.0f;
        }
#endif
    }
}

struct block_8 {
    using type = block_q8_0;
#ifdef MELT_VNNI
    static constexpr int OFFSET = 128;
#else
    static constexpr int OFFSET = 0;
#endif

    static __m256i load(const type & x) {
        const __m256i qs = _mm256_loadu_si256((const __m256i *) x.qs);
        return OFFSET ? _mm256_xor_si256(qs, _mm256_set1_epi8((char) 0x80)) : qs;
    }
    // sums of products of 4: the first factor of maddubs is without sign, so x gives its sign to q
    static __m256i dot(__m256i x, __m256i q) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(q, x)),
                                 _mm256_set1_epi16(1));
    }
};

struct block_4 {
    using type                  = block_q4_0;
    static constexpr int OFFSET = 8;

    // 0 to 15: the low halves of 16 bytes, then the high ones
    static __m256i load(const type & x) {
        const __m256i qs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x.qs));
        return _mm256_and_si256(_mm256_srlv_epi64(qs, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
    }
    static __m256i dot(__m256i x, __m256i q) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(x, q), _mm256_set1_epi16(1));
    }
};

template <class B>
struct dot_blocks {
    using sum_t = __m256;

    template <int NQ>
    static ALWAYS_INLINE void head(int n, const char * k, const char * q, size_t q_stride, __m256 * sum) {
        const typename B::type * x = (const typename B::type *) k;
        for (int i = 0; i < NQ; i++) {
            sum[i] = _mm256_setzero_ps();
        }
        for (int b = 0; b < n / 32; b++) {
            const __m256  d = _mm256_cvtph_ps(_mm_set1_epi16(x[b].d));
            const __m256i v = B::load(x[b]);
            for (int i = 0; i < NQ; i++) {
                sum[i] = _mm256_fmadd_ps(products(v, ((const q_block *) (q + i * q_stride))[b]), d, sum[i]);
            }
        }
    }

    // sums of 4, less K's scale
    static __m256 products(__m256i v, const q_block & y) {
        const __m256i qs = _mm256_loadu_si256((const __m256i *) y.qs);
        const __m256  d  = _mm256_set1_ps(y.d);
#ifdef MELT_VNNI
        const __m256i start = _mm256_loadu_si256((const __m256i *) y.start);
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_dpbusd_epi32(start, v, qs)), d);
#else
        const __m256 p = _mm256_cvtepi32_ps(B::dot(v, qs));
        return B::OFFSET ? _mm256_fmadd_ps(p, d, _mm256_set1_ps(y.zero)) : _mm256_mul_ps(p, d);
#endif
    }

    static __m256 zero() { return _mm256_setzero_ps(); }
    static void   sum_4(const __m256 * x, float * y) { ::sum_4(x[0], x[1], x[2], x[3], y); }
    static bool   has_rest(int) { return false; }
    static float  rest(int, const char *, const char *) { return 0.0f; }
};

// One block's weights, w * d, in 16 bits: w * d = scale * i16, the largest of them 32767. Returns scale.
static float weights_i16(const float * w, const ggml_half * d, int n_cells, int16_t * w16, int * sum) {
    float  wd[TILE_Q];
    __m256 max = _mm256_setzero_ps();
    for (int c = 0; c < n_cells; c += 8) {
        const __m256 x =
            _mm256_mul_ps(_mm256_loadu_ps(w + c), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (d + c))));
        max = _mm256_max_ps(max, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
        _mm256_storeu_ps(wd + c, x);
    }
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    m4        = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    m4        = _mm_max_ss(m4, _mm_movehdup_ps(m4));

    const float  m   = _mm_cvtss_f32(m4);
    const __m256 inv = _mm256_set1_ps(m > 0.0f ? 32767.0f / m : 0.0f);
    __m128i      all = _mm_setzero_si128();
    for (int c = 0; c < n_cells; c += 8) {
        const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(wd + c), inv));
        const __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        all             = _mm_add_epi32(all, _mm_madd_epi16(y, _mm_set1_epi16(1)));
        _mm_storeu_si128((__m128i *) (w16 + c), y);
    }
    all  = _mm_hadd_epi32(all, all);
    *sum = _mm_cvtsi128_si32(_mm_hadd_epi32(all, all));
    return m / 32767.0f;
}

// sum + x * y, whose values are pairs of 16 bits
static inline __m256i add_products(__m256i sum, __m256i x, __m256i y) {
#ifdef MELT_VNNI
    return _mm256_dpwssd_epi32(sum, x, y);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
#endif
}

// 32 values of two rows, as four vectors of pairs: one value of the first row, the same of the second.
struct pairs_8 {
    using type = block_q8_0;
    enum { OFFSET = 0 };
    static void load(const type & x0, const type & x1, __m256i * y) {
        const __m256i a    = _mm256_loadu_si256((const __m256i *) x0.qs);
        const __m256i b    = _mm256_loadu_si256((const __m256i *) x1.qs);
        const __m256i lo   = _mm256_unpacklo_epi8(a, b);
        const __m256i hi   = _mm256_unpackhi_epi8(a, b);
        const __m256i s_lo = _mm256_cmpgt_epi8(_mm256_setzero_si256(), lo);
        const __m256i s_hi = _mm256_cmpgt_epi8(_mm256_setzero_si256(), hi);
        y[0]               = _mm256_unpacklo_epi8(lo, s_lo); // values 0 to 3 and 16 to 19
        y[1]               = _mm256_unpackhi_epi8(lo, s_lo); // 4 to 7, 20 to 23
        y[2]               = _mm256_unpacklo_epi8(hi, s_hi); // 8 to 11, 24 to 27
        y[3]               = _mm256_unpackhi_epi8(hi, s_hi);
    }
    // adds 32 values in the order of y
    static void add(const __m256 * y, float * out) {
        for (int j = 0; j < 4; j++) {
            float * p = out + 4 * j;
            _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), _mm256_castps256_ps128(y[j])));
            _mm_storeu_ps(p + 16, _mm_add_ps(_mm_loadu_ps(p + 16), _mm256_extractf128_ps(y[j], 1)));
        }
    }
};

struct pairs_4 {
    using type = block_q4_0;
    enum { OFFSET = 8 };
    static void load(const type & x0, const type & x1, __m256i * y) {
        const __m128i a  = _mm_loadu_si128((const __m128i *) x0.qs);
        const __m128i b  = _mm_loadu_si128((const __m128i *) x1.qs);
        const __m256i lo = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
        const __m256i hi = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
        y[0]             = _mm256_and_si256(lo, _mm256_set1_epi16(15)); // values 0 to 7
        y[1]             = _mm256_and_si256(hi, _mm256_set1_epi16(15)); // 8 to 15
        y[2]             = _mm256_srli_epi16(lo, 4);                    // 16 to 23
        y[3]             = _mm256_srli_epi16(hi, 4);
    }
    static void add(const __m256 * y, float * out) {
        for (int j = 0; j < 4; j++) {
            _mm256_storeu_ps(out + 8 * j, _mm256_add_ps(_mm256_loadu_ps(out + 8 * j), y[j]));
        }
    }
};

// up to 4 blocks: their weights first, so that the steps of one do not wait for each other
template <class P, int NQ>
static void add_blocks(int n_blocks, const typename P::type * const * v, int n_cells, const float * w, float * out,
                       int n) {
    ggml_half d[4][TILE_Q];
    int16_t   w16[4][NQ][TILE_Q];
    int       w_sum[4][NQ];
    float     scale[4][NQ];
    for (int c = 0; c < n_cells; c++) {
        for (int b = 0; b < n_blocks; b++) {
            d[b][c] = v[c][b].d;
        }
    }
    for (int b = 0; b < n_blocks; b++) {
        for (int i = 0; i < NQ; i++) {
            scale[b][i] = weights_i16(w + i * TILE, d[b], n_cells, w16[b][i], &w_sum[b][i]);
        }
    }
    for (int b = 0; b < n_blocks; b++) {
        __m256i sum[NQ][4];
        for (int i = 0; i < NQ; i++) {
            for (int j = 0; j < 4; j++) {
                sum[i][j] = _mm256_set1_epi32(-P::OFFSET * w_sum[b][i]);
            }
        }
        // no overflow: TILE_Q rows of at most 128 * 32767
        for (int c = 0; c < n_cells; c += 2) {
            __m256i x[4];
            P::load(v[c][b], v[c + 1][b], x);
            for (int i = 0; i < NQ; i++) {
                int pair;
                memcpy(&pair, w16[b][i] + c, sizeof(pair));
                for (int j = 0; j < 4; j++) {
                    sum[i][j] = add_products(sum[i][j], x[j], _mm256_set1_epi32(pair));
                }
            }
        }
        for (int i = 0; i < NQ; i++) {
            __m256 y[4];
            for (int j = 0; j < 4; j++) {
                y[j] = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][j]), _mm256_set1_ps(scale[b][i]));
            }
            P::add(y, out + i * n + b * 32);
        }
    }
}

// The rows were asked for while their K was read.
template <class P>
static void add_cells_blocks(const cache_rows & v, int n_cells, const float * w, int n_q, float * out) {
    for (int h = 0; h < v.n_head; h++) {
        for (int b = 0; b < v.n / 32; b += 4) {
            const int                n_blocks = std::min(4, v.n / 32 - b);
            const typename P::type * x[TILE_Q];
            for (int c = 0; c < n_cells; c++) {
                x[c] = (const typename P::type *) v.head(c, h) + b;
            }
            for_parts<2>(n_q, [&](auto nq, int i) {
                const int g = h * n_q + i;
                add_blocks<P, nq>(n_blocks, x, n_cells, w + g * TILE, out + g * v.n + b * 32, v.n);
            });
        }
    }
}

static const add_cells_t add_cells_q8_0 = add_cells_blocks<pairs_8>;
static const add_cells_t add_cells_q4_0 = add_cells_blocks<pairs_4>;
