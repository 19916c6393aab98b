// sigmoid(x) = 1 / (1 + exp(-x)), a vector at a time with ggml's exp.

#include "sigmoid.h"

#include "ggml-cpu-impl.h"
#include "vec.h"

#include <cmath>

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#define MELT_SIGMOID 16

static void sigmoid_values(const float * x, float * y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e   = ggml_v_expf(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(x)));
    _mm512_storeu_ps(y, _mm512_div_ps(one, _mm512_add_ps(one, e)));
}

#elif defined(__AVX2__) && defined(__FMA__)

#define MELT_SIGMOID 8

static void sigmoid_values(const float * x, float * y) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 e   = ggml_v_expf(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_loadu_ps(x)));
    _mm256_storeu_ps(y, _mm256_div_ps(one, _mm256_add_ps(one, e)));
}

#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(__ARM_FEATURE_SVE)

#define MELT_SIGMOID 4

static void sigmoid_values(const float * x, float * y) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    const float32x4_t e   = ggml_v_expf(vnegq_f32(vld1q_f32(x)));
    vst1q_f32(y, vdivq_f32(one, vaddq_f32(one, e)));
}

#endif

bool melt_sigmoid(const ggml_compute_params * params, ggml_tensor * dst) {
#ifdef MELT_SIGMOID
    const ggml_tensor * src = dst->src[0];
    if (src->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 || !ggml_is_contiguous(src) ||
        !ggml_is_contiguous(dst)) {
        return false;
    }
    const int64_t n_rows = ggml_nrows(dst);
    const int64_t first  = n_rows * params->ith / params->nth * dst->ne[0];
    const int64_t end    = n_rows * (params->ith + 1) / params->nth * dst->ne[0];
    const float * x      = (const float *) src->data;
    float *       y      = (float *) dst->data;

    int64_t i = first;
    for (; i + MELT_SIGMOID <= end; i += MELT_SIGMOID) {
        sigmoid_values(x + i, y + i);
    }
    for (; i < end; ++i) {
        y[i] = 1.0f / (1.0f + expf(-x[i]));
    }
    return true;
#else
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
#endif
}
