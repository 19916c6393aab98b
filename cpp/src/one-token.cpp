// Which nodes of one token's graph belong together; see one-token.h.

#include "one-token.h"

#include "env-flag.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "kernel-common.h"
#include "repack.h"
#include "row-shares.h"

enum {
    MAX_LONE_VALUES = 8192,     // of RoPE and cache rows, which ggml would split over threads
    MAX_FETCHED     = 16 << 10, // bytes of a norm's weights: some of them fit into the L2 cache with what is there
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
    return node->op == GGML_OP_MUL_MAT && ggml_nrows(node) == 1 && node->src[1]->type == GGML_TYPE_F32 &&
           node->src[0]->extra != nullptr && node->src[0]->buffer != nullptr &&
           node->src[0]->buffer->buft == ggml_backend_cpu_repack_buffer_type();
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

static int next_node(const ggml_cgraph * cgraph, int i_node) {
    do {
        ++i_node;
    } while (i_node < cgraph->n_nodes && is_skipped(cgraph->nodes[i_node]));
    return i_node;
}

static bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    return (const char *) a->data < (const char *) b->data + ggml_nbytes(b) &&
           (const char *) b->data < (const char *) a->data + ggml_nbytes(a);
}

// False if the node cannot be computed together with those that are there.
static bool add_product(melt_products & products, ggml_tensor * node) {
    if (products.n == MELT_MAX_PRODUCTS || !is_product(node)) {
        return false;
    }
    if (products.n > 0 && ggml_is_numa()) {
        return false; // of each product a thread has the rows that lie in its memory
    }
    for (int i = 0; i < products.n; ++i) {
        const ggml_tensor * other = products.node[i];
        if (node->src[0]->extra != other->src[0]->extra || node->src[0]->ne[0] != other->src[0]->ne[0] ||
            overlap(node->src[1], other)) {
            return false;
        }
    }
    int vector = 0;
    while (vector < products.n_vectors && products.vectors[vector] != node->src[1]) {
        ++vector;
    }
    if (vector == products.n_vectors) {
        if (vector == MELT_MAX_VECTORS) {
            return false;
        }
        products.vectors[products.n_vectors++] = node->src[1];
    }
    products.node[products.n]     = node;
    products.vector[products.n++] = vector;
    return true;
}

int melt_gather_products(const ggml_cgraph * cgraph, int i_node, melt_products * products) {
    products->n = products->n_vectors = 0;
    if (!melt_one_token_enabled()) {
        return 0;
    }
    int i_last = i_node;
    for (int i = i_node; i < cgraph->n_nodes && add_product(*products, cgraph->nodes[i]); i = next_node(cgraph, i)) {
        i_last = i;
    }
    return i_last - i_node;
}

size_t melt_vectors_bytes(const ggml_tensor * node) {
    return is_product(node) ? MELT_MAX_VECTORS * melt_vector_bytes(node) : 0;
}

bool melt_goes_on(const ggml_cgraph * cgraph, int i_node) {
    if (!melt_one_token_enabled()) {
        return false;
    }
    const int i_next = next_node(cgraph, i_node);
    while (is_skipped(cgraph->nodes[i_node])) { // the last of lone nodes may be a view
        --i_node;
    }
    return i_next < cgraph->n_nodes && is_lone(cgraph->nodes[i_node]) && is_product(cgraph->nodes[i_next]);
}

void melt_fetch_lone_weights(const ggml_cgraph * cgraph, int i_node, const ggml_compute_params * params) {
    if (params->ith != 0 || !melt_one_token_enabled() || !is_product(cgraph->nodes[i_node])) {
        return;
    }
    int i = i_node;
    while ((i = next_node(cgraph, i)) < cgraph->n_nodes && is_lone(cgraph->nodes[i])) {
        const ggml_tensor * weights = cgraph->nodes[i]->src[1];
        if (weights != nullptr && weights->op == GGML_OP_NONE && ggml_nbytes(weights) <= MAX_FETCHED) {
            fetch_bytes((const char *) weights->data, ggml_nbytes(weights));
        }
    }
}
