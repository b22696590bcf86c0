// One JPEG in the hands of libjpeg: read, written, or both, and freed however that ends.
#pragma once
#include <new>

#include "strict.h"

constexpr int kFailed = -1;      // last_error says why
constexpr int kNotPlain = -2;    // valid perhaps, but not for the fast way
constexpr int kMaxScans = 1000;  // of a progressive file; real ones have about 10

inline void count_scans(j_common_ptr common) {
  if (!common->is_decompressor) return;
  if (reinterpret_cast<j_decompress_ptr>(common)->input_scan_number <= kMaxScans) return;
  char why[64];
  snprintf(why, sizeof why, "has more than %d scans", kMaxScans);
  give_up(common, why);
}

// Ends with an error where a progressive file lacks scans: libjpeg would smooth blocks to hide it.
// Call when all input has been read. High frequencies that were never sent are zero by right.
inline void require_all_scans(j_decompress_ptr in) {
  if (!in->progressive_mode || !in->coef_bits) return;
  for (int c = 0; c < in->num_components; ++c)
    for (int k = 0; k < 64; ++k)
      if (in->coef_bits[c][k] > 0 || (k < 10 && in->coef_bits[c][k] < 0))
        give_up(reinterpret_cast<j_common_ptr>(in), "its progressive scans are incomplete");
}

struct Jpeg {
  jpeg_decompress_struct in{};
  jpeg_compress_struct out{};

  Jpeg() {
    in.err = out.err = arm(errors_);
    progress_.progress_monitor = count_scans;
  }
  ~Jpeg() {
    if (writing_) out.dest->term_destination(&out);  // a stream that outgrew its memory has moved
    free(stream_);
    jpeg_destroy_compress(&out);
    jpeg_destroy_decompress(&in);
  }

  // Runs `body` and returns what it returns, or kFailed where libjpeg gives up or memory runs out.
  // What `body` itself declares must need no destructor: libjpeg's errors jump over it.
  template <class Body>
  int64_t run(Body body) try {
    if (setjmp(errors_.escape)) return fail(kFailed, "%s", errors_.text);
    return body();
  } catch (const std::bad_alloc&) {
    return fail(kFailed, "does not fit into memory");
  }

  void read_header(const uint8_t* data, int64_t size) {
    jpeg_create_decompress(&in);
    in.progress = &progress_;
    jpeg_mem_src(&in, const_cast<uint8_t*>(data), size);
    jpeg_read_header(&in, TRUE);
  }

  // The DCT itself does part of the shrinking to w x h: it halves an image as well as averaging
  // does. The last factor of two to four is left to the averaging.
  void start_reading(int w, int h) {
    in.scale_num = in.scale_denom = 8;
    while (in.scale_num > 1 && int(in.image_width * in.scale_num / 16) >= 2 * w &&
           int(in.image_height * in.scale_num / 16) >= 2 * h)
      in.scale_num /= 2;
    jpeg_start_decompress(&in);
    require_all_scans(&in);
  }

  void open_output() {
    jpeg_create_compress(&out);
    jpeg_mem_dest(&out, &stream_, &stream_size_);
    writing_ = true;
  }

  // 4:2:0, one restart marker a row of MCUs; from rows of pixels, or from planes (`raw`).
  void start_writing(int w, int h, J_COLOR_SPACE colours, int quality, bool raw) {
    open_output();
    out.image_width = w;
    out.image_height = h;
    out.input_components = 3;
    out.in_color_space = colours;
    jpeg_set_defaults(&out);
    jpeg_set_quality(&out, quality, TRUE);
    out.dct_method = JDCT_ISLOW;
    out.restart_in_rows = 1;
    out.raw_data_in = raw;
    jpeg_start_compress(&out, TRUE);
  }

  // After jpeg_finish_compress: hands over what was written, malloc'ed; returns its size.
  int64_t take(uint8_t** result) {
    *result = stream_;
    stream_ = nullptr;
    writing_ = false;
    return static_cast<int64_t>(stream_size_);
  }

 private:
  Errors errors_;
  jpeg_progress_mgr progress_;
  unsigned char* stream_ = nullptr;
  unsigned long stream_size_ = 0;
  bool writing_ = false;
};
