// Colour and geometry operations on the finished crop, with the arithmetic of Pillow.
//
// In and out: uint8 [height, width, 3]. Every operation is a function of the image and its argument;
// which ones, and how strong, was drawn in augment.py.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "native.h"

namespace {

uint8_t clip(float value) {  // as Pillow's blend: towards zero
  return value <= 0.f ? 0 : value >= 255.f ? 255 : static_cast<uint8_t>(value);
}

uint8_t luma(const uint8_t* p) {  // ITU-R BT.601 in 16 bits, as Pillow's "L"
  return static_cast<uint8_t>((p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16);
}

// Every value becomes f(value).
template <class F>
void map_values(uint8_t* image, size_t count, F f) {
  uint8_t table[256];
  for (int v = 0; v < 256; ++v) table[v] = static_cast<uint8_t>(f(v));
  for (size_t i = 0; i < count; ++i) image[i] = table[image[i]];
}

// out = from + factor * (image - from), `from` being a constant.
void blend(uint8_t* image, size_t count, int from, float factor) {
  map_values(image, count, [=](int v) { return clip(from + factor * (v - from)); });
}

void contrast(uint8_t* image, size_t pixels, float factor) {
  uint64_t sum = 0;
  for (size_t i = 0; i < pixels; ++i) sum += luma(image + 3 * i);
  blend(image, 3 * pixels, static_cast<int>(double(sum) / pixels + 0.5), factor);
}

void color(uint8_t* image, size_t pixels, float factor) {
  for (uint8_t* p = image; p < image + 3 * pixels; p += 3) {
    const int grey = luma(p);
    for (int c = 0; c < 3; ++c) p[c] = clip(grey + factor * (p[c] - grey));
  }
}

// Away from, or towards, a 3 x 3 mean with weight 5 of 13 in the middle; the border stays.
void sharpness(uint8_t* image, int height, int width, float factor, std::vector<uint8_t>& copy) {
  const int pitch = 3 * width;
  copy.assign(image, image + size_t(height) * pitch);
  for (int y = 1; y + 1 < height; ++y)
    for (int x = 3; x < pitch - 3; ++x) {
      const uint8_t* at = &copy[size_t(y) * pitch + x];
      int sum = 5 * at[0] + at[-3] + at[3];
      for (int side : {-pitch, pitch}) sum += at[side - 3] + at[side] + at[side + 3];
      const int smooth = static_cast<int>(sum / 13.f + 0.5f);
      image[size_t(y) * pitch + x] = clip(smooth + factor * (at[0] - smooth));
    }
}

// Every channel through a table of its own, which fill(counts, table) makes of how often each value
// occurs; where it returns false, the channel stays.
template <class F>
void map_channels(uint8_t* image, size_t pixels, F fill) {
  for (uint8_t* channel = image; channel < image + 3; ++channel) {
    uint32_t counts[256] = {0};
    uint8_t table[256];
    for (size_t i = 0; i < pixels; ++i) ++counts[channel[3 * i]];
    if (!fill(counts, table)) continue;
    for (size_t i = 0; i < pixels; ++i) channel[3 * i] = table[channel[3 * i]];
  }
}

bool auto_contrast(const uint32_t counts[256], uint8_t table[256]) {
  int low = 0, high = 255;
  while (low < 255 && !counts[low]) ++low;
  while (high > 0 && !counts[high]) --high;
  if (high <= low) return false;
  const double scale = 255.0 / (high - low), offset = -low * scale;
  for (int v = 0; v < 256; ++v)
    table[v] = static_cast<uint8_t>(std::clamp(int(v * scale + offset), 0, 255));
  return true;
}

bool equalize(const uint32_t counts[256], uint8_t table[256]) {
  uint64_t pixels = 0, last = 0;
  int used = 0;
  for (int v = 0; v < 256; ++v)
    if (counts[v]) {
      ++used;
      pixels += last = counts[v];
    }
  const uint64_t step = (pixels - last) / 255;
  if (used <= 1 || !step) return false;
  uint64_t n = step / 2;
  for (int v = 0; v < 256; ++v) {
    table[v] = static_cast<uint8_t>(std::min<uint64_t>(n / step, 255));
    n += counts[v];
  }
  return true;
}

double cubic(double a, double b, double c, double d, double t) {  // Keys' with a = -1, as Pillow
  return b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a - c + d)));
}

// Output (x, y) shows the source at (m0 x + m1 y + m2, m3 x + m4 y + m5), pixel centres at 0.5,
// interpolated as `op.b` says; outside lies `pad`, or black.
void affine(const Output& out, const double (&m)[6], const Op& op, std::vector<uint8_t>& copy) {
  const int height = out.height, width = out.width;
  uint8_t* image = out.pixels;
  copy.assign(image, image + size_t(height) * width * 3);
  const bool bicubic = op.b == 1, black = op.c == 1;
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x) {
      const double sx = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2];
      const double sy = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5];
      const size_t at = (size_t(y) * width + x) * 3;
      if (!(sx >= 0 && sx < width && sy >= 0 && sy < height)) {
        for (int c = 0; c < 3; ++c) image[at + c] = black ? 0 : out.pad[at + c];
        continue;
      }
      const double fx = std::floor(sx - 0.5), fy = std::floor(sy - 0.5);
      const double dx = sx - 0.5 - fx, dy = sy - 0.5 - fy;
      if (bicubic) {
        size_t xs[4], ys[4];
        for (int i = 0; i < 4; ++i) {
          xs[i] = 3 * size_t(std::clamp(int(fx) - 1 + i, 0, width - 1));
          ys[i] = 3 * size_t(width) * std::clamp(int(fy) - 1 + i, 0, height - 1);
        }
        for (int c = 0; c < 3; ++c) {
          double rows[4];
          for (int i = 0; i < 4; ++i) {
            const uint8_t* row = copy.data() + ys[i] + c;
            rows[i] = cubic(row[xs[0]], row[xs[1]], row[xs[2]], row[xs[3]], dx);
          }
          const double value = cubic(rows[0], rows[1], rows[2], rows[3], dy);
          image[at + c] = static_cast<uint8_t>(std::clamp(value + 0.5, 0.0, 255.0));
        }
        continue;
      }
      const int x0 = std::max(int(fx), 0), x1 = std::min(int(fx) + 1, width - 1);
      const int y0 = std::max(int(fy), 0), y1 = std::min(int(fy) + 1, height - 1);
      for (int c = 0; c < 3; ++c) {
        const auto value = [&](int yy, int xx) -> double {
          return copy[(size_t(yy) * width + xx) * 3 + c];
        };
        const double top = value(y0, x0) * (1 - dx) + value(y0, x1) * dx;
        const double bottom = value(y1, x0) * (1 - dx) + value(y1, x1) * dx;
        image[at + c] = static_cast<uint8_t>(top * (1 - dy) + bottom * dy + 0.5);
      }
    }
}

void rotate(const Output& out, const Op& op, std::vector<uint8_t>& copy) {
  const double angle = -op.a * 3.14159265358979323846 / 180.0;
  const double c = std::cos(angle), s = std::sin(angle);
  const double cx = out.width / 2.0, cy = out.height / 2.0;
  affine(out, {c, s, cx - c * cx - s * cy, -s, c, cy + s * cx - c * cy}, op, copy);
}

void erase(const Output& out, const Op& op) {
  const int top = std::clamp(int(op.a), 0, out.height), left = std::clamp(int(op.b), 0, out.width);
  const int bottom = std::clamp(int(op.a + op.c), top, out.height);
  const int right = std::clamp(int(op.b + op.d), left, out.width);
  for (int y = top; y < bottom; ++y) {
    const size_t at = (size_t(y) * out.width + left) * 3;
    std::memcpy(out.pixels + at, out.pad + at, size_t(right - left) * 3);
  }
}

}  // namespace

void apply_ops(const Plan& plan, const Output& out) {
  static thread_local std::vector<uint8_t> copy;
  uint8_t* image = out.pixels;
  const size_t pixels = size_t(out.height) * out.width, count = 3 * pixels;
  for (const Op* op = plan.ops; op < plan.ops + plan.num_ops; ++op) {
    const float a = op->a;
    switch (op->code) {
      case kBrightness: blend(image, count, 0, a); break;
      case kContrast: contrast(image, pixels, a); break;
      case kColor: color(image, pixels, a); break;
      case kSharpness: sharpness(image, out.height, out.width, a, copy); break;
      case kAutoContrast: map_channels(image, pixels, auto_contrast); break;
      case kEqualize: map_channels(image, pixels, equalize); break;
      case kInvert: map_values(image, count, [](int v) { return 255 - v; }); break;
      case kPosterize: {
        const int mask = 0xFF << (8 - std::clamp(int(a), 0, 8));
        map_values(image, count, [=](int v) { return v & mask; });
        break;
      }
      case kSolarize: map_values(image, count, [=](int v) { return v < a ? v : 255 - v; }); break;
      case kSolarizeAdd:
        map_values(image, count, [=](int v) { return v < 128 ? std::min(255, v + int(a)) : v; });
        break;
      case kShearX: affine(out, {1, a, 0, 0, 1, 0}, *op, copy); break;
      case kShearY: affine(out, {1, 0, 0, a, 1, 0}, *op, copy); break;
      case kTranslateX: affine(out, {1, 0, double(a) * out.width, 0, 1, 0}, *op, copy); break;
      case kTranslateY: affine(out, {1, 0, 0, 0, 1, double(a) * out.height}, *op, copy); break;
      case kRotate: rotate(out, *op, copy); break;
      case kShift: {
        const float by[3] = {a, op->b, op->c};
        for (size_t p = 0; p < count; ++p) image[p] = clip(image[p] + by[p % 3] + 0.5f);
        break;
      }
      case kErase: erase(out, *op); break;
      default: break;
    }
  }
}
