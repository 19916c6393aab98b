// Cuts a batch into ubatches for a cache that every loop rewrites: its result depends on which tokens of a
// sequence run together, so a sequence is cut as if it were alone, whatever else is in the batch.

#include "llama-batch.h"

llama_ubatch llama_batch_allocr::split_chunks(uint32_t n_chunk, bool equal) {
    if (equal && has_cpl) {
        return {}; // streams cannot share tokens; the caller reports the failed split
    }

    std::vector<int32_t> idxs;
    seq_set_t            seen; // sequences that have had their turn in this ubatch

    uint32_t     n_seqs       = 0;
    uint32_t     n_seq_tokens = 0;
    llama_seq_id last_seq_id  = -1;

    for (int32_t i = 0; i < batch.n_tokens && idxs.size() < n_chunk; ++i) {
        if (used[i] || (seen & seq_set[i]).any()) {
            continue;
        }
        seen |= seq_set[i];

        // the next chunk of this sequence set starts at its first unused token, which is i
        idx_vec_t chunk;
        for (const int32_t idx : seq_set_map[seq_set[i]]) {
            if (idx >= i && !used[idx] && chunk.size() < n_chunk) {
                chunk.push_back(idx);
            }
        }

        if (idxs.size() + chunk.size() > n_chunk) {
            continue;
        }
        if (equal && n_seqs > 0 && (chunk.size() != n_seq_tokens || batch.seq_id[i][0] != last_seq_id + 1)) {
            continue;
        }

        for (const int32_t idx : chunk) {
            used[idx] = true;
            ++n_used;
        }
        idxs.insert(idxs.end(), chunk.begin(), chunk.end());

        n_seqs += 1;
        n_seq_tokens = chunk.size();
        last_seq_id  = batch.seq_id[i][0];
    }

    if (idxs.empty()) {
        return {};
    }

    return ubatch_add(idxs, equal ? n_seqs : idxs.size(), equal);
}
