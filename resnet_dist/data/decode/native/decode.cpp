// Stored bytes -> the pixels of one augmented image: verify, decode what the crop needs, resize.
//
// In: one sample's bytes (a JPEG stream or raw RGB) and its plan. Out: uint8 [out_h, out_w, 3], or a
// status other than 0 and a message. Never a guess: whatever libjpeg would only warn about, and
// would paint grey, is an error here. Thread-safe; every thread keeps its own decoder and scratch.
#include <unistd.h>

#include <cerrno>
#include <csetjmp>
#include <cstdio>
#include <cmath>
#include <cstring>
#include <algorithm>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "huffman.h"
#include "native.h"

#if JPEG_LIB_VERSION >= 70  // the names of libjpeg's newer interfaces
#define DCT_SIZE DCT_h_scaled_size
#define MIN_DCT_SIZE min_DCT_h_scaled_size
#else
#define DCT_SIZE DCT_scaled_size
#define MIN_DCT_SIZE min_DCT_scaled_size
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Status { kOk = 0, kDigest = 1, kCorrupt = 2, kMismatch = 3, kPlan = 4, kRead = 5 };
enum Mode { kJpeg = 0, kRaw = 1 };

struct Failure {
  jpeg_error_mgr manager;
  jmp_buf jump;
  const char* damage;  // found by our own entropy decoder; else null, and libjpeg has the reason
};

struct Decoder {
  jpeg_decompress_struct info;
  Failure failure;
  char message[JMSG_LENGTH_MAX + 64];
  std::vector<uint8_t> planes[3], row, picture, stored;
  std::vector<JSAMPROW> rows[3];
  ScanReader scan;

  Decoder();
  ~Decoder() { jpeg_destroy_decompress(&info); }
};

[[noreturn]] void on_error(j_common_ptr common) {
  auto* failure = reinterpret_cast<Failure*>(common->err);
  longjmp(failure->jump, 1);
}

// libjpeg calls this for warnings (level < 0) and traces. Damage is an error; oddities are not.
void on_message(j_common_ptr common, int level) {
  if (level >= 0) return;
  switch (common->err->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
      return;
    default:
      on_error(common);
  }
}

Decoder::Decoder() {
  std::memset(&info, 0, sizeof info);
  info.err = jpeg_std_error(&failure.manager);
  failure.manager.error_exit = on_error;
  failure.manager.emit_message = on_message;
  message[0] = 0;
  jpeg_create_decompress(&info);
}

Decoder& decoder() {
  static thread_local Decoder instance;
  return instance;
}

int fail(Decoder& d, Status status, const char* text) {
  std::snprintf(d.message, sizeof d.message, "%s", text);
  return status;
}

int fail_jpeg(Decoder& d) {
  char text[JMSG_LENGTH_MAX];
  if (d.failure.damage)
    std::snprintf(text, sizeof text, "%s", d.failure.damage);
  else
    d.info.err->format_message(reinterpret_cast<j_common_ptr>(&d.info), text);
  jpeg_abort_decompress(&d.info);
  std::snprintf(d.message, sizeof d.message, "JPEG does not decode: %s", text);
  return kCorrupt;
}

// What the picture's size is divided by while it is decoded: the largest power of two, at most 8, by
// which the crop exceeds the output on both axes. Of chroma that has fewer columns than rows, or the
// reverse (4:2:2), libjpeg leaves that difference in the smaller picture: then so much less.
int reduction(const jpeg_decompress_struct& info, const Plan& plan, int out_h, int out_w) {
  double uneven = 1;
  for (int i = 0; i < info.num_components; ++i) {
    const jpeg_component_info& comp = info.comp_info[i];
    const double across = double(info.max_h_samp_factor) / comp.h_samp_factor;
    const double down = double(info.max_v_samp_factor) / comp.v_samp_factor;
    uneven = std::max({uneven, across / down, down / across});
  }
  int by = 1;
  while (by < 8 && plan.height >= 2.0 * by * uneven * out_h && plan.width >= 2.0 * by * uneven * out_w)
    by *= 2;
  return by;
}

// Whole pixels that the box touches, with a margin for interpolation; [low, high).
void window(double start, double extent, int limit, int margin, int* low, int* high) {
  *low = std::clamp(static_cast<int>(std::floor(start)) - margin, 0, limit - 1);
  *high = std::clamp(static_cast<int>(std::ceil(start + extent)) + margin, *low + 1, limit);
}

// Whether the three components can be resized each at its own resolution.
bool planar(const jpeg_decompress_struct& info) {
  if (info.jpeg_color_space != JCS_YCbCr || info.num_components != 3 || !ScanReader::supports(info))
    return false;
  const jpeg_component_info* c = info.comp_info;
  if (c[0].h_samp_factor != info.max_h_samp_factor || c[0].v_samp_factor != info.max_v_samp_factor)
    return false;
  for (int i = 1; i < 3; ++i) {
    if (info.max_h_samp_factor % c[i].h_samp_factor || info.max_v_samp_factor % c[i].v_samp_factor)
      return false;
    if (info.max_h_samp_factor / c[i].h_samp_factor > 2 ||
        info.max_v_samp_factor / c[i].v_samp_factor > 2)
      return false;
  }
  return true;
}

[[noreturn]] void on_damage(j_decompress_ptr info, const char* why) {
  auto* failure = reinterpret_cast<Failure*>(info->err);
  failure->damage = why;
  longjmp(failure->jump, 1);
}

// Room for `count` bytes and for wide reads past them.
void grow(std::vector<uint8_t>& buffer, size_t count) {
  if (buffer.size() < count + 64) buffer.resize(count + 64);
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Header read, box known: the planes of the MCUs that the box touches, then the resize.
void decode_planar(Decoder& d, const Plan& plan, uint8_t* out, int out_h, int out_w) {
  jpeg_decompress_struct& info = d.info;
  const int by = reduction(info, plan, out_h, out_w);
  const int mcu_h = 8 * info.max_v_samp_factor, mcu_w = 8 * info.max_h_samp_factor;
  int low, high;
  Window mcus;
  window(plan.top, plan.height, info.image_height, 3 * by, &low, &high);
  mcus.row0 = low / mcu_h;
  mcus.row1 = ceil_div(high, mcu_h);
  window(plan.left, plan.width, info.image_width, 3 * by, &low, &high);
  mcus.col0 = low / mcu_w;
  mcus.col1 = ceil_div(high, mcu_w);
  const uint8_t* stream = info.src->next_input_byte;
  if (const char* why = d.scan.prepare(info, stream, stream + info.src->bytes_in_buffer, mcus))
    on_damage(&info, why);
  info.scale_num = 8 / by;
  info.scale_denom = 8;
  info.raw_data_out = TRUE;
  info.dct_method = JDCT_ISLOW;
  jpeg_start_decompress(&info);
  d.scan.attach(info, on_damage);
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
    planes[c].data = d.planes[c].data();
    planes[c].stride = stride;
    planes[c].cols = comp.downsampled_width;
    planes[c].rows = comp.downsampled_height;
    // libjpeg interpolates with 3/4 and 1/4; of `by` pixels that became one, the outermost alone
    // takes from the neighbour.
    planes[c].halved_x = info.max_h_samp_factor * block > cols ? 0.25 / by : 0;
    planes[c].halved_y = info.max_v_samp_factor * block > rows ? 0.25 / by : 0;
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
  resize_planes(planes, true, (plan.top - mcus.row0 * mcu_h) / by,
                (plan.left - mcus.col0 * mcu_w) / by, plan.height / by, plan.width / by, plan.flip,
                plan.shift, out, out_h, out_w);
}

// Interleaved RGB rows [low, high) of the picture, at 1/by of its size, into `d.picture`.
void decode_rgb(Decoder& d, int by, int low, int high) {
  jpeg_decompress_struct& info = d.info;
  info.scale_num = 8 / by;
  info.scale_denom = 8;
  info.out_color_space = JCS_RGB;
  info.dct_method = JDCT_ISLOW;
  jpeg_start_decompress(&info);
  const size_t pitch = size_t(info.output_width) * 3;
  d.row.resize(pitch);
  d.picture.resize(pitch * (high - low));
  while (static_cast<int>(info.output_scanline) < high) {
    const int y = info.output_scanline;
    JSAMPROW row = y < low ? d.row.data() : d.picture.data() + pitch * (y - low);
    jpeg_read_scanlines(&info, &row, 1);
  }
  jpeg_abort_decompress(&info);
}

// Resample interleaved pixels: rows [0, rows), `cols` wide; the box is relative to them.
void resize_interleaved(Decoder& d, const uint8_t* pixels, int rows, int cols, double top,
                        double left, double height, double width, const Plan& plan, uint8_t* out,
                        int out_h, int out_w) {
  int x0, x1;
  window(left, width, cols, 2, &x0, &x1);
  const ptrdiff_t stride = (x1 - x0 + 63) / 64 * 64;
  Plane planes[3];
  for (int c = 0; c < 3; ++c) {
    grow(d.planes[c], stride * rows);
    uint8_t* plane = d.planes[c].data();
    for (int y = 0; y < rows; ++y) {
      const uint8_t* source = pixels + (ptrdiff_t(y) * cols + x0) * 3 + c;
      for (int x = 0; x < x1 - x0; ++x) plane[y * stride + x] = source[3 * x];
    }
    planes[c] = Plane{plane, stride, rows, x1 - x0, 0, 0};
  }
  resize_planes(planes, false, top, left - x0, height, width, plan.flip, plan.shift, out, out_h,
                out_w);
}

// Whole-pixel crop without resampling; where the box leaves the picture, `pad` shows.
void copy_box(const uint8_t* pixels, int first_row, int rows, int cols, const Plan& plan,
              const uint8_t* pad, uint8_t* out, int out_h, int out_w) {
  const int top = static_cast<int>(std::lrint(plan.top)), left = static_cast<int>(std::lrint(plan.left));
  int shift[3];
  for (int c = 0; c < 3; ++c) shift[c] = static_cast<int>(std::lrint(plan.shift[c]));
  const bool shifted = shift[0] || shift[1] || shift[2];
  for (int y = 0; y < out_h; ++y) {
    const int row = y + top - first_row;
    for (int x = 0; x < out_w; ++x) {
      const int at = plan.flip ? out_w - 1 - x : x;
      const int col = at + left;
      uint8_t* to = out + (ptrdiff_t(y) * out_w + x) * 3;
      const bool inside = row >= 0 && row < rows && col >= 0 && col < cols;
      const uint8_t* from = inside ? pixels + (ptrdiff_t(row) * cols + col) * 3
                                   : pad + (ptrdiff_t(y) * out_w + x) * 3;
      if (inside && shifted)
        for (int c = 0; c < 3; ++c) to[c] = static_cast<uint8_t>(std::clamp(from[c] + shift[c], 0, 255));
      else
        std::memcpy(to, from, 3);
    }
  }
}

int check_plan(Decoder& d, const Plan& plan, int height, int width, int out_h, int out_w) {
  const double values[] = {plan.top, plan.left, plan.height, plan.width,
                           plan.shift[0], plan.shift[1], plan.shift[2]};
  for (double value : values)
    if (!std::isfinite(value) || std::fabs(value) > 1e6) return fail(d, kPlan, "plan is not finite");
  if (out_h < 1 || out_w < 1 || out_h > 65536 || out_w > 65536)
    return fail(d, kPlan, "output size is out of range");
  if (plan.num_ops < 0 || plan.num_ops > kMaxOps) return fail(d, kPlan, "too many operations");
  for (int i = 0; i < plan.num_ops; ++i) {
    const Op& op = plan.ops[i];
    for (float value : {op.a, op.b, op.c, op.d})
      if (!std::isfinite(value) || std::fabs(value) > 1e6f)
        return fail(d, kPlan, "an operation is not finite");
  }
  if (plan.height <= 0 || plan.width <= 0) return fail(d, kPlan, "the crop is empty");
  for (float value : plan.shift)
    if (std::fabs(value) > 255) return fail(d, kPlan, "colour shift is out of range");
  if (!plan.copy && (plan.top < -1e-3 || plan.left < -1e-3 || plan.top + plan.height > height + 1e-3 ||
                     plan.left + plan.width > width + 1e-3))
    return fail(d, kPlan, "the crop leaves the picture");
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
      return fail(d, kRead, "its shard was cut off while in use");
    } else if (errno != EINTR) {
      std::snprintf(d.message, sizeof d.message, "cannot be read (%s)", strerror(errno));
      return kRead;
    }
  }
  return kOk;
}

int decode_jpeg(Decoder& d, const uint8_t* data, uint64_t size, int height, int width,
                const Plan& plan, const uint8_t* pad, uint8_t* out, int out_h, int out_w) {
  jpeg_decompress_struct& info = d.info;
  d.failure.damage = nullptr;
  if (setjmp(d.failure.jump)) return fail_jpeg(d);
  jpeg_mem_src(&info, const_cast<uint8_t*>(data), size);
  jpeg_read_header(&info, TRUE);
  if (static_cast<int>(info.image_height) != height || static_cast<int>(info.image_width) != width) {
    std::snprintf(d.message, sizeof d.message,
                  "JPEG is %u x %u (height x width), its metadata say %d x %d", info.image_height,
                  info.image_width, height, width);
    jpeg_abort_decompress(&info);
    return kMismatch;
  }
  if (plan.copy) {
    const int top = static_cast<int>(std::lrint(plan.top));
    const int low = std::clamp(top, 0, height - 1);
    const int high = std::clamp(top + out_h, low + 1, height);
    decode_rgb(d, 1, low, high);
    copy_box(d.picture.data(), low, high - low, width, plan, pad, out, out_h, out_w);
  } else if (planar(info)) {
    decode_planar(d, plan, out, out_h, out_w);
  } else {
    const int by = reduction(info, plan, out_h, out_w);
    int low, high;
    window(plan.top / by, plan.height / by, ceil_div(height, by), 2, &low, &high);
    decode_rgb(d, by, low, high);
    resize_interleaved(d, d.picture.data(), high - low, ceil_div(width, by), plan.top / by - low,
                       plan.left / by, plan.height / by, plan.width / by, plan, out, out_h, out_w);
  }
  return kOk;
}

int decode_raw(Decoder& d, const uint8_t* data, uint64_t size, int height, int width,
               const Plan& plan, const uint8_t* pad, uint8_t* out, int out_h, int out_w) {
  if (size != uint64_t(height) * width * 3)
    return fail(d, kMismatch, "raw image has not height x width x 3 bytes");
  if (plan.copy) {
    copy_box(data, 0, height, width, plan, pad, out, out_h, out_w);
    return kOk;
  }
  int low, high;
  window(plan.top, plan.height, height, 2, &low, &high);
  resize_interleaved(d, data + ptrdiff_t(low) * width * 3, high - low, width, plan.top - low,
                     plan.left, plan.height, plan.width, plan, out, out_h, out_w);
  return kOk;
}

}  // namespace

// One image. `check`: compare `digest` with the bytes first. Returns a Status.
EXPORT int rd_decode(const uint8_t* data, uint64_t size, uint64_t digest, int check, int mode,
                     int height, int width, const Plan* plan, const uint8_t* pad, uint8_t* out,
                     int out_h, int out_w) {
  Decoder& d = decoder();
  if (check && XXH3_64bits(data, size) != digest)
    return fail(d, kDigest, "its bytes do not match the hash recorded when it was converted");
  if (int status = check_plan(d, *plan, height, width, out_h, out_w)) return status;
  int status = kMismatch;
  if (mode == kJpeg)
    status = decode_jpeg(d, data, size, height, width, *plan, pad, out, out_h, out_w);
  else if (mode == kRaw)
    status = decode_raw(d, data, size, height, width, *plan, pad, out, out_h, out_w);
  else
    fail(d, kMismatch, "unknown image mode");
  if (status == kOk && plan->num_ops) apply_ops(*plan, out, out_h, out_w, pad);
  return status;
}

// The same for bytes in a file.
EXPORT int rd_decode_stored(int file, uint64_t offset, uint64_t size, uint64_t digest, int check,
                            int mode, int height, int width, const Plan* plan, const uint8_t* pad,
                            uint8_t* out, int out_h, int out_w) {
  Decoder& d = decoder();
  if (int status = read_stored(d, file, offset, size)) return status;
  return rd_decode(d.stored.data(), size, digest, check, mode, height, width, plan, pad, out, out_h,
                   out_w);
}

// Why the last call of this thread failed.
EXPORT const char* rd_last_error() { return decoder().message; }

EXPORT uint64_t rd_digest(const uint8_t* data, uint64_t size) { return XXH3_64bits(data, size); }

EXPORT uint64_t rd_plan_bytes() { return sizeof(Plan); }

// For tests: use the portable kernels, whatever this processor has.
EXPORT void rd_only_portable(int on) { only_portable = on; }
