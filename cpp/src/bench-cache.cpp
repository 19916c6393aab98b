// A full cache without the hours of computing it, for `melt-edge bench`: rows that are there are repeated.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-memory.h"
#include "llama.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

extern "C" {

// Repeats the K and V rows of sequence 0 until it holds n_tokens, at the positions that follow. The sequence must
// start at position 0 without gaps and be alone in its cache. Returns the tokens it holds, 0 if it could not be done,
// which leaves the sequence empty. The context must not be in use by another thread.
LLAMA_API uint32_t melt_edge_kv_repeat(struct llama_context * ctx, uint32_t n_tokens);

} // extern "C"

static constexpr llama_seq_id SEQ_ID = 0;

// What a sequence's state says of itself, without the rows.
struct bench_state_header : public llama_io_write_i {
    std::vector<uint8_t> bytes;

    void write(const void * src, size_t size) override {
        const auto * first = static_cast<const uint8_t *>(src);
        bytes.insert(bytes.end(), first, first + size);
    }

    void write_tensor(ggml_tensor *, size_t, size_t) override {}

    size_t n_bytes() override { return bytes.size(); }
};

// The state of a longer sequence: the same header with more cells, and the rows that the tensors begin with.
struct bench_repeated_state : public llama_io_read_i {
    bench_repeated_state(std::vector<uint8_t> header, size_t n_old, size_t n_new) :
        header(std::move(header)), n_old(n_old), n_new(n_new) {}

    void read(void * dst, size_t size) override {
        if (size > header.size() - pos) {
            throw std::runtime_error("the state's header ended early");
        }
        memcpy(dst, header.data() + pos, size);
        pos += size;
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        const size_t period = size / n_new * n_old;
        rows.resize(period);
        ggml_backend_tensor_get(tensor, rows.data(), offset, period);
        for (size_t done = period; done < size; done += period) {
            ggml_backend_tensor_set(tensor, rows.data(), offset + done, std::min(period, size - done));
        }
    }

    size_t n_bytes() override { return pos; }

    const std::vector<uint8_t> header;
    const size_t               n_old;
    const size_t               n_new;

    size_t               pos = 0;
    std::vector<uint8_t> rows;
};

// As llama_kv_cache::state_write writes it: streams, cells, (position, sequences, sequence) of each cell, the rest.
static std::vector<uint8_t> bench_longer_header(const std::vector<uint8_t> & header, uint32_t n_old, uint32_t n_new) {
    struct cell {
        llama_pos    pos;
        uint32_t     n_seq_id;
        llama_seq_id seq_id;
    };

    const size_t begin = 2 * sizeof(uint32_t);
    const size_t end   = begin + n_old * sizeof(cell);

    uint32_t counts[2];
    if (header.size() < end) {
        throw std::runtime_error("the state's header is short");
    }
    memcpy(counts, header.data(), sizeof(counts));
    if (counts[0] != 1 || counts[1] != n_old) {
        throw std::runtime_error("the cache holds more than one sequence of tokens without gaps");
    }

    bench_state_header longer;
    counts[1] = n_new;
    longer.write(counts, sizeof(counts));
    for (uint32_t i = 0; i < n_new; ++i) {
        const cell next = {(llama_pos) i, 1, SEQ_ID};
        longer.write(&next, sizeof(next));
    }
    longer.write(header.data() + end, header.size() - end);
    return longer.bytes;
}

uint32_t melt_edge_kv_repeat(struct llama_context * ctx, uint32_t n_tokens) {
    try {
        ctx->synchronize();

        llama_memory_t memory = ctx->get_memory();
        const uint32_t n_old  = memory->seq_pos_max(SEQ_ID) + 1; // no tokens: -1
        if (n_old == 0 || memory->seq_pos_min(SEQ_ID) != 0) {
            return 0;
        }
        if (n_tokens <= n_old) {
            return n_old;
        }

        bench_state_header header;
        memory->state_write(header, SEQ_ID, 0);

        bench_repeated_state state(bench_longer_header(header.bytes, n_old, n_tokens), n_old, n_tokens);
        memory->state_read(state, SEQ_ID, 0);
        return n_tokens;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return 0;
    }
}
