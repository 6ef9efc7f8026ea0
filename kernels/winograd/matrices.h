// The integer Winograd matrices F(2,3), F(4,3) and F(5,3), denominators cleared; see matrices.py.
#pragma once

#include "../common/rounding.h"
#include "../common/tensor.h"

namespace qexp {

constexpr int kMost = 7;  // the largest tile: 5 outputs and 2 neighbours

struct Matrices {
  int outputs, reach;
  int64_t divisor;
  int bt[kMost][kMost], g[kMost][kMost], at[kMost][kMost];
};

inline const Matrices& matrices(int64_t outputs) {
  static const Matrices two{2, 4, 2,
                            {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}},
                            {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}},
                            {{1, 1, 1, 0}, {0, 1, -1, 1}}};
  static const Matrices four{4, 6, 24,
                             {{4, 0, -5, 0, 1, 0}, {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                               {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}},
                             {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4}, {1, 2, 4}, {1, -2, 4}, {0, 0, 24}},
                             {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}}};
  static const Matrices five{5, 7, 120,
                             {{12, -4, -15, 5, 3, -1, 0}, {0, 12, 8, -7, -2, 1, 0}, {0, -12, 16, -1, -4, 1, 0},
                               {0, 6, 1, -7, -1, 1, 0}, {0, -6, 5, 5, -5, 1, 0}, {0, 4, 0, -5, 0, 1, 0},
                               {0, -12, 4, 15, -5, -3, 1}},
                             {{10, 0, 0}, {10, 10, 10}, {5, -5, 5}, {-5, -10, -20}, {-1, 2, -4}, {1, 3, 9}, {0, 0, 120}},
                             {{1, 1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 3, 0}, {0, 1, 1, 4, 4, 9, 0},
                               {0, 1, -1, 8, -8, 27, 0}, {0, 1, 1, 16, 16, 81, 1}}};
  STD_TORCH_CHECK(outputs == 2 || outputs == 4 || outputs == 5, "outputs=", outputs, " is not allowed; use 2, 4 or 5");
  return outputs == 2 ? two : outputs == 4 ? four : five;
}

// to[r * step] = sum over c of matrix[r][c] from[c * step]
QEXP_INLINE void apply(const int (&matrix)[kMost][kMost], int rows, int columns, const int64_t* from, int64_t* to, int step) {
  for (int r = 0; r < rows; ++r) {
    int64_t sum = 0;
    for (int c = 0; c < columns; ++c) sum += matrix[r][c] * from[c * step];
    to[r * step] = sum;
  }
}

}  // namespace qexp
