// Pixel sums, for mean and deviation: of pixels, and of some of the rows of MCUs of a stored JPEG.
#include <algorithm>
#include <vector>

#include "codec.h"
#include "segments.h"

EXPORT int dp_decode(const uint8_t* data, int64_t size, int to_w, int to_h,
                     uint8_t* out);  // of pixels.cpp

namespace {

__attribute__((target_clones("avx512f", "avx2", "default"))) void add_sums(
    const uint8_t* rgb, int64_t count, int64_t* totals) {
  constexpr int kLanes = 96;        // a multiple of 3, so a lane is always the same channel
  constexpr int64_t kRun = 65536;   // 65536 * 255^2 fits 32 bits
  for (int64_t at = 0; at < count;) {
    uint32_t sum[kLanes] = {0}, square[kLanes] = {0};
    const int64_t runs = std::min((count - at) / kLanes, kRun);
    for (int64_t run = 0; run < runs; ++run, at += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t value = rgb[at + lane];
        sum[lane] += value;
        square[lane] += value * value;
      }
    for (int lane = 0; runs < kRun && at < count; ++lane, ++at) {
      const uint32_t value = rgb[at];
      totals[lane % 3] += value;
      totals[3 + lane % 3] += value * value;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      totals[lane % 3] += sum[lane];
      totals[3 + lane % 3] += square[lane];
    }
  }
}

struct Layout {  // of a JPEG with one scan and a restart marker a row of MCUs
  int64_t frame = 0, scan = 0;  // where SOF's body and the entropy-coded data begin
  int width = 0, height = 0, mcu_height = 0;
};

bool parse(const uint8_t* data, int64_t size, Layout* found) {
  Segment segment{data + 2};
  while (segment.next(data + size)) {
    const uint8_t* body = segment.body;
    if (segment.marker == 0xC0 || segment.marker == 0xC1) {
      if (segment.size < 6 || segment.size < 6 + 3 * body[5]) return false;
      found->frame = body - data;
      found->height = body[1] << 8 | body[2];
      found->width = body[3] << 8 | body[4];
      int most = 1;
      for (int c = 0; c < body[5]; ++c) most = std::max(most, body[7 + 3 * c] & 15);
      found->mcu_height = 8 * (body[5] == 1 ? 1 : most);
    } else if (segment.marker == 0xDA) {
      found->scan = segment.end - data;
      return found->frame > 0;
    }
  }
  return false;
}

// The rows of MCUs `first`, `first` + `every`, ... as a JPEG of their own; empty: there is none.
// False where the stream is not as Layout says.
bool cut_rows(const uint8_t* data, int64_t size, const Layout& layout, int every, int first,
              std::vector<uint8_t>* cut, int* height) {
  const int rows = (layout.height + layout.mcu_height - 1) / layout.mcu_height;
  *height = 0;
  if (first >= rows) return true;
  cut->assign(data, data + layout.scan);
  const uint8_t *from = data + layout.scan, *end = data + size, *next = from;
  int taken = 0;
  for (int row = 0; row < rows; ++row) {
    while (true) {  // to the marker that ends this row
      next = static_cast<const uint8_t*>(memchr(next, 0xFF, end - next));
      if (!next || next + 1 >= end) return false;
      if (next[1] != 0) break;
      next += 2;
    }
    if (next[1] != (row + 1 < rows ? 0xD0 + (row & 7) : 0xD9)) return false;
    if (row >= first && (row - first) % every == 0) {
      if (taken) {
        cut->push_back(0xFF);
        cut->push_back(0xD0 + ((taken - 1) & 7));
      }
      cut->insert(cut->end(), from, next);
      *height += row + 1 < rows ? layout.mcu_height : layout.height - row * layout.mcu_height;
      ++taken;
    }
    from = next += 2;
  }
  cut->push_back(0xFF);
  cut->push_back(0xD9);
  (*cut)[layout.frame + 1] = *height >> 8;
  (*cut)[layout.frame + 2] = *height & 255;
  return true;
}

}  // namespace

// Adds sums and sums of squares of RGB pixels to totals[6].
EXPORT void dp_sums(const uint8_t* rgb, int64_t pixels, int64_t* totals) {
  add_sums(rgb, 3 * pixels, totals);
}

// The same of the rows of MCUs `first`, `first` + `every`, ... of a JPEG as this library writes them,
// with a restart marker a row. They are decoded as a picture of their own, so that the others cost
// nothing. Returns how many pixels they have, or kFailed.
EXPORT int64_t dp_row_sums(const uint8_t* data, int64_t size, int every, int first,
                           int64_t* totals) try {
  Layout layout;
  std::vector<uint8_t> cut, rgb;
  int height;
  if (!parse(data, size, &layout) || !cut_rows(data, size, layout, every, first, &cut, &height))
    return fail(kFailed, "has no restart marker after every row");
  if (!height) return 0;
  rgb.resize(size_t(layout.width) * height * 3);
  if (dp_decode(cut.data(), cut.size(), layout.width, height, rgb.data())) return kFailed;
  add_sums(rgb.data(), rgb.size(), totals);
  return int64_t(layout.width) * height;
} catch (const std::bad_alloc&) {
  return fail(kFailed, "does not fit into memory");
}
