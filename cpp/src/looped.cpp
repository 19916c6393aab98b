// The model file of "ouro" and "melt": keys, tensors, and a token's path from embedding to head.
// The names and the order are those of melt_edge/modeling.py, which it is tested against.

#include "looped.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model-saver.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

//
// hparams
//

static void looped_require(llama_model_loader & ml, bool ok, enum llm_kv kid, const char * expected) {
    if (!ok) {
        throw std::runtime_error(
            format("%s is out of range, expected %s", std::string(ml.llm_kv(kid)).c_str(), expected));
    }
}

void llama_model_looped::load_hparams(llama_model_loader & ml) {
    llama_looped_check_keys(ml); // first: what follows asserts on some values
    llama_model_base::load_hparams(ml);
}

void llama_model_looped::load_vocab(llama_model_loader & ml) {
    llama_looped_check_vocab(ml);
    llama_model_base::load_vocab(ml);
}

// llama_looped_check_keys has seen each key by itself; here they are compared with each other.
void llama_model_looped::load_arch_hparams(llama_model_loader & ml) {
    llama_looped_hparams & looped = hparams.looped;

    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    ml.get_key(LLM_KV_ROPE_FREQ_BASE, hparams.rope_freq_base_train);
    ml.get_key(LLM_KV_EXIT_THRESHOLD, looped.exit_threshold, false);
    ml.get_key(LLM_KV_NUM_LOOPS, looped.n_loops);

    const uint32_t n_head      = hparams.n_head();
    const uint32_t n_head_kv   = hparams.n_head_kv();
    const uint32_t n_embd_head = hparams.n_embd_head_k();

    looped_require(ml, n_head > 0, LLM_KV_ATTENTION_HEAD_COUNT, "at least 1");
    looped_require(ml, n_head_kv > 0 && n_head % n_head_kv == 0, LLM_KV_ATTENTION_HEAD_COUNT_KV,
                   "a divisor of the head count");
    looped_require(ml, n_embd_head > 0 && n_embd_head % 2 == 0, LLM_KV_ATTENTION_KEY_LENGTH, "an even number");
    looped_require(ml, n_embd_head == hparams.n_embd_head_v(), LLM_KV_ATTENTION_VALUE_LENGTH, "the key length");
    looped_require(ml, n_embd_head == hparams.n_rot(), LLM_KV_ROPE_DIMENSION_COUNT, "the key length");
    looped_require(ml, hparams.n_ff() > 0, LLM_KV_FEED_FORWARD_LENGTH, "at least 1");

    looped.n_layer_phys = hparams.n_layer();

    if (arch == LLM_ARCH_MELT) {
        // one cache slot per layer, written again by every loop
        std::string kv_gate;
        std::string kv_gate_init;
        ml.get_key(LLM_KV_CHUNK_SIZE, looped.chunk_size);
        ml.get_key(LLM_KV_KV_GATE, kv_gate);
        ml.get_key(LLM_KV_KV_GATE_INIT, kv_gate_init);
        looped.kv_gate            = kv_gate == "elementwise";
        looped.kv_gate_init_input = kv_gate_init == "input";
    } else {
        // one cache slot per (loop, layer): the cache is made for n_layer_all layers
        const uint64_t n_slots = (uint64_t) looped.n_loops * looped.n_layer_phys;
        if (n_slots > LLAMA_MAX_LAYERS) {
            throw std::runtime_error(format(
                "%s x %s is %llu, expected at most %d cache slots", std::string(ml.llm_kv(LLM_KV_NUM_LOOPS)).c_str(),
                std::string(ml.llm_kv(LLM_KV_BLOCK_COUNT)).c_str(), (unsigned long long) n_slots, LLAMA_MAX_LAYERS));
        }
        for (uint32_t slot = looped.n_layer_phys; slot < n_slots; ++slot) {
            hparams.n_head_arr[slot]    = n_head;
            hparams.n_head_kv_arr[slot] = n_head_kv;
            hparams.n_ff_arr[slot]      = hparams.n_ff();
        }
        hparams.n_layer_all = (uint32_t) n_slots;
    }

    if (hparams.n_embd == 2048) {
        switch (looped.n_layer_phys) {
            case 24: type = looped.kv_gate ? LLM_TYPE_1_6B : LLM_TYPE_1_4B; break;
            case 48: type = looped.kv_gate ? LLM_TYPE_UNKNOWN : LLM_TYPE_2_6B; break;
            default: type = LLM_TYPE_UNKNOWN;
        }
    }
}

void llama_looped_save_hparams(llama_model_saver & saver, const llama_hparams & hparams) {
    const llama_looped_hparams & looped = hparams.looped;
    if (looped.n_layer_phys == 0) {
        return;
    }

    saver.add_kv(LLM_KV_BLOCK_COUNT, looped.n_layer_phys); // n_layer_all counts Ouro's cache slots
    saver.add_kv(LLM_KV_NUM_LOOPS, looped.n_loops);
    saver.add_kv(LLM_KV_EXIT_THRESHOLD, looped.exit_threshold);
    if (looped.chunk_size > 0) {
        saver.add_kv(LLM_KV_CHUNK_SIZE, looped.chunk_size);
        saver.add_kv(LLM_KV_KV_GATE, looped.kv_gate ? "elementwise" : "none");
        saver.add_kv(LLM_KV_KV_GATE_INIT, looped.kv_gate_init_input ? "input" : "zeros");
    }
}

//
// tensors
//

// The kernels of norms and biases read float32, and those of products abort or crash on what is no weight type.
static void looped_check_type(const ggml_tensor * tensor, bool is_weight) {
    if (tensor == nullptr) {
        return;
    }

    bool ok = tensor->type == GGML_TYPE_F32;
    if (is_weight) {
        switch (tensor->type) {
            case GGML_TYPE_F16:
            case GGML_TYPE_BF16:
            case GGML_TYPE_Q4_0:
            case GGML_TYPE_Q4_1:
            case GGML_TYPE_Q5_0:
            case GGML_TYPE_Q5_1:
            case GGML_TYPE_Q8_0:
            case GGML_TYPE_Q2_K:
            case GGML_TYPE_Q3_K:
            case GGML_TYPE_Q4_K:
            case GGML_TYPE_Q5_K:
            case GGML_TYPE_Q6_K:
            case GGML_TYPE_IQ4_NL:
            case GGML_TYPE_IQ4_XS: ok = true; break;
            default: break;
        }
    }

    if (!ok) {
        throw std::runtime_error(format("%s has type %s, expected %s", tensor->name, ggml_type_name(tensor->type),
                                        is_weight ? "a floating-point or quantized weight type" : "f32"));
    }
}

void llama_model_looped::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    const int64_t n_embd_q = n_embd_head_k * n_head;

    tok_embd    = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, 0);
    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), {n_embd}, 0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT, "weight"), {n_embd, n_vocab}, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, TENSOR_DUPLICATED);
    }

    exit_gate   = create_tensor(tn(LLM_TENSOR_EXIT_GATE, "weight"), {n_embd, 1}, TENSOR_NOT_REQUIRED);
    exit_gate_b = create_tensor(tn(LLM_TENSOR_EXIT_GATE, "bias"), {1}, exit_gate ? 0 : TENSOR_NOT_REQUIRED);
    if ((exit_gate == nullptr) != (exit_gate_b == nullptr)) {
        throw std::runtime_error("exit_gate.bias is in the file, but exit_gate.weight is not");
    }
    if (exit_gate == nullptr && hparams.looped.exit_threshold < 1.0f) {
        throw std::runtime_error("an exit threshold below 1 needs exit_gate.weight, which the file does not have");
    }

    // Ouro's further cache slots have no weights of their own: the graph asks for layers[il % n_layer_phys]
    for (int il = 0; il < (int) hparams.looped.n_layer_phys; ++il) {
        auto & layer = layers[il];

        layer.attn_norm = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", il), {n_embd}, 0);

        if (hparams.looped.kv_gate) {
            layer.kv_gate_x   = create_tensor(tn(LLM_TENSOR_KV_GATE_X, "weight", il), {n_embd, n_embd}, 0);
            layer.kv_gate_x_b = create_tensor(tn(LLM_TENSOR_KV_GATE_X, "bias", il), {n_embd}, 0);
            layer.kv_gate_h   = create_tensor(tn(LLM_TENSOR_KV_GATE_H, "weight", il), {n_embd, n_embd}, 0);
        }

        layer.wq = create_tensor(tn(LLM_TENSOR_ATTN_Q, "weight", il), {n_embd, n_embd_q}, 0);
        layer.wk = create_tensor(tn(LLM_TENSOR_ATTN_K, "weight", il), {n_embd, n_embd_k_gqa}, 0);
        layer.wv = create_tensor(tn(LLM_TENSOR_ATTN_V, "weight", il), {n_embd, n_embd_v_gqa}, 0);
        layer.wo = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", il), {n_embd_q, n_embd}, 0);

        layer.attn_post_norm = create_tensor(tn(LLM_TENSOR_ATTN_POST_NORM, "weight", il), {n_embd}, 0);

        layer.ffn_norm = create_tensor(tn(LLM_TENSOR_FFN_NORM, "weight", il), {n_embd}, 0);
        layer.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", il), {n_embd, n_ff}, 0);
        layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP, "weight", il), {n_embd, n_ff}, 0);
        layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", il), {n_ff, n_embd}, 0);

        layer.ffn_post_norm = create_tensor(tn(LLM_TENSOR_FFN_POST_NORM, "weight", il), {n_embd}, 0);
    }

    for (const ggml_tensor * tensor : {tok_embd, output}) {
        looped_check_type(tensor, true);
    }
    for (const ggml_tensor * tensor : {output_norm, exit_gate, exit_gate_b}) {
        looped_check_type(tensor, false);
    }
    for (int il = 0; il < (int) hparams.looped.n_layer_phys; ++il) {
        const auto & layer = layers[il];
        for (const ggml_tensor * tensor : {layer.kv_gate_x, layer.kv_gate_h, layer.wq, layer.wk, layer.wv, layer.wo,
                                           layer.ffn_gate, layer.ffn_up, layer.ffn_down}) {
            looped_check_type(tensor, true);
        }
        for (const ggml_tensor * tensor :
             {layer.attn_norm, layer.attn_post_norm, layer.ffn_norm, layer.ffn_post_norm, layer.kv_gate_x_b}) {
            looped_check_type(tensor, false);
        }
    }
}

//
// graph
//

// the chunk's rows of the cache, as ggml_get_rows wants them
class looped_input_rows : public llm_graph_input_i {
public:
    looped_input_rows(ggml_tensor * rows, const llm_graph_input_attn_kv * inp_attn) : rows(rows), inp_attn(inp_attn) {}

    // inp_attn is an input that is set before
    void set_input(const llama_ubatch *) override {
        const auto * idxs = (const int64_t *) inp_attn->self_k_idxs->data;

        const std::vector<int32_t> data(idxs, idxs + rows->ne[0]);
        ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
    }

    bool can_reuse(const llm_graph_params & params) override { return rows->ne[0] == params.ubatch.n_tokens; }

private:
    ggml_tensor *                   rows; // I32 [n_tokens]
    const llm_graph_input_attn_kv * inp_attn;
};

struct llama_model_looped::graph : public llm_graph_context {
    graph(const llama_model & model, const llm_graph_params & params);

    const llama_model &          model;
    const llama_looped_hparams & looped;

    // inputs, the same in every loop
    ggml_tensor *             inp_pos;
    llm_graph_input_attn_kv * inp_attn;
    ggml_tensor *             inp_rows; // nullptr if latents wait in the graph's buffer
    ggml_tensor *             inp_out_ids;

    std::vector<ggml_tensor *> latents; // h of each layer, from the loop before; nullptr in the first

    ggml_tensor * build_inp_rows() const;

    // one pass over the stack; the rows that no output asks for are dropped in the last layer of the last loop
    ggml_tensor * build_loop(ggml_tensor * cur, int loop_idx);

    // the latent from which K and V are made: z = sigmoid(Wz u + bz + Uz h), h = z*h + (1 - z)*u
    ggml_tensor * build_kv_gate(const llama_layer & layer, ggml_tensor * u, ggml_tensor * h, int il) const;

    // the latent as the next loop reads it; between the loops it waits in the layer's rows of the cache
    ggml_tensor * build_latent(ggml_tensor * h, int il) const;

    // the state of the loop at which each token leaves
    ggml_tensor * build_exit(const std::vector<ggml_tensor *> & states) const;
};

std::unique_ptr<llm_graph_context> llama_model_looped::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_looped::graph::graph(const llama_model & model, const llm_graph_params & params) :
    llm_graph_context(params), model(model), looped(model.hparams.looped), latents(looped.n_layer_phys, nullptr) {
    ggml_tensor * cur = build_inp_embd(model.tok_embd); // [n_embd, n_tokens]

    inp_pos     = build_inp_pos();
    inp_attn    = build_attn_inp_kv();
    inp_rows    = build_inp_rows();
    inp_out_ids = build_inp_out_ids();

    const bool early_exit = looped.exit_threshold < 1.0f;

    std::vector<ggml_tensor *> states; // of the output rows after each loop

    for (int loop_idx = 0; loop_idx < (int) looped.n_loops; ++loop_idx) {
        cur = build_loop(cur, loop_idx);

        if (early_exit) {
            const bool gathered = loop_idx == (int) looped.n_loops - 1;
            states.push_back(inp_out_ids && !gathered ? ggml_get_rows(ctx0, cur, inp_out_ids) : cur);
        }
    }

    if (early_exit) {
        cur = build_exit(states);
    }

    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    cur = build_lora_mm(model.output, cur, model.output_s); // [n_vocab, n_outputs]
    cb(cur, "result_output", -1);
    res->t_logits = cur;

    ggml_build_forward_expand(gf, cur);
}

ggml_tensor * llama_model_looped::graph::build_loop(ggml_tensor * cur, int loop_idx) {
    const int64_t n_embd_head = hparams.n_embd_head_v();
    const float   kq_scale    = 1.0f / sqrtf(float(n_embd_head));

    const int  n_layer_phys = looped.n_layer_phys;
    const bool per_loop_kv  = looped.chunk_size == 0; // Ouro
    const bool is_last_loop = loop_idx == (int) looped.n_loops - 1;

    for (int layer_idx = 0; layer_idx < n_layer_phys; ++layer_idx) {
        const llama_layer & layer = model.layers[layer_idx];

        // the cache slot: MELT's loops all write the rows of the physical layer
        const int il = per_loop_kv ? loop_idx * n_layer_phys + layer_idx : layer_idx;

        res->t_layer_inp[il] = cur;

        ggml_tensor * inpSA = cur;

        ggml_tensor * u = build_norm(cur, layer.attn_norm, nullptr, LLM_NORM_RMS, il);
        cb(u, "attn_norm", il);

        ggml_tensor * Qcur = build_lora_mm(layer.wq, u, layer.wq_s);
        // Products of the same vector follow each other: the CPU takes one token's together (one-token.h). With rows Q
        // comes after the gate, which saves a buffer. Graphs of different order must differ in their number of nodes,
        // as these do: ggml gives a graph the buffers of the one before if it has as many.
        if (inp_rows == nullptr) {
            ggml_build_forward_expand(gf, Qcur);
        }

        ggml_tensor * h = looped.kv_gate ? build_kv_gate(layer, u, latents[layer_idx], il) : u;

        ggml_tensor * Kcur = build_lora_mm(layer.wk, h, layer.wk_s);
        ggml_tensor * Vcur = build_lora_mm(layer.wv, h, layer.wv_s);
        ggml_build_forward_expand(gf, Kcur);
        ggml_build_forward_expand(gf, Vcur);

        Qcur = ggml_reshape_3d(ctx0, Qcur, n_embd_head, n_head, n_tokens);
        Kcur = ggml_reshape_3d(ctx0, Kcur, n_embd_head, n_head_kv, n_tokens);
        Vcur = ggml_reshape_3d(ctx0, Vcur, n_embd_head, n_head_kv, n_tokens);

        Qcur = ggml_rope_ext(ctx0, Qcur, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                             ext_factor, attn_factor, beta_fast, beta_slow);
        Kcur = ggml_rope_ext(ctx0, Kcur, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                             ext_factor, attn_factor, beta_fast, beta_slow);
        cb(Qcur, "Qcur", il);
        cb(Kcur, "Kcur", il);
        cb(Vcur, "Vcur", il);

        cur = build_attn(inp_attn, layer.wo, nullptr, layer.wo_s, Qcur, Kcur, Vcur, nullptr, nullptr, nullptr, kq_scale,
                         il);
        cb(cur, "attn_out", il);

        latents[layer_idx] = h;
        if (inp_rows != nullptr && !is_last_loop) {
            ggml_build_forward_expand(gf, cur); // attention reads the rows before build_latent writes them
            latents[layer_idx] = build_latent(h, il);
        }

        if (is_last_loop && layer_idx == n_layer_phys - 1 && inp_out_ids) {
            cur   = ggml_get_rows(ctx0, cur, inp_out_ids); // [n_embd, n_outputs]
            inpSA = ggml_get_rows(ctx0, inpSA, inp_out_ids);
        }

        cur = build_norm(cur, layer.attn_post_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "attn_post_norm", il);

        ggml_tensor * ffn_inp = ggml_add(ctx0, cur, inpSA);
        cb(ffn_inp, "ffn_inp", il);

        cur = build_norm(ffn_inp, layer.ffn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "ffn_norm", il);

        cur = build_ffn(cur, layer.ffn_up, nullptr, layer.ffn_up_s, layer.ffn_gate, nullptr, layer.ffn_gate_s,
                        layer.ffn_down, nullptr, layer.ffn_down_s, nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);
        cb(cur, "ffn_out", il);

        cur = build_norm(cur, layer.ffn_post_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "ffn_post_norm", il);

        cur = ggml_add(ctx0, cur, ffn_inp);
        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);
    }

    // the final norm closes every loop
    cur = build_norm(cur, model.output_norm, nullptr, LLM_NORM_RMS, -1);
    cb(cur, "loop_norm", -1);

    return cur;
}

ggml_tensor * llama_model_looped::graph::build_kv_gate(const llama_layer & layer, ggml_tensor * u, ggml_tensor * h,
                                                       int il) const {
    if (h == nullptr && looped.kv_gate_init_input) {
        return u;
    }

    ggml_tensor * z = build_lora_mm(layer.kv_gate_x, u);
    if (h != nullptr) {
        z = ggml_add(ctx0, z, build_lora_mm(layer.kv_gate_h, h));
    }
    z = ggml_sigmoid(ctx0, ggml_add(ctx0, z, layer.kv_gate_x_b));
    cb(z, "kv_gate_z", il);

    // z*h + (1 - z)*u as u + z*(h - u): one operation fewer; h is zero in the first loop
    ggml_tensor * cur = h != nullptr ? ggml_add(ctx0, u, ggml_mul(ctx0, z, ggml_sub(ctx0, h, u)))
                                     : ggml_sub(ctx0, u, ggml_mul(ctx0, z, u));
    cb(cur, "kv_gate_h", il);

    return cur;
}

// true if a row is as long as a latent and of a type that can hold it
static bool looped_holds_latent(const ggml_tensor * cache, int64_t n_embd) {
    return cache->ne[0] == n_embd && (cache->type == GGML_TYPE_F16 || cache->type == GGML_TYPE_F32);
}

ggml_tensor * llama_model_looped::graph::build_inp_rows() const {
    // One token's latents are small, and writing them would be a step more. Without flash attention V has no rows. A
    // device that takes over some operations would copy whole caches of the CPU's to read a few rows.
    if (!looped.kv_gate || looped.n_loops == 1 || n_tokens == 1 || !cparams.flash_attn || cparams.training ||
        !model.devices.empty()) {
        return nullptr;
    }
    // the layers' caches are alike
    if (!looped_holds_latent(inp_attn->mctx->get_k(ctx0, 0)->view_src, n_embd) ||
        !looped_holds_latent(inp_attn->mctx->get_v(ctx0, 0)->view_src, n_embd)) {
        return nullptr;
    }

    ggml_tensor * rows = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_tokens);
    ggml_set_input(rows);
    ggml_set_name(rows, "inp_rows");
    res->add_input(std::make_unique<looped_input_rows>(rows, inp_attn));
    return rows;
}

// Nobody reads the rows of the chunk's own tokens before the next loop has written them anew. So K's row keeps h
// rounded to the cache's type, and V's what that rounding left: 22 bits of float16 together. A buffer for the latents
// of all layers would be as large as the chunk's part of the cache.
ggml_tensor * llama_model_looped::graph::build_latent(ggml_tensor * h, int il) const {
    const auto * mctx   = inp_attn->mctx;
    const auto   as_row = [&](ggml_tensor * cur) {
        return ggml_reshape_3d(ctx0, cur, hparams.n_embd_head_k(il), n_head_kv, n_tokens);
    };

    ggml_tensor * k = mctx->cpy_k(ctx0, as_row(h), inp_attn->get_k_idxs(), il);

    ggml_tensor * rest = ggml_sub(ctx0, h, ggml_get_rows(ctx0, k, inp_rows));
    cb(rest, "kv_gate_rest", il);

    ggml_tensor * v = mctx->cpy_v(ctx0, as_row(rest), inp_attn->get_v_idxs(), il);
    ggml_build_forward_expand(gf, v);

    // read again where the next loop needs it, so that nothing stays in the buffer
    ggml_tensor * cur = ggml_add(ctx0, ggml_get_rows(ctx0, k, inp_rows), ggml_get_rows(ctx0, v, inp_rows));
    cb(cur, "kv_gate_latent", il);

    return cur;
}

ggml_tensor * llama_model_looped::graph::build_exit(const std::vector<ggml_tensor *> & states) const {
    // remaining *= 1 - exit_t; a token leaves at the first loop with 1 - remaining >= threshold, that is
    // threshold - 1 + remaining <= 0, and at the last one anyway
    ggml_tensor * remaining = nullptr; // [1, n_outputs]
    ggml_tensor * staying   = nullptr; // 1 while the token has not left
    ggml_tensor * cur       = nullptr; // [n_embd, n_outputs]

    for (size_t loop_idx = 0; loop_idx < states.size(); ++loop_idx) {
        ggml_tensor * state = states[loop_idx];

        ggml_tensor * leaving = staying; // share of the state that is read: 0 or 1
        if (loop_idx + 1 < states.size()) {
            ggml_tensor * logit = ggml_add(ctx0, ggml_mul_mat(ctx0, model.exit_gate, state), model.exit_gate_b);
            ggml_tensor * stay  = ggml_sigmoid(ctx0, ggml_neg(ctx0, logit)); // 1 - exit_t
            remaining           = remaining ? ggml_mul(ctx0, remaining, stay) : stay;

            ggml_tensor * still = ggml_step(ctx0, ggml_scale_bias(ctx0, remaining, 1.0f, looped.exit_threshold - 1.0f));
            leaving             = staying ? ggml_sub(ctx0, staying, still) : ggml_scale_bias(ctx0, still, -1.0f, 1.0f);
            staying             = still;
        }

        ggml_tensor * part = leaving ? ggml_mul(ctx0, state, leaving) : state;
        cur                = cur ? ggml_add(ctx0, cur, part) : part;
    }
    cb(cur, "exit_state", -1);

    return cur;
}

uint32_t llama_looped_max_nodes(const llama_model & model) {
    const llama_looped_hparams & looped = model.hparams.looped;

    uint64_t per_loop = 64ull * looped.n_layer_phys + 32; // at most 60 tensors are made for a layer
    for (const auto & lora : model.loras) {
        per_loop += lora->get_n_nodes();
    }

    return (uint32_t) std::min<uint64_t>(1024 + looped.n_loops * per_loop, INT32_MAX);
}

//
// batches
//

void llama_looped_limit_batch(const llama_hparams & hparams, llama_cparams & cparams) {
    const uint32_t chunk_size = hparams.looped.chunk_size;
    if (chunk_size == 0) {
        return;
    }

    cparams.n_ubatch = std::min(cparams.n_ubatch, chunk_size);

    const uint64_t n_batch = ((uint64_t) cparams.n_batch + cparams.n_ubatch - 1) / cparams.n_ubatch * cparams.n_ubatch;
    cparams.n_batch        = (uint32_t) std::min<uint64_t>(n_batch, std::max(cparams.n_ctx, cparams.n_batch));

    if (cparams.n_ubatch < chunk_size && cparams.n_ubatch < cparams.n_ctx) {
        LLAMA_LOG_WARN("%s: prompts are cut into chunks of %u tokens (n_ubatch), the model was made for %u\n", __func__,
                       cparams.n_ubatch, chunk_size);
    }
}
