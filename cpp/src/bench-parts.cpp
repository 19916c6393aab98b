// Where the time of a token goes, for `melt-edge bench`: attention over the cache, gates and the rest, in each loop.
// The graph is computed in pieces with a clock between them. A context that is not asked for this runs as always.

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama.h"

#include "ggml-backend.h"

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

extern "C" {

// Decodes n_tokens tokens of sequence 0 one by one and adds up the seconds of their parts, the first token's left out.
// seconds: [n_loops + 1][3], the last row is what follows the loops; attention from the writing of the rows to the
// weighted sum, gates, all else. Returns the number of tokens that were timed, 0 if they could not be evaluated. The
// context must not be in use by another thread.
LLAMA_API uint32_t melt_edge_time_parts(struct llama_context * ctx, llama_token * tokens, uint32_t n_tokens,
                                        double * seconds, uint32_t n_loops);

} // extern "C"

using bench_clock = std::chrono::steady_clock;

enum bench_part : uint32_t {
    BENCH_PART_ATTENTION,
    BENCH_PART_GATES,
    BENCH_PART_OTHER,
    BENCH_PART_COUNT,
};

struct bench_timer {
    bench_timer(uint32_t n_loops, double * seconds) : n_loops(n_loops), seconds(seconds) {}

    const uint32_t n_loops;
    double *       seconds;

    std::vector<uint32_t> slots; // of each node of a token's graph: where its time is added

    bool   learning = true; // the first token: which nodes there are
    size_t i_node   = 0;

    // while learning
    uint32_t   loop_idx = 0;
    bench_part part     = BENCH_PART_OTHER;

    bench_clock::time_point last;

    void next_token() {
        learning = slots.empty();
        i_node   = 0;
    }

    bool ask(const ggml_tensor * node) {
        if (learning) {
            learn(node);
            return false;
        }
        if (i_node == 0) {
            last = bench_clock::now();
        }
        const size_t i = i_node++;
        return i + 1 >= slots.size() || slots[i] != slots[i + 1];
    }

    void computed() {
        const auto now = bench_clock::now();
        if (i_node <= slots.size()) {
            seconds[slots[i_node - 1]] += std::chrono::duration<double>(now - last).count();
        }
        last = now;
    }

private:
    // by the names that the graph gives; in every layer the nodes of a part follow each other
    void learn(const ggml_tensor * node) {
        if (part == BENCH_PART_OTHER) {
            if (node->op == GGML_OP_SET_ROWS) {
                part = BENCH_PART_ATTENTION;
            } else if (node->src[0] != nullptr && strstr(node->src[0]->name, ".kv_gate_") != nullptr) {
                part = BENCH_PART_GATES;
            }
        }
        slots.push_back(loop_idx * BENCH_PART_COUNT + part);

        if (starts(node, "kqv_out") || starts(node, "kv_gate_h")) {
            part = BENCH_PART_OTHER;
        }
        if ((starts(node, "loop_norm") || starts(node, "result_norm")) && loop_idx < n_loops) {
            ++loop_idx;
        }
    }

    static bool starts(const ggml_tensor * node, const char * name) {
        return strncmp(node->name, name, strlen(name)) == 0;
    }
};

static bool bench_on_node(ggml_tensor * node, bool ask, void * user_data) {
    auto * timer = static_cast<bench_timer *>(user_data);
    if (ask) {
        return timer->ask(node);
    }
    timer->computed();
    return true;
}

static void bench_set_callback(llama_context * ctx, ggml_backend_sched_eval_callback callback, void * user_data) {
    ctx->synchronize();

    // the context hands its own to every graph that it builds; one that is used again keeps the scheduler's
    auto & cparams            = const_cast<llama_cparams &>(ctx->get_cparams());
    cparams.cb_eval           = callback;
    cparams.cb_eval_user_data = user_data;
    ggml_backend_sched_set_eval_callback(ctx->get_sched(), callback, user_data);
}

static uint32_t bench_time_parts(llama_context * ctx, bench_timer & timer, llama_token * tokens, uint32_t n_tokens) {
    for (uint32_t i = 0; i < n_tokens; ++i) {
        timer.next_token();
        if (llama_decode(ctx, llama_batch_get_one(tokens + i, 1)) != 0) {
            return 0;
        }
        ctx->synchronize();
    }
    return n_tokens > 0 ? n_tokens - 1 : 0;
}

uint32_t melt_edge_time_parts(struct llama_context * ctx, llama_token * tokens, uint32_t n_tokens, double * seconds,
                              uint32_t n_loops) {
    bench_timer timer(n_loops, seconds);
    bench_set_callback(ctx, bench_on_node, &timer);

    uint32_t n_timed = 0;
    try {
        n_timed = bench_time_parts(ctx, timer, tokens, n_tokens);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
    }

    bench_set_callback(ctx, nullptr, nullptr);
    return n_timed;
}
