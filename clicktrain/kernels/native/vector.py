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
    The instructions of AVX512_BF16 also make zeros of numbers under 1.2e-38.
    Vector extensions of GCC and Clang, not intrinsics: AVX2, AVX-512 and NEON come from one text.

    Args:
        dtype: of the activations, one of `STORED_TYPES`.
        lanes: V, numbers of its `compute_type` in one vector register.
    """
    kept, dtype = dtype, compute_type(dtype)
    size = dtype.itemsize
    widths = []
    half = lanes // 2
    while half > 1:
        widths.append(f"typedef real vec{half} __attribute__((vector_size({half * size})));")
        half //= 2
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
            *_in_register(lanes * size),
            *_lane_sums("", "vec", dtype, lanes),
            *_stored(kept, lanes),
            *_stream(lanes * kept.itemsize),
            "static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }",
            "static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }",
            "",
        ]
    )


def integer_vectors(dtype: torch.dtype, lanes: int) -> str:
    """``ivec``, LANES integers of the size of ``real``: what comparisons of ``vec`` give, masks of bits."""
    size = compute_type(dtype).itemsize
    shape = f"vector_size({lanes * size}), aligned({lanes * size})"
    return f"typedef int{8 * size}_t ivec __attribute__(({shape}));\n" + _INLINE


_INLINE = "#define INLINE static inline __attribute__((always_inline))\n"


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
        f"typedef uint16_t stored {_vector(2 * lanes)};",
        f"typedef uint32_t bits {_vector(4 * lanes)};",
        f"{inline} bits spread(stored v) {{",
        # Instructions by name where GCC 12 finds no good ones; they take whole registers.
        "#if (defined(__AVX512F__) && LANES == 16) || (defined(__AVX2__) && LANES == 8)",
        "  bits b;",
        '  __asm__("vpmovzxwd %1, %0" : "=v"(b) : "vm"(v));',
        "  return b;",
        "#else",
        "  return __builtin_convertvector(v, bits);",
        "#endif",
        "}",
        f"{inline} vec widen(stored v) {{ return (vec)(spread(v) << 16); }}",
        f"typedef real half_vec {_vector(2 * lanes)};",
        *_lane_sums("half_", "half_vec", torch.float32, lanes // 2),
        f"{inline} stored narrow(vec v) {{",
        "#if defined(__AVX512BF16__) && LANES == 16",
        "  stored s;",
        '  __asm__("vcvtneps2bf16 %1, %0" : "=v"(s) : "v"(v));',
        "  return s;",
        "#else",
        # Not a number: all bits set. The upper halves are then what is kept.
        "  const bits b = (bits)v, near = (b + 0x7fff + ((b >> 16) & 1)) | (bits)(v != v);",
        "#if defined(__AVX2__) && LANES == 8",
        f"  const uint8_t upper {_vector(32)} = {{{', '.join(['2, 3, 6, 7, 10, 11, 14, 15'] * 4)}}};",
        "  bits moved;",
        '  __asm__("vpshufb %2, %1, %0\\n\\tvpermq $8, %0, %0" : "=v"(moved) : "v"(near), "vm"(upper));',
        "  stored s;",
        "  memcpy(&s, &moved, sizeof s);",
        "  return s;",
        "#else",
        "  return __builtin_convertvector(near >> 16, stored);",
        "#endif",
        "#endif",
        "}",
    ]


def _vector(size: int) -> str:
    """A C type's attributes that make it a vector of that size, which may lie over any other type."""
    return f"__attribute__((vector_size({size}), aligned({size}), may_alias))"


def _in_register(size: int) -> list[str]:
    """``KEEP(v)``, which holds a vector of that size in a register, and ``USE(v)``, which needs it there.

    What several sums use is to be loaded once: compilers fold the load into each use instead. Vectors wider
    than a register are several of them, which ``KEEP`` leaves to the compiler.
    """
    lines: list[str] = []
    for macro, widest, letter in _REGISTER_CLASSES:
        if size <= widest:
            lines += [
                f"#{'el' if lines else ''}if defined({macro})",
                f'#define KEEP(x) __asm__("" : "+{letter}"(x))',
                f'#define USE(x) __asm__ volatile("" : : "{letter}"(x))',
            ]
    other = ["#define KEEP(x)", '#define USE(x) __asm__ volatile("" : : "m"(x))']
    return [*lines, "#else", *other, "#endif"] if lines else other


_REGISTER_CLASSES = (
    ("__AVX512F__", 64, "v"),
    ("__AVX__", 32, "x"),
    ("__x86_64__", 16, "x"),
    ("__aarch64__", 16, "w"),
)
"""Macro, bytes of a vector register, and the letter for one in inline assembly."""


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


def _lane_sums(prefix: str, vector: str, dtype: torch.dtype, lanes: int) -> list[str]:
    """``lane_sum(v)``, and ``add_lane_sums4(out, a, b, c, d)``, by transposing adds.

    The latter adds four vectors' sums to ``out[0..3]``.
    """
    inline = "static inline __attribute__((always_inline, unused))"
    steps = [f"{vector} v{lanes} = v;"]
    half = lanes
    while half > 1:
        half //= 2
        lower = ", ".join(str(i) for i in range(half))
        upper = ", ".join(str(i + half) for i in range(half))
        if half == 1:
            steps.append("return v2[0] + v2[1];")
        else:
            steps.append(
                f"vec{half} v{half} = __builtin_shufflevector(v{2 * half}, v{2 * half}, {lower}) + "
                f"__builtin_shufflevector(v{2 * half}, v{2 * half}, {upper});"
            )
    sum_of = f"{prefix}lane_sum"
    single = [
        f"{inline} real {sum_of}({vector} v) {{",
        "#if __has_builtin(__builtin_shufflevector)",
        f"  {' '.join(steps) if lanes > 1 else 'return v[0];'}",
        "#else",
        f"  real s = 0; for (int i = 0; i < {lanes}; ++i) s += v[i]; return s;",
        "#endif",
        "}",
    ]
    head = (
        f"{inline} void {prefix}add_lane_sums4(real *out, {vector} a, {vector} b, {vector} c, {vector} d) {{"
    )
    plain = " ".join(f"out[{i}] += {sum_of}({name});" for i, name in enumerate("abcd"))
    if lanes < 4:
        return [*single, f"{head} {plain} }}"]

    def pick(first: str, second: str, indices: list[int]) -> str:
        return f"__builtin_shufflevector({first}, {second}, {', '.join(map(str, indices))})"

    even = [i for pair in range(0, lanes, 2) for i in (pair, lanes + pair)]
    low = [i for four in range(0, lanes, 4) for i in (four, four + 1, lanes + four, lanes + four + 1)]
    lines = [
        *single,
        head,
        "#if __has_builtin(__builtin_shufflevector)",
        f"  {vector} t = {pick('a', 'b', even)} + {pick('a', 'b', [i + 1 for i in even])};",
        f"  {vector} u = {pick('c', 'd', even)} + {pick('c', 'd', [i + 1 for i in even])};",
        f"  {vector} s{lanes} = {pick('t', 'u', low)} + {pick('t', 'u', [i + 2 for i in low])};",
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
