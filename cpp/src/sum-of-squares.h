// A row's sum of squares, for the norms. One sum after the other takes 3 us for 2048 values while all threads wait.

#pragma once

#include <stdint.h>

// The sum of x[i]^2, squared in float32 and added in float64 as ggml does, eight sums side by side.
static inline double melt_sum_of_squares(int64_t n, const float * x) {
    double  sums[8] = {};
    int64_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sums[j] += (double) (x[i + j] * x[i + j]);
        }
    }
    for (; i < n; ++i) {
        sums[0] += (double) (x[i] * x[i]);
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}
