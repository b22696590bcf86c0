// Weights of a separable resize, as fixed-point taps.
//
// An output pixel that covers at least one source pixel is the mean over the area it covers; a smaller
// one is interpolated linearly between pixel centres. Chroma that JPEG stored at half resolution is
// never upsampled: the decoder's own interpolation (3/4, 1/4) is folded into the weights, so that the
// result is that of resizing the fully decoded picture.
#include <algorithm>
#include <cmath>

#include "native.h"

namespace {

// Of one output pixel: `weights` of the pixels from the one that is returned.
int pixel_weights(double start, double step, int index, std::vector<double>& weights) {
  weights.clear();
  if (step < 1.0) {
    const double centre = start + (index + 0.5) * step - 0.5, low = std::floor(centre);
    weights = {1.0 - (centre - low), centre - low};
    return static_cast<int>(low);
  }
  const double a = start + index * step, b = a + step, share = 1.0 / step;
  const int first = static_cast<int>(std::floor(a + 1e-9));
  const int last = std::max(first + 1, static_cast<int>(std::ceil(b - 1e-9)));
  for (int i = first; i < last; ++i)
    weights.push_back((std::min(b, i + 1.0) - std::max(a, double(i))) * share);
  return first;
}

}  // namespace

void build_taps(Taps& taps, double start, double extent, int out, int count, int pixels,
                double halved, bool reverse) {
  static thread_local std::vector<double> pixel, row;
  const double step = extent / out;
  const int reach = static_cast<int>(std::ceil(std::max(step, 1.0))) + 2;  // pixels of one output
  const int width = std::min(count, halved ? reach / 2 + 3 : reach);
  row.resize(width);
  taps.width = width;
  taps.first.resize(out);
  taps.weight.resize(static_cast<size_t>(out) * width);
  int used = 1;
  for (int i = 0; i < out; ++i) {
    const int start_at = pixel_weights(start, step, i, pixel);
    const int low = std::clamp(start_at, 0, pixels - 1);  // beyond the edge, the edge counts
    const int first = std::clamp(halved ? (low + 1) / 2 - 1 : low, 0, count - width);
    std::fill(row.begin(), row.end(), 0.0);
    for (size_t t = 0; t < pixel.size(); ++t) {
      const int p = std::clamp(start_at + static_cast<int>(t), 0, pixels - 1);
      if (!halved) {
        row[p - first] += pixel[t];
      } else {
        const int own = p / 2, other = std::clamp((p & 1) ? own + 1 : own - 1, 0, count - 1);
        row[own - first] += (1.0 - halved) * pixel[t];
        row[other - first] += halved * pixel[t];
      }
    }
    const int target = reverse ? out - 1 - i : i;
    int16_t* q = &taps.weight[static_cast<size_t>(target) * width];
    int sum = 0, heaviest = 0;
    for (int t = 0; t < width; ++t) {
      const int value = static_cast<int>(row[t] * 32768.0 + 0.5);
      sum += value;
      q[t] = static_cast<int16_t>(std::min(value, 32767));
      if (q[t] > q[heaviest]) heaviest = t;
      if (value) used = std::max(used, t + 1);
    }
    const int fixed = q[heaviest] + (32768 - sum);  // the weights add up to one
    q[heaviest] = static_cast<int16_t>(std::min(fixed, 32767));
    taps.first[target] = first;
  }
  if (used < width) {  // drop columns that no output uses
    for (int i = 0; i < out; ++i)
      std::copy_n(&taps.weight[static_cast<size_t>(i) * width], used,
                  &taps.weight[static_cast<size_t>(i) * used]);
    taps.width = used;
  }
}
