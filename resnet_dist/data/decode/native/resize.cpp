// Separable resampling of three planes into interleaved RGB, flip and colour shift included.
//
// In: the planes of a decoded window (Y, Cb, Cr at their own resolution, or R, G, B).
// Out: uint8 [out_h, out_w, 3].
//
// Vertical pass row by row; the horizontal pass runs on transposed blocks of 32 rows, so that both
// passes are plain multiply-adds on neighbouring values and no image-sized temporary exists.
#include <algorithm>
#include <cmath>

#include "native.h"

namespace {

struct Axes {
  Taps rows, cols;
  int low = 0, high = 0;  // columns of the plane that any output needs
};

bool alike(const Plane& a, const Plane& b) {
  return a.rows == b.rows && a.cols == b.cols && a.halved_x == b.halved_x &&
         a.halved_y == b.halved_y;
}

}  // namespace

void resize_planes(const Plane planes[3], bool ycc, const Box& box, const Plan& plan,
                   const Output& out) {
  static thread_local Axes own[3];
  static thread_local std::vector<int16_t> vertical, turned, resized[3];
  const Kernels& k = kernels();
  const Axes* axes[3];
  int widest = 0;
  for (int c = 0; c < 3; ++c) {
    const Plane& p = planes[c];
    if (c && alike(p, planes[c - 1])) {
      axes[c] = axes[c - 1];
      continue;
    }
    Axes& axis = own[c];
    build_taps(axis.rows, box.top, box.height, out.height, p.rows, planes[0].rows, p.halved_y,
               false);
    build_taps(axis.cols, box.left, box.width, out.width, p.cols, planes[0].cols, p.halved_x,
               plan.flip);
    const auto [least, most] =
        std::minmax_element(axis.cols.first.begin(), axis.cols.first.end());
    axis.low = *least;
    axis.high = *most + axis.cols.width;
    for (int& first : axis.cols.first) first -= axis.low;
    axes[c] = &axis;
    widest = std::max(widest, axis.high - axis.low);
  }
  const ptrdiff_t pitch = (widest + 31) / 32 * 32;
  vertical.resize(pitch * kLanes);
  turned.resize(pitch * kLanes);
  const int block = out.width * kLanes;
  int16_t levels[3];
  for (int c = 0; c < 3; ++c) {
    resized[c].resize(block);
    levels[c] = static_cast<int16_t>(std::lrint(std::clamp(plan.shift[c], -255.f, 255.f) * 128));
  }
  for (int row = 0; row < out.height; row += kLanes) {
    const int rows = std::min(kLanes, out.height - row);
    for (int c = 0; c < 3; ++c) {
      const Plane& p = planes[c];
      const Axes& axis = *axes[c];
      const int cols = axis.high - axis.low;
      for (int i = 0; i < rows; ++i)
        k.vertical(p.data + axis.rows.first[row + i] * p.stride + axis.low, p.stride,
                   &axis.rows.weight[size_t(row + i) * axis.rows.width], axis.rows.width, cols,
                   &vertical[i * pitch]);
      k.transpose(vertical.data(), pitch, (cols + 7) / 8 * 8, turned.data());
      k.horizontal(turned.data(), axis.cols, out.width, resized[c].data());
    }
    if (ycc) k.ycc_to_rgb(resized[0].data(), resized[1].data(), resized[2].data(), block);
    const int16_t* const rgb[3] = {resized[0].data(), resized[1].data(), resized[2].data()};
    k.interleave(rgb, levels, out.width, rows, out.pixels + size_t(row) * out.width * 3);
  }
}
