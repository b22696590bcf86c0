// Separable resampling of three planes into interleaved RGB, flip and colour shift included.
//
// In: the planes of a decoded window (Y, Cb, Cr at their own resolution, or R, G, B).
// Out: uint8 [out_h, out_w, 3].
//
// Weights: an output pixel that covers at least one source pixel is the mean over the area it
// covers; a smaller one is interpolated linearly between pixel centres. Chroma that JPEG stored at
// half resolution is never upsampled: the decoder's own interpolation (3/4, 1/4) is folded into the
// weights, so that the result is that of resizing the fully decoded picture.
//
// Values travel as int16 with 7 fractional bits, weights as Q15; one product is one pmulhrsw lane.
#include "native.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int kLanes = 32;  // output rows that the horizontal pass treats together

struct Taps {  // output i = sum over t of weight[i * width + t] * source[first[i] + t]
  int width = 0;
  std::vector<int> first;
  std::vector<int16_t> weight;
};

// Continuous weights of one output pixel on the window's pixel grid.
int pixel_weights(double start, double step, int index, std::vector<double>& w) {
  w.clear();
  if (step >= 1.0) {
    double a = start + index * step, b = a + step;
    int first = static_cast<int>(std::floor(a + 1e-9));
    int last = std::max(first + 1, static_cast<int>(std::ceil(b - 1e-9)));
    for (int i = first; i < last; ++i)
      w.push_back((std::min(b, i + 1.0) - std::max(a, double(i))) / step);
    return first;
  }
  double centre = start + (index + 0.5) * step - 0.5;
  double low = std::floor(centre);
  w.push_back(1.0 - (centre - low));
  w.push_back(centre - low);
  return static_cast<int>(low);
}

// Weights for every output pixel of one axis, on a grid of `count` samples.
void build_taps(Taps& taps, double start, double extent, int out, int count, bool halved,
                bool reverse) {
  static thread_local std::vector<double> pixel, sample;
  static thread_local std::vector<int> firsts;
  static thread_local std::vector<std::vector<double>> rows;
  const double step = extent / out;
  rows.resize(std::max<size_t>(rows.size(), out));
  firsts.assign(out, 0);
  int widest = 1;
  const int pixels = halved ? 2 * count : count;
  for (int i = 0; i < out; ++i) {
    int first = pixel_weights(start, step, i, pixel);
    // Pixels beyond the edge count for the edge.
    int low = std::clamp(first, 0, pixels - 1);
    int high = std::clamp(first + static_cast<int>(pixel.size()) - 1, 0, pixels - 1);
    int low_sample = halved ? std::max(0, (low + 1) / 2 - 1) : low;
    int high_sample = halved ? std::min(count - 1, (high + 1) / 2) : high;
    std::vector<double>& row = rows[i];
    row.assign(high_sample - low_sample + 1, 0.0);
    for (size_t t = 0; t < pixel.size(); ++t) {
      int p = std::clamp(first + static_cast<int>(t), 0, pixels - 1);
      if (!halved) {
        row[p - low_sample] += pixel[t];
      } else {  // libjpeg's triangle interpolation: 3/4 of the own sample, 1/4 of the nearer other
        int own = p / 2, other = std::clamp((p & 1) ? own + 1 : own - 1, 0, count - 1);
        row[own - low_sample] += 0.75 * pixel[t];
        row[other - low_sample] += 0.25 * pixel[t];
      }
    }
    firsts[i] = low_sample;
    widest = std::max(widest, static_cast<int>(row.size()));
  }
  widest = std::min(widest, count);
  taps.width = widest;
  taps.first.assign(out, 0);
  taps.weight.assign(static_cast<size_t>(out) * widest, 0);
  for (int i = 0; i < out; ++i) {
    const std::vector<double>& row = rows[i];
    int first = std::min(firsts[i], count - widest), shift = firsts[i] - first;
    int target = reverse ? out - 1 - i : i;
    int16_t* w = &taps.weight[static_cast<size_t>(target) * widest];
    int sum = 0, heaviest = 0;
    for (size_t t = 0; t < row.size(); ++t) {
      int q = static_cast<int>(std::lrint(row[t] * 32768.0));
      sum += q;
      w[t + shift] = static_cast<int16_t>(std::min(q, 32767));
      if (row[t] > row[heaviest]) heaviest = static_cast<int>(t);
    }
    int fixed = w[heaviest + shift] + (32768 - sum);  // weights add up to one, exactly
    w[heaviest + shift] = static_cast<int16_t>(std::min(fixed, 32767));
    taps.first[target] = first;
  }
}

inline __attribute__((always_inline)) int16_t mulhrs(int16_t a, int16_t b) {
  return static_cast<int16_t>((static_cast<int32_t>(a) * b + 0x4000) >> 15);
}

// One output row of the vertical pass: columns [x0, x1) of the plane, as 7-bit fixed point.
CLONES void vertical_row(const uint8_t* base, ptrdiff_t stride, const int16_t* w, int taps, int cols,
                         int16_t* __restrict out) {
  const uint8_t* row = base;
  const int16_t w0 = w[0];
  if (taps == 1) {
    for (int x = 0; x < cols; ++x) out[x] = static_cast<int16_t>(row[x] << 7);
    return;
  }
  const uint8_t* next = base + stride;
  const int16_t w1 = w[1];
  for (int x = 0; x < cols; ++x)
    out[x] = static_cast<int16_t>(mulhrs(static_cast<int16_t>(row[x] << 7), w0) +
                                  mulhrs(static_cast<int16_t>(next[x] << 7), w1));
  for (int t = 2; t < taps; ++t) {
    const int16_t wt = w[t];
    if (wt == 0) continue;
    const uint8_t* r = base + t * stride;
    for (int x = 0; x < cols; ++x)
      out[x] = static_cast<int16_t>(out[x] + mulhrs(static_cast<int16_t>(r[x] << 7), wt));
  }
}

typedef int16_t v8 __attribute__((vector_size(16)));
typedef uint8_t v16 __attribute__((vector_size(16)));

inline __attribute__((always_inline)) void transpose8(const int16_t* in, ptrdiff_t in_stride,
                                                      int16_t* out, ptrdiff_t out_stride) {
  v8 a[8], b[8];
  for (int i = 0; i < 8; ++i) __builtin_memcpy(&a[i], in + i * in_stride, 16);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = __builtin_shufflevector(b[i], b[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; ++i) __builtin_memcpy(out + i * out_stride, &b[i], 16);
}

// [kLanes rows, cols] -> [cols, kLanes]; cols is a multiple of 8.
CLONES void transpose_block(const int16_t* in, ptrdiff_t in_stride, int cols, int16_t* out) {
  for (int x = 0; x < cols; x += 8)
    for (int r = 0; r < kLanes; r += 8)
      transpose8(in + r * in_stride + x, in_stride, out + static_cast<ptrdiff_t>(x) * kLanes + r,
                 kLanes);
}

// Horizontal pass over kLanes rows at once: [cols, kLanes] -> [out_w, kLanes].
CLONES void horizontal_block(const int16_t* in, const int* first, const int16_t* weight, int taps,
                             int out_w, int16_t* __restrict out) {
  for (int o = 0; o < out_w; ++o) {
    const int16_t* source = in + static_cast<ptrdiff_t>(first[o]) * kLanes;
    const int16_t* w = weight + static_cast<ptrdiff_t>(o) * taps;
    int16_t acc[kLanes];
    for (int l = 0; l < kLanes; ++l) acc[l] = mulhrs(source[l], w[0]);
    for (int t = 1; t < taps; ++t)
      for (int l = 0; l < kLanes; ++l)
        acc[l] = static_cast<int16_t>(acc[l] + mulhrs(source[t * kLanes + l], w[t]));
    for (int l = 0; l < kLanes; ++l) out[static_cast<ptrdiff_t>(o) * kLanes + l] = acc[l];
  }
}

inline __attribute__((always_inline)) uint8_t to_byte(int value) {
  return static_cast<uint8_t>(std::clamp(value, 0, 255));
}

// JFIF's inverse: R = Y + 1.402 Cr, G = Y - 0.344136 Cb - 0.714136 Cr, B = Y + 1.772 Cb.
// Planes hold 7 fractional bits; rounding happens once, here. Source: ITU-T T.871, section 7.
CLONES void ycc_block(const int16_t* y, const int16_t* cb, const int16_t* cr, int count,
                      const int* shift, uint8_t* __restrict r, uint8_t* __restrict g,
                      uint8_t* __restrict b) {
  const int s0 = shift[0], s1 = shift[1], s2 = shift[2];
  for (int i = 0; i < count; ++i) {
    int u = cb[i] - (128 << 7), v = cr[i] - (128 << 7), l = (static_cast<int>(y[i]) << 14);
    r[i] = to_byte((l + 22970 * v + s0) >> 21);
    g[i] = to_byte((l - 5638 * u - 11700 * v + s1) >> 21);
    b[i] = to_byte((l + 29032 * u + s2) >> 21);
  }
}

CLONES void rgb_block(const int16_t* in, int count, int shift, uint8_t* __restrict out) {
  for (int i = 0; i < count; ++i) out[i] = to_byte(((static_cast<int>(in[i]) << 14) + shift) >> 21);
}

inline __attribute__((always_inline)) void transpose16(const uint8_t* in, ptrdiff_t in_stride,
                                                       v16 out[16]) {
  v16 a[16];
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&a[i], in + i * in_stride, 16);
  v16* from = a;
  v16* to = out;
  for (int pass = 0; pass < 4; ++pass) {
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                          5, 21, 6, 22, 7, 23);
      to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                              12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::swap(from, to);
  }
  for (int i = 0; i < 16; ++i) out[i] = from[i];
}

// Three [out_w, kLanes] byte planes -> `rows` rows of interleaved RGB.
CLONES void interleave_block(const uint8_t* r, const uint8_t* g, const uint8_t* b, int out_w,
                             int rows, uint8_t* out) {
  const ptrdiff_t pitch = static_cast<ptrdiff_t>(out_w) * 3;
  int x = 0;
  for (; x + 16 <= out_w; x += 16)
    for (int half = 0; half < kLanes && half < rows; half += 16) {
      v16 tr[16], tg[16], tb[16];
      const ptrdiff_t at = static_cast<ptrdiff_t>(x) * kLanes + half;
      transpose16(r + at, kLanes, tr);
      transpose16(g + at, kLanes, tg);
      transpose16(b + at, kLanes, tb);
      for (int i = 0; i < 16 && half + i < rows; ++i) {
        uint8_t* row = out + (half + i) * pitch + 3 * x;
        v16 rg0 = __builtin_shufflevector(tr[i], tg[i], 0, 16, -1, 1, 17, -1, 2, 18, -1, 3, 19, -1,
                                          4, 20, -1, 5);
        v16 rg1 = __builtin_shufflevector(tr[i], tg[i], 21, -1, 6, 22, -1, 7, 23, -1, 8, 24, -1, 9,
                                          25, -1, 10, 26);
        v16 rg2 = __builtin_shufflevector(tr[i], tg[i], -1, 11, 27, -1, 12, 28, -1, 13, 29, -1, 14,
                                          30, -1, 15, 31, -1);
        v16 o0 = __builtin_shufflevector(rg0, tb[i], 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12,
                                         13, 20, 15);
        v16 o1 = __builtin_shufflevector(rg1, tb[i], 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12,
                                         25, 14, 15);
        v16 o2 = __builtin_shufflevector(rg2, tb[i], 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30,
                                         13, 14, 31);
        __builtin_memcpy(row, &o0, 16);
        __builtin_memcpy(row + 16, &o1, 16);
        __builtin_memcpy(row + 32, &o2, 16);
      }
    }
  for (; x < out_w; ++x)
    for (int i = 0; i < rows; ++i) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(x) * kLanes + i;
      uint8_t* pixel = out + i * pitch + 3 * x;
      pixel[0] = r[at];
      pixel[1] = g[at];
      pixel[2] = b[at];
    }
}

struct Axis {
  Taps rows, cols;
  int low = 0, high = 0;  // columns of the plane that any output needs
};

}  // namespace

void resize_planes(const Plane planes[3], bool ycc, double top, double left, double height,
                   double width, int flip, const float shift[3], uint8_t* out, int out_h,
                   int out_w) {
  static thread_local Axis axes[3];
  static thread_local std::vector<int16_t> vertical, turned, resized[3];
  static thread_local std::vector<uint8_t> bytes[3];
  int widest = 0;
  for (int c = 0; c < 3; ++c) {
    const Plane& p = planes[c];
    Axis& axis = axes[c];
    if (c && p.rows == planes[c - 1].rows && p.cols == planes[c - 1].cols &&
        p.halved_x == planes[c - 1].halved_x && p.halved_y == planes[c - 1].halved_y) {
      axis = axes[c - 1];
    } else {
      build_taps(axis.rows, top, height, out_h, p.rows, p.halved_y, false);
      build_taps(axis.cols, left, width, out_w, p.cols, p.halved_x, flip);
      axis.low = *std::min_element(axis.cols.first.begin(), axis.cols.first.end());
      axis.high = *std::max_element(axis.cols.first.begin(), axis.cols.first.end()) +
                  axis.cols.width;
      for (int& first : axis.cols.first) first -= axis.low;
    }
    widest = std::max(widest, axis.high - axis.low);
  }
  const ptrdiff_t pitch = (widest + 7) / 8 * 8;
  vertical.resize(pitch * kLanes);
  turned.resize(pitch * kLanes);
  const size_t block = static_cast<size_t>(out_w) * kLanes;
  for (int c = 0; c < 3; ++c) {
    resized[c].resize(block);
    bytes[c].resize(block);
  }
  int rounding[3];
  for (int c = 0; c < 3; ++c)
    rounding[c] = (1 << 20) + static_cast<int>(std::lrint(shift[c] * double(1 << 21)));
  for (int row = 0; row < out_h; row += kLanes) {
    const int rows = std::min(kLanes, out_h - row);
    for (int c = 0; c < 3; ++c) {
      const Plane& p = planes[c];
      const Axis& axis = axes[c];
      const int cols = axis.high - axis.low;
      for (int i = 0; i < rows; ++i) {
        const uint8_t* base = p.data + axis.rows.first[row + i] * p.stride + axis.low;
        vertical_row(base, p.stride, &axis.rows.weight[size_t(row + i) * axis.rows.width],
                     axis.rows.width, cols, &vertical[i * pitch]);
      }
      transpose_block(vertical.data(), pitch, (cols + 7) / 8 * 8, turned.data());
      horizontal_block(turned.data(), axis.cols.first.data(), axis.cols.weight.data(),
                       axis.cols.width, out_w, resized[c].data());
    }
    if (ycc) {
      ycc_block(resized[0].data(), resized[1].data(), resized[2].data(), static_cast<int>(block),
                rounding, bytes[0].data(), bytes[1].data(), bytes[2].data());
    } else {
      for (int c = 0; c < 3; ++c)
        rgb_block(resized[c].data(), static_cast<int>(block), rounding[c], bytes[c].data());
    }
    interleave_block(bytes[0].data(), bytes[1].data(), bytes[2].data(), out_w, rows,
                     out + static_cast<size_t>(row) * out_w * 3);
  }
}
