#include "qexp_int.h"

void qx_affine(const q64 *x, qx_run r, const q64 *factor, int n_factor, const q64 *bias, int n_bias, const q64 *zero, int n_zero, int shift, q64 *y) {
    for (long p = 0; p < r.outer * r.c * r.inner; p++) {
        int o = (int)(p / r.inner % r.c);
        y[p] = qx_times_power((x[p] - qx_at(zero, n_zero, o)) * qx_at(factor, n_factor, o), shift) + qx_at(bias, n_bias, o);
    }
}

void qx_multiply(const q64 *a, const q64 *b, int n, const long *length, const long *step_a, const long *step_b, q64 za, q64 zb, q64 *y) {
    long total = 1;
    for (int d = 0; d < n; d++) total *= length[d];
    for (long p = 0; p < total; p++) {
        long rest = p, i = 0, j = 0;
        for (int d = n - 1; d >= 0; d--) {
            i += rest % length[d] * step_a[d];
            j += rest % length[d] * step_b[d];
            rest /= length[d];
        }
        y[p] = (a[i] - za) * (b[j] - zb);
    }
}

void qx_matmul(const q64 *a, const q64 *b, long count, int m, int k, int l, q64 za, q64 zb, q64 *y) {
    for (long p = 0; p < count * m; p++)
        for (int j = 0; j < l; j++) {
            q64 sum = 0;
            for (int i = 0; i < k; i++) sum += (a[p * k + i] - za) * (b[(p / m * k + i) * l + j] - zb);
            y[p * l + j] = sum;
        }
}

void qx_move(const q64 *x, int n, const qx_walk *walk, q64 fill, q64 *y) {
    long total = 1;
    for (int d = 0; d < n; d++) total *= walk[d].length;
    for (long p = 0; p < total; p++) {
        long rest = p, from = 0, inside = 1;
        for (int d = n - 1; d >= 0; d--) {
            long place = walk[d].first + walk[d].step * (rest % walk[d].length);
            rest /= walk[d].length;
            inside = inside && place >= 0 && place < walk[d].size;
            from += place * walk[d].stride;
        }
        y[p] = inside ? x[from] : fill;
    }
}

void qx_place(const q64 *x, long outer, long n, long stride, q64 *y) {
    for (long o = 0; o < outer; o++)
        for (long i = 0; i < n; i++) y[o * stride + i] = x[o * n + i];
}

void qx_resample(const q64 *x, qx_shape in, qx_shape out, int row_taps, const q64 *rows, const q64 *row_w, int column_taps,
                 const q64 *columns, const q64 *column_w, const q64 *zero, int n_zero, q64 *y) {
    for (int c = 0; c < out.c; c++)
        for (int i = 0; i < out.h; i++)
            for (int j = 0; j < out.w; j++) {
                q64 sum = 0;
                for (int k = 0; k < row_taps; k++)
                    for (int l = 0; l < column_taps; l++) {
                        long row = (long)rows[(long)i * row_taps + k], column = (long)columns[(long)j * column_taps + l];
                        q64 value = x[((long)c * in.h + row) * in.w + column] - qx_at(zero, n_zero, c);
                        sum += value * row_w[(long)i * row_taps + k] * column_w[(long)j * column_taps + l];
                    }
                y[((long)c * out.h + i) * out.w + j] = sum;
            }
}

/* the floor of a square root, by Newton's method from above */
static q64 root(q64 x) {
    int bits = 0;
    q64 guess, next;
    while (bits < 62 && (x >> bits)) bits++;
    guess = (q64)1 << ((bits + 1) / 2);
    while (guess && (next = (guess + x / guess) / 2) < guess) guess = next;
    return guess;
}

static q64 floor_divide(q64 a, q64 b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

void qx_normalize(const q64 *x, long groups, long n, int finer, int fraction, q64 eps, qx_run r, const q64 *sign, int n_sign,
                  const q64 *bias, int n_bias, q64 *y) {
    for (long g = 0; g < groups; g++) {
        q64 sum = 0, squares = 0, t;
        for (long i = g * n; i < (g + 1) * n; i++) {
            sum += x[i];
            squares += x[i] * x[i];
        }
        t = root(qx_times_power(n * squares - sum * sum, 2 * finer) + eps);
        for (long i = g * n; i < (g + 1) * n; i++) {
            int o = (int)(i / r.inner % r.c);
            q64 apart = qx_times_power(n * x[i] - sum, finer + fraction);
            y[i] = qx_at(sign, n_sign, o) * (t ? floor_divide(2 * apart + t, 2 * t) : 0) + qx_at(bias, n_bias, o);
        }
    }
}

static long place(long p, int n, const long *length, const long *step) {
    long at = 0;
    for (int d = n - 1; d >= 0; d--) {
        at += p % length[d] * step[d];
        p /= length[d];
    }
    return at;
}

void qx_divide(const q64 *a, const q64 *b, int n, const long *length, const long *step_b, q64 za, q64 zb, int fraction, q64 *y) {
    long total = 1;
    for (int d = 0; d < n; d++) total *= length[d];
    for (long p = 0; p < total; p++) {
        q64 over = b[place(p, n, length, step_b)] - zb, size = over < 0 ? -over : over;
        q64 above = qx_times_power(over < 0 ? za - a[p] : a[p] - za, fraction + 1);
        y[p] = size ? floor_divide(above + size, 2 * size) : 0;
    }
}

void qx_length(const q64 *x, int n_kept, const long *kept, const long *kept_step, int n_gone, const long *gone, const long *gone_step,
               q64 zero, int finer, q64 *y) {
    long results = 1, terms = 1;
    for (int d = 0; d < n_kept; d++) results *= kept[d];
    for (int d = 0; d < n_gone; d++) terms *= gone[d];
    for (long p = 0; p < results; p++) {
        const q64 *first = x + place(p, n_kept, kept, kept_step);
        q64 squares = 0;
        for (long i = 0; i < terms; i++) {
            q64 code = first[place(i, n_gone, gone, gone_step)] - zero;
            squares += code * code;
        }
        y[p] = root(qx_times_power(squares, 2 * finer));
    }
}

void qx_unit_length(const q64 *x, qx_run r, q64 zero, int finer, int fraction, q64 least, q64 *y) {
    for (long p = 0; p < r.outer * r.inner; p++) {
        long start = p / r.inner * r.c * r.inner + p % r.inner;
        q64 squares = 0, t;
        for (int c = 0; c < r.c; c++) {
            q64 code = x[start + c * r.inner] - zero;
            squares += code * code;
        }
        t = root(qx_times_power(squares, 2 * finer));
        if (t < least) t = least;
        for (int c = 0; c < r.c; c++) {
            q64 code = qx_times_power(x[start + c * r.inner] - zero, finer + fraction + 1);
            y[start + c * r.inner] = floor_divide(code + t, 2 * t);
        }
    }
}

void qx_softmax(const q64 *x, qx_run r, const q64 *table, int fraction, q64 *y) {
    for (long p = 0; p < r.outer * r.inner; p++) {
        long start = p / r.inner * r.c * r.inner + p % r.inner;
        q64 most = x[start], sum = 0;
        for (int c = 1; c < r.c; c++) most = x[start + c * r.inner] > most ? x[start + c * r.inner] : most;
        for (int c = 0; c < r.c; c++) sum += table[most - x[start + c * r.inner]];
        for (int c = 0; c < r.c; c++) {
            q64 e = table[most - x[start + c * r.inner]];
            y[start + c * r.inner] = (qx_times_power(e, fraction + 1) + sum) / (2 * sum);
        }
    }
}
