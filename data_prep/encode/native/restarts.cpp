// Restart markers into JPEG streams that stay as they are, bit by bit. Nothing here decodes a
// pixel; what is unusual is left to libjpeg.
#include <algorithm>

#include "codec.h"
#include "plain.h"

namespace {

constexpr int kOverrun = 512;  // bytes that parsing one block may look past the end

INLINE uint64_t peek(const uint8_t* data, uint64_t bit) {
  uint64_t word;
  memcpy(&word, data + (bit >> 3), 8);
  return __builtin_bswap64(word) << (bit & 7);  // at least 57 valid bits
}

class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}
  INLINE void put(uint64_t value, int count) {  // count <= 32
    if (count == 0) return;
    held_ = (held_ << count) | (value & ((uint64_t{1} << count) - 1));
    bits_ += count;
    while (bits_ >= 8) {
      bits_ -= 8;
      *out_++ = static_cast<uint8_t>(held_ >> bits_);
    }
  }
  INLINE void copy(const uint8_t* data, uint64_t from, uint64_t to) {
    while (to - from >= 32) {
      // Bring `held_` up in whole words: 32 bits in, four bytes out.
      held_ = (held_ << 32) | (peek(data, from) >> 32);
      uint32_t word = __builtin_bswap32(static_cast<uint32_t>(held_ >> bits_));
      memcpy(out_, &word, 4);
      out_ += 4;
      from += 32;
    }
    const int rest = static_cast<int>(to - from);
    if (rest) put(peek(data, from) >> (64 - rest), rest);
  }
  uint8_t* align() {  // with ones, as the standard asks
    if (bits_) put(0x7F, 8 - bits_);
    return out_;
  }

 private:
  uint8_t* out_;
  uint64_t held_ = 0;
  int bits_ = 0;
};

// Copies entropy-coded bytes without their stuffing. `ends` gets the end of every restart
// interval in `clean`. Returns false where the data is not [interval RSTn]* interval EOI.
bool unstuff(const uint8_t* scan, const uint8_t* end, std::vector<uint8_t>* clean,
             std::vector<uint64_t>* ends) {
  clean->resize(end - scan + kOverrun);
  uint8_t* out = clean->data();
  int expected = 0;
  while (true) {
    const auto* mark = static_cast<const uint8_t*>(memchr(scan, 0xFF, end - scan));
    if (!mark || mark + 1 >= end) return false;
    memcpy(out, scan, mark - scan);
    out += mark - scan;
    const int next = mark[1];
    scan = mark + 2;
    if (next == 0) {
      *out++ = 0xFF;
    } else if (next == 0xD0 + expected) {
      expected = (expected + 1) & 7;
      ends->push_back(out - clean->data());
    } else if (next == 0xD9) {
      ends->push_back(out - clean->data());
      break;
    } else {
      return false;
    }
  }
  memset(out, 0, kOverrun);
  return true;
}

struct Reader : BitReader {
  const uint8_t* data;

  explicit Reader(const uint8_t* from) : BitReader{from}, data(from) {}
  uint64_t position() const { return 8 * static_cast<uint64_t>(next - data) - count; }
  void seek(uint64_t byte) { static_cast<BitReader&>(*this) = BitReader{data + byte}; }
};

INLINE int category_of(int value) {
  const unsigned magnitude = value < 0 ? -value : value;
  return magnitude ? 32 - __builtin_clz(magnitude) : 0;
}

// Reads a DC difference; needs 27 bits at hand. False where no code fits.
INLINE bool read_dc(BitReader& in, const Table& table, int* difference) {
  if (const int32_t step = table.dc[in.word >> (64 - kLook)]) {
    *difference = step >> 8;
    in.drop(step & 255);
    return true;
  }
  int symbol, length;
  if (!table.find(in.word, 1, &symbol, &length)) return false;
  in.drop(length);
  *difference = symbol ? extend(static_cast<int>(in.word >> (64 - symbol)), symbol) : 0;
  in.drop(symbol);
  return true;
}

// Passes over the AC codes and values of one block. False where they are damaged.
INLINE bool skip_ac(BitReader& in, const Table& table) {
  constexpr uint64_t kEnd = 64 << kAdvance;
  uint64_t sum = 1 << kAdvance;  // steps taken: the next coefficient, and the bits since a refill
  const auto too_far = [](Step step, uint64_t after) {
    return step & kEndOfBlock ? after >= 2 * kEnd : after >= kEnd + (1 << kAdvance);
  };
  while (true) {
    in.refill();
    for (int probe = 0; probe < kProbes; ++probe) {
      Step step = table.many[in.word >> (64 - kLook)];
      uint64_t after = sum + step;
      if (after >= kEnd) {  // the block ends here, or before these symbols do, or the code is long
        if (too_far(step, after)) {
          in.count -= sum & 63;
          sum &= ~uint64_t{63};
          in.refill();
          step = table.one[in.word >> (64 - kLook)];
          if (!step) {
            int symbol, length;
            if (!table.find(in.word, 1, &symbol, &length)) return false;
            step = step_of(symbol, length);
          }
          after = sum + step;
          if (too_far(step, after)) return false;
        }
        in.word <<= step & 63;
        sum = after;
        if (sum < kEnd) break;  // a long code; go on with fresh bits
        in.count -= sum & 63;
        return true;
      }
      in.word <<= step & 63;
      sum = after;
    }
    in.count -= sum & 63;
    sum &= ~uint64_t{63};
  }
}

// Copies the scan in `clean`, whose restart intervals end at the bytes `ends`, to `joined` so that
// every row of MCUs begins anew at a whole byte; `rows` gets their ends. `standard`: the table for
// all DC differences, where it is not the file's own. False where the scan is damaged.
// Shifts by a variable cost three times as much without BMI2, which every processor since 2013 has.
__attribute__((target_clones("bmi2", "default"))) bool walk(
    const Plain& plain, int64_t across, int64_t down, const uint8_t* clean,
    const std::vector<uint64_t>& ends, const Table* standard, uint8_t* joined,
    std::vector<uint64_t>* rows) {
  BitWriter writer(joined);
  Reader in(clean);
  uint64_t copied = 0, limit = ends[0] * 8;
  size_t interval = 0;
  int64_t left = plain.interval ? plain.interval : across * down;
  int in_dc[4] = {0}, out_dc[4] = {0};
  for (int64_t row = 0; row < down; ++row) {
    memset(out_dc, 0, sizeof out_dc);
    for (int64_t column = 0; column < across; ++column) {
      if (left == 0) {
        if (limit - in.position() >= 8) return false;
        writer.copy(clean, copied, in.position());
        in.seek(ends[interval]);
        copied = in.position();
        limit = ends[++interval] * 8;
        left = plain.interval;
        memset(in_dc, 0, sizeof in_dc);
      }
      --left;
      for (int c = 0; c < plain.components; ++c) {
        const Component& part = plain.component[c];
        for (int block = part.h * part.v; block > 0; --block) {
          in.refill();
          const uint64_t start = in.position();
          int difference;
          if (!read_dc(in, *part.dc, &difference)) return false;
          const int value = in_dc[c] + difference;
          if (value < -32768 || value > 32767) return false;
          if (in_dc[c] != out_dc[c] || standard) {
            const int patched = value - out_dc[c];
            const int category = category_of(patched);
            const Table& code = standard ? *standard : *part.dc;
            if (category > 11 || !code.lengths[category]) return false;
            writer.copy(clean, copied, start);
            writer.put(code.codes[category], code.lengths[category]);
            writer.put(patched < 0 ? patched - 1 : patched, category);
            copied = in.position();
          }
          in_dc[c] = out_dc[c] = value;
          if (!skip_ac(in, *part.ac)) return false;
          if (in.position() > limit) return false;  // ran into the next marker
        }
      }
    }
    writer.copy(clean, copied, in.position());
    copied = in.position();
    rows->push_back(writer.align() - joined);
  }
  if (limit - in.position() >= 8) return false;
  return true;
}

}  // namespace

// Writes the same image with one restart marker a row of MCUs, and without metadata that no decoder
// of pixels reads; coefficients and tables stay as they are. `*result` is malloc'ed; free it with
// dp_free. Returns the size, or kNotPlain where the file needs libjpeg's judgement.
//
// A code optimised for its image may lack the category of a difference that a restart makes;
// `standard_dc` = 1 gives every DC difference a code that has all.
EXPORT int64_t dp_add_restarts(const uint8_t* data, int64_t size, int standard_dc,
                               uint8_t** result) try {
  struct Scratch {
    Tables tables;
    std::vector<uint8_t> clean, joined;
  };
  static thread_local Scratch scratch;
  auto& [tables, clean, joined] = scratch;  // one look-up of the thread's own
  Plain plain;
  if (!parse_plain(data, size, standard_dc, &tables, &plain)) return kNotPlain;
  const Table* standard =
      standard_dc ? tables.get(kStandardDc, kStandardDc + 16, 12, true) : nullptr;
  std::vector<uint64_t> ends, rows;
  if (!unstuff(plain.scan, data + size, &clean, &ends)) return kNotPlain;

  const int64_t across = ceil_div(plain.width, 8 * plain.h_max);
  const int64_t down = ceil_div(plain.height, 8 * plain.v_max);
  const int64_t intervals = plain.interval ? ceil_div(across * down, plain.interval) : 1;
  if (static_cast<int64_t>(ends.size()) != intervals || across > 65535) return kNotPlain;
  // A block takes two bits at least, so a file much smaller than its blocks is not worth a walk.
  if (across * down > static_cast<int64_t>(ends.back()) * 4) return kNotPlain;

  // A patched DC code takes at most 27 bits, and ranges are written four bytes at a time.
  int64_t patches = 3 * (down + intervals);
  for (int c = 0; standard_dc && c < plain.components; ++c)
    patches += across * down * plain.component[c].h * plain.component[c].v;
  joined.resize(clean.size() + 4 * patches + down + intervals + 64);
  if (!walk(plain, across, down, clean.data(), ends, standard, joined.data(), &rows))
    return kNotPlain;

  auto* out = static_cast<uint8_t*>(
      malloc(plain.head.size() + plain.sos.size() + 2 * rows.back() + 2 * rows.size() + 16));
  if (!out) return kNotPlain;
  uint8_t* to = std::copy(plain.head.begin(), plain.head.end(), out);
  if (down > 1)
    for (int64_t byte : {0xFFl, 0xDDl, 0l, 4l, across >> 8, across})
      *to++ = static_cast<uint8_t>(byte);
  to = std::copy(plain.sos.begin(), plain.sos.end(), to);
  const uint8_t* next = joined.data();
  for (size_t row = 0; row < rows.size(); ++row) {
    const uint8_t* stop = joined.data() + rows[row];
    while (next < stop) {
      const auto* mark = static_cast<const uint8_t*>(memchr(next, 0xFF, stop - next));
      const uint8_t* until = mark ? mark + 1 : stop;
      to = std::copy(next, until, to);
      if (mark) *to++ = 0;
      next = until;
    }
    *to++ = 0xFF;
    *to++ = row + 1 < rows.size() ? 0xD0 + (row & 7) : 0xD9;
  }
  *result = out;
  return to - out;
} catch (const std::bad_alloc&) {
  return kNotPlain;
}
