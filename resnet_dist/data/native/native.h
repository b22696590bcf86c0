// Shared by the native sources: the plan of one image, planes, and the resize.
#pragma once
#include <cstdint>
#include <cstddef>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES
#endif

// What happens to one image. Mirrored by PLAN in resnet_dist/data/native.py.
struct Plan {
  double top, left, height, width;  // the box, in source pixels, from the corner of the image
  int32_t flip;                     // mirror left-right
  int32_t copy;                     // 1: no resampling; the box is whole pixels of the output size
  float shift[3];                   // added to R, G, B, in grey levels, before rounding
  int32_t reserved;
};

// One channel of a decoded window. `samples_per_pixel` is 1 or 1/2 of the window's pixels.
struct Plane {
  const uint8_t* data;
  ptrdiff_t stride;   // bytes between rows
  int rows, cols;     // samples that exist; beyond them the edge is repeated
  int halved_y, halved_x;  // 1: the channel has half the window's pixels along this axis
};

// Box of the window -> output [out_h, out_w, 3] RGB. Planes are Y, Cb, Cr or R, G, B.
// `top`, `left`, `height`, `width` are in pixels of the window.
void resize_planes(const Plane planes[3], bool ycc, double top, double left, double height,
                   double width, int flip, const float shift[3], uint8_t* out, int out_h,
                   int out_w);
