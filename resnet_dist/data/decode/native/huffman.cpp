// Entropy decoding of one window of a baseline JPEG.
//
// Three quarters of decoding a photograph is Huffman decoding, and a random crop needs about half of
// the picture. Restart markers, which the conversion writes at every row of MCUs, let the reader jump
// over rows and over what lies right of the crop; what lies left of it is parsed, not stored. One
// table lookup yields a coefficient's run, value and length together.
//
// Every run through the stream is bounded: by the picture's MCUs, by 64 coefficients a block, and by
// the end of the data, which is checked once an MCU against a margin that no MCU can cross.
#include "huffman.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "strict.h"

// libjpeg's interface between entropy decoding and the rest, as in its jpegint.h, which not every
// distribution installs. Unchanged since 1998; a test compares pixels with plain libjpeg.
struct jpeg_entropy_decoder {
  void (*start_pass)(j_decompress_ptr);
  boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW*);
  boolean insufficient_data;
};

namespace {

constexpr int kPeek = 11;
constexpr size_t kSlack = 4096;  // more bytes than any MCU: 10 blocks x 64 x 31 bits = 2,480

// Position in the block of the k-th coefficient; beyond 63 for damaged runs.
constexpr uint8_t kOrder[64 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33,
    40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36,
    29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

}  // namespace

struct HuffmanTable : Code {
  // value << 16 | run << 8 | bits, where code and value fit in kPeek bits; 0 otherwise.
  uint32_t fast[1 << kPeek];
  // bits << 8 | symbol of the code, where it fits in kPeek bits; 0 otherwise.
  uint16_t code[1 << kPeek];

  bool build() {
    return assign([this](int symbol, int bits, int length) {
      const int size = symbol & 15, rest = kPeek - length;
      for (int tail = 0; rest >= 0 && tail < 1 << rest; ++tail) {
        const int next = bits << rest | tail;
        code[next] = static_cast<uint16_t>(length << 8 | symbol);
        if (size > rest || (!size && !is_dc)) continue;
        fast[next] = static_cast<uint32_t>(extend(tail >> (rest - size), size)) << 16 |
                     static_cast<uint32_t>(symbol >> 4) << 8 |
                     static_cast<uint32_t>(length + size);
      }
      return true;
    });
  }
};

namespace {

const HuffmanTable* table_for(const JHUFF_TBL& source, bool is_dc) {
  static thread_local TableCache<HuffmanTable, 16> tables;
  const int total = std::accumulate(source.bits + 1, source.bits + 17, 0);
  return tables.get(source.bits + 1, source.huffval, total, is_dc);
}

}  // namespace

bool ScanReader::supports(const jpeg_decompress_struct& info) {
  if (info.progressive_mode || info.arith_code || info.data_precision != 8) return false;
  if (info.comps_in_scan != info.num_components || info.num_components < 2) return false;
  int blocks = 0;
  for (int c = 0; c < info.num_components; ++c)
    blocks += info.comp_info[c].h_samp_factor * info.comp_info[c].v_samp_factor;
  return blocks <= D_MAX_BLOCKS_IN_MCU;
}

void ScanReader::damaged(const char* why) { give_up(info_, why); }

void ScanReader::prepare(jpeg_decompress_struct& info, const Window& window) {
  info_ = reinterpret_cast<j_common_ptr>(&info);
  const int mcu_w = 8 * info.max_h_samp_factor, mcu_h = 8 * info.max_v_samp_factor;
  const int width = info.image_width, height = info.image_height;
  mcus_per_row_ = ceil_div(width, mcu_w);
  window_ = window;
  interval_ = info.restart_interval;
  const int total = mcus_per_row_ * ceil_div(height, mcu_h);
  const int first_mcu = window.row0 * mcus_per_row_ + window.col0;
  const int last_mcu = (window.row1 - 1) * mcus_per_row_ + window.col1 - 1;
  if (!interval_) interval_ = total;
  const uint8_t* data = info.src->next_input_byte;
  collect(data, data + info.src->bytes_in_buffer, first_mcu / interval_, last_mcu / interval_);

  info.image_width = std::min(width - window.col0 * mcu_w, (window.col1 - window.col0) * mcu_w);
  info.image_height = std::min(height - window.row0 * mcu_h, (window.row1 - window.row0) * mcu_h);
  info.restart_interval = 0;
  info.total_iMCU_rows = window.row1 - window.row0;
  for (int c = 0; c < info.num_components; ++c) {
    jpeg_component_info& comp = info.comp_info[c];
    const int across = comp.h_samp_factor * static_cast<int>(info.image_width);
    const int down = comp.v_samp_factor * static_cast<int>(info.image_height);
    comp.width_in_blocks = ceil_div(across, mcu_w);
    comp.height_in_blocks = ceil_div(down, mcu_h);
  }
}

// The segments [first, last] of the scan, with stuffed zeros removed.
void ScanReader::collect(const uint8_t* data, const uint8_t* end, int first, int last) {
  segments_.clear();
  first_segment_ = first;
  bytes_.resize(end - data + kSlack);
  uint8_t* out = bytes_.data();
  int segment = 0;
  const uint8_t* at = data;
  size_t start = 0;
  while (true) {
    const auto* mark = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at));
    if (!mark) damaged("the stream ends without a marker");
    if (segment >= first) {
      std::memcpy(out, at, mark - at);
      out += mark - at;
    }
    const uint8_t* code = mark + 1;
    while (code < end && *code == 0xFF) ++code;  // fill bytes
    if (code == end) damaged("the stream ends inside a marker");
    at = code + 1;
    if (*code == 0) {
      if (segment >= first) *out++ = 0xFF;
      continue;
    }
    if (segment >= first) {
      const size_t stop = out - bytes_.data();
      segments_.push_back({start, stop});
      start = stop;
    }
    if (segment == last) break;
    if (*code != JPEG_RST0 + segment % 8) damaged("a restart marker is missing or out of order");
    ++segment;
  }
  std::memset(out, 0, kSlack);
}

void ScanReader::attach(jpeg_decompress_struct& info) {
  blocks_in_mcu_ = info.blocks_in_MCU;
  for (int b = 0; b < blocks_in_mcu_; ++b) {
    const int c = info.MCU_membership[b];
    const jpeg_component_info& comp = *info.cur_comp_info[c];
    component_of_[b] = c;
    // libjpeg has checked that the tables exist and are valid codes when it started.
    dc_[b] = table_for(*info.dc_huff_tbl_ptrs[comp.dc_tbl_no], true);
    ac_[b] = table_for(*info.ac_huff_tbl_ptrs[comp.ac_tbl_no], false);
  }
  row_ = window_.row0;
  col_ = window_.col0;
  segment_ = -1;
  info.client_data = this;
  info.entropy->decode_mcu = decode_mcu;
}

namespace {

// A symbol whose code may be longer than kPeek bits; -1 where there is no such code.
inline int read_symbol(BitReader& b, const HuffmanTable& table) {
  const unsigned entry = table.code[b.word >> (64 - kPeek)];
  if (entry) {
    b.drop(entry >> 8);
    return entry & 255;
  }
  int symbol, length;
  if (!table.find(b.word, kPeek + 1, &symbol, &length)) return -1;
  b.drop(length);
  return symbol;
}

inline int read_value(BitReader& b, int size) {
  const int bits = static_cast<int>(b.word >> (64 - size));
  b.drop(size);
  return extend(bits, size);
}

// One block. Returns false where the code is damaged.
template <bool kStore>
INLINE bool read_block(BitReader& b, const HuffmanTable& dc, const HuffmanTable& ac, int& predictor,
                       JCOEF* out) {
  b.refill();
  uint32_t entry = dc.fast[b.word >> (64 - kPeek)];
  if (entry) {
    b.drop(entry & 255);
    predictor += static_cast<int32_t>(entry) >> 16;
  } else {
    const int size = read_symbol(b, dc);
    if (size < 0 || size > 15) return false;
    if (size) predictor += read_value(b, size);
  }
  if (kStore) out[0] = static_cast<JCOEF>(predictor);
  int k = 1;
  while (true) {
    b.refill();
    for (int i = 0; i < 5; ++i) {  // five times kPeek bits fit in what one refill gives
      entry = ac.fast[b.word >> (64 - kPeek)];
      if (!entry) break;
      k += entry >> 8 & 255;
      b.drop(entry & 255);
      if (kStore) out[kOrder[k]] = static_cast<JCOEF>(static_cast<int32_t>(entry) >> 16);
      if (++k > 63) return k == 64;
    }
    if (entry) continue;
    b.refill();
    const int symbol = read_symbol(b, ac);
    if (symbol <= 0) return symbol == 0;  // end of block, or no such code
    const int size = symbol & 15;
    k += symbol >> 4;
    if (size) {
      const int value = read_value(b, size);
      if (kStore) out[kOrder[k]] = static_cast<JCOEF>(value);
    } else if (symbol != 0xF0) {
      return false;
    }
    if (++k > 63) return k == 64;
  }
}

}  // namespace

template <bool kStore>
void ScanReader::read_mcu(JBLOCKROW* blocks) {
  BitReader b = bits_;
  for (int i = 0; i < blocks_in_mcu_; ++i)
    if (!read_block<kStore>(b, *dc_[i], *ac_[i], predictor_[component_of_[i]],
                            kStore ? blocks[i][0] : nullptr))
      damaged("a code does not exist, or a block has more than 64 coefficients");
  // Bytes taken, less whole bytes still unused.
  if (b.next - b.count / 8 > segment_end_) damaged("the data end before the picture");
  bits_ = b;
  ++mcu_;
}

boolean ScanReader::decode_mcu(j_decompress_ptr info, JBLOCKROW* blocks) {
  auto& reader = *static_cast<ScanReader*>(info->client_data);
  if (reader.col_ == reader.window_.col0 || reader.mcu_ % reader.interval_ == 0)
    reader.seek(reader.row_ * reader.mcus_per_row_ + reader.col_);
  reader.read_mcu<true>(blocks);
  if (++reader.col_ == reader.window_.col1) {
    reader.col_ = reader.window_.col0;
    ++reader.row_;
  }
  return TRUE;
}

// Stand before `mcu`: jump to its segment, then parse what precedes it there.
void ScanReader::seek(int mcu) {
  if (const int segment = mcu / interval_; segment != segment_) {
    const Segment& s = segments_[segment - first_segment_];
    segment_ = segment;
    mcu_ = segment * interval_;
    std::fill(std::begin(predictor_), std::end(predictor_), 0);
    bits_ = BitReader{bytes_.data() + s.start};
    segment_end_ = bytes_.data() + s.end;
  }
  while (mcu_ < mcu) read_mcu<false>(nullptr);
}
