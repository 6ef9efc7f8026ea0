/* Integer arithmetic of a qexp package: plain C99, no floating point, no allocation, no dependency.
 *
 * A tensor is an array of int64_t codes, channels first: [C][H][W], or [features]. A per-channel constant is an array with its length n:
 * n == 1 holds for all channels. */
#ifndef QEXP_INT_H
#define QEXP_INT_H
#include <stdint.h>

typedef int64_t q64;
enum qx_rounding { QX_HALF_EVEN, QX_HALF_UP, QX_HALF_AWAY, QX_FLOOR, QX_TRUNC, QX_FLOAT32, QX_FLOAT32_SUM };

typedef struct { int c, h, w; } qx_shape;
/* A tensor as [outer][c][inner], with its channels in the middle. */
typedef struct { long outer; int c; long inner; } qx_run;
/* A dimension of a result: position i is first + step * i of a dimension of the source with size entries, which lie stride apart. */
typedef struct { long length, first, step, size, stride; } qx_walk;
typedef struct { int kh, kw, sh, sw, ph, pw, dh, dw, groups; } qx_window;

static inline q64 qx_at(const q64 *values, int n, int channel) { return values[n > 1 ? channel : 0]; }
/* a negative number shifted right is left to the compiler by C99; this is not */
static inline q64 qx_floor_shift(q64 x, int shift) { return x >= 0 ? x >> shift : -((-(x + 1)) >> shift) - 1; }
/* nor is a negative number shifted left defined */
static inline q64 qx_times_power(q64 x, int shift) { return x * ((q64)1 << shift); }

/* Element i of a packed array is bits [i * bits, (i + 1) * bits) of the byte stream, lowest bit first; two's complement where is_signed. */
void qx_unpack(const uint8_t *packed, long n, int bits, int is_signed, int32_t *out);

/* Each of rows * inner codes gives way to the entry of its row's table that it names; a table has count entries. */
void qx_levels(int32_t *codes, int rows, long inner, const int32_t *levels, int count);

/* x / 2^shift, rounded. */
q64 qx_shift_round(q64 x, int shift, enum qx_rounding rounding);

/* y[o] = (sum of (x - zero) * w << align) + bias[o]; beyond the border x is zero. */
void qx_conv(const q64 *x, qx_shape in, const int32_t *w, const q64 *bias, const q64 *zero, int n_zero, qx_window k, int align, qx_shape out, q64 *y);

/* y = clip(round(((x - zero) * multiplier + addend) / 2^shift), low, high), with one constant, or one per channel. */
void qx_requantize(const q64 *x, qx_run r, const q64 *multiplier, int n_multiplier, const q64 *addend, int n_addend,
                   const q64 *shift, int n_shift, const q64 *zero, int n_zero, enum qx_rounding rounding, q64 low, q64 high, q64 *y);

void qx_clamp(const q64 *x, qx_run r, const q64 *low, int n_low, const q64 *high, int n_high, q64 *y);
/* y += (x - zero) << shift; y begins as zeros */
void qx_add(const q64 *x, long n, q64 zero, int shift, q64 *y);
void qx_max_pool(const q64 *x, qx_shape in, qx_window k, qx_shape out, q64 *y);
void qx_sum_pool(const q64 *x, qx_shape in, qx_window k, const q64 *zero, int n_zero, qx_shape out, q64 *y);
/* a table of entries codes for each channel, or one for all (rows == 1) */
void qx_lookup(const q64 *x, qx_run r, const q64 *table, int rows, int entries, q64 low, q64 *y);
void qx_strided_pad(const q64 *x, qx_shape in, int stride, int before, q64 zero, qx_shape out, q64 *y);

/* qexp_ops.c */

/* y = ((x - zero) * factor << shift) + bias */
void qx_affine(const q64 *x, qx_run r, const q64 *factor, int n_factor, const q64 *bias, int n_bias, const q64 *zero, int n_zero, int shift, q64 *y);
/* y = (a - za)(b - zb) over n dimensions, in each of which an operand moves by its step (0: it is repeated) */
void qx_multiply(const q64 *a, const q64 *b, int n, const long *length, const long *step_a, const long *step_b, q64 za, q64 zb, q64 *y);
/* y = (a - za) 2^fraction / (b - zb), rounded; 0 where b is zb; sizes of 1 of b are repeated: its steps are 0 there */
void qx_divide(const q64 *a, const q64 *b, int n, const long *length, const long *step_b, q64 za, q64 zb, int fraction, q64 *y);
/* y = (a - za) @ (b - zb): count matrices [m][k] times [k][l] */
void qx_matmul(const q64 *a, const q64 *b, long count, int m, int k, int l, q64 za, q64 zb, q64 *y);
/* codes in another order, and fill where a dimension walks outside of the source */
void qx_move(const q64 *x, int n, const qx_walk *walk, q64 fill, q64 *y);
/* outer runs of n codes, stride apart in the result */
void qx_place(const q64 *x, long outer, long n, long stride, q64 *y);
/* y[i][j] = sum_kl row_w[i][k] column_w[j][l] (x[rows[i][k]][columns[j][l]] - zero) */
void qx_resample(const q64 *x, qx_shape in, qx_shape out, int row_taps, const q64 *rows, const q64 *row_w, int column_taps,
                 const q64 *columns, const q64 *column_w, const q64 *zero, int n_zero, q64 *y);
/* mean 0 and variance 1 in each of groups runs of n codes; then a sign and a summand for each channel */
void qx_normalize(const q64 *x, long groups, long n, int finer, int fraction, q64 eps, qx_run r, const q64 *sign, int n_sign,
                  const q64 *bias, int n_bias, q64 *y);
/* roots of sums of squares, 2^finer times: over the dimensions gone, for each place of those kept */
void qx_length(const q64 *x, int n_kept, const long *kept, const long *kept_step, int n_gone, const long *gone, const long *gone_step,
               q64 zero, int finer, q64 *y);
/* vectors along the channels, divided by their length, or by least units of 2^-finer where they are shorter */
void qx_unit_length(const q64 *x, qx_run r, q64 zero, int finer, int fraction, q64 least, q64 *y);
/* shares of exponentials along the channels */
void qx_softmax(const q64 *x, qx_run r, const q64 *table, int fraction, q64 *y);
#endif
