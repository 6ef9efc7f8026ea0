#include "qexp_int.h"

void qx_unpack(const uint8_t *packed, long n, int bits, int is_signed, int32_t *out) {
    for (long i = 0; i < n; i++) {
        int32_t value = 0;
        for (int b = 0; b < bits; b++) {
            long place = i * bits + b;
            value |= (int32_t)((packed[place >> 3] >> (place & 7)) & 1) << b;
        }
        out[i] = is_signed && (value >> (bits - 1)) ? value - ((int32_t)1 << bits) : value;
    }
}

void qx_levels(int32_t *codes, int rows, long inner, const int32_t *levels, int count) {
    for (int r = 0; r < rows; r++)
        for (long i = 0; i < inner; i++) codes[r * inner + i] = levels[(long)r * count + codes[r * inner + i]];
}

q64 qx_shift_round(q64 x, int shift, enum qx_rounding rounding) {
    q64 whole = qx_floor_shift(x, shift), one = (q64)1 << shift, rest = x - qx_times_power(whole, shift), twice = rest * 2;
    switch (rounding) {
        case QX_FLOOR: return whole;
        case QX_TRUNC: return whole + (rest != 0 && x < 0);
        case QX_HALF_UP: return whole + (twice >= one && rest != 0);
        case QX_HALF_AWAY: return whole + (twice > one || (twice == one && x >= 0));
        default: return whole + (twice > one || (twice == one && (whole & 1)));
    }
}

/* an integer as float32 holds it: 24 bits, ties to even */
static q64 held(q64 x) {
    q64 most = x < 0 ? -x : x, whole;
    int drop = 0;
    while ((most >> drop) >= ((q64)1 << 24)) drop++;
    whole = qx_times_power(qx_shift_round(most, drop, QX_HALF_EVEN), drop);
    return x < 0 ? -whole : whole;
}

void qx_conv(const q64 *x, qx_shape in, const int32_t *w, const q64 *bias, const q64 *zero, int n_zero, qx_window k, int align, qx_shape out, q64 *y) {
    int per = in.c / k.groups, outputs = out.c / k.groups;
    for (int o = 0; o < out.c; o++)
        for (int i = 0; i < out.h; i++)
            for (int j = 0; j < out.w; j++) {
                q64 sum = 0;
                for (int c = 0; c < per; c++) {
                    int channel = (o / outputs) * per + c;
                    const q64 *map = x + (long)channel * in.h * in.w;
                    const int32_t *taps = w + ((long)o * per + c) * k.kh * k.kw;
                    q64 z = qx_at(zero, n_zero, channel);
                    for (int r = 0; r < k.kh; r++) {
                        int row = i * k.sh - k.ph + r * k.dh;
                        if (row < 0 || row >= in.h) continue;
                        for (int s = 0; s < k.kw; s++) {
                            int column = j * k.sw - k.pw + s * k.dw;
                            if (column >= 0 && column < in.w) sum += (map[(long)row * in.w + column] - z) * taps[r * k.kw + s];
                        }
                    }
                }
                y[((long)o * out.h + i) * out.w + j] = qx_times_power(sum, align) + bias[o];
            }
}

void qx_requantize(const q64 *x, qx_run r, const q64 *multiplier, int n_multiplier, const q64 *addend, int n_addend,
                   const q64 *shift, int n_shift, const q64 *zero, int n_zero, enum qx_rounding rounding, q64 low, q64 high, q64 *y) {
    for (long p = 0; p < r.outer * r.c * r.inner; p++) {
        int o = (int)(p / r.inner % r.c);
        q64 value = (x[p] - qx_at(zero, n_zero, o)) * qx_at(multiplier, n_multiplier, o) + qx_at(addend, n_addend, o);
        if (rounding == QX_FLOAT32) { /* as runtimes: number and product as float32, the zero point last */
            value = held(held(x[p] - qx_at(zero, n_zero, o)) * qx_at(multiplier, n_multiplier, o));
            value = qx_shift_round(value, (int)qx_at(shift, n_shift, o), QX_HALF_EVEN);
            value += qx_floor_shift(qx_at(addend, n_addend, o), (int)qx_at(shift, n_shift, o));
        } else if (rounding == QX_FLOAT32_SUM) { /* the zero point before the rounding */
            value = held(held(x[p] - qx_at(zero, n_zero, o)) * qx_at(multiplier, n_multiplier, o)) + qx_at(addend, n_addend, o);
            value = qx_shift_round(held(value), (int)qx_at(shift, n_shift, o), QX_HALF_EVEN);
        } else
            value = qx_shift_round(value, (int)qx_at(shift, n_shift, o), rounding);
        y[p] = value < low ? low : value > high ? high : value;
    }
}

void qx_clamp(const q64 *x, qx_run r, const q64 *low, int n_low, const q64 *high, int n_high, q64 *y) {
    for (long p = 0; p < r.outer * r.c * r.inner; p++) {
        int o = (int)(p / r.inner % r.c);
        q64 least = qx_at(low, n_low, o), most = qx_at(high, n_high, o);
        y[p] = x[p] < least ? least : x[p] > most ? most : x[p];
    }
}

void qx_add(const q64 *x, long n, q64 zero, int shift, q64 *y) {
    for (long i = 0; i < n; i++) y[i] += qx_times_power(x[i] - zero, shift);
}

void qx_max_pool(const q64 *x, qx_shape in, qx_window k, qx_shape out, q64 *y) {
    for (int c = 0; c < out.c; c++)
        for (int i = 0; i < out.h; i++)
            for (int j = 0; j < out.w; j++) {
                q64 most = INT64_MIN;
                for (int r = 0; r < k.kh; r++)
                    for (int s = 0; s < k.kw; s++) {
                        int row = i * k.sh - k.ph + r * k.dh, column = j * k.sw - k.pw + s * k.dw;
                        if (row < 0 || row >= in.h || column < 0 || column >= in.w) continue;
                        q64 value = x[((long)c * in.h + row) * in.w + column];
                        if (value > most) most = value;
                    }
                y[((long)c * out.h + i) * out.w + j] = most;
            }
}

void qx_sum_pool(const q64 *x, qx_shape in, qx_window k, const q64 *zero, int n_zero, qx_shape out, q64 *y) {
    for (int c = 0; c < out.c; c++)
        for (int i = 0; i < out.h; i++)
            for (int j = 0; j < out.w; j++) {
                q64 sum = 0;
                for (int r = 0; r < k.kh; r++)
                    for (int s = 0; s < k.kw; s++) {
                        int row = i * k.sh - k.ph + r, column = j * k.sw - k.pw + s;
                        if (row < 0 || row >= in.h || column < 0 || column >= in.w) continue;
                        sum += x[((long)c * in.h + row) * in.w + column] - qx_at(zero, n_zero, c);
                    }
                y[((long)c * out.h + i) * out.w + j] = sum;
            }
}

void qx_lookup(const q64 *x, qx_run r, const q64 *table, int rows, int entries, q64 low, q64 *y) {
    for (long p = 0; p < r.outer * r.c * r.inner; p++) {
        long row = rows > 1 ? p / r.inner % r.c : 0;
        y[p] = table[row * entries + (x[p] - low)];
    }
}

void qx_strided_pad(const q64 *x, qx_shape in, int stride, int before, q64 zero, qx_shape out, q64 *y) {
    for (int c = 0; c < out.c; c++)
        for (int i = 0; i < out.h; i++)
            for (int j = 0; j < out.w; j++) {
                int from = c - before;
                long place = ((long)from * in.h + (long)i * stride) * in.w + (long)j * stride;
                y[((long)c * out.h + i) * out.w + j] = from >= 0 && from < in.c ? x[place] : zero;
            }
}
