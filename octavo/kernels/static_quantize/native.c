/* float32 to int8 codes under given scales, on a CPU with AVX-512. */

#include "native.h"

/* code = saturate(round_half_even(x / scale) + zero_point); NaN gives -128.

Values come in `total / length` rows, the last of which may be shorter; there is one scale, or one
for each value of a row. */
void octavo_static_quantize(const float *x, ptrdiff_t total, ptrdiff_t length, const float *scales,
                            int many, int zero_point, int8_t *codes, int threads) {
    const floats zero = all((float)zero_point);
    const ptrdiff_t rows = (total + length - 1) / length;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (ptrdiff_t i = 0; i < rows; i++) {
        const float *row = x + i * length;
        const ptrdiff_t left = total - i * length, count = left < length ? left : length;
        floats scale = all(scales[0]);
        for (ptrdiff_t at = 0; at < count; at += LANES) {
            const __mmask16 mask = first(count - at);
            if (many) scale = _mm512_maskz_loadu_ps(mask, scales + at);
            const floats ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, row + at), scale);
            const floats code = _mm512_add_ps(_mm512_roundscale_ps(ratio, 0), zero);
            const ints whole = _mm512_cvtps_epi32(clamp(code, -128.0f, 127.0f));
            _mm_mask_storeu_epi8(codes + i * length + at, mask, _mm512_cvtsepi32_epi8(whole));
        }
    }
}
