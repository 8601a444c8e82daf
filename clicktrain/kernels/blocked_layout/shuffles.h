// Shuffles of activations as they are stored, for `tile`.
#pragma once
#include "kernels/native/vector.h"

// Images begin anywhere: no alignment beyond a number's.
typedef number numbers __attribute__((vector_size(STORED_BYTES), aligned(NUMBER_BYTES), may_alias));
#if __has_builtin(__builtin_shufflevector)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef number_bits lane_numbers __attribute__((vector_size(STORED_BYTES)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (lane_numbers){__VA_ARGS__})
#endif
