// Keeps C++ exceptions from crossing the C API: a caller in another language cannot catch them.

#pragma once

#include "llama-impl.h"

#include <exception>

template <typename F>
static int32_t llama_no_throw(const char * func, F && f) {
    try {
        return f();
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", func, err.what());
    } catch (...) {
        LLAMA_LOG_ERROR("%s: unknown exception\n", func);
    }

    return -4; // fatal error, as every code below -1
}
