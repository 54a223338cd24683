/* y = activation((x @ w.T) * scale_x * scale_w + bias) + residual, on a CPU with AVX-512 VNNI. */

#include "native_gelu.h"
#include "native_tiles.h"

#define HIGH 16            /* tiles of rows that go by weights which no cache holds */
#define SHARES 4           /* parts of the work that a thread should find */
#define CACHED (640 << 10) /* bytes of weights that the second cache holds */

enum activation { NONE, RELU, RELU6, GELU, GELU_TANH, SILU, HARDSWISH };
enum output { FLOAT32, BFLOAT16, FLOAT16, CODES, SUMS };

typedef struct {
    const float *scale_x;
    ptrdiff_t scale_x_step;
    const float *scale_w;
    ptrdiff_t scale_w_step;
    const float *bias;
    const int32_t *integer_bias;
    int activation;
    const float *residual;
    int output;
    float out_scale;
    int out_zero_point;
    void *out;
} Epilogue;

typedef struct {
    const int8_t *x;
    const uint8_t *w;
    ptrdiff_t m, n, k;
    Epilogue epilogue;
} Product;

INLINE floats activate(floats y, int activation) {
    switch (activation) {
        case RELU: return _mm512_max_ps(_mm512_setzero_ps(), y);
        case RELU6: return clamp(y, 0.0f, 6.0f);
        case GELU: return gelu(y);
        case GELU_TANH: return gelu_tanh(y);
        case SILU: return silu(y);
        case HARDSWISH: return hardswish(y);
        default: return y;
    }
}

/* float32 to bfloat16, to nearest even; NaN stays one. */
INLINE __m256i to_bfloat16(floats y) {
    const ints bits = _mm512_castps_si512(y);
    const ints odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all_ints(1));
    ints rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, all_ints(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, all_ints(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

/* saturate(round_half_even(y / scale) + zero_point); NaN gives -128. */
INLINE __m128i to_codes(floats y, float scale, int zero_point) {
    const floats ratio = _mm512_roundscale_ps(_mm512_div_ps(y, all(scale)), 0);
    const floats code = _mm512_add_ps(ratio, all((float)zero_point));
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(clamp(code, -128.0f, 127.0f)));
}

/* What all rows of 16 output channels, or of as many as there are, have in common. */
typedef struct {
    __mmask16 mask;
    floats scale_w, bias;
    ints integer_bias;
} Columns;

INLINE Columns columns_at(ptrdiff_t column, ptrdiff_t n, const Epilogue *e) {
    Columns c = {first(n - column), all(1.0f), all(0.0f), _mm512_setzero_si512()};
    if (e->scale_w)
        c.scale_w = e->scale_w_step ? _mm512_maskz_loadu_ps(c.mask, e->scale_w + column)
                                    : all(*e->scale_w);
    if (e->bias) c.bias = _mm512_maskz_loadu_ps(c.mask, e->bias + column);
    if (e->integer_bias)
        c.integer_bias = _mm512_maskz_loadu_epi32(c.mask, e->integer_bias + column);
    return c;
}

INLINE void write(floats y, __mmask16 mask, ptrdiff_t at, const Epilogue *e) {
    switch (e->output) {
        case BFLOAT16:
            _mm256_mask_storeu_epi16((uint16_t *)e->out + at, mask, to_bfloat16(y));
            break;
        case FLOAT16:
            _mm256_mask_storeu_epi16((uint16_t *)e->out + at, mask, _mm512_cvtps_ph(y, 0));
            break;
        case CODES:
            _mm_mask_storeu_epi8((int8_t *)e->out + at, mask,
                                 to_codes(y, e->out_scale, e->out_zero_point));
            break;
        default: _mm512_mask_storeu_ps((float *)e->out + at, mask, y);
    }
}

/* The epilogue of a tile. `activation` and `plain`, which is float32 without a residual, are
constants where it is called, so that no branch stands in the loop. */
INLINE void finish(int32_t sums[TILE][PANEL], int rows, ptrdiff_t row, ptrdiff_t column,
                   ptrdiff_t n, const Epilogue *epilogue, const int activation, const int plain) {
    const Epilogue e = *epilogue;
    for (int half = 0; half < PANEL && column + half < n; half += LANES) {
        const Columns c = columns_at(column + half, n, &e);
        for (int i = 0; i < rows; i++) {
            const ptrdiff_t at = (row + i) * n + column + half;
            ints sum = _mm512_loadu_si512(sums[i] + half);
            if (!plain && e.output == SUMS) {
                _mm512_mask_storeu_epi32((int32_t *)e.out + at, c.mask, sum);
                continue;
            }
            if (e.integer_bias) sum = _mm512_add_epi32(sum, c.integer_bias);
            floats y = _mm512_cvtepi32_ps(sum);
            y = _mm512_mul_ps(y, all(e.scale_x[(row + i) * e.scale_x_step]));
            y = _mm512_add_ps(_mm512_mul_ps(y, c.scale_w), c.bias);
            y = activate(y, activation);
            if (plain) {
                _mm512_mask_storeu_ps((float *)e.out + at, c.mask, y);
                continue;
            }
            if (e.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(c.mask, e.residual + at));
            write(y, c.mask, at, &e);
        }
    }
}

/* The same for the activation and the form of the result that were asked for. */
static void finish_any(int32_t sums[TILE][PANEL], int rows, ptrdiff_t row, ptrdiff_t column,
                       ptrdiff_t n, const Epilogue *e) {
    const int plain = e->output == FLOAT32 && !e->residual;
#define FINISH(name)                                                                              \
    case name:                                                                                    \
        if (plain) finish(sums, rows, row, column, n, e, name, 1);                                \
        else finish(sums, rows, row, column, n, e, name, 0);                                      \
        break;
    switch (e->activation) {
        FINISH(NONE)
        FINISH(RELU)
        FINISH(RELU6)
        FINISH(GELU)
        FINISH(GELU_TANH)
        FINISH(SILU)
        FINISH(HARDSWISH)
    }
}

/* Asks for the lines that a tile will write, while its products are computed. */
INLINE void ask_for(const Epilogue *e, ptrdiff_t rows, ptrdiff_t at, ptrdiff_t n) {
    const ptrdiff_t size = e->output == FLOAT32 || e->output == SUMS ? 4 : e->output == CODES ? 1 : 2;
    for (ptrdiff_t i = 0; i < rows && i < TILE; i++) {
        const char *line = (const char *)e->out + (at + i * n) * size;
        for (ptrdiff_t byte = 0; byte < PANEL * size; byte += 64) __builtin_prefetch(line + byte, 1);
    }
}

/* One block of rows by some panels: as many at a time as the second cache holds, and each tile of
rows by all of these, since results are best written along their rows. */
static void block(const Product *p, ptrdiff_t row, ptrdiff_t end, ptrdiff_t panel,
                  ptrdiff_t last_panel) {
    const ptrdiff_t k = p->k, cached = panel_size(k) < CACHED ? CACHED / panel_size(k) : 1;
    int32_t starts[HIGH * TILE], sums[TILE][PANEL];
    for (ptrdiff_t i = row; i < end; i++) starts[i - row] = start_of(p->x + i * k, k);
    for (; panel < last_panel; panel += cached) {
        const ptrdiff_t stop = panel + cached < last_panel ? panel + cached : last_panel;
        for (ptrdiff_t i = row, rows = 0; i < end; i += rows)
            for (ptrdiff_t j = panel; j < stop; j++) {
                const uint8_t *w = p->w + j * panel_size(k);
                ask_for(&p->epilogue, end - i, i * p->n + j * PANEL, p->n);
                rows = tile(p->x + i * k, w, k, end - i, starts + (i - row), sums);
                finish_any(sums, rows, i, j * PANEL, p->n, &p->epilogue);
            }
    }
}

/* The arguments are those of `Product` and `Epilogue`; pointers may be NULL for what is left out.
Work is shared by blocks of rows, equally high but for a tile, and by groups of panels where blocks
are few or would be shared unequally. Rows of a block lie together: threads that write every other
row slow each other down. */
void octavo_int8_gemm(const int8_t *x, const uint8_t *w, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                      const float *scale_x, ptrdiff_t scale_x_step, const float *scale_w,
                      ptrdiff_t scale_w_step, const float *bias, const int32_t *integer_bias,
                      int activation, const float *residual, int output, float out_scale,
                      int out_zero_point, void *out, int threads) {
    const Product p = {x, w, m, n, k,
                       {scale_x, scale_x_step, scale_w, scale_w_step, bias, integer_bias,
                        activation, residual, output, out_scale, out_zero_point, out}};
    const ptrdiff_t tiles = (m + TILE - 1) / TILE, panels = (n + PANEL - 1) / PANEL;
    const ptrdiff_t shares = threads > 1 ? SHARES * threads : 1;
    ptrdiff_t blocks = (tiles + HIGH - 1) / HIGH;
    if (n * k <= CACHED && blocks < shares) blocks = shares < tiles ? shares : tiles;
    const ptrdiff_t least = (shares + blocks - 1) / blocks;
    ptrdiff_t groups = least;
    while (blocks * groups % threads && groups < 2 * least) groups++;
    if (blocks * groups % threads) groups = least;
    if (groups > panels) groups = panels;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (ptrdiff_t b = 0; b < blocks; b++)
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t row = b * tiles / blocks * TILE, end = (b + 1) * tiles / blocks * TILE;
            block(&p, row, end < m ? end : m, g * panels / groups, (g + 1) * panels / groups);
        }
}
