// Shared by the native sources: the plan of one image, planes, weights, and the kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

// What is done to an image's colours or geometry after the crop. Numbers are those of decoder.py.
enum OpCode : int32_t {
  kNone = 0,
  kBrightness, kContrast, kColor, kSharpness,  // a: factor, 1 changes nothing
  kAutoContrast, kEqualize, kInvert,
  kPosterize,    // a: bits that stay
  kSolarize,     // a: threshold
  kSolarizeAdd,  // a: what is added below 128
  // b: 1 interpolates bicubically, 0 bilinearly; c: outside is black for 1, padding for 0
  kShearX, kShearY,          // a: pixels a pixel
  kTranslateX, kTranslateY,  // a: share of the side
  kRotate,       // a: degrees, counter-clockwise
  kShift,        // a, b, c: levels added to R, G, B
  kErase,        // a, b, c, d: top, left, height, width of what becomes padding
};

struct Op {
  int32_t code;
  float a, b, c, d;
};

constexpr int kMaxOps = 14;

struct Box {
  double top, left, height, width;  // in pixels, from the corner of a picture
};

// What happens to one image. Mirrored by PLAN in decoder.py.
struct Plan {
  Box box;          // of the source
  int32_t flip;     // mirror left-right
  int32_t copy;     // 1: no resampling; the box is whole pixels of the output size
  float shift[3];   // added to R, G, B, in grey levels, before rounding
  int32_t num_ops;  // then these, in order
  Op ops[kMaxOps];
};

// What comes out: RGB [height, width, 3]. `pad`, as large, is what lies outside a picture.
struct Output {
  uint8_t* pixels;
  int height, width;
  const uint8_t* pad;
};

// Carry out `plan.ops` in place.
void apply_ops(const Plan& plan, const Output& out);

// One channel of a decoded window. `data` may be read 64 bytes past the last sample.
struct Plane {
  const uint8_t* data;
  ptrdiff_t stride;        // bytes between rows
  int rows, cols;          // samples that exist; beyond them the edge is repeated
  // 0: as many samples as the window has pixels. Else half as many, and each pixel of the decoded
  // picture takes this share of the neighbouring sample.
  double halved_y, halved_x;
};

// `box` of the window -> output, mirrored and shifted as planned. Planes are Y, Cb, Cr (`ycc`) or
// R, G, B.
void resize_planes(const Plane planes[3], bool ycc, const Box& box, const Plan& plan,
                   const Output& out);

// Output i = sum over t < width of weight[i * width + t] * source[first[i] + t], weights in Q15.
struct Taps {
  int width = 0;
  std::vector<int> first;
  std::vector<int16_t> weight;
};

// Weights of `out` output pixels that cover [start, start + extent) of an axis of `pixels` pixels,
// stored as `count` samples: as many, or half of them, rounded up (`halved` as in Plane).
void build_taps(Taps& taps, double start, double extent, int out, int count, int pixels,
                double halved, bool reverse);

constexpr int kLanes = 32;  // output rows that the horizontal pass treats together

// Kernels. Values are int16 with 7 fractional bits. Every implementation gives the same bits.
struct Kernels {
  // One output row of the vertical pass; writes up to 31 values more than `cols`.
  void (*vertical)(const uint8_t* rows, ptrdiff_t stride, const int16_t* weight, int taps, int cols,
                   int16_t* out);
  // [kLanes, cols] at `stride` -> [cols, kLanes]; cols is a multiple of 8.
  void (*transpose)(const int16_t* in, ptrdiff_t stride, int cols, int16_t* out);
  // [cols, kLanes] -> [out_w, kLanes].
  void (*horizontal)(const int16_t* in, const Taps& taps, int out_w, int16_t* out);
  // Y, Cb, Cr -> R, G, B in place, `count` values each (a multiple of kLanes).
  void (*ycc_to_rgb)(int16_t* y, int16_t* cb, int16_t* cr, int count);
  // Add `shift`, round, clamp: three [out_w, kLanes] -> `rows` rows of interleaved bytes.
  void (*interleave)(const int16_t* const rgb[3], const int16_t shift[3], int out_w, int rows,
                     uint8_t* out);
};

const Kernels& kernels();  // the fastest that this processor runs
extern bool only_portable;   // for tests: as if the processor had no vector units
