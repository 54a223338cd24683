/* Rows of float32 to int8 codes with one scale per row, on a CPU with AVX-512. */

#include "native_rows.h"

void octavo_quantize_rows(const float *x, ptrdiff_t rows, ptrdiff_t k, int8_t *codes, float *scales,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (ptrdiff_t i = 0; i < rows; i++) scales[i] = quantize_row(x + i * k, k, codes + i * k);
}
