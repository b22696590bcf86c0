// Stored bytes -> the pixels of one augmented image: verify, decode what the crop needs, resize.
//
// In: one sample's bytes (a JPEG stream or raw RGB) and its plan. Out: uint8 [out_h, out_w, 3], or a
// status other than 0 and a message. Never a guess: whatever libjpeg would only warn about, and
// would paint grey, is an error here. Thread-safe; every thread keeps its own decoder and scratch.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "huffman.h"
#include "native.h"
#include "strict.h"

namespace {

enum Status { kOk = 0, kDigest = 1, kCorrupt = 2, kMismatch = 3, kPlan = 4, kRead = 5 };
enum Mode { kJpeg = 0, kRaw = 1 };

struct Decoder {
  jpeg_decompress_struct info{};
  Errors errors;
  std::vector<uint8_t> planes[3], row, picture, stored;
  std::vector<JSAMPROW> rows[3];
  ScanReader scan;

  Decoder() {
    info.err = arm(errors);
    jpeg_create_decompress(&info);
  }
  ~Decoder() { jpeg_destroy_decompress(&info); }
};

// What the picture's size is divided by while it is decoded: the largest power of two, at most 8, by
// which the crop exceeds the output on both axes. Of chroma that has fewer columns than rows, or the
// reverse (4:2:2), libjpeg leaves that difference in the smaller picture: then so much less.
int reduction(const jpeg_decompress_struct& info, const Box& box, const Output& out) {
  double uneven = 1;
  for (int i = 0; i < info.num_components; ++i) {
    const jpeg_component_info& comp = info.comp_info[i];
    const double across = double(info.max_h_samp_factor) / comp.h_samp_factor;
    const double down = double(info.max_v_samp_factor) / comp.v_samp_factor;
    uneven = std::max({uneven, across / down, down / across});
  }
  int by = 1;
  while (by < 8 && box.height >= 2.0 * by * uneven * out.height &&
         box.width >= 2.0 * by * uneven * out.width)
    by *= 2;
  return by;
}

struct Range {
  int low, high;  // [low, high)
};

// Whole pixels that the box touches along an axis, with a margin for interpolation.
Range window(double start, double extent, int limit, int margin) {
  const int low = std::clamp(static_cast<int>(std::floor(start)) - margin, 0, limit - 1);
  return {low, std::clamp(static_cast<int>(std::ceil(start + extent)) + margin, low + 1, limit)};
}

// Room for `count` bytes and for wide reads past them.
void grow(std::vector<uint8_t>& buffer, size_t count) {
  if (buffer.size() < count + 64) buffer.resize(count + 64);
}

// Header read, box known: the planes of the MCUs that the box touches, then the resize.
void decode_planar(Decoder& d, const Plan& plan, const Output& out) {
  jpeg_decompress_struct& info = d.info;
  const Box& box = plan.box;
  const int by = reduction(info, box, out);
  const int mcu_h = 8 * info.max_v_samp_factor, mcu_w = 8 * info.max_h_samp_factor;
  const Range down = window(box.top, box.height, info.image_height, 3 * by);
  const Range across = window(box.left, box.width, info.image_width, 3 * by);
  const Window mcus{down.low / mcu_h, ceil_div(down.high, mcu_h), across.low / mcu_w,
                    ceil_div(across.high, mcu_w)};
  d.scan.prepare(info, mcus);
  info.scale_num = 8 / by;
  info.scale_denom = 8;
  info.raw_data_out = TRUE;
  info.dct_method = JDCT_ISLOW;
  jpeg_start_decompress(&info);
  d.scan.attach(info);
  const int block = info.MIN_DCT_SIZE;
  const int lines = info.max_v_samp_factor * block;  // output lines of one row of MCUs
  const int mcu_rows = mcus.row1 - mcus.row0, mcu_cols = mcus.col1 - mcus.col0;
  Plane planes[3];
  JSAMPARRAY pointers[3];
  for (int c = 0; c < 3; ++c) {
    const jpeg_component_info& comp = info.comp_info[c];
    const int rows = comp.v_samp_factor * comp.DCT_SIZE, cols = comp.h_samp_factor * comp.DCT_SIZE;
    const ptrdiff_t stride = (ptrdiff_t(mcu_cols) * cols + 63) / 64 * 64;
    grow(d.planes[c], stride * rows * mcu_rows);
    d.rows[c].resize(rows);
    // libjpeg interpolates with 3/4 and 1/4; of `by` pixels that became one, the outermost alone
    // takes from the neighbour.
    const double share = 0.25 / by;
    planes[c] = Plane{d.planes[c].data(), stride, int(comp.downsampled_height),
                      int(comp.downsampled_width), lines > rows ? share : 0,
                      info.max_h_samp_factor * block > cols ? share : 0};
  }
  for (int r = 0; r < mcu_rows; ++r) {
    for (int c = 0; c < 3; ++c) {
      const int rows = static_cast<int>(d.rows[c].size());
      for (int i = 0; i < rows; ++i)
        d.rows[c][i] = d.planes[c].data() + planes[c].stride * (ptrdiff_t(r) * rows + i);
      pointers[c] = d.rows[c].data();
    }
    jpeg_read_raw_data(&info, pointers, lines);
  }
  jpeg_abort_decompress(&info);
  resize_planes(planes, true,
                {(box.top - mcus.row0 * mcu_h) / by, (box.left - mcus.col0 * mcu_w) / by,
                 box.height / by, box.width / by},
                plan, out);
}

// Interleaved RGB rows of the picture, at 1/by of its size, into `d.picture`.
void decode_rgb(Decoder& d, int by, Range rows) {
  jpeg_decompress_struct& info = d.info;
  info.scale_num = 8 / by;
  info.scale_denom = 8;
  info.out_color_space = JCS_RGB;
  info.dct_method = JDCT_ISLOW;
  jpeg_start_decompress(&info);
  const size_t pitch = size_t(info.output_width) * 3;
  d.row.resize(pitch);
  d.picture.resize(pitch * (rows.high - rows.low));
  while (static_cast<int>(info.output_scanline) < rows.high) {
    const int y = info.output_scanline;
    JSAMPROW row = y < rows.low ? d.row.data() : d.picture.data() + pitch * (y - rows.low);
    jpeg_read_scanlines(&info, &row, 1);
  }
  jpeg_abort_decompress(&info);
}

// Rows of the picture that have been decoded: RGB [rows, cols, 3], from row `first` on.
struct Strip {
  const uint8_t* pixels;
  int first, rows, cols;
};

// Resample; the strip comes from a picture at 1/by of its size. Strips are passed by value: pixels
// that are written could else be these very numbers, to the compiler.
void resize_strip(Decoder& d, Strip strip, int by, const Plan& plan, const Output& out) {
  const double left = plan.box.left / by, width = plan.box.width / by;
  const auto [x0, x1] = window(left, width, strip.cols, 2);
  const int cols = x1 - x0;
  const ptrdiff_t stride = (cols + 63) / 64 * 64;
  Plane planes[3];
  for (int c = 0; c < 3; ++c) {
    grow(d.planes[c], stride * strip.rows);
    uint8_t* plane = d.planes[c].data();
    for (int y = 0; y < strip.rows; ++y) {
      const uint8_t* source = strip.pixels + (ptrdiff_t(y) * strip.cols + x0) * 3 + c;
      for (int x = 0; x < cols; ++x) plane[y * stride + x] = source[3 * x];
    }
    planes[c] = Plane{plane, stride, strip.rows, cols, 0, 0};
  }
  resize_planes(planes, false,
                {plan.box.top / by - strip.first, left - x0, plan.box.height / by, width}, plan,
                out);
}

// Whole-pixel crop without resampling; where the box leaves the picture, `out.pad` shows.
void copy_box(Strip strip, const Plan& plan, Output out) {
  const int top = static_cast<int>(std::lrint(plan.box.top)) - strip.first;
  const int left = static_cast<int>(std::lrint(plan.box.left));
  const int begin = std::clamp(-left, 0, out.width);  // columns of the box within the picture
  const int end = std::clamp(strip.cols - left, begin, out.width);
  const ptrdiff_t pitch = ptrdiff_t(out.width) * 3, step = plan.flip ? -3 : 3;
  int shift[3];
  for (int c = 0; c < 3; ++c) shift[c] = static_cast<int>(std::lrint(plan.shift[c]));
  const bool shifted = shift[0] || shift[1] || shift[2];
  for (int y = 0; y < out.height; ++y) {
    std::memcpy(out.pixels + y * pitch, out.pad + y * pitch, pitch);
    const int row = y + top;
    if (row < 0 || row >= strip.rows) continue;
    const uint8_t* from = strip.pixels + (ptrdiff_t(row) * strip.cols + left + begin) * 3;
    uint8_t* to = out.pixels + y * pitch + 3 * (plan.flip ? out.width - 1 - begin : begin);
    for (int x = begin; x < end; ++x, from += 3, to += step)
      if (shifted)
        for (int c = 0; c < 3; ++c) to[c] = uint8_t(std::clamp(from[c] + shift[c], 0, 255));
      else
        std::memcpy(to, from, 3);
  }
}

// The rows that the plan needs of a picture that is `height` / `by` rows high.
Range rows_needed(const Plan& plan, int height, int by, const Output& out) {
  if (!plan.copy)
    return window(plan.box.top / by, plan.box.height / by, ceil_div(height, by), 2);
  const int top = static_cast<int>(std::lrint(plan.box.top)), low = std::clamp(top, 0, height - 1);
  return {low, std::clamp(top + out.height, low + 1, height)};
}

int check_plan(const Plan& plan, int height, int width, const Output& out) {
  const Box& box = plan.box;
  for (double value : {box.top, box.left, box.height, box.width, double(plan.shift[0]),
                       double(plan.shift[1]), double(plan.shift[2])})
    if (!std::isfinite(value) || std::fabs(value) > 1e6) return fail(kPlan, "plan is not finite");
  if (out.height < 1 || out.width < 1 || out.height > 65536 || out.width > 65536)
    return fail(kPlan, "output size is out of range");
  if (plan.num_ops < 0 || plan.num_ops > kMaxOps) return fail(kPlan, "too many operations");
  for (int i = 0; i < plan.num_ops; ++i) {
    const Op& op = plan.ops[i];
    for (float value : {op.a, op.b, op.c, op.d})
      if (!std::isfinite(value) || std::fabs(value) > 1e6f)
        return fail(kPlan, "an operation is not finite");
  }
  if (box.height <= 0 || box.width <= 0) return fail(kPlan, "the crop is empty");
  for (float value : plan.shift)
    if (std::fabs(value) > 255) return fail(kPlan, "colour shift is out of range");
  if (!plan.copy && (box.top < -1e-3 || box.left < -1e-3 || box.top + box.height > height + 1e-3 ||
                     box.left + box.width > width + 1e-3))
    return fail(kPlan, "the crop leaves the picture");
  return kOk;
}

// Bytes [offset, offset + size) of a file into `d.stored`. A mapping would save the copy, about 5%
// of a decode, and end the process with SIGBUS where the file is cut off or its file system fails.
int read_stored(Decoder& d, int file, uint64_t offset, uint64_t size) {
  grow(d.stored, size);
  for (uint64_t done = 0; done < size;) {
    const ssize_t count = pread(file, d.stored.data() + done, size - done, offset + done);
    if (count > 0) {
      done += count;
    } else if (count == 0) {
      return fail(kRead, "its shard was cut off while in use");
    } else if (errno != EINTR) {
      return fail(kRead, "cannot be read (%s)", strerror(errno));
    }
  }
  return kOk;
}

int decode_jpeg(Decoder& d, const uint8_t* data, uint64_t size, int height, int width,
                const Plan& plan, const Output& out) {
  jpeg_decompress_struct& info = d.info;
  if (setjmp(d.errors.escape)) {
    jpeg_abort_decompress(&info);
    return fail(kCorrupt, "JPEG does not decode: %s", d.errors.text);
  }
  jpeg_mem_src(&info, const_cast<uint8_t*>(data), size);
  jpeg_read_header(&info, TRUE);
  if (int(info.image_height) != height || int(info.image_width) != width) {
    fail(kMismatch, "JPEG is %u x %u (height x width), its metadata say %d x %d", info.image_height,
         info.image_width, height, width);
    jpeg_abort_decompress(&info);
    return kMismatch;
  }
  if (!plan.copy && plain_colours(info) && ScanReader::supports(info)) {
    decode_planar(d, plan, out);
    return kOk;
  }
  const int by = plan.copy ? 1 : reduction(info, plan.box, out);
  const Range rows = rows_needed(plan, height, by, out);
  decode_rgb(d, by, rows);
  const Strip strip{d.picture.data(), rows.low, rows.high - rows.low, ceil_div(width, by)};
  plan.copy ? copy_box(strip, plan, out) : resize_strip(d, strip, by, plan, out);
  return kOk;
}

int decode_raw(Decoder& d, const uint8_t* data, uint64_t size, int height, int width,
               const Plan& plan, const Output& out) {
  if (size != uint64_t(height) * width * 3)
    return fail(kMismatch, "raw image has not height x width x 3 bytes");
  const auto [low, high] = rows_needed(plan, height, 1, out);
  const Strip strip{data + ptrdiff_t(low) * width * 3, low, high - low, width};
  plan.copy ? copy_box(strip, plan, out) : resize_strip(d, strip, 1, plan, out);
  return kOk;
}

}  // namespace

// One image: the `size` bytes at `data`, or, where that is null, at `offset` of the open `file`.
// `check`: compare `digest` with the bytes first. Returns a Status.
EXPORT int rd_decode(const uint8_t* data, int file, uint64_t offset, uint64_t size, uint64_t digest,
                     int check, int mode, int height, int width, const Plan* plan,
                     const uint8_t* pad, uint8_t* pixels, int out_h, int out_w) {
  static thread_local Decoder d;
  const Output out{pixels, out_h, out_w, pad};
  if (!data) {
    if (int status = read_stored(d, file, offset, size)) return status;
    data = d.stored.data();
  }
  if (check && XXH3_64bits(data, size) != digest)
    return fail(kDigest, "its bytes do not match the hash recorded when it was converted");
  if (int status = check_plan(*plan, height, width, out)) return status;
  if (mode != kJpeg && mode != kRaw) return fail(kMismatch, "unknown image mode");
  const auto decode = mode == kJpeg ? decode_jpeg : decode_raw;
  if (int status = decode(d, data, size, height, width, *plan, out)) return status;
  apply_ops(*plan, out);
  return kOk;
}

// Why the last call of this thread failed.
EXPORT const char* rd_last_error() { return last_error; }

EXPORT uint64_t rd_plan_bytes() { return sizeof(Plan); }

// For tests: use the portable kernels, whatever this processor has.
EXPORT void rd_only_portable(int on) { only_portable = on; }
