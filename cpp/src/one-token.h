// Fewer waits in the graph of one token on the CPU. ggml lets all threads meet after every node; of the 45 meetings in
// a gated layer most follow a node that one thread computes in less time than a meeting takes. The environment's
// MELT_ONE_TOKEN=0 brings them back.

#pragma once

#include "ggml-backend.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;
struct ggml_tensor;
struct melt_products;

// False with MELT_ONE_TOKEN=0.
bool melt_one_token_enabled(void);

// The number of nodes from this one on, views included, that one thread computes alone: norms, sums, activations, RoPE
// and the writing of cache rows, for one token. 0 if the first one is for all threads.
int melt_lone_nodes(const struct ggml_cgraph * cgraph, int i_node);

// The products that are computed together from this node on, or none. Returns how many nodes follow the first, views
// included.
GGML_BACKEND_API int melt_gather_products(const struct ggml_cgraph * cgraph, int i_node,
                                          struct melt_products * products);

// Bytes of the work buffer that the vectors of products take, if this node is one.
size_t melt_vectors_bytes(const struct ggml_tensor * node);

// True if the next node lets the threads meet itself, before they read what lone nodes up to this one wrote.
bool melt_goes_on(const struct ggml_cgraph * cgraph, int i_node);

// The first thread asks for the weights of norms and the biases that it will read after this node, a product, and then
// waits for the others to be done with it.
void melt_fetch_lone_weights(const struct ggml_cgraph * cgraph, int i_node, const struct ggml_compute_params * params);

// ggml's barrier for the many meetings of a token: with OpenMP all threads write to one place, here each to its own.
// With MELT_ONE_TOKEN=0, without OpenMP and for more than 8 threads it is ggml's.
void melt_meet(const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
