// Which nodes of one token's graph belong together; see one-token.h.

#include "one-token.h"

#include "env-flag.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "repack.h"
#include "row-shares.h"

enum {
    MAX_LONE_VALUES = 8192, // of RoPE and cache rows, which ggml would split over threads
};

bool melt_one_token_enabled() {
    static const bool enabled = melt_env_flag("MELT_ONE_TOKEN");
    return enabled;
}

// ggml leaves these out
static bool is_skipped(const ggml_tensor * node) {
    return ggml_op_is_empty(node->op) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0;
}

static bool is_lone(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_RMS_NORM:
        case GGML_OP_UNARY:
        case GGML_OP_GLU: return ggml_nrows(node) == 1; // ggml splits by rows
        case GGML_OP_ROPE: return node->ne[2] == 1 && node->ne[3] == 1 && ggml_nelements(node) <= MAX_LONE_VALUES;
        case GGML_OP_SET_ROWS: return ggml_nelements(node->src[0]) <= MAX_LONE_VALUES;
        default: return false;
    }
}

// the product of repacked weights and one vector: the first thread quantizes the vector, all meet, all multiply
static bool is_product(const ggml_tensor * node) {
#ifdef GGML_USE_CPU_REPACK
    return node->op == GGML_OP_MUL_MAT && ggml_nrows(node) == 1 && node->src[0]->extra != nullptr &&
           node->src[0]->buffer != nullptr && node->src[0]->buffer->buft == ggml_backend_cpu_repack_buffer_type();
#else
    GGML_UNUSED(node);
    return false;
#endif
}

int melt_lone_nodes(const ggml_cgraph * cgraph, int i_node) {
    if (!melt_one_token_enabled()) {
        return 0;
    }
    int i = i_node;
    while (i < cgraph->n_nodes && (is_lone(cgraph->nodes[i]) || (i > i_node && is_skipped(cgraph->nodes[i])))) {
        ++i;
    }
    return i - i_node;
}

melt_wait melt_after_node(const ggml_cgraph * cgraph, int i_node, const ggml_compute_params * params) {
    if (!melt_one_token_enabled()) {
        return MELT_WAIT;
    }
    int i_next = i_node + 1;
    while (i_next < cgraph->n_nodes && is_skipped(cgraph->nodes[i_next])) {
        ++i_next;
    }
    while (is_skipped(cgraph->nodes[i_node])) { // the last of lone nodes may be a view
        --i_node;
    }
    if (i_next == cgraph->n_nodes || !is_product(cgraph->nodes[i_next])) {
        return MELT_WAIT;
    }
    const ggml_tensor * node = cgraph->nodes[i_node];
    const ggml_tensor * next = cgraph->nodes[i_next];
    if (is_lone(node)) {
        return MELT_GO_ON;
    }
    const bool same = is_product(node) && node->src[1] == next->src[1] && node->src[0]->extra == next->src[0]->extra;
    return same && params->i_product + 1 < MELT_MAX_SAME_INPUT ? MELT_SAME_INPUT : MELT_WAIT;
}
