// The rows of products with one vector each, shared out to the threads. ggml gives each thread the next chunk of all
// rows of one product, and each chunk begins the reading of memory anew, so chunks are large and threads wait for the
// last one. Here products that follow each other are shared out together: a thread goes through rows of its own from
// front to back, half of them at first and then three quarters of what is left, and a thread that is done takes from
// the back of another's. Reading is seldom interrupted, and threads of the same speed are done within the smallest step
// of each other. MELT_ONE_TOKEN=0 leaves the rows to ggml.

#pragma once

#include "ggml-backend.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

enum {
    MELT_MAX_PRODUCTS = 8,
    MELT_MAX_VECTORS  = 2,        // that they take, for each of which there is room in the work buffer
    MELT_MIN_STEP     = 32 << 10, // bytes of weights, read in about a microsecond
};

// Products whose weights have the same type, layout and row length; none of them takes what another one gives.
struct melt_products {
    int                        n; // 0: the node is left to ggml
    int                        n_vectors;
    struct ggml_tensor *       node[MELT_MAX_PRODUCTS];
    int                        vector[MELT_MAX_PRODUCTS]; // the number of the one that each takes
    const struct ggml_tensor * vectors[MELT_MAX_VECTORS];
};

// Bytes of the work buffer for one vector of such a product, quantized; and where the vector of that number lies.
size_t melt_vector_bytes(const struct ggml_tensor * node);
char * melt_vector(const struct ggml_compute_params * params, int vector);

// What the shares take at the end of the work buffer.
GGML_BACKEND_API size_t melt_row_shares_bytes(int n_threads);

// All threads meet, the vectors having been quantized, and begin params->melt.
void melt_begin_rows(const struct ggml_compute_params * params);

// Rows of one of the products that lie together.
struct melt_rows {
    int     product;
    int64_t first;
    int64_t end;
    int64_t group; // of all products' groups those that this thread has taken and not gone through: from here
    int64_t end_group;
};

// This thread's next rows, in whole groups of n_group; false if none is left. *rows: of zeros for the first call, then
// what the call before left there.
GGML_BACKEND_API bool melt_next_rows(const struct ggml_compute_params * params, int n_group, struct melt_rows * rows);

#ifdef __cplusplus
}
#endif
