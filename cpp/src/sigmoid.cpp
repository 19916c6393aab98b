// sigmoid(x) = 1 / (1 + exp(-x)), a vector at a time with ggml's exp.

#include "sigmoid.h"

#include "float-vectors.h"

#include <cmath>

#ifdef MELT_VF_EXP // else ggml's own is as fast

static vf sigmoid(vf x) {
    const vf one = vf_set(1.0f);
    const vf e   = vf_exp(vf_sub(vf_zero(), x));
    return vf_div(one, vf_fma(e, one, one));
}

#endif

bool melt_sigmoid(const ggml_compute_params * params, ggml_tensor * dst) {
#ifdef MELT_VF_EXP
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
    for (; i + VF_N <= end; i += VF_N) {
        vf_store(y + i, sigmoid(vf_load(x + i)));
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
