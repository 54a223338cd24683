/* GELU by a table: max(x, 0) - |x| Q(|x|), with Q the share of a normal distribution above a value.

Q is a polynomial of degree 4 in each of 31 intervals, through its values at Chebyshev's points, with
an error of 4e-9; beyond the last, at 5.5, it is 0 in place of 2e-8. Each coefficient is looked up in
a table of 32, which two registers hold. */

#ifndef OCTAVO_NATIVE_GELU_H
#define OCTAVO_NATIVE_GELU_H

#include "native.h"

#include <math.h>

#define TERMS 5
#define INTERVALS 32
#define WIDTH (5.5 / (INTERVALS - 1.5))

static float gelu_terms[TERMS][INTERVALS] __attribute__((aligned(64)));

/* The polynomial of an interval, in places from -1/2 to 1/2 around its middle, by Newton's way. */
static void fit_gelu(int interval) {
    double place[TERMS], slope[TERMS], term[TERMS] = {0};
    for (int i = 0; i < TERMS; i++) {
        place[i] = 0.5 * cos((2 * i + 1) * M_PI / (2 * TERMS));
        slope[i] = 0.5 * erfc((interval + place[i]) * WIDTH * M_SQRT1_2);
    }
    for (int order = 1; order < TERMS; order++)
        for (int i = TERMS - 1; i >= order; i--)
            slope[i] = (slope[i] - slope[i - 1]) / (place[i] - place[i - order]);
    for (int i = TERMS - 1; i >= 0; i--) {
        for (int power = TERMS - 1; power > 0; power--)
            term[power] = term[power - 1] - term[power] * place[i];
        term[0] = slope[i] - term[0] * place[i];
    }
    for (int power = 0; power < TERMS; power++) gelu_terms[power][interval] = (float)term[power];
}

/* Runs when the library is loaded; what stands for all beyond the last interval stays 0. */
static __attribute__((constructor)) void fit_gelu_terms(void) {
    for (int interval = 0; interval < INTERVALS - 1; interval++) fit_gelu(interval);
}

INLINE floats gelu_term(int power, ints interval) {
    const floats low = _mm512_load_ps(gelu_terms[power]);
    return _mm512_permutex2var_ps(low, interval, _mm512_load_ps(gelu_terms[power] + LANES));
}

INLINE floats gelu(floats x) {
    const floats per_width = all((float)(1 / WIDTH)), to_integer = all(0x1.8p23f);
    const floats size = _mm512_abs_ps(x), last = all((float)((INTERVALS - 1) * WIDTH));
    const floats within = _mm512_min_ps(last, size);
    /* the last bits of a float of this size are those of the integer next to the sum */
    const floats rounded = _mm512_fmadd_ps(within, per_width, to_integer);
    const ints interval = _mm512_castps_si512(rounded);
    const floats place = _mm512_fmsub_ps(within, per_width, _mm512_sub_ps(rounded, to_integer));
    floats q = gelu_term(TERMS - 1, interval);
    for (int power = TERMS - 2; power >= 0; power--)
        q = _mm512_fmadd_ps(q, place, gelu_term(power, interval));
    return _mm512_fnmadd_ps(size, q, _mm512_max_ps(_mm512_setzero_ps(), x));
}

#endif
