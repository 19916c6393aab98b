// The rows of a product with one vector, shared out to the threads. ggml gives each the next chunk of all rows, and
// each chunk begins the reading of memory anew, so chunks are large and threads wait for the last one. Here a thread
// goes through rows of its own from front to back, in steps of half of what is left, and a thread that is done takes
// from the back of another's: reading is not interrupted, and threads of the same speed are done within the smallest
// step of each other. MELT_ONE_TOKEN=0 leaves the rows to ggml.

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
    MELT_MAX_SAME_INPUT = 8,        // products of one vector between two meetings
    MELT_MIN_STEP       = 32 << 10, // bytes of weights, read in about a microsecond
};

// What the shares take at the end of the work buffer.
GGML_BACKEND_API size_t melt_row_shares_bytes(int n_threads);

// All threads meet and begin a product; without a meeting where it takes the same input as the one before. False if the
// rows are left to ggml, and then nothing was done.
bool melt_begin_rows(struct ggml_compute_params * params);

// This thread's next rows, in groups of rows that lie together: returns how many groups, *group being the first; 0 when
// none is left. n_groups: of the product. group_bytes: of a group's weights.
GGML_BACKEND_API int64_t melt_next_rows(const struct ggml_compute_params * params, int64_t n_groups, size_t group_bytes,
                                        int64_t * group);

#ifdef __cplusplus
}
#endif
