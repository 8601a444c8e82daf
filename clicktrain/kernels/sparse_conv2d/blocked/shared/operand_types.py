"""What windows are made of while they are computed with: the C type ``cell``, and the multiply-add on it.

- Numbers that are kept as they are computed with, and bfloat16 widened to float32: ``cell`` is ``vec``.
- **Pairs** (`Tiling.pairs`, bfloat16 only): AVX512_BF16's ``vdpbf16ps`` multiplies pairs of bfloat16 and adds
  both products to a float32, two multiply-adds a lane. Forward and gradient of the input pair two
  neighbouring columns of the source, laid side by side when a region is copied: a kernel's taps that lie next
  to each other in a row become one instruction, a tap without a neighbour has a zero for the other. So
  masks need no restriction; of patterns of four taps about one and a half go into one. The gradient of the
  weight is a sum over images: it pairs two images, which lie side by side anyway. Its operands are half a
  register, so that it gains only where those are multiplied at twice the rate.

On other processors the same code runs with two multiply-adds for a pair: for tests, and slower.
"""

from __future__ import annotations

import math

import torch

from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase


def distance(phase: Phase, problem: ConvProblem) -> int:
    """Columns of the source between what neighbouring taps of a row read for one result."""
    axis = problem.columns
    if phase == "dgrad":
        return axis.dilation // math.gcd(axis.dilation, axis.stride)
    return axis.dilation


def as_stored(phase: Phase, pairs: bool, dtype: torch.dtype) -> bool:
    """Whether activations are computed with as they lie in memory, without a copy of another type."""
    return dtype is not torch.bfloat16 or (pairs and phase == "wgrad")


def support(phase: Phase, problem: ConvProblem, pairs: bool) -> str:
    """The types ``cell``, ``weight`` and ``sums_t``, ``MULTIPLY_ADD`` and the copy of a window's row."""
    if not pairs:
        return _PLAIN
    if phase == "wgrad":
        return _IMAGES
    return f"#define DISTANCE {distance(phase, problem)}\n{_COLUMNS}"


_COPY_ROW = """
#define PACK_ROW(o, p) \\
  for (int j = 0; j < c0; ++j) o[j] = (cell){0}; \\
  _Pragma("GCC unroll 18") \\
  for (int j = c0; j < c1; ++j) o[j] = to_cell(p[j]); \\
  for (int j = c1; j < cols; ++j) o[j] = (cell){0};
"""

_PLAIN = (
    """
typedef vec cell;
typedef real weight;
typedef vec sums_t;
#define to_cell widen
#define all_lanes splat
#define MULTIPLY_ADD(sum, w, x) ((sum) += (w) * (x))
#define ADD_LANE_SUMS4 add_lane_sums4
#define LANE_SUM lane_sum
"""
    + _COPY_ROW
)

_COLUMNS = """
typedef bits cell;
typedef uint32_t weight;
static inline __attribute__((always_inline)) cell all_lanes(weight w) { return w - (cell){0}; }
#if defined(__AVX512BF16__) && LANES == 16
#define MULTIPLY_ADD(sum, w, x) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(x))
#else
#define MULTIPLY_ADD(sum, w, x) ((sum) += (vec)((w) << 16) * (vec)((x) << 16), \\
                                 (sum) += (vec)((w) & 0xffff0000) * (vec)((x) & 0xffff0000))
#endif
#define PACK_ROW(o, p) \\
  (void)c1; \\
  for (int j = 0; j < cols; ++j) { \\
    const int first = col + j, second = first + DISTANCE; \\
    cell v = {0}; \\
    if (first >= 0 && first < SRC_W) v = spread(p[j]); \\
    if (second >= 0 && second < SRC_W) v |= spread(p[j + DISTANCE]) << 16; \\
    o[j] = v; \\
  }
"""

_IMAGES = (
    """
typedef stored cell;
typedef uint32_t half_bits __attribute__((vector_size(2 * LANES), aligned(2 * LANES), may_alias));
typedef half_vec sums_t;
#if LANES < 8
// Clang holds no operand of less than 16 bytes in a vector register.
#undef KEEP
#define KEEP(x)
#endif
static inline __attribute__((always_inline, unused)) cell to_cell(stored v) { return v; }
#if defined(__AVX512BF16__) && LANES == 16
#define MULTIPLY_ADD(sum, w, x) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(x))
#else
#define MULTIPLY_ADD(sum, w, x) \\
  ((sum) += (half_vec)((half_bits)(w) << 16) * (half_vec)((half_bits)(x) << 16), \\
   (sum) += (half_vec)((half_bits)(w) & 0xffff0000) * (half_vec)((half_bits)(x) & 0xffff0000))
#endif
#define ADD_LANE_SUMS4 half_add_lane_sums4
#define LANE_SUM half_lane_sum
"""
    + _COPY_ROW
)
