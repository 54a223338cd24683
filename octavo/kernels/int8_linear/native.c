/* A dynamic INT8 Linear from float rows to float rows, on a CPU with AVX-512 VNNI: quantization and
product in one call, since for small inputs a second call takes as long as the arithmetic. */

#include "../int8_gemm/native.c"
#include "native_rows.h"

void octavo_int8_linear(const float *x, const uint8_t *w, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                        const float *scale_w, const float *bias, int activation, int8_t *codes,
                        float *scales, float *out, int quantizers, int threads) {
#pragma omp parallel for schedule(static) num_threads(quantizers) if (quantizers > 1)
    for (ptrdiff_t i = 0; i < m; i++) scales[i] = quantize_row(x + i * k, k, codes + i * k);
    octavo_int8_gemm(codes, w, m, n, k, scales, m > 1, scale_w, 1, bias, NULL, activation, NULL,
                     FLOAT32, 1.0f, 0, out, threads);
}
