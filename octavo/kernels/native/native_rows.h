/* Rows of float32 to int8 codes with one scale per row, on a CPU with AVX-512.

scale = max|x| / 127, or 1 / 127 for a row of zeros; code = saturate(round_half_even(x / scale)).
NaN makes a row's scale NaN and its codes -128, as in the reference. */

#ifndef OCTAVO_NATIVE_ROWS_H
#define OCTAVO_NATIVE_ROWS_H

#include "native.h"

/* The largest magnitude, NaN if there is one: magnitudes are in the order of their bits. */
INLINE float peak_of(const float *row, ptrdiff_t k) {
    ints most = _mm512_setzero_si512();
    const ints magnitude = all_ints(0x7fffffff);
    for (ptrdiff_t at = 0; at < k; at += LANES) {
        const ints bits = _mm512_maskz_loadu_epi32(first(k - at), row + at);
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    const ints peak = all_ints(_mm512_reduce_max_epi32(most));
    return _mm512_cvtss_f32(_mm512_castsi512_ps(peak));
}

/* Writes the codes of a row, and returns its scale. */
INLINE float quantize_row(const float *row, ptrdiff_t k, int8_t *codes) {
    const float peak = peak_of(row, k);
    const float scale = (peak == 0.0f ? 1.0f : peak) / 127.0f;
    for (ptrdiff_t at = 0; at < k; at += LANES) {
        const __mmask16 mask = first(k - at);
        const floats ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, row + at), all(scale));
        const ints code = _mm512_cvtps_epi32(clamp(ratio, -128.0f, 127.0f));
        _mm_mask_storeu_epi8(codes + at, mask, _mm512_cvtsepi32_epi8(code));
    }
    return scale;
}

#endif
