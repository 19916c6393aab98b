// What the Python bindings ask of the library beyond llama.h: which build it is, and how many bytes it holds.

#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama.h"

#include <string>

#if !defined(MELT_PIN_VERSION) || !defined(MELT_PIN_COMMIT) || !defined(MELT_SOURCES_SHA256)
#error "the build passes the pin and the digest of the sources"
#endif

extern "C" {

// JSON: the pinned bindings and commit, the digest of the patches and our sources, and the size of every struct that
// crosses the boundary. The text lives as long as the library. Thread-safe.
LLAMA_API const char * melt_edge_build_info(void);

// Bytes of the model's tensors, of the K/V cache and of the compute buffers, over all devices. The context must be
// alive and not in use by another thread.
LLAMA_API uint64_t melt_edge_weights_bytes(const struct llama_context * ctx);
LLAMA_API uint64_t melt_edge_kv_bytes(const struct llama_context * ctx);
LLAMA_API uint64_t melt_edge_compute_bytes(const struct llama_context * ctx);

} // extern "C"

static std::string build_info() {
    std::string json = "{";
    json += "\"llama_cpp_python\": \"" MELT_PIN_VERSION "\", ";
    json += "\"llama_cpp_commit\": \"" MELT_PIN_COMMIT "\", ";
    json += "\"sources_sha256\": \"" MELT_SOURCES_SHA256 "\", ";
    json += "\"sizeof\": {";
    json += "\"llama_model_params\": " + std::to_string(sizeof(llama_model_params)) + ", ";
    json += "\"llama_context_params\": " + std::to_string(sizeof(llama_context_params)) + ", ";
    json += "\"llama_batch\": " + std::to_string(sizeof(llama_batch)) + ", ";
    json += "\"llama_model_quantize_params\": " + std::to_string(sizeof(llama_model_quantize_params)) + ", ";
    json += "\"llama_token_data\": " + std::to_string(sizeof(llama_token_data)) + ", ";
    json += "\"llama_sampler_chain_params\": " + std::to_string(sizeof(llama_sampler_chain_params)) + "}}";
    return json;
}

const char * melt_edge_build_info(void) {
    static const std::string info = build_info();
    return info.c_str();
}

static uint64_t sum_bytes(const llama_context * ctx, size_t llama_memory_breakdown_data::* part) {
    uint64_t n_bytes = 0;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
        n_bytes += data.*part;
    }
    return n_bytes;
}

uint64_t melt_edge_weights_bytes(const llama_context * ctx) {
    return sum_bytes(ctx, &llama_memory_breakdown_data::model);
}

uint64_t melt_edge_kv_bytes(const llama_context * ctx) {
    return sum_bytes(ctx, &llama_memory_breakdown_data::context);
}

uint64_t melt_edge_compute_bytes(const llama_context * ctx) {
    return sum_bytes(ctx, &llama_memory_breakdown_data::compute);
}
