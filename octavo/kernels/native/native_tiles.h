/* Exact sums of products of int8 codes, on a CPU with AVX-512 VNNI.

vpdpbusd adds four products of an unsigned and a signed byte to each of 16 int32, exactly. So the
weights are stored as codes plus 128, and the sums of a row of x begin with -128 times the sum of its
codes.

Weights lie in panels of 32 output channels, [N / 32][ceil(K / 4)][32][4], filled up with 128. A
tile of the result is up to 12 rows by a panel: 24 registers of sums, two of weights, and four codes
of a row broadcast to every lane as the instruction reads them. */

#ifndef OCTAVO_NATIVE_TILES_H
#define OCTAVO_NATIVE_TILES_H

#include "native.h"

#include <string.h>

#define SHIFT 128
#define AHEAD 1024 /* bytes of weights that are asked for before they are needed */

/* Bytes of a panel. */
INLINE ptrdiff_t panel_size(ptrdiff_t k) { return (k + 3) / 4 * 4 * PANEL; }

/* Up to four codes of a row as one int32, filled up with 0. */
INLINE int32_t group(const int8_t *codes, ptrdiff_t count) {
    int32_t four = 0;
    memcpy(&four, codes, (size_t)count);
    return four;
}

/* What the sums of a row begin with: -128 times the sum of its codes. */
static int32_t start_of(const int8_t *row, ptrdiff_t k) {
    ints sum = _mm512_setzero_si512();
    const ints ones = _mm512_set1_epi8(1);
    ptrdiff_t at = 0;
    for (; at + 64 <= k; at += 64)
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(row + at));
    if (at < k) {
        const __mmask64 rest = (1ull << (k - at)) - 1;
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(rest, row + at));
    }
    return (int32_t)(0u - (uint32_t)_mm512_reduce_add_epi32(sum) * SHIFT);
}

#define BEGIN(i) ints left_##i = all_ints(starts[i]), right_##i = left_##i;
#define ADD(i)                                                                                    \
    four = all_ints(group(third[(i) / 3] + (i) % 3 * k, 4));                                      \
    left_##i = _mm512_dpbusd_epi32(left_##i, w_left, four);                                       \
    right_##i = _mm512_dpbusd_epi32(right_##i, w_right, four);
#define STORE(i)                                                                                  \
    _mm512_storeu_si512(sums[i], left_##i);                                                       \
    _mm512_storeu_si512(sums[i] + LANES, right_##i);

/* Sums of COUNT rows by a panel, over the groups of four codes that are whole. Every third row has
a pointer: from it an address reaches two further rows, so that all fit into registers. */
#define TILE_OF(COUNT)                                                                            \
    static __attribute__((noinline)) void tile_of_##COUNT(                                        \
        const int8_t *x, const uint8_t *w, ptrdiff_t k, const int32_t *starts,                    \
        int32_t sums[TILE][PANEL]) {                                                              \
        const int8_t *third[] = {x, x + 3 * k, x + 6 * k, x + 9 * k};                             \
        ROWS_##COUNT(BEGIN)                                                                       \
        for (const int8_t *end = x + k / 4 * 4; third[0] < end; w += 4 * PANEL) {                 \
            const ints w_left = _mm512_loadu_si512(w), w_right = _mm512_loadu_si512(w + 64);      \
            ints four;                                                                            \
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);                                   \
            _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);                              \
            ROWS_##COUNT(ADD)                                                                     \
            third[0] += 4, third[1] += 4, third[2] += 4, third[3] += 4;                           \
        }                                                                                         \
        ROWS_##COUNT(STORE)                                                                       \
    }

TILE_OF(12)
TILE_OF(8)
TILE_OF(6)
TILE_OF(4)
TILE_OF(2)
TILE_OF(1)

/* Adds the products of a last group that is not whole; `w` is the panel's beginning. */
static void add_rest(const int8_t *x, const uint8_t *w, ptrdiff_t k, int rows,
                     int32_t sums[TILE][PANEL]) {
    const ptrdiff_t at = k / 4 * 4;
    for (int i = 0; i < rows; i++) {
        const ints four = all_ints(group(x + i * k + at, k - at));
        for (int half = 0; half < PANEL; half += LANES) {
            const ints codes = _mm512_loadu_si512(w + at * PANEL + half * 4);
            const ints sum = _mm512_loadu_si512(sums[i] + half);
            _mm512_storeu_si512(sums[i] + half, _mm512_dpbusd_epi32(sum, codes, four));
        }
    }
}

/* Sums of as many rows as one tile takes, from what they begin with; returns how many. */
static int tile(const int8_t *x, const uint8_t *w, ptrdiff_t k, ptrdiff_t rows,
                const int32_t *starts, int32_t sums[TILE][PANEL]) {
    int taken = 1;
    if (rows >= 12) tile_of_12(x, w, k, starts, sums), taken = 12;
    else if (rows >= 8) tile_of_8(x, w, k, starts, sums), taken = 8;
    else if (rows >= 6) tile_of_6(x, w, k, starts, sums), taken = 6;
    else if (rows >= 4) tile_of_4(x, w, k, starts, sums), taken = 4;
    else if (rows >= 2) tile_of_2(x, w, k, starts, sums), taken = 2;
    else tile_of_1(x, w, k, starts, sums);
    if (k % 4) add_rest(x, w, k, taken, sums);
    return taken;
}

#endif
