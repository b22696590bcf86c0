// What needs libjpeg: lossless rewriting through coefficients, strict decoding with area-averaged
// shrinking, encoding.
#include <vector>

#include "shrink.h"
#include "strict.h"

// The same through libjpeg's coefficients, for whatever it can read without making pixels up:
// progressive files, several scans, tables without the codes that a restart needs. `*out` is
// malloc'ed; free it with dp_free. Returns the size or kFailed.
API int64_t dp_transcode(const uint8_t* data, int64_t size, uint8_t** out, char* message,
                         int message_size) {
  jpeg_decompress_struct in;
  jpeg_compress_struct to;
  Errors errors;
  jpeg_progress_mgr progress;
  unsigned char* result = nullptr;
  unsigned long result_size = 0;
  memset(&in, 0, sizeof in);
  memset(&to, 0, sizeof to);
  in.err = to.err = Arm(&errors, message, message_size);
  if (setjmp(errors.escape)) {
    jpeg_destroy_compress(&to);
    jpeg_destroy_decompress(&in);
    free(result);
    return kFailed;
  }
  jpeg_create_decompress(&in);
  jpeg_create_compress(&to);
  progress.progress_monitor = CountScans;
  in.progress = &progress;
  jpeg_mem_src(&in, const_cast<unsigned char*>(data), size);
  jpeg_read_header(&in, TRUE);
  jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&in);
  RequireAllScans(&in);
  jpeg_mem_dest(&to, &result, &result_size);
  jpeg_copy_critical_parameters(&in, &to);
  if (to.num_components == 1) to.comp_info[0].h_samp_factor = to.comp_info[0].v_samp_factor = 1;
  to.optimize_coding = TRUE;
  to.restart_in_rows = 1;
  jpeg_write_coefficients(&to, coefficients);
  jpeg_finish_compress(&to);
  jpeg_finish_decompress(&in);
  jpeg_destroy_compress(&to);
  jpeg_destroy_decompress(&in);
  *out = result;
  return static_cast<int64_t>(result_size);
}

API void dp_free(void* memory) { free(memory); }

// Decodes a grey or three-component JPEG to RGB, shrunk to to_w x to_h (the file's own size: no
// shrinking). Returns 0, or kFailed where libjpeg would have to make up any pixel.
API int dp_decode(const uint8_t* data, int64_t size, int to_w, int to_h, uint8_t* out,
                  char* message, int message_size) {
  jpeg_decompress_struct in;
  Errors errors;
  jpeg_progress_mgr progress;
  AreaShrinker<3>* volatile shrinker = nullptr;  // volatile: they must survive the jump
  uint8_t* volatile line = nullptr;
  memset(&in, 0, sizeof in);
  in.err = Arm(&errors, message, message_size);
  if (setjmp(errors.escape)) {
    jpeg_destroy_decompress(&in);
    delete shrinker;
    free(line);
    return kFailed;
  }
  jpeg_create_decompress(&in);
  progress.progress_monitor = CountScans;
  in.progress = &progress;
  jpeg_mem_src(&in, const_cast<unsigned char*>(data), size);
  jpeg_read_header(&in, TRUE);
  in.out_color_space = JCS_RGB;
  SetReduction(&in, to_w, to_h);
  jpeg_start_decompress(&in);
  RequireAllScans(&in);
  const int w = in.output_width, h = in.output_height;
  if (w < to_w || h < to_h || in.output_components != 3) {
    snprintf(message, message_size, "has %d x %d pixels", w, h);
    jpeg_destroy_decompress(&in);
    return kFailed;
  }
  if (w == to_w && h == to_h) {
    while (in.output_scanline < in.output_height) {
      JSAMPROW rows[1] = {out + size_t(in.output_scanline) * w * 3};
      jpeg_read_scanlines(&in, rows, 1);
    }
  } else {
    shrinker = new AreaShrinker<3>(w, h, {w, to_w}, {h, to_h}, to_w, to_h, out, 3 * ptrdiff_t(to_w));
    line = static_cast<uint8_t*>(malloc(size_t(w) * 3));
    while (in.output_scanline < in.output_height) {
      JSAMPROW rows[1] = {line};
      jpeg_read_scanlines(&in, rows, 1);
      shrinker->Row(line);
    }
  }
  jpeg_finish_decompress(&in);
  jpeg_destroy_decompress(&in);
  delete shrinker;
  free(line);
  return 0;
}

// Decodes in the file's own colours and throws the pixels away: is it whole? Returns 0 or kFailed.
API int dp_check(const uint8_t* data, int64_t size, char* message, int message_size) {
  jpeg_decompress_struct in;
  Errors errors;
  jpeg_progress_mgr progress;
  memset(&in, 0, sizeof in);
  in.err = Arm(&errors, message, message_size);
  if (setjmp(errors.escape)) {
    jpeg_destroy_decompress(&in);
    return kFailed;
  }
  jpeg_create_decompress(&in);
  progress.progress_monitor = CountScans;
  in.progress = &progress;
  jpeg_mem_src(&in, const_cast<unsigned char*>(data), size);
  jpeg_read_header(&in, TRUE);
  in.out_color_space = in.jpeg_color_space == JCS_YCCK ? JCS_CMYK : in.jpeg_color_space;
  jpeg_start_decompress(&in);
  RequireAllScans(&in);
  JSAMPARRAY line = in.mem->alloc_sarray(reinterpret_cast<j_common_ptr>(&in), JPOOL_IMAGE,
                                         in.output_width * in.output_components, 1);
  while (in.output_scanline < in.output_height) jpeg_read_scanlines(&in, line, 1);
  jpeg_finish_decompress(&in);
  jpeg_destroy_decompress(&in);
  return 0;
}

// Shrinks RGB pixels by averaging areas.
API void dp_shrink(const uint8_t* rgb, int w, int h, int to_w, int to_h, uint8_t* out) {
  AreaShrinker<3> shrinker(w, h, {w, to_w}, {h, to_h}, to_w, to_h, out, 3 * ptrdiff_t(to_w));
  for (int y = 0; y < h; ++y) shrinker.Row(rgb + size_t(y) * w * 3);
}

// Encodes RGB pixels: 4:2:0, one restart marker a row of MCUs. `*out` is malloc'ed.
API int64_t dp_encode(const uint8_t* rgb, int w, int h, int quality, uint8_t** out, char* message,
                      int message_size) {
  jpeg_compress_struct to;
  Errors errors;
  unsigned char* result = nullptr;
  unsigned long result_size = 0;
  memset(&to, 0, sizeof to);
  to.err = Arm(&errors, message, message_size);
  if (setjmp(errors.escape)) {
    jpeg_destroy_compress(&to);
    free(result);
    return kFailed;
  }
  jpeg_create_compress(&to);
  jpeg_mem_dest(&to, &result, &result_size);
  to.image_width = w;
  to.image_height = h;
  to.input_components = 3;
  to.in_color_space = JCS_RGB;
  jpeg_set_defaults(&to);
  jpeg_set_quality(&to, quality, TRUE);
  to.dct_method = JDCT_ISLOW;
  to.restart_in_rows = 1;
  jpeg_start_compress(&to, TRUE);
  while (to.next_scanline < to.image_height) {
    JSAMPROW rows[1] = {const_cast<uint8_t*>(rgb) + size_t(to.next_scanline) * w * 3};
    jpeg_write_scanlines(&to, rows, 1);
  }
  jpeg_finish_compress(&to);
  jpeg_destroy_compress(&to);
  *out = result;
  return static_cast<int64_t>(result_size);
}

API int dp_libjpeg_version() { return LIBJPEG_TURBO_VERSION_NUMBER; }
