// Entropy decoding of one window of a baseline JPEG, put in libjpeg's place.
#pragma once
#include <cstdint>
#include <cstddef>
#include <cstdio>
#include <vector>

#include <jpeglib.h>

// MCU rows [row0, row1) and columns [col0, col1) of the scan.
struct Window {
  int row0, row1, col0, col1;
};

struct HuffmanTable;

// Reads the scan that follows a parsed header. libjpeg does everything else: it believes the picture
// is just the window, and asks for the coefficients of one MCU after the other.
class ScanReader {
 public:
  // Whether this scan can be read here: sequential, Huffman coded, 8 bits, all components at once.
  static bool supports(const jpeg_decompress_struct& info);

  // After jpeg_read_header, before jpeg_start_decompress: shrink the picture to the window. The
  // stream is `data` up to `end`. Returns a reason where the stream is damaged, else null.
  const char* prepare(jpeg_decompress_struct& info, const uint8_t* data, const uint8_t* end,
                      const Window& window);

  // After jpeg_start_decompress: take over. Damage found later is reported through `on_damage`.
  void attach(jpeg_decompress_struct& info, void (*on_damage)(j_decompress_ptr, const char*));

 private:
  struct Segment {  // between restart markers; offsets into `bytes_`
    size_t start, end;
  };

  static boolean decode_mcu(j_decompress_ptr info, JBLOCKROW* blocks);
  const char* next_mcu(JBLOCKROW* blocks);
  const char* seek(int mcu);
  void enter(int segment);
  const char* collect(const uint8_t* data, const uint8_t* end, int first, int last);
  template <bool kStore>
  const char* read_mcu(JBLOCKROW* blocks);

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

  uint64_t bits_ = 0;  // the next bits, left-justified
  int count_ = 0;      // how many of them are real
  const uint8_t* next_ = nullptr;
  const uint8_t* segment_end_ = nullptr;
  void (*on_damage_)(j_decompress_ptr, const char*) = nullptr;
};
