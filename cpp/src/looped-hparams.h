// What the looped architectures ("ouro", "melt") add to llama_hparams.

#pragma once

#include <cstdint>

struct llama_looped_hparams {
    uint32_t n_loops      = 1;
    uint32_t n_layer_phys = 0; // layers in the file; 0: not a looped architecture

    // tokens of a sequence that see each other loop by loop; 0: the result does not depend on it
    uint32_t chunk_size = 0;

    bool kv_gate            = false; // the K/V rows are made from a gated latent, else from the normed input
    bool kv_gate_init_input = false; // the latent of the first loop is the normed input, else it starts from zeros

    // the first loop at which the exit probability adds up to this is read; from 1 on, the last loop is
    float exit_threshold = 1.0f;
};
