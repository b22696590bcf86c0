// A JPEG shrunk into a JPEG without leaving its own colours: every channel is averaged at the
// resolution it is stored in, straight to the resolution it will be stored in. Next to decoding to
// RGB, this saves two colour conversions and the up- and downsampling of chroma, which also cost
// quality.
#include <new>

#include "shrink.h"
#include "strict.h"

namespace {

constexpr int kMcu = 16;  // pixels of the 4:2:0 that comes out

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// One channel on its way: rows of the decoder in, the plane of the encoder out.
struct Channel {
  std::vector<uint8_t> lines, plane;  // `lines`: one row of MCUs of the source
  std::vector<JSAMPROW> rows;
  int pitch = 0, height = 0;          // of the plane, whole MCUs
  int rows_in = 0, rows_there = 0;    // source rows given on, and those that exist
};

struct Scratch {
  Channel channel[3];
  AreaShrinker<1>* shrinker[3] = {nullptr, nullptr, nullptr};
  ~Scratch() {
    for (AreaShrinker<1>* one : shrinker) delete one;
  }
};

// YCbCr whose chroma is stored at full or half resolution.
bool Simple(const jpeg_decompress_struct& in) {
  if (in.jpeg_color_space != JCS_YCbCr || in.num_components != 3) return false;
  const jpeg_component_info* c = in.comp_info;
  if (c[0].h_samp_factor != in.max_h_samp_factor || c[0].v_samp_factor != in.max_v_samp_factor)
    return false;
  for (int i = 1; i < 3; ++i)
    for (int halved : {in.max_h_samp_factor, in.max_v_samp_factor}) {
      const int own = halved == in.max_h_samp_factor ? c[i].h_samp_factor : c[i].v_samp_factor;
      if (own != halved && 2 * own != halved) return false;
    }
  return true;
}

// What one channel's outputs cover along an axis: `stored` samples stand for 8 x `most` pixels of
// `side`, which becomes `to`; `each` is how many pixels of the result an output stands for.
Ratio Covers(int side, int stored, int most, int to, int each) {
  return {int64_t(side) * stored * each, int64_t(8) * most * to};
}

// Repeats the last column and row up to whole MCUs.
void Fill(Channel* channel, int width, int height) {
  for (int y = 0; y < height; ++y) {
    uint8_t* row = channel->plane.data() + size_t(y) * channel->pitch;
    memset(row + width, row[width - 1], channel->pitch - width);
  }
  const uint8_t* last = channel->plane.data() + size_t(height - 1) * channel->pitch;
  for (int y = height; y < channel->height; ++y)
    memcpy(channel->plane.data() + size_t(y) * channel->pitch, last, channel->pitch);
}

}  // namespace

// Decodes, shrinks to to_w x to_h (or leaves as it is) and encodes at 4:2:0 with one restart marker
// a row of MCUs. `*out` is malloc'ed. Returns the size; kNotPlain where the file is of another kind,
// and kFailed where libjpeg would have to make up a pixel.
API int64_t dp_reencode(const uint8_t* data, int64_t size, int to_w, int to_h, int quality,
                        uint8_t** out, char* message, int message_size) try {
  jpeg_decompress_struct in;
  jpeg_compress_struct to;
  Errors errors;
  jpeg_progress_mgr progress;
  unsigned char* result = nullptr;
  unsigned long result_size = 0;
  Scratch scratch;
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
  if (!Simple(in)) {
    jpeg_destroy_compress(&to);
    jpeg_destroy_decompress(&in);
    return kNotPlain;
  }
  in.raw_data_out = TRUE;
  SetReduction(&in, to_w, to_h);
  jpeg_start_decompress(&in);
  RequireAllScans(&in);
  const int wide = in.image_width, tall = in.image_height;
  const int mcus = CeilDiv(wide, 8 * in.max_h_samp_factor);
  JSAMPARRAY planes[3];
  for (int c = 0; c < 3; ++c) {
    const jpeg_component_info& part = in.comp_info[c];
    Channel& channel = scratch.channel[c];
    const int across = part.h_samp_factor * part.DCT_SIZE;
    const int down = part.v_samp_factor * part.DCT_SIZE, each = c ? 2 : 1;
    const int to_cols = CeilDiv(to_w, each), to_rows = CeilDiv(to_h, each);
    channel.lines.resize(size_t(mcus) * across * down);
    for (int i = 0; i < down; ++i)
      channel.rows.push_back(channel.lines.data() + size_t(i) * mcus * across);
    planes[c] = channel.rows.data();
    channel.pitch = CeilDiv(to_w, kMcu) * kMcu / each;
    channel.height = CeilDiv(to_h, kMcu) * kMcu / each;
    channel.plane.resize(size_t(channel.pitch) * channel.height);
    channel.rows_there = part.downsampled_height;
    scratch.shrinker[c] = new AreaShrinker<1>(
        part.downsampled_width, part.downsampled_height,
        Covers(wide, across, in.max_h_samp_factor, to_w, each),
        Covers(tall, down, in.max_v_samp_factor, to_h, each), to_cols, to_rows,
        channel.plane.data(), channel.pitch);
  }
  while (in.output_scanline < in.output_height) {
    jpeg_read_raw_data(&in, planes, in.max_v_samp_factor * in.MIN_DCT_SIZE);
    for (int c = 0; c < 3; ++c) {
      Channel& channel = scratch.channel[c];
      for (JSAMPROW row : channel.rows)
        if (channel.rows_in++ < channel.rows_there) scratch.shrinker[c]->Row(row);
    }
  }
  jpeg_finish_decompress(&in);
  for (int c = 0; c < 3; ++c)
    Fill(&scratch.channel[c], CeilDiv(to_w, c ? 2 : 1), CeilDiv(to_h, c ? 2 : 1));

  jpeg_mem_dest(&to, &result, &result_size);
  to.image_width = to_w;
  to.image_height = to_h;
  to.input_components = 3;
  to.in_color_space = JCS_YCbCr;
  jpeg_set_defaults(&to);
  jpeg_set_quality(&to, quality, TRUE);
  to.dct_method = JDCT_ISLOW;
  to.restart_in_rows = 1;
  to.raw_data_in = TRUE;
  jpeg_start_compress(&to, TRUE);
  while (to.next_scanline < to.image_height) {
    JSAMPROW rows[3][kMcu];
    JSAMPARRAY images[3] = {rows[0], rows[1], rows[2]};
    for (int c = 0; c < 3; ++c)
      for (int i = 0; i < kMcu / (c ? 2 : 1); ++i)
        rows[c][i] = scratch.channel[c].plane.data() +
                     (size_t(to.next_scanline) / (c ? 2 : 1) + i) * scratch.channel[c].pitch;
    jpeg_write_raw_data(&to, images, kMcu);
  }
  jpeg_finish_compress(&to);
  jpeg_destroy_compress(&to);
  jpeg_destroy_decompress(&in);
  *out = result;
  return static_cast<int64_t>(result_size);
} catch (const std::bad_alloc&) {
  snprintf(message, message_size, "does not fit into memory");
  return kFailed;
}
