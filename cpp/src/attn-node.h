// The shape of attention's node, for our kernels of it.

#pragma once

#include "ggml.h"

#include <cstring>

// A GGML_OP_FLASH_ATTN_EXT node.
struct attn_node {
    const ggml_tensor * q;    // [n_embd_k, n_tokens, n_head, n_streams]
    const ggml_tensor * k;    // [n_embd_k, n_kv, n_head_kv, of n_streams]
    const ggml_tensor * v;    // [n_embd_v, n_kv, n_head_kv, of n_streams]
    const ggml_tensor * mask; // [n_kv, n_tokens, 1, of n_streams], f16; none: all cells are seen
    const ggml_tensor * dst;  // [n_embd_v, n_head, n_tokens, n_streams]

    int64_t n_embd_k, n_embd_v; // of a head
    int64_t n_head, n_head_kv, n_kv, n_tokens, n_streams;
    float   scale;

    // False for what no kernel of ours takes.
    bool init(const ggml_tensor * node) {
        dst       = node;
        q         = dst->src[0];
        k         = dst->src[1];
        v         = dst->src[2];
        mask      = dst->src[3];
        n_embd_k  = k->ne[0];
        n_embd_v  = v->ne[0];
        n_head    = q->ne[2];
        n_head_kv = k->ne[2];
        n_kv      = k->ne[1];
        n_tokens  = q->ne[1];
        n_streams = q->ne[3];

        float params[3]; // scale, ALiBi's bias, soft-capping
        memcpy(params, dst->op_params, sizeof(params));
        scale = params[0];
        return params[1] == 0.0f && params[2] == 0.0f && dst->src[4] == nullptr && v->ne[2] == n_head_kv &&
               (mask == nullptr || mask->ne[2] == 1) && q->type == GGML_TYPE_F32;
    }

    // a stream's part of K or V
    const char * cache(const ggml_tensor * kv, int64_t stream) const {
        return (const char *) kv->data + stream / (n_streams / kv->ne[3]) * kv->nb[3];
    }
    const float * query(int64_t token, int64_t head, int64_t stream) const {
        return (const float *) ((const char *) q->data + token * q->nb[1] + head * q->nb[2] + stream * q->nb[3]);
    }
    // what a token sees, a value for each cell; nullptr: all of them
    const ggml_fp16_t * mask_row(int64_t token, int64_t stream) const {
        return mask == nullptr ? nullptr
                               : (const ggml_fp16_t *) ((const char *) mask->data + token * mask->nb[1] +
                                                        stream % mask->ne[3] * mask->nb[3]);
    }
    float * out(int64_t token, int64_t head, int64_t stream) const {
        return (float *) ((char *) dst->data + head * dst->nb[1] + token * dst->nb[2] + stream * dst->nb[3]);
    }
};
