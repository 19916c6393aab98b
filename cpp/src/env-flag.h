// Switches in the environment, to compare our kernels with ggml's.

#pragma once

#include <cstdlib>
#include <cstring>

// False where the variable is "0".
static inline bool melt_env_flag(const char * name) {
    const char * value = getenv(name);
    return value == nullptr || strcmp(value, "0") != 0;
}
