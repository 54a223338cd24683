/* softmax(q @ k.T * scale + mask) @ v in float32, on a CPU with AVX-512.

Keys are taken in blocks, transposed, that a cache holds. Queries go through them in tiles of 12
rows: scores of a tile by 32 keys in 24 registers, then what a row has so far is scaled to its new
maximum (online softmax, arXiv 1805.02867), and its weights times the values are added to it. */

#include "native.h"

#include <math.h>
#include <string.h>

#define QUERIES 192
#define MOST_KEYS 512
#define MOST_SIZE 256
#define ROOM (1 << 15)

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

#define CLEAR(i) floats left_##i = _mm512_setzero_ps(), right_##i = left_##i;
#define ADD(i)                                                                                    \
    one = all(rows[i * step + at]);                                                               \
    left_##i = _mm512_fmadd_ps(one, left, left_##i);                                              \
    right_##i = _mm512_fmadd_ps(one, right, right_##i);
#define STORE(i)                                                                                  \
    _mm512_storeu_ps(out + i * out_step, left_##i);                                               \
    _mm512_storeu_ps(out + i * out_step + LANES, right_##i);

/* out [12, 32] = rows [12, count] @ columns [count, 32]; steps are between rows. `wide` masks the
columns that there are. */
static __attribute__((noinline)) void product(const float *rows, ptrdiff_t step, ptrdiff_t count,
                                              const float *columns, ptrdiff_t column_step,
                                              uint32_t wide, float *out, ptrdiff_t out_step) {
    const __mmask16 low = (__mmask16)wide, high = (__mmask16)(wide >> 16);
    ROWS_12(CLEAR)
    for (ptrdiff_t at = 0; at < count; at++, columns += column_step) {
        const floats left = _mm512_maskz_loadu_ps(low, columns);
        const floats right = _mm512_maskz_loadu_ps(high, columns + LANES);
        floats one;
        ROWS_12(ADD)
    }
    ROWS_12(STORE)
}

/* 16 x 16 floats to their transpose, by four steps of exchanges. */
static void transpose(const float *from, ptrdiff_t from_step, ptrdiff_t rows, ptrdiff_t columns,
                      float *to, ptrdiff_t to_step) {
    floats r[LANES], t[LANES];
    const __mmask16 mask = first(columns);
    for (int i = 0; i < LANES; i++)
        r[i] = i < rows ? _mm512_maskz_loadu_ps(mask, from + i * from_step) : _mm512_setzero_ps();
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
    for (int i = 0; i < LANES && i < columns; i++) _mm512_storeu_ps(to + i * to_step, r[i]);
}

/* Keys [count, size] to panels [ceil(count / 32)][size][32], filled up with zeros. */
static void transpose_keys(const float *keys, ptrdiff_t step, ptrdiff_t count, ptrdiff_t size,
                           float *panels) {
    for (ptrdiff_t key = 0; key < (count + PANEL - 1) / PANEL * PANEL; key += LANES) {
        float *panel = panels + key / PANEL * PANEL * size + key % PANEL;
        const ptrdiff_t rows = count - key < LANES ? count - key : LANES;
        for (ptrdiff_t at = 0; at < size; at += LANES)
            transpose(keys + key * step + at, step, rows, size - at, panel + at * PANEL, PANEL);
    }
}

/* What keys `first_key` and on, of a query, are hidden or given by the masks. */
INLINE floats masked(floats scores, const Attention *a, const uint8_t *kept, const float *added,
                     ptrdiff_t query, ptrdiff_t key) {
    __mmask16 seen = first(a->keys - key);
    if (a->causal) seen &= first(query + 1 - key);
    if (kept) {
        const __m128i bytes = _mm_maskz_loadu_epi8(seen, kept + key);
        seen = _mm_mask_test_epi8_mask(seen, bytes, bytes);
    }
    if (added) scores = _mm512_add_ps(scores, _mm512_maskz_loadu_ps(seen, added + key));
    return _mm512_mask_mov_ps(all(-INFINITY), seen, scores);
}

/* Scores of a row over `count` keys become exp(score - maximum); returns how much smaller what was
found before becomes. */
static float soften(float *scores, ptrdiff_t count, const Attention *a, const uint8_t *kept,
                    const float *added, ptrdiff_t query, ptrdiff_t key, float *most, float *sum) {
    floats peak = all(*most);
    const int plain = !kept && !added && !a->causal && key + count <= a->keys && count % LANES == 0;
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        floats s = _mm512_loadu_ps(scores + i);
        if (!plain) {
            s = masked(s, a, kept, added, query, key + i);
            _mm512_storeu_ps(scores + i, s);
        }
        peak = _mm512_max_ps(peak, s);
    }
    const float top = _mm512_reduce_max_ps(peak);
    const float base = top == -INFINITY ? 0.0f : top;
    floats total = _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        const floats s = _mm512_sub_ps(_mm512_loadu_ps(scores + i), all(base));
        const floats e = exponential(s);
        _mm512_storeu_ps(scores + i, e);
        total = _mm512_add_ps(total, e);
    }
    const float shrink = key == 0 || *most == -INFINITY ? 0.0f : expf(*most - base);
    *sum = *sum * shrink + _mm512_reduce_add_ps(total);
    *most = top;
    return shrink;
}

/* A block of keys for up to 192 queries; `panels` are its keys. */
static void block(const Attention *a, ptrdiff_t batch, ptrdiff_t head, ptrdiff_t query,
                  ptrdiff_t last_query, ptrdiff_t key, ptrdiff_t count, const float *panels,
                  float *most, float *sums) {
    float rows[TILE * MOST_SIZE], scores[TILE * (MOST_KEYS + LANES)], part[TILE * PANEL];
    const ptrdiff_t width = (count + PANEL - 1) / PANEL * PANEL, size = a->size;
    const ptrdiff_t step = width + LANES;  // so that rows do not share lines of the first cache
    const ptrdiff_t at_mask = batch * a->mask_batch + head * a->mask_head;
    const float *v = a->v.at + batch * a->v.batch + head / a->sharing * a->v.head
                     + key * a->v.token;
    for (ptrdiff_t q = query; q < last_query; q += TILE) {
        const ptrdiff_t there = last_query - q < TILE ? last_query - q : TILE;
        for (ptrdiff_t i = 0; i < TILE; i++) {
            const ptrdiff_t token = q + (i < there ? i : there - 1);
            const float *from = a->q.at + batch * a->q.batch + head * a->q.head + token * a->q.token;
            for (ptrdiff_t d = 0; d < size; d++) rows[i * size + d] = from[d] * a->scale;
        }
        for (ptrdiff_t p = 0; p < width; p += PANEL)
            product(rows, size, size, panels + p * size, PANEL, ~0u, scores + p, step);
        float shrink[TILE];
        for (ptrdiff_t i = 0; i < there; i++) {
            const ptrdiff_t at = at_mask + (q + i) * a->mask_query;
            shrink[i] = soften(scores + i * step, width, a, a->kept ? a->kept + at : NULL,
                               a->added ? a->added + at : NULL, q + i, key,
                               most + (q + i - query), sums + (q + i - query));
        }
        for (ptrdiff_t d = 0; d < size; d += PANEL) {
            const uint32_t wide = size - d >= PANEL ? ~0u : (1u << (size - d)) - 1;
            product(scores, step, count, v + d, a->v.token, wide, part, PANEL);
            for (ptrdiff_t i = 0; i < there; i++) {
                float *out = a->out + batch * a->out_batch + head * a->out_head
                             + (q + i) * a->out_token + d;
                for (int half = 0; half < PANEL && d + half < size; half += LANES) {
                    const __mmask16 mask = first(size - d - half);
                    floats y = _mm512_loadu_ps(part + i * PANEL + half);
                    if (key > 0) {
                        const floats before = _mm512_maskz_loadu_ps(mask, out + half);
                        y = _mm512_fmadd_ps(before, all(shrink[i]), y);
                    }
                    _mm512_mask_storeu_ps(out + half, mask, y);
                }
            }
        }
    }
}

/* Up to 192 queries of a head. */
static void attend(const Attention *a, ptrdiff_t batch, ptrdiff_t head, ptrdiff_t query,
                   ptrdiff_t last_query) {
    static _Thread_local float panels[ROOM];
    float most[QUERIES], sums[QUERIES];
    for (ptrdiff_t i = 0; i < last_query - query; i++) most[i] = -INFINITY, sums[i] = 0.0f;
    ptrdiff_t step = ROOM / a->size / PANEL * PANEL;
    if (step > MOST_KEYS) step = MOST_KEYS;
    const ptrdiff_t keys = a->causal && last_query < a->keys ? last_query : a->keys;
    const float *k = a->k.at + batch * a->k.batch + head / a->sharing * a->k.head;
    for (ptrdiff_t key = 0; key < keys; key += step) {
        const ptrdiff_t count = keys - key < step ? keys - key : step;
        transpose_keys(k + key * a->k.token, a->k.token, count, a->size, panels);
        block(a, batch, head, query, last_query, key, count, panels, most, sums);
    }
    for (ptrdiff_t i = 0; i < last_query - query; i++) {
        float *out = a->out + batch * a->out_batch + head * a->out_head
                     + (query + i) * a->out_token;
        const floats by = all(sums[i] == 0.0f ? 0.0f : 1.0f / sums[i]);
        for (ptrdiff_t d = 0; d < a->size; d += LANES) {
            const __mmask16 mask = first(a->size - d);
            _mm512_mask_storeu_ps(out + d, mask,
                                  _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, out + d), by));
        }
    }
}

/* q [B, H, T, D], k and v [B, H / sharing, S, D] and out [B, H, T, D], with steps between batches,
heads and tokens, 12 numbers; a mask [B, H, T, S] with 3 numbers: bytes that keep a key, or floats that are
added; either may be NULL. */
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
