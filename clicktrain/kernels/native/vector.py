"""What generated sources start with: vector types, broadcasts, sums over lanes, numbers kept in bfloat16."""

from __future__ import annotations

import torch

C_TYPES = {torch.float32: "float", torch.float64: "double"}
"""Number types that kernels compute in."""
STORED_TYPES = (*C_TYPES, torch.bfloat16)
"""Number types that activations may be kept in."""


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute in, and have their parameters in, where activations are kept in that type."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def preamble(dtype: torch.dtype, lanes: int) -> str:
    """Types and helpers: ``real``, ``vec`` of ``LANES`` reals (aligned), ``splat``, ``lane_sum``.

    Activations are read and written as ``stored``, as many numbers of their own type, through ``widen`` and
    ``narrow`` (to the nearest, ties to even, NaN stays NaN); both do nothing where that type is computed in.
    Vector extensions of GCC and Clang, not intrinsics: AVX2, AVX-512 and NEON come from one text.

    Args:
        dtype: of the activations, one of `STORED_TYPES`.
        lanes: V, numbers of its `compute_type` in one vector register.
    """
    kept, dtype = dtype, compute_type(dtype)
    size = dtype.itemsize
    steps = []
    half = lanes
    while half > 1:
        half //= 2
        low = ", ".join(str(i) for i in range(half))
        high = ", ".join(str(i + half) for i in range(half))
        if half == 1:
            steps.append("return v2[0] + v2[1];")
        else:
            steps.append(
                f"vec{half} v{half} = __builtin_shufflevector(v{2 * half}, v{2 * half}, {low}) + "
                f"__builtin_shufflevector(v{2 * half}, v{2 * half}, {high});"
            )
    widths = []
    half = lanes // 2
    while half > 1:
        widths.append(f"typedef real vec{half} __attribute__((vector_size({half * size})));")
        half //= 2
    plain = "real s = 0; for (int i = 0; i < LANES; ++i) s += v[i]; return s;"
    body = " ".join([f"vec v{lanes} = v;", *steps]) if lanes > 1 else "return v[0];"
    return "\n".join(
        [
            "#include <stdint.h>",
            "#include <stddef.h>",
            "#include <string.h>",
            "#include <math.h>",
            f"typedef {C_TYPES[dtype]} real;",
            f"#define LANES {lanes}",
            f"typedef real vec __attribute__((vector_size({lanes * size}), aligned({lanes * size})));",
            *widths,
            "#ifndef __has_builtin",
            "#define __has_builtin(x) 0",
            "#endif",
            "static inline __attribute__((always_inline)) vec splat(real x) { return x - (vec){0}; }",
            "static inline __attribute__((always_inline)) real lane_sum(vec v) {",
            "#if __has_builtin(__builtin_shufflevector)",
            f"  {body}",
            "#else",
            f"  {plain}",
            "#endif",
            "}",
            # What several sums use is to be loaded once: compilers fold the load into each use instead.
            "#if defined(__AVX512F__)",
            '#define KEEP(x) __asm__("" : "+v"(x))',
            "#elif defined(__x86_64__)",
            '#define KEEP(x) __asm__("" : "+x"(x))',
            "#elif defined(__aarch64__)",
            '#define KEEP(x) __asm__("" : "+w"(x))',
            "#else",
            "#define KEEP(x)",
            "#endif",
            *_lane_sums(dtype, lanes),
            *_stored(kept, lanes),
            *_stream(lanes * kept.itemsize),
            "static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }",
            "static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }",
            "",
        ]
    )


def _stored(dtype: torch.dtype, lanes: int) -> list[str]:
    """``number`` and ``stored``, one and ``LANES`` activations, and the ways from and to ``vec``."""
    inline = "static inline __attribute__((always_inline, unused))"
    if dtype is not torch.bfloat16:
        return [
            "typedef real number;",
            "typedef vec stored;",
            f"{inline} vec widen(stored v) {{ return v; }}",
            f"{inline} stored narrow(vec v) {{ return v; }}",
        ]
    return [
        "typedef uint16_t number;",
        f"typedef uint16_t stored __attribute__((vector_size({2 * lanes}), aligned({2 * lanes}), may_alias));",
        f"typedef uint32_t bits __attribute__((vector_size({4 * lanes}), aligned({4 * lanes})));",
        f"{inline} vec widen(stored v) {{",
        # Instructions by name where GCC 12 finds no good ones; they take whole registers.
        "#if (defined(__AVX512F__) && LANES == 16) || (defined(__AVX2__) && LANES == 8)",
        "  bits b;",
        '  __asm__("vpmovzxwd %1, %0" : "=v"(b) : "vm"(v));',
        "  return (vec)(b << 16);",
        "#else",
        "  return (vec)(__builtin_convertvector(v, bits) << 16);",
        "#endif",
        "}",
        f"{inline} stored narrow(vec v) {{",
        "#if defined(__AVX512BF16__) && LANES == 16",
        "  stored s;",
        '  __asm__("vcvtneps2bf16 %1, %0" : "=v"(s) : "v"(v));',
        "  return s;",
        "#else",
        "  const bits b = (bits)v, odd = (b >> 16) & 1, near = b + 0x7fff + odd, nan = b | 0x400000;",
        "  const bits known = (bits)(v == v);",
        "  return __builtin_convertvector(((near & known) | (nan & ~known)) >> 16, stored);",
        "#endif",
        "}",
    ]


def _stream(size: int) -> list[str]:
    """``STREAM(p, v)``, a store of so many bytes around the caches, and ``DRAIN``.

    For results that are too large to be found there again: nothing has to be read first. ``DRAIN`` makes them
    visible to other threads.
    """
    known = {64: ("__AVX512F__", "movntps512"), 32: ("__AVX__", "movntps256"), 16: ("__SSE__", "movntps")}
    lines = [
        "#if defined(__clang__)",
        "#define STREAM(p, v) __builtin_nontemporal_store(v, p)",
    ]
    if size in known:
        macro, name = known[size]
        lines += [
            f"#elif defined({macro})",
            f"typedef float stream_t __attribute__((vector_size({size}), may_alias));",
            f"#define STREAM(p, v) __builtin_ia32_{name}((float *)(p), (stream_t)(v))",
        ]
    return [
        *lines,
        "#else",
        "#define STREAM(p, v) (*(p) = (v))",
        "#endif",
        "#if defined(__x86_64__)",
        "#define DRAIN() __builtin_ia32_sfence()",
        "#else",
        "#define DRAIN() ((void)0)",
        "#endif",
    ]


def _lane_sums(dtype: torch.dtype, lanes: int) -> list[str]:
    """``add_lane_sums4(out, a, b, c, d)``: adds four vectors' sums to ``out[0..3]``, by transposing adds."""
    head = (
        "static inline __attribute__((always_inline)) "
        "void add_lane_sums4(real *out, vec a, vec b, vec c, vec d) {"
    )
    plain = "out[0] += lane_sum(a); out[1] += lane_sum(b); out[2] += lane_sum(c); out[3] += lane_sum(d);"
    if lanes < 4:
        return [f"{head} {plain} }}"]

    def pick(first: str, second: str, indices: list[int]) -> str:
        return f"__builtin_shufflevector({first}, {second}, {', '.join(map(str, indices))})"

    even = [i for pair in range(0, lanes, 2) for i in (pair, lanes + pair)]
    low = [i for four in range(0, lanes, 4) for i in (four, four + 1, lanes + four, lanes + four + 1)]
    lines = [
        head,
        "#if __has_builtin(__builtin_shufflevector)",
        f"  vec t = {pick('a', 'b', even)} + {pick('a', 'b', [i + 1 for i in even])};",
        f"  vec u = {pick('c', 'd', even)} + {pick('c', 'd', [i + 1 for i in even])};",
        f"  vec s{lanes} = {pick('t', 'u', low)} + {pick('t', 'u', [i + 2 for i in low])};",
    ]
    half = lanes
    while half > 4:
        half //= 2
        wide = f"s{2 * half}"
        first, second = list(range(half)), list(range(half, 2 * half))
        lines.append(f"  vec{half} s{half} = {pick(wide, wide, first)} + {pick(wide, wide, second)};")
    size = dtype.itemsize
    lines += [
        f"  typedef real four __attribute__((vector_size({4 * size}), aligned({size}), may_alias));",
        "  *(four *)out += (four)s4;",
        "#else",
        f"  {plain}",
        "#endif",
        "}",
    ]
    return lines
