// What needs libjpeg: lossless rewriting through coefficients, strict decoding with area-averaged
// shrinking, encoding. Pixels are RGB.
#include <optional>

#include "codec.h"
#include "shrink.h"

// Why the last call of this thread failed.
EXPORT const char* dp_last_error() { return last_error; }

EXPORT void dp_free(void* memory) { free(memory); }

// The same as dp_add_restarts through libjpeg's coefficients, for whatever it can read without
// making pixels up: progressive files, several scans, tables without the codes that a restart
// needs. `*out` is malloc'ed; free it with dp_free. Returns the size or kFailed.
EXPORT int64_t dp_transcode(const uint8_t* data, int64_t size, uint8_t** out) {
  Jpeg jpeg;
  return jpeg.run([&] {
    jpeg.read_header(data, size);
    jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&jpeg.in);
    require_all_scans(&jpeg.in);
    jpeg.open_output();
    jpeg_copy_critical_parameters(&jpeg.in, &jpeg.out);
    jpeg_component_info* part = jpeg.out.comp_info;
    if (jpeg.out.num_components == 1) part->h_samp_factor = part->v_samp_factor = 1;
    jpeg.out.optimize_coding = TRUE;
    jpeg.out.restart_in_rows = 1;
    jpeg_write_coefficients(&jpeg.out, coefficients);
    jpeg_finish_compress(&jpeg.out);
    jpeg_finish_decompress(&jpeg.in);
    return jpeg.take(out);
  });
}

// Decodes a grey or three-component JPEG to RGB, shrunk to to_w x to_h (the file's own size: no
// shrinking); where `out` is null, a JPEG of any colours to nowhere: is it whole? Returns 0, or
// kFailed where libjpeg would have to make up any pixel.
EXPORT int dp_decode(const uint8_t* data, int64_t size, int to_w, int to_h, uint8_t* out) {
  std::optional<AreaShrinker<3>> shrinker;
  std::vector<uint8_t> line;
  Jpeg jpeg;
  return jpeg.run([&] {
    jpeg_decompress_struct& in = jpeg.in;
    jpeg.read_header(data, size);
    if (out)
      in.out_color_space = JCS_RGB;
    else
      in.out_color_space = in.jpeg_color_space == JCS_YCCK ? JCS_CMYK : in.jpeg_color_space;
    jpeg.start_reading(out ? to_w : in.image_width, out ? to_h : in.image_height);
    const int w = in.output_width, h = in.output_height;
    if (out && (w < to_w || h < to_h || in.output_components != 3))
      return fail(kFailed, "has %d x %d pixels", w, h);
    if (out && (w != to_w || h != to_h))
      shrinker.emplace(w, h, Ratio{w, to_w}, Ratio{h, to_h}, to_w, to_h, out, 3 * ptrdiff_t(to_w));
    if (!out || shrinker) line.resize(size_t(w) * in.output_components);
    while (in.output_scanline < in.output_height) {
      JSAMPROW row = line.empty() ? out + size_t(in.output_scanline) * w * 3 : line.data();
      jpeg_read_scanlines(&in, &row, 1);
      if (shrinker) shrinker->add_row(row);
    }
    jpeg_finish_decompress(&in);
    return 0;
  });
}

// Shrinks pixels by averaging areas.
EXPORT void dp_shrink(const uint8_t* rgb, int w, int h, int to_w, int to_h, uint8_t* out) {
  AreaShrinker<3> shrinker(w, h, {w, to_w}, {h, to_h}, to_w, to_h, out, 3 * ptrdiff_t(to_w));
  for (int y = 0; y < h; ++y) shrinker.add_row(rgb + size_t(y) * w * 3);
}

// Encodes pixels: 4:2:0, one restart marker a row of MCUs. `*out` is malloc'ed.
EXPORT int64_t dp_encode(const uint8_t* rgb, int w, int h, int quality, uint8_t** out) {
  Jpeg jpeg;
  return jpeg.run([&] {
    jpeg.start_writing(w, h, JCS_RGB, quality, false);
    while (jpeg.out.next_scanline < jpeg.out.image_height) {
      JSAMPROW row = const_cast<uint8_t*>(rgb) + size_t(jpeg.out.next_scanline) * w * 3;
      jpeg_write_scanlines(&jpeg.out, &row, 1);
    }
    jpeg_finish_compress(&jpeg.out);
    return jpeg.take(out);
  });
}

EXPORT int dp_libjpeg_version() { return LIBJPEG_TURBO_VERSION_NUMBER; }
