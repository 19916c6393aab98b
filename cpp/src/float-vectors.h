// Float vectors for attn-decode.cpp, attn-prefill.cpp and sigmoid.cpp: as many lanes as the CPU has, and the loads that
// widen cache rows to float. Written once per instruction set: AVX-512, AVX2 with FMA and F16C, NEON on 64 bits, and
// one lane for the rest.

#pragma once

#include "ggml-cpu-impl.h" // tells what MSVC does not: FMA and F16C come with AVX2
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// y = the sums of a, b, c and d; the kernels of 8 and 4 bits need it whatever vf is
static inline void sum_4(__m256 a, __m256 b, __m256 c, __m256 d, float * y) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

#endif

#if defined(__AVX512F__)

using vf = __m512;
enum { VF_N = 16 };

static inline vf vf_zero() {
    return _mm512_setzero_ps();
}
static inline vf vf_set(float x) {
    return _mm512_set1_ps(x);
}
static inline vf vf_load(const float * p) {
    return _mm512_loadu_ps(p);
}
static inline void vf_store(float * p, vf a) {
    _mm512_storeu_ps(p, a);
}
static inline vf vf_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline vf vf_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
static inline vf vf_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
static inline float vf_hmax(vf a) {
    return _mm512_reduce_max_ps(a);
}

// y = the sums of a, b, c and d
static inline void vf_sum_4(vf a, vf b, vf c, vf d, float * y) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    __m512       x  = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    x               = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
    x               = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1)); // four times each
    _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, x)));
}

static inline vf vf_load_f16(const uint16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

static inline vf vf_load_bf16(const uint16_t * p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

static inline vf vf_from_i8(__m128i x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}
static inline vf vf_load_i8(const int8_t * p) {
    return vf_from_i8(_mm_loadu_si128((const __m128i *) p));
}

// the low and the high halves of VF_N bytes, less 8
static inline void vf_load_i4(const uint8_t * p, vf & lo, vf & hi) {
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    lo              = vf_from_i8(_mm_sub_epi8(_mm_and_si128(x, _mm_set1_epi8(15)), _mm_set1_epi8(8)));
    hi = vf_from_i8(_mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15)), _mm_set1_epi8(8)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

using vf = __m256;
enum { VF_N = 8 };

static inline vf vf_zero() {
    return _mm256_setzero_ps();
}
static inline vf vf_set(float x) {
    return _mm256_set1_ps(x);
}
static inline vf vf_load(const float * p) {
    return _mm256_loadu_ps(p);
}
static inline void vf_store(float * p, vf a) {
    _mm256_storeu_ps(p, a);
}
static inline vf vf_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}

static inline vf vf_div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
static inline vf vf_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}

static inline float vf_hmax(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x        = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

static inline void vf_sum_4(vf a, vf b, vf c, vf d, float * y) {
    sum_4(a, b, c, d, y);
}

static inline vf vf_load_f16(const uint16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

static inline vf vf_load_bf16(const uint16_t * p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}

static inline vf vf_from_i8(__m128i x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
}
static inline vf vf_load_i8(const int8_t * p) {
    return vf_from_i8(_mm_loadl_epi64((const __m128i *) p));
}
static inline void vf_load_i4(const uint8_t * p, vf & lo, vf & hi) {
    const __m128i x = _mm_loadl_epi64((const __m128i *) p);
    lo              = vf_from_i8(_mm_sub_epi8(_mm_and_si128(x, _mm_set1_epi8(15)), _mm_set1_epi8(8)));
    hi = vf_from_i8(_mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15)), _mm_set1_epi8(8)));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

using vf = float32x4_t;
enum { VF_N = 4 };

static inline vf vf_zero() {
    return vdupq_n_f32(0.0f);
}
static inline vf vf_set(float x) {
    return vdupq_n_f32(x);
}
static inline vf vf_load(const float * p) {
    return vld1q_f32(p);
}
static inline void vf_store(float * p, vf a) {
    vst1q_f32(p, a);
}
static inline vf vf_add(vf a, vf b) {
    return vaddq_f32(a, b);
}
static inline vf vf_sub(vf a, vf b) {
    return vsubq_f32(a, b);
}
static inline vf vf_mul(vf a, vf b) {
    return vmulq_f32(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}
static inline vf vf_div(vf a, vf b) {
    return vdivq_f32(a, b);
}
static inline vf vf_max(vf a, vf b) {
    return vmaxq_f32(a, b);
}
static inline float vf_hmax(vf a) {
    return vmaxvq_f32(a);
}

static inline void vf_sum_4(vf a, vf b, vf c, vf d, float * y) {
    vst1q_f32(y, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

static inline vf vf_load_f16(const uint16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
static inline vf vf_load_bf16(const uint16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

static inline uint32_t load_4_bytes(const void * p) {
    uint32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

static inline vf vf_load_i8(const int8_t * p) {
    const int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(load_4_bytes(p)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x))));
}

static inline void vf_load_i4(const uint8_t * p, vf & lo, vf & hi) {
    const uint8x8_t x = vreinterpret_u8_u32(vdup_n_u32(load_4_bytes(p)));
    const int8x8_t  l = vsub_s8(vreinterpret_s8_u8(vand_u8(x, vdup_n_u8(15))), vdup_n_s8(8));
    const int8x8_t  h = vsub_s8(vreinterpret_s8_u8(vshr_n_u8(x, 4)), vdup_n_s8(8));
    lo                = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(l))));
    hi                = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(h))));
}

#else

using vf = float;
enum { VF_N = 1 };

static inline vf vf_zero() {
    return 0.0f;
}
static inline vf vf_set(float x) {
    return x;
}
static inline vf vf_load(const float * p) {
    return *p;
}
static inline void vf_store(float * p, vf a) {
    *p = a;
}
static inline vf vf_add(vf a, vf b) {
    return a + b;
}
static inline vf vf_sub(vf a, vf b) {
    return a - b;
}
static inline vf vf_mul(vf a, vf b) {
    return a * b;
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return a * b + c;
}
static inline vf vf_max(vf a, vf b) {
    return a > b ? a : b;
}
static inline float vf_hmax(vf a) {
    return a;
}

static inline void vf_sum_4(vf a, vf b, vf c, vf d, float * y) {
    y[0] = a;
    y[1] = b;
    y[2] = c;
    y[3] = d;
}

static inline vf vf_load_f16(const uint16_t * p) {
    return GGML_CPU_FP16_TO_FP32(*p);
}
static inline vf vf_load_bf16(const uint16_t * p) {
    const uint32_t x = (uint32_t) *p << 16;
    float          y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
static inline vf vf_load_i8(const int8_t * p) {
    return *p;
}

static inline void vf_load_i4(const uint8_t * p, vf & lo, vf & hi) {
    lo = (*p & 15) - 8;
    hi = (*p >> 4) - 8;
}

#endif

// ggml has an exp of a whole vector for most of these
#if defined(__AVX512DQ__) || (!defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)) || \
    (defined(__ARM_NEON) && defined(__aarch64__) && !defined(__ARM_FEATURE_SVE))
#define MELT_VF_EXP
#endif

static inline vf vf_exp(vf a) {
#ifdef MELT_VF_EXP
    return ggml_v_expf(a);
#else
    float x[VF_N];
    vf_store(x, a);
    for (float & value : x) {
        value = expf(value);
    }
    return vf_load(x);
#endif
}
