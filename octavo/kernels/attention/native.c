/* softmax(q @ k.T * scale + mask) @ v in float32, on a CPU with AVX-512.

Keys and values are taken in blocks, packed, that a cache holds. Queries go through them in tiles
of 12 rows: scores of a tile by 32 keys in 24 registers, then what a row has so far is scaled to its
new maximum (online softmax, arXiv 1805.02867), and its weights times the values are added to it.
Scores are in units of log(2), so that weights are powers of two.

A word, 32 bits, is what one step of a product takes of a row. It is a float, or where the processor
multiplies bfloat16 a pair of them: features that follow each other of a query or a key, weights and
values of keys that follow each other. Sums are float32 either way. */

#include "native.h"

#include <float.h>
#include <math.h>

#define QUERIES 192
#define MOST_KEYS 512
#define MOST_SIZE 256
#define ROOM (1 << 15) /* words of a block's keys, and of its values */
#define STEP (MOST_KEYS + LANES) /* words between a tile's rows: no power of two, for the cache */
#define LOG2E 1.44269504f

typedef struct {
    const float *at;
    ptrdiff_t batch, head, token;
} Tensor;

typedef struct {
    Tensor q, k, v;
    const uint8_t *kept;
    const float *added;
    ptrdiff_t mask_batch, mask_head, mask_query;
    float *out;
    ptrdiff_t out_batch, out_head, out_token;
    ptrdiff_t queries, keys, size, sharing;
    float scale;
    int causal;
} Attention;

/* Keys that follow each other and their values, packed. */
typedef struct {
    ptrdiff_t key, count; /* the first, and how many */
    int last;
    const float *keys, *values;
} Block;

#ifdef __AVX512BF16__

#define DEPTH 2 /* numbers of a word */

/* Terms of 2**x - 1 on [0, 1], from the highest, for the least largest error: 1e-4 of 2**x. */
static const float POWERS[] = {7.826796919e-2f, 2.263076752e-1f, 6.954243183e-1f};

INLINE floats multiply_add(floats rows, floats columns, floats sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)rows, (__m512bh)columns);
}

/* Words of 32 numbers that follow each other. */
INLINE floats words_of(floats left, floats right) {
    return (floats)_mm512_cvtne2ps_pbh(right, left);
}

/* Words [16] of a row's first `count` numbers, zeros behind them. */
INLINE floats words_at(const float *from, ptrdiff_t count, float by) {
    const floats left = _mm512_maskz_loadu_ps(first(count), from);
    const floats right = _mm512_maskz_loadu_ps(first(count - LANES), from + LANES);
    return words_of(_mm512_mul_ps(left, all(by)), _mm512_mul_ps(right, all(by)));
}

/* Words [16] of what two rows have in the same places; `there` says if the second is there. */
INLINE floats words_across(const float *from, ptrdiff_t step, int there, __mmask16 mask) {
    const floats one = _mm512_maskz_loadu_ps(mask, from);
    const floats other = _mm512_maskz_loadu_ps(there ? mask : 0, from + step);
    const ints low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
    const ints high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(other));
    return (floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Writes 32 weights as words, and adds them to sums as they were rounded. */
INLINE floats keep(floats left, floats right, float *words, floats sums) {
    const floats both = words_of(left, right);
    _mm512_storeu_ps(words, both);
    return multiply_add(both, (floats)_mm512_set1_epi16(0x3f80), sums); /* bfloat16 1.0 */
}

#else

#define DEPTH 1

/* As above, with an error of 2e-9. */
static const float POWERS[] = {2.171531232e-4f, 1.244082814e-3f, 9.678065777e-3f,
                               5.548415333e-2f, 2.402295172e-1f, 6.931470037e-1f};

INLINE floats multiply_add(floats rows, floats columns, floats sums) {
    return _mm512_fmadd_ps(rows, columns, sums);
}

INLINE floats words_at(const float *from, ptrdiff_t count, float by) {
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(first(count), from), all(by));
}

INLINE floats words_across(const float *from, ptrdiff_t step, int there, __mmask16 mask) {
    (void)step, (void)there;
    return _mm512_maskz_loadu_ps(mask, from);
}

INLINE floats keep(floats left, floats right, float *words, floats sums) {
    _mm512_storeu_ps(words, left);
    _mm512_storeu_ps(words + LANES, right);
    return _mm512_add_ps(sums, _mm512_add_ps(left, right));
}

#endif

INLINE ptrdiff_t words(ptrdiff_t numbers) { return (numbers + DEPTH - 1) / DEPTH; }

INLINE ptrdiff_t padded(ptrdiff_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

/* 2**x for x <= 0: a polynomial of what x is above the next lower integer, times 2**integer. Both
instructions take the integer themselves, and give 0 for -inf and NaN for NaN. */
INLINE floats power(floats x) {
    const floats f = _mm512_reduce_ps(x, 1);
    floats p = all(POWERS[0]);
    for (int i = 1; i < (int)(sizeof POWERS / sizeof *POWERS); i++)
        p = _mm512_fmadd_ps(p, f, all(POWERS[i]));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, all(1.0f)), x);
}

#define CLEAR(i) floats left_##i = _mm512_setzero_ps(), right_##i = left_##i;
#define ADD(i)                                                                                    \
    one = all(rows[i * STEP + at]);                                                               \
    left_##i = multiply_add(one, left, left_##i);                                                 \
    right_##i = multiply_add(one, right, right_##i);
#define STORE(i)                                                                                  \
    _mm512_store_ps(out + i * STEP, left_##i);                                                    \
    _mm512_store_ps(out + i * STEP + LANES, right_##i);

/* out [12, 32] = rows [12, count] @ panel [count, 32], `count` in words. */
static __attribute__((noinline)) void product(const float *rows, ptrdiff_t count,
                                              const float *panel, float *out) {
    ROWS_12(CLEAR)
    for (ptrdiff_t at = 0; at < count; at++, panel += PANEL) {
        const floats left = _mm512_load_ps(panel), right = _mm512_load_ps(panel + LANES);
        floats one;
        ROWS_12(ADD)
    }
    ROWS_12(STORE)
}

/* Numbers [rows, columns] to words [words(columns), 16], by four steps of exchanges. */
static void transpose(const float *from, ptrdiff_t step, ptrdiff_t rows, ptrdiff_t columns,
                      float *to) {
    floats r[LANES], t[LANES];
    for (int i = 0; i < LANES; i++)
        r[i] = i < rows ? words_at(from + i * step, columns, 1.0f) : _mm512_setzero_ps();
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
    for (int i = 0; i < LANES && i < words(columns); i++) _mm512_store_ps(to + i * PANEL, r[i]);
}

/* Keys [count, size] to panels [count / 32][words(size)][32], filled up with zeros. */
static void pack_keys(const float *keys, ptrdiff_t step, ptrdiff_t count, ptrdiff_t size,
                      float *panels) {
    for (ptrdiff_t key = 0; key < padded(count); key += LANES) {
        float *panel = panels + key / PANEL * PANEL * words(size) + key % PANEL;
        for (ptrdiff_t at = 0; at < words(size); at += LANES)
            transpose(keys + key * step + at * DEPTH, step, count - key, size - at * DEPTH,
                      panel + at * PANEL);
    }
}

/* Values [count, size] to panels [size / 32][words(count)][32], filled up with zeros. */
static void pack_values(const float *values, ptrdiff_t step, ptrdiff_t count, ptrdiff_t size,
                        float *panels) {
    for (ptrdiff_t at = 0; at < padded(size); at += PANEL)
        for (ptrdiff_t key = 0; key < count; key += DEPTH, panels += PANEL)
            for (ptrdiff_t i = 0; i < PANEL; i += LANES)
                _mm512_store_ps(panels + i, words_across(values + key * step + at + i, step,
                                                         key + 1 < count, first(size - at - i)));
}

/* 16 scores as the masks leave them; keys from `end` on are hidden. A mask that is added may hold
the lowest float, which hides a key only from queries that see others: rounded towards zero, its
product stays above -inf. */
INLINE floats masked(const float *scores, const uint8_t *kept, const float *added, ptrdiff_t i,
                     ptrdiff_t end) {
    floats s = _mm512_load_ps(scores + i);
    __mmask16 seen = first(end - i);
    if (kept) {
        const __m128i bytes = _mm_maskz_loadu_epi8(seen, kept + i);
        seen = _mm_test_epi8_mask(bytes, bytes);
    }
    if (added) {
        const floats there = _mm512_maskz_loadu_ps(seen, added + i);
        s = _mm512_add_ps(s, _mm512_mul_round_ps(there, all(LOG2E),
                                                 _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    }
    return _mm512_mask_mov_ps(all(-INFINITY), seen, s);
}

/* Scores of a row over `count` keys, a multiple of 32, become the words of 2**(score - maximum), in
place. Returns how much smaller what was found before becomes. The maximum is a number even where no
key was seen, so that differences from it are. */
INLINE float soften(float *scores, ptrdiff_t count, const uint8_t *kept, const float *added,
                    ptrdiff_t end, float *most, float *sum) {
    floats peak = all(*most), total = _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < count; i += LANES)
        peak = _mm512_max_ps(peak, masked(scores, kept, added, i, end));
    const float top = _mm512_reduce_max_ps(peak);
    for (ptrdiff_t i = 0; i < count; i += PANEL) {
        const floats left = masked(scores, kept, added, i, end);
        const floats right = masked(scores, kept, added, i + LANES, end);
        total = keep(power(_mm512_sub_ps(left, all(top))), power(_mm512_sub_ps(right, all(top))),
                     scores + words(i), total);
    }
    const float shrink = _mm512_cvtss_f32(power(all(*most - top)));
    *sum = *sum * shrink + _mm512_reduce_add_ps(total);
    *most = top;
    return shrink;
}

/* Up to 12 queries of a head and a block of keys. */
static void tile(const Attention *a, const Block *block, ptrdiff_t batch, ptrdiff_t head,
                 ptrdiff_t query, ptrdiff_t there, float *most, float *sums) {
    _Alignas(64) float rows[TILE * STEP], scores[TILE * STEP], shrink[TILE];
    const ptrdiff_t size = a->size, width = padded(block->count);
    const float *q = a->q.at + batch * a->q.batch + head * a->q.head;
    float *out = a->out + batch * a->out_batch + head * a->out_head + query * a->out_token;
    for (ptrdiff_t i = 0; i < TILE; i++) {
        const float *from = q + (query + (i < there ? i : there - 1)) * a->q.token;
        for (ptrdiff_t d = 0; d < words(size); d += LANES)
            _mm512_store_ps(rows + i * STEP + d,
                            words_at(from + d * DEPTH, size - d * DEPTH, a->scale * LOG2E));
    }
    for (ptrdiff_t i = 0; i < there; i++)
        for (ptrdiff_t d = 0; d < size; d += LANES)
            __builtin_prefetch(out + i * a->out_token + d, 1); /* it is written at the end */
    for (ptrdiff_t p = 0; p < width; p += PANEL)
        product(rows, words(size), block->keys + p * words(size), scores + p);
    for (ptrdiff_t i = 0; i < there; i++) {
        const ptrdiff_t at = batch * a->mask_batch + head * a->mask_head
                             + (query + i) * a->mask_query + block->key;
        const uint8_t *kept = a->kept ? a->kept + at : NULL;
        const float *added = a->added ? a->added + at : NULL;
        const ptrdiff_t seen = query + i + 1 - block->key, there_are = a->keys - block->key;
        const ptrdiff_t end = a->causal && seen < there_are ? seen : there_are;
        float *row = scores + i * STEP;
        /* written out for what most models ask: the loops of `soften` are then free of the rest */
        if (end < width || added)
            shrink[i] = soften(row, width, kept, added, end, most + i, sums + i);
        else if (kept)
            shrink[i] = soften(row, width, kept, NULL, PTRDIFF_MAX, most + i, sums + i);
        else
            shrink[i] = soften(row, width, NULL, NULL, PTRDIFF_MAX, most + i, sums + i);
    }
    for (ptrdiff_t d = 0; d < size; d += PANEL) {
        product(scores, words(block->count), block->values + d * words(block->count), rows);
        for (ptrdiff_t i = 0; i < there; i++) {
            const floats by = all(!block->last ? 1.0f : sums[i] == 0.0f ? 0.0f : 1.0f / sums[i]);
            float *to = out + i * a->out_token + d;
            for (ptrdiff_t half = 0; half < PANEL && d + half < size; half += LANES) {
                const __mmask16 mask = first(size - d - half);
                floats y = _mm512_load_ps(rows + i * STEP + half);
                if (block->key > 0)
                    y = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, to + half), all(shrink[i]), y);
                _mm512_mask_storeu_ps(to + half, mask, _mm512_mul_ps(y, by));
            }
        }
    }
}

/* Up to 192 queries of a head. */
static void attend(const Attention *a, ptrdiff_t batch, ptrdiff_t head, ptrdiff_t query,
                   ptrdiff_t last_query) {
    static _Thread_local _Alignas(64) float packed_keys[ROOM], packed_values[ROOM];
    float most[QUERIES], sums[QUERIES];
    for (ptrdiff_t i = 0; i < last_query - query; i++) most[i] = -FLT_MAX, sums[i] = 0.0f;
    ptrdiff_t step = ROOM * DEPTH / padded(a->size) / PANEL * PANEL;
    if (step > MOST_KEYS) step = MOST_KEYS;
    const ptrdiff_t keys = a->causal && last_query < a->keys ? last_query : a->keys;
    const float *k = a->k.at + batch * a->k.batch + head / a->sharing * a->k.head;
    const float *v = a->v.at + batch * a->v.batch + head / a->sharing * a->v.head;
    for (ptrdiff_t key = 0; key < keys; key += step) {
        const ptrdiff_t count = keys - key < step ? keys - key : step;
        const Block block = {key, count, key + step >= keys, packed_keys, packed_values};
        pack_keys(k + key * a->k.token, a->k.token, count, a->size, packed_keys);
        pack_values(v + key * a->v.token, a->v.token, count, a->size, packed_values);
        for (ptrdiff_t q = query; q < last_query; q += TILE)
            tile(a, &block, batch, head, q, last_query - q < TILE ? last_query - q : TILE,
                 most + (q - query), sums + (q - query));
    }
}

/* q [B, H, T, D], k and v [B, H / sharing, S, D] and out [B, H, T, D], with steps between batches,
heads and tokens, 12 numbers; a mask [B, H, T, S] with 3 numbers: bytes that keep a key, or floats
that are added; either may be NULL. */
void octavo_attention(const float *q, const float *k, const float *v, const uint8_t *kept,
                      const float *added, float *out, const ptrdiff_t *steps, ptrdiff_t batches,
                      ptrdiff_t heads, ptrdiff_t queries, ptrdiff_t keys, ptrdiff_t size,
                      ptrdiff_t sharing, float scale, int causal, int threads) {
    const Attention a = {
        {q, steps[0], steps[1], steps[2]}, {k, steps[3], steps[4], steps[5]},
        {v, steps[6], steps[7], steps[8]}, kept, added, steps[12], steps[13], steps[14],
        out, steps[9], steps[10], steps[11], queries, keys, size, sharing, scale, causal,
    };
    const ptrdiff_t parts = (queries + QUERIES - 1) / QUERIES;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (ptrdiff_t b = 0; b < batches; b++)
        for (ptrdiff_t h = 0; h < heads; h++)
            for (ptrdiff_t part = 0; part < parts; part++) {
                const ptrdiff_t query = part * QUERIES;
                attend(&a, b, h, query, query + QUERIES < queries ? query + QUERIES : queries);
            }
}
