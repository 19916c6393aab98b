// One thread's work on the products that are computed together; see row-shares.h. A template, since ggml's kernels are
// members of one.

#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "row-shares.h"

// chunk(params, product, first row, end): multiplies these rows, a multiple of n_group, with the vector at
// params->wdata, which is quantized to vector_type. False for a node that is left to ggml; then nothing was done.
template <class F>
static bool melt_forward_products(const ggml_compute_params * params, ggml_type vector_type, int n_group, F && chunk) {
    if (params->melt == nullptr || params->melt->n == 0) {
        return false;
    }
    const melt_products & products = *params->melt;

    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(vector_type)->from_float;
    for (int i = 0; params->ith == 0 && i < products.n_vectors; ++i) {
        from_float((const float *) products.vectors[i]->data, melt_vector(params, i), products.vectors[i]->ne[0]);
    }

    melt_begin_rows(params);
    for (melt_rows rows = {}; melt_next_rows(params, n_group, &rows);) {
        ggml_compute_params with = *params;
        with.wdata               = melt_vector(params, products.vector[rows.product]);
        with.wsize               = melt_vector_bytes(products.node[rows.product]);
        chunk(&with, products.node[rows.product], rows.first, rows.end);
    }
    return true;
}
