// Fewer waits in the graph of one token on the CPU. ggml lets all threads meet after every node; of the 45 meetings in
// a gated layer most follow a node that one thread computes in less time than a meeting takes. The environment's
// MELT_ONE_TOKEN=0 brings them back.

#pragma once

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

// False with MELT_ONE_TOKEN=0.
bool melt_one_token_enabled(void);

// The number of nodes from this one on, views included, that one thread computes alone: norms, sums, activations, RoPE
// and the writing of cache rows, for one token. 0 if the first one is for all threads.
int melt_lone_nodes(const struct ggml_cgraph * cgraph, int i_node);

enum melt_wait {
    MELT_WAIT,       // all threads meet before the next node
    MELT_GO_ON,      // the next node lets them meet itself, before it reads what this one wrote
    MELT_SAME_INPUT, // both are products of the same vector, which stays quantized where it is
};

// What follows this node, or the last of its lone nodes.
enum melt_wait melt_after_node(const struct ggml_cgraph * cgraph, int i_node,
                               const struct ggml_compute_params * params);

// ggml's barrier for the many meetings of a token: with OpenMP all threads write to one place, here each to its own.
// With MELT_ONE_TOKEN=0, without OpenMP and for more than 8 threads it is ggml's.
void melt_meet(const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
