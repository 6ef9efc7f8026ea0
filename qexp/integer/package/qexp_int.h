/* Integer arithmetic of a qexp package: plain C99, no floating point, no allocation, no dependency.
 *
 * A tensor is an array of int64_t codes, channels first: [C][H][W], or [features]. A per-channel constant is an array with its length n:
 * n == 1 holds for all channels. */
#ifndef QEXP_INT_H
#define QEXP_INT_H
#include <stdint.h>

typedef int64_t q64;
enum qx_rounding { QX_HALF_EVEN, QX_HALF_UP, QX_HALF_AWAY, QX_FLOOR, QX_TRUNC, QX_FLOAT32 };

typedef struct { int c, h, w; } qx_shape;
typedef struct { int kh, kw, sh, sw, ph, pw, dh, dw, groups; } qx_window;

/* Element i of a packed array is bits [i * bits, (i + 1) * bits) of the byte stream, lowest bit first; two's complement where is_signed. */
void qx_unpack(const uint8_t *packed, long n, int bits, int is_signed, int32_t *out);

/* Each of rows * inner codes gives way to the entry of its row's table that it names; a table has count entries. */
void qx_levels(int32_t *codes, int rows, long inner, const int32_t *levels, int count);

/* x / 2^shift, rounded. */
q64 qx_shift_round(q64 x, int shift, enum qx_rounding rounding);

/* y[o] = (sum of (x - zero) * w << align) + bias[o]; beyond the border x is zero. */
void qx_conv(const q64 *x, qx_shape in, const int32_t *w, const q64 *bias, const q64 *zero, int n_zero, qx_window k, int align, qx_shape out, q64 *y);

/* y = clip(round(((x - zero) * multiplier + addend) / 2^shift), low, high), with one constant, or one per channel. */
void qx_requantize(const q64 *x, int c, int inner, const q64 *multiplier, int n_multiplier, const q64 *addend, int n_addend,
                   const q64 *shift, int n_shift, const q64 *zero, int n_zero, enum qx_rounding rounding, q64 low, q64 high, q64 *y);

void qx_clamp(const q64 *x, int c, int inner, const q64 *low, int n_low, const q64 *high, int n_high, q64 *y);
/* y += (x - zero) << shift; y begins as zeros */
void qx_add(const q64 *x, long n, q64 zero, int shift, q64 *y);
void qx_max_pool(const q64 *x, qx_shape in, qx_window k, qx_shape out, q64 *y);
void qx_sum_pool(const q64 *x, qx_shape in, qx_window k, const q64 *zero, int n_zero, qx_shape out, q64 *y);
void qx_lookup(const q64 *x, long n, const q64 *table, q64 low, q64 *y);
void qx_strided_pad(const q64 *x, qx_shape in, int stride, int before, q64 zero, qx_shape out, q64 *y);
#endif
