// Looped transformers: one stack of layers applied n_loops times to every token.
// llama_model_ouro keeps a K/V cache slot for each (loop, layer), llama_model_melt one for each layer.

#pragma once

#include "llama-graph.h"
#include "llama-model-loader.h"
#include "llama-model.h"

struct llama_cparams;
struct llama_model_saver;

static constexpr uint32_t LLAMA_LOOPED_MAX_LOOPS = 64;

// Both architectures; they differ in hparams.looped, which the file's keys fill.
struct llama_model_looped : public llama_model_base {
    llama_model_looped(const struct llama_model_params & params) : llama_model_base(params) {}

    // these throw std::runtime_error naming the key for every value that the graph cannot take
    void load_hparams(llama_model_loader & ml) override;
    void load_vocab(llama_model_loader & ml) override;
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    struct graph;

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;
};

struct llama_model_ouro : public llama_model_looped {
    llama_model_ouro(const struct llama_model_params & params) : llama_model_looped(params) {}
};

struct llama_model_melt : public llama_model_looped {
    llama_model_melt(const struct llama_model_params & params) : llama_model_looped(params) {}
};

// throws std::runtime_error naming the first key, of the file or an override, that the architecture cannot have
void llama_looped_check_keys(const llama_model_loader & ml);

// the same for what the vocabulary asserts on, or what leaves it without a byte's token
void llama_looped_check_vocab(llama_model_loader & ml);

// an upper bound on the nodes of the graph, LoRA adapters included
uint32_t llama_looped_max_nodes(const llama_model & model);

// n_ubatch is the chunk: at most the file's chunk size. n_batch becomes a multiple of it where the context
// allows, so that a caller who feeds n_batch tokens at a time cuts a prompt where one call would cut it.
void llama_looped_limit_batch(const llama_hparams & hparams, llama_cparams & cparams);

// write the keys that load_arch_hparams reads
void llama_looped_save_hparams(llama_model_saver & saver, const llama_hparams & hparams);
