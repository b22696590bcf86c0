// A JPEG shrunk into a JPEG without leaving its own colours: every channel is averaged at the
// resolution it is stored in, straight to the resolution it will be stored in. Next to decoding to
// RGB, this saves two colour conversions and the up- and downsampling of chroma, which also cost
// quality.
#include <optional>

#include "codec.h"
#include "shrink.h"

namespace {

constexpr int kMcu = 16;  // pixels of the 4:2:0 that comes out

int each(int c) { return c ? 2 : 1; }  // pixels of the result a side that a sample stands for

// One channel on its way: rows of the decoder in, the plane of the encoder out.
struct Channel {
  std::vector<uint8_t> lines, plane;  // `lines`: one row of MCUs of the source
  std::vector<JSAMPROW> rows;
  std::optional<AreaShrinker<1>> shrinker;
  int width = 0, height = 0, pitch = 0;  // of the plane; `pitch`: whole MCUs
  int rows_in = 0, rows_there = 0;       // source rows given on, and those that exist
};

// What one channel's outputs cover along an axis: `stored` samples stand for 8 x `most` pixels of
// `side`, which becomes `to`; `each` is how many pixels of the result an output stands for.
Ratio covers(int side, int stored, int most, int to, int each) {
  return {int64_t(side) * stored * each, int64_t(8) * most * to};
}

void prepare(Channel& channel, const jpeg_decompress_struct& in, int c, int to_w, int to_h) {
  const jpeg_component_info& part = in.comp_info[c];
  const int across = part.h_samp_factor * part.DCT_SIZE, down = part.v_samp_factor * part.DCT_SIZE;
  const int pitch_in = ceil_div(in.image_width, 8 * in.max_h_samp_factor) * across;
  channel.lines.resize(size_t(pitch_in) * down);
  for (int i = 0; i < down; ++i)
    channel.rows.push_back(channel.lines.data() + size_t(i) * pitch_in);
  channel.rows_there = part.downsampled_height;
  channel.width = ceil_div(to_w, each(c));
  channel.height = ceil_div(to_h, each(c));
  channel.pitch = ceil_div(to_w, kMcu) * kMcu / each(c);
  channel.plane.resize(size_t(channel.pitch) * (ceil_div(to_h, kMcu) * kMcu / each(c)));
  channel.shrinker.emplace(
      part.downsampled_width, part.downsampled_height,
      covers(in.image_width, across, in.max_h_samp_factor, to_w, each(c)),
      covers(in.image_height, down, in.max_v_samp_factor, to_h, each(c)), channel.width,
      channel.height, channel.plane.data(), channel.pitch);
}

// Repeats the last column and row up to whole MCUs.
void fill_edges(Channel& channel) {
  uint8_t* row = channel.plane.data();
  for (int y = 0; y < channel.height; ++y, row += channel.pitch)
    memset(row + channel.width, row[channel.width - 1], channel.pitch - channel.width);
  for (; row < channel.plane.data() + channel.plane.size(); row += channel.pitch)
    memcpy(row, row - channel.pitch, channel.pitch);
}

}  // namespace

// Decodes, shrinks to to_w x to_h (or leaves as it is) and encodes at 4:2:0 with one restart marker
// a row of MCUs. `*out` is malloc'ed. Returns the size; kNotPlain where the file is of another kind,
// and kFailed where libjpeg would have to make up a pixel.
EXPORT int64_t dp_reencode(const uint8_t* data, int64_t size, int to_w, int to_h, int quality,
                           uint8_t** result) {
  Channel channels[3];
  Jpeg jpeg;
  return jpeg.run([&]() -> int64_t {
    auto& in = jpeg.in;
    auto& out = jpeg.out;
    jpeg.read_header(data, size);
    if (!plain_colours(in)) return kNotPlain;
    in.raw_data_out = TRUE;
    jpeg.start_reading(to_w, to_h);
    for (int c = 0; c < 3; ++c) prepare(channels[c], in, c, to_w, to_h);
    while (in.output_scanline < in.output_height) {
      JSAMPARRAY planes[3];
      for (int c = 0; c < 3; ++c) planes[c] = channels[c].rows.data();
      jpeg_read_raw_data(&in, planes, in.max_v_samp_factor * in.MIN_DCT_SIZE);
      for (Channel& channel : channels)
        for (JSAMPROW row : channel.rows)
          if (channel.rows_in++ < channel.rows_there) channel.shrinker->add_row(row);
    }
    jpeg_finish_decompress(&in);
    for (Channel& channel : channels) fill_edges(channel);

    jpeg.start_writing(to_w, to_h, JCS_YCbCr, quality, true);
    while (out.next_scanline < out.image_height) {
      JSAMPROW rows[3][kMcu];
      JSAMPARRAY images[3] = {rows[0], rows[1], rows[2]};
      for (int c = 0; c < 3; ++c)
        for (int i = 0; i < kMcu / each(c); ++i)
          rows[c][i] = channels[c].plane.data() +
                       (size_t(out.next_scanline) / each(c) + i) * channels[c].pitch;
      jpeg_write_raw_data(&out, images, kMcu);
    }
    jpeg_finish_compress(&out);
    return jpeg.take(result);
  });
}
