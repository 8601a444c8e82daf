// Passes of batch norm over one chunk: H*W vectors of one channel in one block of images.
//
// Lanes are summed apart until the end, where the sums of padding lanes are dropped: loops over activations have
// no case for padding, and not even a NaN in it counts. Activations are widened where they are read and rounded
// once, where they are written; everything between is of `real` or double.
#pragma once
#include "kernels/activations/activations.h"

// Vectors that are summed in `real` before the sum goes over to double.
#define PIECE 1024

// The beginning of a channel's next chunk, while its present one is read: the processor notices too late that it goes
// on elsewhere.
#define BEGINNING 32  // cache lines
INLINE void fetch_ahead(const stored *chunk, int64_t stride, int64_t area, int64_t b, int64_t blocks) {
  const char *next = (const char *)(chunk + stride);
  if (b + 1 < blocks)
    for (int64_t byte = 0; byte < min64(area * STORED_BYTES, BEGINNING * 64); byte += 64) FETCH(next + byte);
}

INLINE ivec first_lanes(int64_t count) {
  ivec lanes;
  for (int l = 0; l < LANES; ++l) lanes[l] = l < count ? -1 : 0;
  return lanes;
}
INLINE void flush(double *restrict to, vec v, ivec lanes) {
  real part[LANES];
  v = only(v, lanes);
  memcpy(part, &v, sizeof v);
  for (int l = 0; l < LANES; ++l) to[l] += part[l];
}
INLINE double total(const double *from) {
  double s = 0;
  for (int l = 0; l < LANES; ++l) s += from[l];
  return s;
}

// Sums of x - center and of its square, lane by lane.
NOINLINE void centered_sums(const stored *restrict x, int64_t area, real center, ivec lanes, double *restrict sum,
                            double *restrict square) {
  const vec k = splat(center);
  for (int64_t first = 0; first < area; first += PIECE) {
    const int64_t end = min64(first + PIECE, area);
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, q0 = {0}, q1 = {0}, q2 = {0}, q3 = {0};
    int64_t i = first;
    for (; i + 4 <= end; i += 4) {
      const vec a = widen(x[i]) - k, b = widen(x[i + 1]) - k;
      const vec c = widen(x[i + 2]) - k, d = widen(x[i + 3]) - k;
      s0 += a; s1 += b; s2 += c; s3 += d;
      q0 += a * a; q1 += b * b; q2 += c * c; q3 += d * d;
    }
    for (; i < end; ++i) {
      const vec a = widen(x[i]) - k;
      s0 += a; q0 += a * a;
    }
    flush(sum, (s0 + s1) + (s2 + s3), lanes);
    flush(square, (q0 + q1) + (q2 + q3), lanes);
  }
}

// What a channel's numbers go through: act((x - center) * scale + shift + residual).
typedef struct {
  real center, scale, shift, low, high;
} channel;
INLINE limits limits_of(channel c) { return (limits){splat(c.low), splat(c.high)}; }

// y may be x.
INLINE void scaled(const stored *x, const stored *residual, stored *y, int64_t area, channel c, const int add) {
  const vec k = splat(c.center), a = splat(c.scale), b = splat(c.shift);
  const limits to = limits_of(c);
  for (int64_t i = 0; i < area; ++i) {
    vec v = (widen(x[i]) - k) * a + b;
    if (add) v += widen(residual[i]);
    y[i] = narrow(activated(v, to));
  }
}
NOINLINE void apply(const stored *x, const stored *residual, stored *y, int64_t area, channel c) {
  if (residual) scaled(x, residual, y, area, c, 1);
  else scaled(x, residual, y, area, c, 0);
}

// ---- backward. h is the gradient in front of the activation: of gy, and of what the activation had before it or,
// for those of which that is enough, after it. What is before it is computed again from x and the residual, by the
// same instructions as in the forward pass, rather than kept.

#define DIRECT 0        // there is no activation
#define BY_RESULT 1     // from y
#define BY_ARGUMENT 2   // from x
#define BY_ARGUMENTS 3  // from x and the residual
typedef struct {
  const stored *gy, *x, *y, *residual;
} sources;
INLINE sources chunk_of(sources from, int64_t at) {
  return (sources){from.gy + at, from.x ? from.x + at : 0, from.y ? from.y + at : 0,
                   from.residual ? from.residual + at : 0};
}
INLINE vec before(sources from, int64_t i, vec away, vec a, vec b, limits to, const int way) {
  const vec g = widen(from.gy[i]);
  if (way == DIRECT) return g;
  if (way == BY_RESULT) return act_grad(g, widen(from.y[i]), to);
  vec z = away * a + b;
  if (way == BY_ARGUMENTS) z += widen(from.residual[i]);
  return act_grad(g, z, to);
}
// Calls `run` with the way as a constant: only those that the activation can have become code.
#define BY_WAY(run, ...)                                                                           \
  if (ACTIVATION == NONE) run(__VA_ARGS__, DIRECT);                                                \
  else if (ACTIVATION <= LEAKY && from.y) run(__VA_ARGS__, BY_RESULT);                             \
  else if (from.residual) run(__VA_ARGS__, BY_ARGUMENTS);                                          \
  else run(__VA_ARGS__, BY_ARGUMENT);

#define ADD_PRODUCT(j, at)                                          \
  {                                                                 \
    const vec away = with_x ? widen(from.x[at]) - k : (vec){0};     \
    const vec h = before(from, at, away, a, b, to, way);            \
    s[j] += h;                                                      \
    if (with_x) p[j] += h * away;                                   \
    if (keep) keep[at] = narrow(only(h, lanes));                    \
  }
INLINE void products(sources from, stored *keep, int64_t area, channel c, ivec lanes, double *restrict sum,
                     double *restrict product, const int with_x, const int way) {
  const vec k = splat(c.center), a = splat(c.scale), b = splat(c.shift);
  const limits to = limits_of(c);
  for (int64_t first = 0; first < area; first += PIECE) {
    const int64_t end = min64(first + PIECE, area);
    vec s[4] = {{0}}, p[4] = {{0}};
    int64_t i = first;
    for (; i + 4 <= end; i += 4) {
      ADD_PRODUCT(0, i)
      ADD_PRODUCT(1, i + 1)
      ADD_PRODUCT(2, i + 2)
      ADD_PRODUCT(3, i + 3)
    }
    for (; i < end; ++i) {
      ADD_PRODUCT(0, i)
    }
    flush(sum, (s[0] + s[1]) + (s[2] + s[3]), lanes);
    flush(product, (p[0] + p[1]) + (p[2] + p[3]), lanes);
  }
}
// Sums of h and h * (x - center), lane by lane; `keep` gets h unless it is null.
NOINLINE void grad_sums(sources from, stored *keep, int64_t area, channel c, ivec lanes, double *sum,
                        double *product) {
  BY_WAY(products, from, keep, area, c, lanes, sum, product, 1)
}
// Whether h is kept from the first pass for the second, where nobody asks for it: what takes many instructions is
// computed once.
#define KEEPS_H (ACTIVATION >= HARDSWISH)

typedef struct {
  real by_g, by_x, plus;
} combination;
INLINE void combined(sources from, stored *gx, int64_t area, channel c, combination of, ivec lanes, const int way) {
  const vec k = splat(c.center), a = splat(c.scale), b = splat(c.shift);
  const vec kg = splat(of.by_g), kx = splat(of.by_x), k1 = splat(of.plus);
  const limits to = limits_of(c);
  for (int64_t i = 0; i < area; ++i) {
    const vec away = widen(from.x[i]) - k, h = before(from, i, away, a, b, to, way);
    gx[i] = narrow(only(kg * h + (kx * away + k1), lanes));
  }
}
// gx = by_g * h + by_x * (x - center) + plus; `kept` is h unless it is null, and may be gx.
NOINLINE void grad_apply(sources from, const stored *kept, stored *gx, int64_t area, channel c, combination of,
                         ivec lanes) {
  if (kept) {
    from.gy = kept;
    combined(from, gx, area, c, of, lanes, DIRECT);
  } else if (!KEEPS_H) {
    BY_WAY(combined, from, gx, area, c, of, lanes)
  }
}

#define ADD_AND_PUT(j, at)                                                       \
  {                                                                              \
    const vec away = with_x ? widen(from.x[at]) : (vec){0};                      \
    const vec h = only(before(from, at, away, a, b, to, way), lanes);            \
    s[j] += h;                                                                   \
    if (with_x) p[j] += only(h * away, lanes);                                   \
    if (gx) gx[at] = narrow(h * a);                                              \
    if (gr) gr[at] = narrow(h);                                                  \
  }
INLINE void scaled_grad(sources from, stored *gx, stored *gr, int64_t area, channel c, ivec lanes,
                        double *restrict sum, double *restrict product, const int with_x, const int way) {
  const vec a = splat(c.scale), b = splat(c.shift);
  const limits to = limits_of(c);
  for (int64_t first = 0; first < area; first += PIECE) {
    const int64_t end = min64(first + PIECE, area);
    vec s[2] = {{0}}, p[2] = {{0}};
    int64_t i = first;
    for (; i + 2 <= end; i += 2) {
      ADD_AND_PUT(0, i)
      ADD_AND_PUT(1, i + 1)
    }
    for (; i < end; ++i) {
      ADD_AND_PUT(0, i)
    }
    flush(sum, s[0] + s[1], lanes);
    flush(product, p[0] + p[1], lanes);
  }
}
// Without statistics one pass does both: gx = scale * h, gr = h, unless they are null, and the sums of h and h * x.
NOINLINE void grad_scaled(sources from, stored *gx, stored *gr, int64_t area, channel c, ivec lanes, double *sum,
                          double *product) {
  if (from.x) {
    BY_WAY(scaled_grad, from, gx, gr, area, c, lanes, sum, product, 1)
  } else {
    BY_WAY(scaled_grad, from, gx, gr, area, c, lanes, sum, product, 0)
  }
}
