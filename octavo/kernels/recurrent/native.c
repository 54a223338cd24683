/* Steps of an INT8 LSTM or GRU layer in one direction, on a CPU with AVX-512 VNNI.

A step quantizes nothing on its own: what computes a hidden state writes its code too, and the next
step multiplies codes. Gates lie one after the other, each in panels of 32 units, so that one pass
over 32 units of some rows makes the sums of all their gates, which never leave the first cache.
Threads share the units; a step waits for all units of the one before it.

The third gate, the tanh, comes with everything that makes it doubled: tanh(x) is
2 sigmoid(2 x) - 1. */

#include "native_tiles.h"

#define ROUND 12582912.0f /* 1.5 * 2**23: added, it leaves a rounded integer in the lowest bits */
#define QMAX 127.0f

typedef struct {
    const float *gates;          /* the input's part, [steps, rows, gates * size] */
    ptrdiff_t rows;              /* that the first of these steps has */
    ptrdiff_t start;             /* the first of these steps, counted from the sequence's first */
    const int64_t *sizes;        /* rows of each step of the sequence, never growing; NULL: all */
    ptrdiff_t directions;        /* of the layer */
    ptrdiff_t batch, size;       /* rows and units of a state */
    const uint8_t *w;            /* panels of each gate's recurrent weights */
    const float *scale;          /* of their products with codes of h / limit, [gates * size] */
    const float *bias;           /* of a GRU's recurrent product, as `scale`; NULL: an LSTM */
    const float *limits;         /* what no |h| of a row exceeds: for an LSTM, of the first step;
                                    NULL: 1 */
    int8_t *codes;               /* [2, batch, size]: of h before even steps, and before odd ones */
    float *hidden, *cell;        /* [batch, size], updated; cell states of an LSTM only */
    float *states;               /* hidden, [steps of the sequence, directions, batch, size] */
} Span;

/* Products of codes, of each gate. */
typedef int32_t Sums[4][TILE][PANEL];

/* Sixteen units of a row, or as many as there are. */
typedef struct {
    __mmask16 mask;
    ptrdiff_t unit, row;
    floats limit;
    const float *gates;
} Place;

INLINE floats load(const Place *p, const float *from) {
    return _mm512_maskz_loadu_ps(p->mask, from);
}

/* The recurrent product of a gate, and `term`. */
INLINE floats recurrent(const Span *s, const Place *p, int gate, const int32_t *sums, floats term) {
    const floats scale = _mm512_mul_ps(load(p, s->scale + gate * s->size + p->unit), p->limit);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), scale, term);
}

INLINE floats input(const Span *s, const Place *p, int gate) {
    return load(p, p->gates + gate * s->size + p->unit);
}

INLINE floats tanh_of_half(floats x) {
    return _mm512_fmsub_ps(all(2.0f), sigmoid(x), all(1.0f));
}

INLINE floats lstm(const Span *s, const Place *p, Sums sums, int i, int half) {
    floats x[4];
    for (int gate = 0; gate < 4; gate++)
        x[gate] = recurrent(s, p, gate, sums[gate][i] + half, input(s, p, gate));
    float *cell = s->cell + p->row * s->size + p->unit;
    floats c = _mm512_mul_ps(sigmoid(x[1]), load(p, cell));
    c = _mm512_fmadd_ps(sigmoid(x[0]), tanh_of_half(x[2]), c);
    _mm512_mask_storeu_ps(cell, p->mask, c);
    return _mm512_mul_ps(sigmoid(x[3]), tanh_of_half(_mm512_add_ps(c, c)));
}

INLINE floats gru(const Span *s, const Place *p, Sums sums, int i, int half) {
    floats x[3];
    for (int gate = 0; gate < 3; gate++)
        x[gate] = recurrent(s, p, gate, sums[gate][i] + half,
                            load(p, s->bias + gate * s->size + p->unit));
    const floats r = sigmoid(_mm512_add_ps(x[0], input(s, p, 0)));
    const floats z = sigmoid(_mm512_add_ps(x[1], input(s, p, 1)));
    const floats n = tanh_of_half(_mm512_fmadd_ps(r, x[2], input(s, p, 2)));
    const floats h = load(p, s->hidden + p->row * s->size + p->unit);
    return _mm512_fmadd_ps(z, _mm512_sub_ps(h, n), n);
}

/* Codes of h / limit, rounded half to even once. */
INLINE __m128i codes_of(floats h, floats limit) {
    const floats span = _mm512_div_ps(all(QMAX), limit);
    const ints bits = _mm512_castps_si512(_mm512_fmadd_ps(h, span, all(ROUND)));
    return _mm512_cvtepi32_epi8(bits);
}

/* New states of up to 32 units of some rows. */
INLINE void update(const Span *s, ptrdiff_t step, ptrdiff_t row, int rows, ptrdiff_t unit,
                   Sums sums, const int is_lstm) {
    const ptrdiff_t gates = (3 + is_lstm) * s->size, state = s->batch * s->size;
    const int limited = s->limits && (!is_lstm || step == 0);
    const float *from = s->gates + ((step - s->start) * s->rows + row) * gates;
    float *states = s->states + step * s->directions * state;
    int8_t *codes = s->codes + (step + 1) % 2 * state;
    for (int half = 0; half < PANEL && unit + half < s->size; half += LANES)
        for (int i = 0; i < rows; i++) {
            const floats limit = all(limited ? s->limits[row + i] : 1.0f);
            const Place p = {first(s->size - unit - half), unit + half, row + i, limit,
                             from + i * gates};
            const floats h = is_lstm ? lstm(s, &p, sums, i, half) : gru(s, &p, sums, i, half);
            const ptrdiff_t at = p.row * s->size + p.unit;
            _mm512_mask_storeu_ps(s->hidden + at, p.mask, h);
            _mm512_mask_storeu_ps(states + at, p.mask, h);
            _mm_mask_storeu_epi8(codes + at, p.mask, codes_of(h, is_lstm ? all(1.0f) : limit));
        }
}

/* Asks for the input's part of 32 units of some rows, which comes while products are made. */
INLINE void prefetch(const Span *s, ptrdiff_t step, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t unit,
                     int gates) {
    const float *from = s->gates + ((step - s->start) * s->rows + row) * gates * s->size + unit;
    for (ptrdiff_t i = 0; i < rows * gates; i++)
        for (int line = 0; line < PANEL; line += LANES)
            _mm_prefetch((const char *)(from + i * s->size + line), _MM_HINT_T0);
}

/* Sums of one row with 32 units of every gate, whose panels are `apart` bytes from each other. All
gates take turns, for a sum of one gate alone would wait for the product before. */
INLINE void row_of_gates(const int8_t *codes, const uint8_t *w, ptrdiff_t size, ptrdiff_t apart,
                         int32_t start, Sums sums, const int gates) {
    ints left[4], right[4];
    for (int gate = 0; gate < gates; gate++) left[gate] = right[gate] = all_ints(start);
    for (ptrdiff_t at = 0; at + 4 <= size; at += 4) {
        const ints four = all_ints(group(codes + at, 4));
        for (int gate = 0; gate < gates; gate++) {
            const uint8_t *own = w + gate * apart + at * PANEL;
            _mm_prefetch((const char *)own + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)own + AHEAD + 64, _MM_HINT_T0);
            left[gate] = _mm512_dpbusd_epi32(left[gate], _mm512_loadu_si512(own), four);
            right[gate] = _mm512_dpbusd_epi32(right[gate], _mm512_loadu_si512(own + 64), four);
        }
    }
    for (int gate = 0; gate < gates; gate++) {
        _mm512_storeu_si512(sums[gate][0], left[gate]);
        _mm512_storeu_si512(sums[gate][0] + LANES, right[gate]);
        if (size % 4) add_rest(codes, w + gate * apart, size, 1, sums[gate]);
    }
}

/* One step of 32 units. */
INLINE void block(const Span *s, ptrdiff_t step, ptrdiff_t index, const int is_lstm) {
    const ptrdiff_t size = s->size, apart = (size + PANEL - 1) / PANEL * panel_size(size);
    const ptrdiff_t count = s->sizes ? s->sizes[step] : s->rows;
    const uint8_t *w = s->w + index * panel_size(size);
    const int gates = 3 + is_lstm;
    Sums sums;
    int32_t starts[TILE];
    for (ptrdiff_t row = 0, rows; row < count; row += rows) {
        const int8_t *codes = s->codes + (step % 2 * s->batch + row) * size;
        const ptrdiff_t left = count - row;
        const ptrdiff_t most = left < TILE ? left : TILE;
        prefetch(s, step, row, most, index * PANEL, gates);
        for (int i = 0; i < most; i++) starts[i] = start_of(codes + i * size, size);
        if (left == 1) {
            row_of_gates(codes, w, size, apart, starts[0], sums, gates);
            rows = 1;
        } else
            for (int gate = 0; gate < gates; gate++)
                rows = tile(codes, w + gate * apart, size, left, starts, sums[gate]);
        update(s, step, row, rows, index * PANEL, sums, is_lstm);
    }
}

/* A thread's units from `low` to `high` in one step. Every second step takes them in reverse, so
that it begins with the weights that the thread's cache still holds. */
static void part(const Span *s, ptrdiff_t step, ptrdiff_t low, ptrdiff_t high) {
    for (ptrdiff_t i = low; i < high; i++) {
        const ptrdiff_t index = step % 2 ? low + high - 1 - i : i;
        if (s->bias) block(s, step, index, 0);
        else block(s, step, index, 1);
    }
}

/* Runs the steps from `start` to `end` in one direction. The other arguments are those of `Span`,
with `hidden` and `cell` [directions, batch, size]. */
void octavo_recurrent_steps(const float *gates, ptrdiff_t rows, ptrdiff_t start, ptrdiff_t end,
                            const int64_t *sizes, ptrdiff_t direction, ptrdiff_t directions,
                            ptrdiff_t batch, ptrdiff_t size, const uint8_t *w,
                            const float *scale, const float *bias, const float *limits,
                            int8_t *codes, float *hidden, float *cell, float *states,
                            int threads) {
    const ptrdiff_t own = direction * batch * size, panels = (size + PANEL - 1) / PANEL;
    const Span s = {gates, rows, start, sizes, directions, batch, size, w, scale, bias, limits,
                    codes, hidden + own, cell ? cell + own : NULL, states + own};
    if (threads > panels) threads = (int)panels;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (ptrdiff_t step = start; step < end; step++) {
#pragma omp for schedule(static)
        for (int i = 0; i < threads; i++)
            part(&s, step, i * panels / threads, (i + 1) * panels / threads);
    }
}
