// Which metadata keys a file of "ouro" or "melt" may have, and with which values: the rules of runtime/gguf_keys.py
// for programs that load a file without the Python check. Upstream asserts on some values, and takes others over
// into a graph that does not have their feature.

#include "llama-impl.h"
#include "looped.h"

#include <cmath>
#include <unordered_set>

static constexpr double LLAMA_LOOPED_MAX_I32 = INT32_MAX;

// One value or range that a key may have, both ends included; a key with several rows may have any of them.
// GGUF_TYPE_ARRAY: an array of numbers, each in the range. Text: the whole value.
struct looped_key_rule {
    const char * name; // without the architecture
    gguf_type    type;
    double       low;
    double       high;
    const char * text = nullptr;
};

// clang-format off
static const looped_key_rule LOOPED_KEY_RULES[] = {
    { "block_count",                             GGUF_TYPE_UINT32,  1,     LLAMA_MAX_LAYERS                },
    { "num_loops",                               GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_LOOPS          },
    { "context_length",                          GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "embedding_length",                        GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "feed_forward_length",                     GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "attention.head_count",                    GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "attention.head_count_kv",                 GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "attention.key_length",                    GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "attention.value_length",                  GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "attention.layer_norm_rms_epsilon",        GGUF_TYPE_FLOAT32, 1e-12, 0.1                             },
    { "rope.dimension_count",                    GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "rope.freq_base",                          GGUF_TYPE_FLOAT32, 1.001, 1e30                            },
    { "exit_threshold",                          GGUF_TYPE_FLOAT32, 1e-6,  1.0                             },
    { "vocab_size",                              GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },

    // what upstream's model saver writes of features that these architectures do not have, when it is not 0
    { "attention.causal",                        GGUF_TYPE_BOOL,    1,     1                               },
    { "pooling_type",                            GGUF_TYPE_UINT32,  0,     0                               },
    { "pooling_type",                            GGUF_TYPE_UINT32,  UINT32_MAX, UINT32_MAX                 },
    { "rope.scaling.type",                       GGUF_TYPE_STRING,  0,     0,                     "none"   },
    { "rope.scaling.type",                       GGUF_TYPE_STRING,  0,     0,                     "linear" },
    { "rope.scaling.factor",                     GGUF_TYPE_FLOAT32, 0,     0                               },
    { "rope.scaling.factor",                     GGUF_TYPE_FLOAT32, 1,     1                               },
    { "rope.scaling.attn_factor",                GGUF_TYPE_FLOAT32, 1,     1                               },
    { "rope.scaling.original_context_length",    GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "rope.scaling.yarn_attn_factor",           GGUF_TYPE_FLOAT32, 1,     1                               },
    { "rope.scaling.yarn_beta_fast",             GGUF_TYPE_FLOAT32, 32,    32                              },
    { "rope.scaling.yarn_beta_slow",             GGUF_TYPE_FLOAT32, 1,     1                               },
    { "rope.scaling.yarn_ext_factor",            GGUF_TYPE_FLOAT32, -1,    -1                              },
    { "attention.key_length_swa",                GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "attention.value_length_swa",              GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "rope.dimension_count_swa",                GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "rope.freq_base_swa",                      GGUF_TYPE_FLOAT32, 0,     1e30                            },
    { "activation.situ_beta",                    GGUF_TYPE_FLOAT32, 1,     1                               },
    { "attention.indexer.kpool_select_tail",     GGUF_TYPE_BOOL,    1,     1                               },
    { "attention.rope_pattern",                  GGUF_TYPE_UINT32,  1,     1                               },
    { "attn_logit_softcapping",                  GGUF_TYPE_FLOAT32, 50,    50                              },
    { "decoder_start_token_id",                  GGUF_TYPE_INT32,   -1,    -1                              },
    { "deepstack_mapping",                       GGUF_TYPE_ARRAY,   -1,    -1                              },
    { "expert_group_scale",                      GGUF_TYPE_FLOAT32, 0.05f, 0.05f                           },
    { "final_logit_softcapping",                 GGUF_TYPE_FLOAT32, 30,    30                              },
    { "kda.gate_lower_bound",                    GGUF_TYPE_FLOAT32, -INFINITY, -INFINITY                   },
    { "router_logit_softcapping",                GGUF_TYPE_FLOAT32, 30,    30                              },
    { "token_shift_count",                       GGUF_TYPE_UINT32,  2,     2                               },
};

static const looped_key_rule MELT_KEY_RULES[] = {
    { "chunk_size",                              GGUF_TYPE_UINT32,  1,     LLAMA_LOOPED_MAX_I32            },
    { "kv_gate",                                 GGUF_TYPE_STRING,  0,     0,                     "elementwise" },
    { "kv_gate",                                 GGUF_TYPE_STRING,  0,     0,                     "none"        },
    { "kv_gate_init",                            GGUF_TYPE_STRING,  0,     0,                     "input"       },
    { "kv_gate_init",                            GGUF_TYPE_STRING,  0,     0,                     "zeros"       },
};
// clang-format on

// The value of a key, from the file or from an override.
struct looped_value {
    gguf_type           type;
    std::string         text;    // of a string
    std::vector<double> numbers; // of everything else; one, unless it is an array
};

static double looped_number(gguf_type type, const void * data, size_t i) {
    switch (type) {
        case GGUF_TYPE_UINT8: return ((const uint8_t *) data)[i];
        case GGUF_TYPE_INT8: return ((const int8_t *) data)[i];
        case GGUF_TYPE_UINT16: return ((const uint16_t *) data)[i];
        case GGUF_TYPE_INT16: return ((const int16_t *) data)[i];
        case GGUF_TYPE_UINT32: return ((const uint32_t *) data)[i];
        case GGUF_TYPE_INT32: return ((const int32_t *) data)[i];
        case GGUF_TYPE_FLOAT32: return ((const float *) data)[i];
        case GGUF_TYPE_BOOL: return ((const int8_t *) data)[i];
        case GGUF_TYPE_UINT64: return (double) ((const uint64_t *) data)[i];
        case GGUF_TYPE_INT64: return (double) ((const int64_t *) data)[i];
        case GGUF_TYPE_FLOAT64: return ((const double *) data)[i];
        default: return NAN; // a text in an array: no rule allows it
    }
}

static looped_value looped_file_value(const gguf_context * ctx, int64_t id) {
    looped_value value = {gguf_get_kv_type(ctx, id), "", {}};

    if (value.type == GGUF_TYPE_STRING) {
        value.text = gguf_get_val_str(ctx, id);
    } else if (value.type != GGUF_TYPE_ARRAY) {
        value.numbers.push_back(looped_number(value.type, gguf_get_val_data(ctx, id), 0));
    } else {
        const gguf_type item = gguf_get_arr_type(ctx, id);
        const void *    data = item == GGUF_TYPE_STRING ? nullptr : gguf_get_arr_data(ctx, id);
        for (size_t i = 0; i < gguf_get_arr_n(ctx, id); ++i) {
            value.numbers.push_back(looped_number(item, data, i));
        }
    }

    return value;
}

static looped_value looped_override_value(const llama_model_kv_override & override) {
    switch (override.tag) {
        case LLAMA_KV_OVERRIDE_TYPE_INT: return {GGUF_TYPE_UINT32, "", {(double) override.val_i64}};
        case LLAMA_KV_OVERRIDE_TYPE_FLOAT: return {GGUF_TYPE_FLOAT32, "", {override.val_f64}};
        case LLAMA_KV_OVERRIDE_TYPE_BOOL: return {GGUF_TYPE_BOOL, "", {(double) override.val_bool}};
        case LLAMA_KV_OVERRIDE_TYPE_STR: return {GGUF_TYPE_STRING, override.val_str, {}};
    }
    throw std::runtime_error(format("the override of %s has an unknown type", override.key));
}

// comparisons are written so that NaN fails them
static bool looped_all_in(const std::vector<double> & numbers, double low, double high) {
    for (const double number : numbers) {
        if (!(number >= low && number <= high)) {
            return false;
        }
    }
    return true;
}

static bool looped_allows(const looped_key_rule & rule, const looped_value & value) {
    if (rule.type != value.type) {
        return false;
    }
    return rule.text ? value.text == rule.text : looped_all_in(value.numbers, rule.low, rule.high);
}

static std::string looped_show(const looped_value & value) {
    if (value.type == GGUF_TYPE_STRING) {
        return "'" + value.text.substr(0, 80) + "'";
    }
    if (value.type == GGUF_TYPE_ARRAY) {
        return format("an array of %zu items", value.numbers.size());
    }
    return format("%.10g (%s)", value.numbers[0], gguf_type_name(value.type));
}

static std::string looped_show(const looped_key_rule & rule) {
    if (rule.text) {
        return format("'%s'", rule.text);
    }
    const std::string type = gguf_type_name(rule.type);
    return rule.low == rule.high ? format("%.10g (%s)", rule.low, type.c_str())
                                 : format("%.10g to %.10g (%s)", rule.low, rule.high, type.c_str());
}

static void looped_check_key(llm_arch arch, const std::string & key, const looped_value & value) {
    const std::string name = key.substr(key.find('.') + 1);

    std::vector<looped_key_rule> rules(std::begin(LOOPED_KEY_RULES), std::end(LOOPED_KEY_RULES));
    if (arch == LLM_ARCH_MELT) {
        rules.insert(rules.end(), std::begin(MELT_KEY_RULES), std::end(MELT_KEY_RULES));
    }

    std::string expected;
    for (const looped_key_rule & rule : rules) {
        if (name != rule.name) {
            continue;
        }
        if (looped_allows(rule, value)) {
            return;
        }
        expected += (expected.empty() ? "" : " or ") + looped_show(rule);
    }

    if (!expected.empty()) {
        throw std::runtime_error(
            format("%s is %s, expected %s", key.c_str(), looped_show(value).c_str(), expected.c_str()));
    }

    // the saver writes every key it knows: 0 and false turn a feature off
    if (value.type == GGUF_TYPE_STRING || !looped_all_in(value.numbers, 0, 0)) {
        throw std::runtime_error(format("%s is %s, but %s has no such feature", key.c_str(), looped_show(value).c_str(),
                                        llm_arch_name(arch)));
    }
}

void llama_looped_check_keys(const llama_model_loader & ml) {
    const llm_arch    arch   = ml.get_arch();
    const std::string prefix = std::string(llm_arch_name(arch)) + ".";

    const auto is_checked = [&](const std::string & key) {
        return key.rfind(prefix, 0) == 0 || key.rfind("xielu.", 0) == 0 || key.rfind("general.tensor_extra.", 0) == 0;
    };

    for (int64_t id = 0; id < gguf_get_n_kv(ml.metadata); ++id) {
        const std::string key = gguf_get_key(ml.metadata, id);
        if (is_checked(key)) {
            looped_check_key(arch, key, looped_file_value(ml.metadata, id));
        }
    }
    for (const auto & [key, override] : ml.kv_overrides) {
        if (is_checked(key)) {
            looped_check_key(arch, key, looped_override_value(override));
        }
    }

    if (gguf_get_alignment(ml.metadata) < GGUF_DEFAULT_ALIGNMENT) {
        throw std::runtime_error(format("general.alignment is %zu, expected %d or more",
                                        gguf_get_alignment(ml.metadata), GGUF_DEFAULT_ALIGNMENT));
    }
}

void llama_looped_check_vocab(llama_model_loader & ml) {
    std::string model = "none";
    ml.get_key(LLM_KV_TOKENIZER_MODEL, model, false);
    // "test" is the tokenizer of upstream's own tests
    if (model != "gpt2" && model != "none" && model != "no_vocab" && model != "test") {
        throw std::runtime_error(format("tokenizer.ggml.model is '%s', expected 'gpt2'", model.c_str()));
    }

    std::vector<std::string> tokens;
    ml.get_arr(LLM_KV_TOKENIZER_LIST, tokens, false);

    std::unordered_set<std::string> seen;
    for (const std::string & token : tokens) {
        if (token.empty() || !seen.insert(token).second) {
            throw std::runtime_error(format("tokenizer.ggml.tokens has the token '%s' %s", token.c_str(),
                                            token.empty() ? "without a text" : "twice"));
        }
    }

    uint32_t n_vocab = 0;
    if (ml.get_key(LLM_KV_VOCAB_SIZE, n_vocab, false) && !tokens.empty() && n_vocab != tokens.size()) {
        throw std::runtime_error(format("%s is %u, but the vocabulary has %zu tokens",
                                        ml.llm_kv(LLM_KV_VOCAB_SIZE).c_str(), n_vocab, tokens.size()));
    }
}
