/* What the C of several operators shares: AVX-512 vectors of 16 floats, and functions of them.

Differences from torch's functions are a few units in the last place of the largest term. NaN stays
NaN: where an instruction takes its second operand if one is NaN, the values are the second one. */

#ifndef OCTAVO_NATIVE_H
#define OCTAVO_NATIVE_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define PANEL 32 /* columns of a tile */
#define TILE 12  /* rows of the largest */

typedef __m512 floats;
typedef __m512i ints;

INLINE floats all(float value) { return _mm512_set1_ps(value); }

INLINE ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }

/* A mask of the first `count` lanes, of all 16 if there are more. */
INLINE __mmask16 first(ptrdiff_t count) {
    if (count >= LANES) return 0xffff;
    return count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

INLINE floats clamp(floats x, float low, float high) {
    return _mm512_min_ps(all(high), _mm512_max_ps(all(low), x));
}

/* exp(x), by 2**n times a polynomial on [-1/2, 1/2]. */
INLINE floats exponential(floats x) {
    const float log2e = 1.44269502e+0f, log2e_rest = 1.92596299e-8f;
    x = clamp(x, -104.0f, 89.0f);
    const floats n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(log2e)), 0);
    floats f = _mm512_fmsub_ps(x, all(log2e), n);
    f = _mm512_fmadd_ps(x, all(log2e_rest), f);
    floats p = all(1.534580806e-4f);
    p = _mm512_fmadd_ps(p, f, all(1.339993090e-3f));
    p = _mm512_fmadd_ps(p, f, all(9.618489072e-3f));
    p = _mm512_fmadd_ps(p, f, all(5.550328642e-2f));
    p = _mm512_fmadd_ps(p, f, all(2.402264625e-1f));
    p = _mm512_fmadd_ps(p, f, all(6.931471825e-1f));
    p = _mm512_fmadd_ps(p, f, all(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* 1 / (1 + exp(-x)). */
INLINE floats sigmoid(floats x) {
    const floats e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), e));
}

/* x / (1 + exp(-2 u)), as (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)); u = sqrt(2/pi) (x + ...). */
INLINE floats gelu_tanh(floats x) {
    const floats cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const floats inner = _mm512_fmadd_ps(cubed, all(0.044715f), x);
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(inner, all(1.595769122f))));
}

INLINE floats silu(floats x) { return _mm512_mul_ps(x, sigmoid(x)); }

INLINE floats hardswish(floats x) {
    const floats gate = clamp(_mm512_add_ps(x, all(3.0f)), 0.0f, 6.0f);
    return _mm512_div_ps(_mm512_mul_ps(x, gate), all(6.0f));
}

/* Rows written out, so that every compiler keeps their sums in registers. */
#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_4(DO) ROWS_2(DO) DO(2) DO(3)
#define ROWS_6(DO) ROWS_4(DO) DO(4) DO(5)
#define ROWS_8(DO) ROWS_6(DO) DO(6) DO(7)
#define ROWS_12(DO) ROWS_8(DO) DO(8) DO(9) DO(10) DO(11)

#endif
