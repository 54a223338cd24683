/* LayerNorm over rows of float32 and what is added to them, on a CPU with AVX-512. */

#include "native_rows.h"

#include <math.h>

/* Writes the sum of two rows, and returns the sum of its values. */
INLINE float added(const float *row, const float *residual, float *out, ptrdiff_t n) {
    floats sum = _mm512_setzero_ps();
    for (ptrdiff_t at = 0; at < n; at += LANES) {
        const __mmask16 mask = first(n - at);
        const floats x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, row + at),
                                       _mm512_maskz_loadu_ps(mask, residual + at));
        _mm512_mask_storeu_ps(out + at, mask, x);
        sum = _mm512_add_ps(sum, x);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Sum of the squared distances of a row's values to their mean. */
INLINE float spread(const float *row, float mean, ptrdiff_t n) {
    floats sum = _mm512_setzero_ps();
    for (ptrdiff_t at = 0; at < n; at += LANES) {
        const __mmask16 mask = first(n - at);
        const floats x = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, row + at), all(mean));
        sum = _mm512_fmadd_ps(x, x, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* out [count, n] = (z - mean) / sqrt(variance + eps) * weight + bias with z = rows + residual, and
where `codes` is not NULL out's codes and scales. weight and bias [n] may be NULL. */
void octavo_add_norm(const float *rows, const float *residual, const float *weight,
                     const float *bias, float eps, float *out, int8_t *codes, float *scales,
                     ptrdiff_t count, ptrdiff_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (ptrdiff_t i = 0; i < count; i++) {
        float *row = out + i * n;
        const float mean = added(rows + i * n, residual + i * n, row, n) / (float)n;
        const floats by = all(1.0f / sqrtf(spread(row, mean, n) / (float)n + eps));
        for (ptrdiff_t at = 0; at < n; at += LANES) {
            const __mmask16 mask = first(n - at);
            floats y = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + at), all(mean));
            y = _mm512_mul_ps(y, by);
            if (weight) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, weight + at));
            if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias + at));
            _mm512_mask_storeu_ps(row + at, mask, y);
        }
        if (codes) scales[i] = quantize_row(row, n, codes + i * n);
    }
}
