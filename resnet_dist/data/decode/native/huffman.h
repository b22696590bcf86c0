// Entropy decoding of one window of a baseline JPEG, put in libjpeg's place.
#pragma once
#include <cstdint>
#include <cstddef>
#include <cstdio>
#include <vector>

#include <jpeglib.h>

#include "codes.h"

// MCU rows [row0, row1) and columns [col0, col1) of the scan.
struct Window {
  int row0, row1, col0, col1;
};

struct HuffmanTable;

// Reads the scan that follows a parsed header. libjpeg does everything else: it believes the
// picture is just the window, and asks for the coefficients of one MCU after the other. Damage ends
// the call into libjpeg, or here, through `give_up`.
class ScanReader {
 public:
  // Whether this scan can be read here: sequential, Huffman coded, 8 bits, all components at once.
  static bool supports(const jpeg_decompress_struct& info);

  // After jpeg_read_header, before jpeg_start_decompress: shrink the picture to the window. The
  // stream is what libjpeg would read next.
  void prepare(jpeg_decompress_struct& info, const Window& window);

  // After jpeg_start_decompress: take over.
  void attach(jpeg_decompress_struct& info);

 private:
  struct Segment {  // between restart markers; offsets into `bytes_`
    size_t start, end;
  };

  static boolean decode_mcu(j_decompress_ptr info, JBLOCKROW* blocks);
  void seek(int mcu);
  void collect(const uint8_t* data, const uint8_t* end, int first, int last);
  template <bool kStore>
  void read_mcu(JBLOCKROW* blocks);
  [[noreturn, gnu::cold]] void damaged(const char* why);

  j_common_ptr info_ = nullptr;
  std::vector<uint8_t> bytes_;  // entropy-coded bytes without stuffing
  std::vector<Segment> segments_;
  int first_segment_ = 0;
  int interval_ = 0;  // MCUs between restart markers
  int mcus_per_row_ = 0;
  Window window_{};
  int row_ = 0, col_ = 0;  // next MCU that libjpeg will ask for
  int segment_ = 0, mcu_ = 0;  // where the reader stands

  int blocks_in_mcu_ = 0;
  int component_of_[D_MAX_BLOCKS_IN_MCU];
  const HuffmanTable* dc_[D_MAX_BLOCKS_IN_MCU];
  const HuffmanTable* ac_[D_MAX_BLOCKS_IN_MCU];
  int predictor_[MAX_COMPS_IN_SCAN];

  BitReader bits_;
  const uint8_t* segment_end_ = nullptr;
};
