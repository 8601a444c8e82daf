// Inside of the runtime: what the network is (tables in model.c), and how it runs on this processor (plans).
//
// Two layouts of activations. SINGLE, one image: [C, plane], where a plane is height x width rounded up to 16 floats
// (1 where an image is one position). BLOCK, `lanes` images side by side: [C, H, W, lanes].
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "model.h"

#define MODEL_ALIGNMENT 64
#define MODEL_SLACK 256       // floats that may be read before and after a buffer, or written after it
#define MODEL_TILE_ROWS 16    // of results in registers, at most
#define MODEL_TILE_VECTORS 16 // of one filter in registers, at most
#define MODEL_TILE_DENSE 6    // of each of four filters in registers, at most
#define MODEL_SUMS_TAPS 4   // FORM_TAPS: taps of a group, at most,
#define MODEL_SUMS_WIDE 4   // and vectors of an image
#define MODEL_SUMS_TOTAL 16 // and both multiplied
#define MODEL_STRETCHES 8   // whose sums are moved together
#define MODEL_BLOCK_BYTES 33554432  // of the activations of a block, at most: about what is cached
#define MODEL_WINDOW_SIDE 4  // FORM_WINDOWS: rows and columns of results in registers
#define MODEL_GROUP 4         // filters of a dense layer that are computed at once
#define MODEL_BLOCK 16        // outputs of a dense linear layer that lie side by side

enum { SINGLE, BLOCK, LAYOUTS };
enum { OP_CONV, OP_LINEAR, OP_POOL, OP_BINS, OP_BINARY, OP_AFFINE, OP_COPY, OP_SOFTMAX };
enum { ACT_NONE, ACT_RELU, ACT_CLAMP, ACT_LEAKY, ACT_HARDSWISH, ACT_SILU, ACT_GELU, ACT_GELU_TANH, ACT_SIGMOID,
       ACT_HARDSIGMOID, ACT_TANH, ACT_ELU };
enum { POOL_MAX, POOL_AVERAGE };
enum { BINARY_ADD, BINARY_MULTIPLY, BINARY_SUBTRACT };

// An activation: channels x height x width of one image, and where it is in the memory of a context.
typedef struct {
  int32_t channels, height, width;
  int64_t single, block;  // floats from the start of a context's memory; of a block, for one image
} model_value;

// One operation; fields that its kind does not use are 0.
typedef struct {
  int32_t kind, in, other, out;  // values; `other` is what is added or multiplied, -1 without
  int32_t act;                   // ACT_*, the last thing that is done
  float low, high;               // of the activation
  int32_t kernel[2], stride[2], padding[2], dilation[2], groups;
  int32_t mode;                  // POOL_* or BINARY_*
  int32_t counts_padding;        // of averages
  float divisor;                 // of averages, 0: the number of positions
  int32_t dense;                 // all weights are there, in groups of filters
  int64_t count;                 // weights that are stored
  int64_t bias, values, bits;    // bytes from the start of the weights; bits -1 for a dense layer
  float most;                    // of the input, which is not negative, for int8; 0: unknown, or it may be negative
  int32_t from, to, channels;    // copies: first channel of input and output, how many; -1: all, laid end to end
  int32_t shift[2];              // copies: row and column of the output that the first of the input goes to
  int32_t clears;                // copies: what is not copied to becomes zero
} model_op;

typedef struct {
  uint64_t fingerprint;  // the same number is in the weights that belong to these tables
  int64_t weight_bytes, single, block;  // memory of activations, floats for one image
  int32_t input, output, ops_count, values_count;
  const model_op *ops;
  const model_value *values;
} model_description;

extern const model_description model_network_description;

// One run of a filter's weights whose inputs are in the region at hand.
typedef struct { uint32_t value, offset, count, filter; } model_job;
#define JOB_FIRST 0x80000000u  // begins with the bias instead of sums
#define JOB_LAST 0x40000000u   // ends with what is added and the activation
#define JOB_MORE(job) ((int)((job)->filter >> 28 & 3))  // dense: filters beside the first
#define JOB_FILTER(job) ((job)->filter & 0x0fffffffu)

enum { FORM_DIRECT, FORM_ROWS, FORM_FLAT, FORM_TAPS, FORM_COLUMNS, FORM_WINDOWS, FORM_POINTWISE };
// FORM_FLAT: row by row; where rows are as long as those of the results, many at once; or a copy for each tap instead
// of each column of the kernel, where a tile is a whole image.
enum { MOVED_BY_ROW, MOVED_AT_ONCE, MOVED_BY_TAP };
#define MODEL_TAPS 9    // copies of an image in the latter two, at most
#define MODEL_MASKS 48  // vectors of one copy, at most

// FORM_TAPS, of one image of few vectors: inputs stay where they are, and each tap has sums of its own, which are
// moved to where they belong when a filter's kernels with the same taps are done. So an input is loaded once for all
// taps of a kernel, and a weight is all that a product loads beside it. A stretch is these kernels of one filter; a
// group has the stretches of some filters with the same taps, those of equal length together, which spares wrong
// guesses of jumps.
typedef struct { uint32_t filter, kernels; } model_stretch;  // or pairs of kernels
typedef struct {
  uint32_t stretch, count;   // of `stretches`
  uint32_t kernel, value;    // its first of `offsets`, which are channels here, and of `packed`
  int taps, tap[MODEL_SUMS_TAPS];
} model_group;

// FORM_COLUMNS, of one image: a strip of rows with sums for each of the three columns of a kernel stays in registers
// for all kernels of a filter, and is put together in the end, moved by a lane. Rows of a kernel's input are loaded
// once for all its taps, by code of its own for each set of taps that is frequent (sets.h, written with the network).
//
// FORM_WINDOWS, of a block: MODEL_WINDOW_SIDE squared results stay in registers for all kernels of a filter in a pass,
// again with code for each set; windows of all channels of a pass are in L2.
//
// FORM_POINTWISE, of 1x1 kernels: weights of a filter by twos or fours, whatever their channels; the tile's inputs of
// all channels of a pass are copied as bfloat16 or int8 numbers, as many vectors in one, and interleaved by the
// processor. So are those of FORM_COLUMNS and FORM_WINDOWS where they take several kernels at once.
typedef struct { uint32_t kernel, value; } model_filter;  // its first of `offsets` / 2, and of `packed`

// How one convolution runs in one layout. Channels are taken in passes, whose inputs are copied into a region that fits
// a cache: of FORM_ROWS rows of the padded image, split by what stride leaves as remainder; of FORM_FLAT one copy of
// the image for each column of the kernel, in which all positions of results follow each other. FORM_DIRECT reads the
// input where it is. Offsets of weights are in `unit` floats from the region's begin.
typedef struct {
  int form, rows, cols;         // tile: rows of results, vectors in a row
  int passes, pass_channels;
  int region_rows, phases, phase_cols;  // rows of one channel; FLAT: arrays of one column and their length
  int moved;                    // FLAT: how the image is copied, MOVED_*
  int64_t channel;              // elements of one channel in the region
  int64_t unit;                 // floats
  const uint16_t *offsets;      // one for each stored weight; of a dense layer for each of one filter
  const model_job *jobs;
  const uint32_t *begin;        // [passes + 1], in jobs; FORM_TAPS: [parts + 1], in groups
  // FORM_TAPS: filters in parts, which are computed one after another or by several threads.
  int parts;
  int64_t most[4];              // groups, stretches, kernels and weights, as many as there may be
  int whole;                    // FORM_WINDOWS: whether the results are the whole image
  // FORM_COLUMNS, FORM_WINDOWS: [passes x filters + 1]; `offsets` are sets and channels of kernels. FORM_POINTWISE: the
  // same; `offsets` are channels.
  const model_filter *filters;
  const model_group *groups;
  const model_stretch *stretches;
  int together;                 // kernels at once: 1, of float32, 2 of bfloat16 or 4 of int8
  const float *packed;          // weights of as many kernels each
  const float *scales;          // of filters: what one step of a sum of int8 products is worth
  const int32_t *inside;        // [taps, cols x lanes]: all bits set where a tap of the position is in the image
} model_plan;

// Where an operation's weights are.
typedef struct { const float *bias, *values; } model_constants;

// A thread among those that run one call together.
typedef struct model_team model_team;
typedef struct { model_team *team; int number, count; } model_worker;
typedef void (*model_work)(void *given, model_worker);
model_team *model_team_new(int count);  // the caller included; NULL: threads cannot be started
void model_team_free(model_team *);
void model_team_run(model_team *, model_work, void *given);  // by every thread of the team; returns when all are done
void model_meet(model_team *);  // returns when all threads of a team have called it

typedef struct model_isa model_isa;

struct model_network {
  const unsigned char *weights;    // while it is opened
  void *own_weights, *own_tables;  // to be freed
  model_constants *constants;      // one an operation
  const unsigned char *choices;    // [LAYOUTS, ops], what was measured (plan.h), while it is opened; NULL: by rules
  const model_isa *isa;
  int max_batch, blocks;           // blocks: whether the layout is planned
  model_plan *plans[LAYOUTS];      // one an operation
  int64_t region;                  // floats of the largest region
  size_t kept, tables;             // bytes of weights and tables
  double *times;                   // seconds of each operation, the least so far, -1 before; NULL: not measured
};

// As model_open and model_open_file, with `choices` of plans; and the bytes of a file of weights, to be freed.
int model_open_choosing(const void *weights, size_t bytes, int max_batch, const char *isa, const unsigned char *choices,
                        model_network **network);
int model_open_file_choosing(const char *path, int max_batch, const char *isa, const unsigned char *choices,
                             model_network **network);
int model_read_weights(const char *path, unsigned char **weights, size_t *bytes);
double model_seconds(void);

// A convolution in a form of its own.
typedef void (*model_special)(const model_op *, const model_plan *, const model_value *in, const model_value *out,
                              const float *bias, const float *image, const float *residual, float *results,
                              float *region, model_worker);

// NULL: it is not there. FORM_TAPS of one kernel at a time is a part of `run`.
typedef struct { model_special taps, columns, windows, pointwise; } model_specials;

// What one set of instructions can do.
struct model_isa {
  const char *name;
  int lanes, registers;
  int (*available)(void);
  void (*run)(const model_network *, int layout, float *memory, float *region, model_worker);
  void (*enter)(const float *images, int count, float *memory);               // images -> block
  void (*leave)(const float *memory, int count, float *results);              // block -> results
  int rounds;  // to bfloat16 or int8: only taken by name
  const model_specials *specials[3];  // for one, two or four kernels at once; NULL: there are none
};

// NULL: it is not there.
static inline model_special model_special_of(const model_isa *isa, int form, int together) {
  const model_specials *s = isa->specials[together / 2];
  return !s                       ? NULL
         : form == FORM_TAPS      ? s->taps
         : form == FORM_COLUMNS   ? s->columns
         : form == FORM_WINDOWS   ? s->windows
         : form == FORM_POINTWISE ? s->pointwise
                                  : NULL;
}

extern const model_isa *const model_isas[];  // best first, then those that round, NULL at the end

int model_plan_all(model_network *);  // MODEL_OK or an error
// Steps of int8 inputs in one.
static inline float model_unit(const model_op *op) { return op->most > 0 ? 255 / op->most : 1; }
static inline int64_t model_plane(const model_value *v, int layout) {
  const int64_t size = (int64_t)v->height * v->width;
  return layout == BLOCK || size == 1 ? size : (size + 15) / 16 * 16;
}
