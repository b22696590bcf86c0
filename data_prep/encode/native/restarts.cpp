// Restart markers into JPEG streams that stay as they are: headers, Huffman codes, bits. Nothing here
// decodes a pixel; what is unusual is left to libjpeg.
#include <algorithm>
#include <new>
#include <vector>

#include "strict.h"

#define INLINE __attribute__((always_inline)) inline  // so that it is compiled for its caller's target

namespace {

constexpr int kOverrun = 512;  // bytes that parsing one block may look past the end

INLINE uint64_t Peek64(const uint8_t* data, uint64_t bit) {
  uint64_t word;
  memcpy(&word, data + (bit >> 3), 8);
  return __builtin_bswap64(word) << (bit & 7);  // at least 57 valid bits
}

class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}
  INLINE void Put(uint64_t value, int count) {  // count <= 32
    if (count == 0) return;
    held_ = (held_ << count) | (value & ((uint64_t{1} << count) - 1));
    bits_ += count;
    while (bits_ >= 8) {
      bits_ -= 8;
      *out_++ = static_cast<uint8_t>(held_ >> bits_);
    }
  }
  INLINE void Copy(const uint8_t* data, uint64_t from, uint64_t to) {
    while (to - from >= 32) {
      // Bring `held_` up in whole words: 32 bits in, four bytes out.
      held_ = (held_ << 32) | (Peek64(data, from) >> 32);
      uint32_t word = __builtin_bswap32(static_cast<uint32_t>(held_ >> bits_));
      memcpy(out_, &word, 4);
      out_ += 4;
      from += 32;
    }
    const int rest = static_cast<int>(to - from);
    if (rest) Put(Peek64(data, from) >> (64 - rest), rest);
  }
  uint8_t* Align() {  // with ones, as the standard asks
    if (bits_) Put(0x7F, 8 - bits_);
    return out_;
  }

 private:
  uint8_t* out_;
  uint64_t held_ = 0;
  int bits_ = 0;
};

// --- Huffman tables --------------------------------------------------------------------------

constexpr int kLook = 12;
constexpr int kProbes = 3;  // after a refill of 56 bits
constexpr int kMost = 56 / kProbes;  // bits that one of them may pass over

// What some bits of AC codes and values do: bits 0-5 how many they are, from bit 6 by how many
// coefficients they advance, and 64 more where the block ends with them. So sums of steps are steps,
// and one comparison tells that something ends or is wrong.
using Step = uint16_t;
constexpr int kAdvance = 6;
constexpr Step kEndOfBlock = 64 << kAdvance, kUnknown = 512 << kAdvance;

struct Table {
  std::vector<uint8_t> made_of;  // lengths and symbols, as in the file
  bool is_dc = false;
  uint64_t used = 0;       // when, for the cache
  int32_t dc[1 << kLook];  // DC: difference << 8 | bits, where they fit in kLook; else 0
  Step one[1 << kLook];    // AC: the first symbol in the next kLook bits, with its value; else 0
  // AC: all symbols that lie in them whole, up to the end of the block, or the first alone where its
  // value goes on for some bits, since a second look at those is a branch that nothing foretells.
  Step many[1 << kLook];
  uint8_t lengths[256];    // of the symbol's code, 0: no code
  uint16_t codes[256];
  int32_t limit[18];       // first code beyond length l, left-aligned in 16 bits
  int32_t offset[17];
  uint8_t symbols[256];
};

INLINE Step StepOf(int symbol, int length) {
  if (symbol == 0) return static_cast<Step>(length | kEndOfBlock);
  return static_cast<Step>((length + (symbol & 15)) | ((symbol >> 4) + 1) << kAdvance);
}

INLINE int Extend(int bits, int size) {  // ITU-T T.81, F.2.2.1
  return size && bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

// `counts` and the symbols after them, as they stand in a DHT segment. False where that is no code,
// or has symbols that no 8-bit picture needs.
bool Build(const uint8_t* counts, int total, bool is_dc, Table* table) {
  *table = Table{};
  const uint8_t* symbols = counts + 16;
  memcpy(table->symbols, symbols, total);
  int code = 0, index = 0;
  for (int length = 1; length <= 16; ++length) {
    table->offset[length] = index - code;
    for (int i = 0; i < counts[length - 1]; ++i, ++index, ++code) {
      const int symbol = symbols[index];
      if (code >= 1 << length || table->lengths[symbol]) return false;
      if (is_dc && symbol > 11) return false;
      table->lengths[symbol] = length;
      table->codes[symbol] = code;
      const int size = is_dc ? symbol : symbol & 15, rest = kLook - length;
      if (!is_dc && size > 10) return false;
      if (!is_dc && !size && symbol != 0 && symbol != 0xF0) return false;
      if (rest < 0) continue;
      if (!is_dc) {
        Step* first = table->one + (code << rest);
        std::fill(first, first + (1 << rest), StepOf(symbol, length));
        continue;
      }
      for (int tail = 0; size <= rest && tail < 1 << rest; ++tail)
        table->dc[code << rest | tail] =
            Extend(tail >> (rest - size), size) * 256 + length + size;
    }
    table->limit[length] = code << (16 - length);
    code <<= 1;
  }
  table->limit[17] = 1 << 16;
  for (int window = 0; !is_dc && window < 1 << kLook; ++window) {
    int sum = 0;
    while (sum < kEndOfBlock) {
      const Step step = table->one[(window << (sum & 63)) & ((1 << kLook) - 1)];
      if (!step || (sum & 63) + (step & 63) > kLook) break;
      if (step < kEndOfBlock && sum + step >= kEndOfBlock) break;  // would read as an end
      sum += step;
    }
    if (!sum && (table->one[window] & 63) <= kMost) sum = table->one[window];
    table->many[window] = sum ? static_cast<Step>(sum) : kUnknown;
  }
  table->made_of.assign(counts, counts + 16 + total);
  table->is_dc = is_dc;
  return true;
}

// Tables of this thread by content: most files carry the same few. Null where `Build` fails. A file
// has at most four in use, so none of its own is lost; those it defines twice are not plain.
class TableCache {
 public:
  const Table* Get(const uint8_t* counts, int total, bool is_dc) {
    Table* oldest = tables_.data();
    ++clock_;
    for (Table& table : tables_) {
      if (table.is_dc == is_dc && table.made_of.size() == size_t(16 + total) &&
          !memcmp(table.made_of.data(), counts, 16 + total)) {
        table.used = clock_;
        return &table;
      }
      if (table.used < oldest->used) oldest = &table;
    }
    if (!Build(counts, total, is_dc, oldest)) {
      oldest->made_of.clear();
      return nullptr;
    }
    oldest->used = clock_;
    return oldest;
  }

 private:
  std::vector<Table> tables_ = std::vector<Table>(12);
  uint64_t clock_ = 0;
};

// Symbol and code length of the next bits; false where no code fits.
INLINE bool Find(const Table& table, uint64_t bits, int* symbol, int* length) {
  const int next = static_cast<int>(bits >> 48);
  for (int l = 1; l <= 16; ++l) {
    if (next < table.limit[l]) {
      *symbol = table.symbols[((next >> (16 - l)) + table.offset[l]) & 255];
      *length = l;
      return true;
    }
  }
  return false;
}

// Lengths and symbols of a DC code with all twelve categories (T.81, table K.3).
constexpr uint8_t kStandardDc[28] = {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0,
                                     0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

struct Component {
  int id, h, v, quantizer;
  const Table *dc = nullptr, *ac = nullptr;
};

INLINE int Category(int value) {
  const unsigned magnitude = value < 0 ? -value : value;
  return magnitude ? 32 - __builtin_clz(magnitude) : 0;
}

struct Plain {  // what the fast way needs of a file
  int width = 0, height = 0, components = 0, interval = 0;
  Component component[4];
  const uint8_t* scan = nullptr;  // entropy-coded data
  std::vector<uint8_t> head;      // SOI .. before SOS, without what is dropped
  std::vector<uint8_t> sos;
};

// Parses a file for the fast way. Anything unusual is left to libjpeg.
bool Parse(const uint8_t* data, int64_t size, bool standard_dc, TableCache* cache, Plain* plain) {
  const Table *dc[2] = {nullptr, nullptr}, *ac[2] = {nullptr, nullptr};
  int tables = 0;
  auto keep = [&](const uint8_t* from, int64_t count) {
    plain->head.insert(plain->head.end(), from, from + count);
  };
  keep(data, 2);
  int64_t at = 2;
  bool framed = false;
  int quantizers = 0;  // bit set of those defined
  while (true) {
    if (at + 4 > size || data[at] != 0xFF) return false;
    const int marker = data[at + 1];
    const int64_t length = data[at + 2] << 8 | data[at + 3];
    const uint8_t* body = data + at + 4;
    if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9) || length < 2 ||
        at + 2 + length > size)
      return false;
    const uint8_t* end = data + at + 2 + length;
    if (marker == 0xC0 || marker == 0xC1) {
      if (framed || length < 8 || body[0] != 8) return false;
      framed = true;
      plain->height = body[1] << 8 | body[2];
      plain->width = body[3] << 8 | body[4];
      plain->components = body[5];
      if (!plain->width || !plain->height || (plain->components != 1 && plain->components != 3) ||
          length != 8 + 3 * plain->components)
        return false;
      for (int c = 0; c < plain->components; ++c) {
        Component& part = plain->component[c];
        part.id = body[6 + 3 * c];
        part.h = body[7 + 3 * c] >> 4;
        part.v = body[7 + 3 * c] & 15;
        part.quantizer = body[8 + 3 * c];
        if (part.h < 1 || part.h > 4 || part.v < 1 || part.v > 4 || part.quantizer > 3) return false;
      }
      if (plain->components == 1 && (plain->component[0].h != 1 || plain->component[0].v != 1))
        return false;
      keep(data + at, 2 + length);
    } else if (marker == 0xC4) {
      while (body < end) {
        if (end - body < 17) return false;
        const int kind = body[0];
        int total = 0;
        for (int i = 1; i <= 16; ++i) total += body[i];
        if ((kind & 0xEE) || total > 256 || end - body < 17 + total) return false;
        const Table* table = ++tables > 8 ? nullptr : cache->Get(body + 1, total, kind < 16);
        if (!table) return false;
        (kind < 16 ? dc[kind] : ac[kind & 1]) = table;
        if (kind >= 16 || !standard_dc) {
          const uint8_t start[] = {0xFF, 0xC4, static_cast<uint8_t>((19 + total) >> 8),
                                   static_cast<uint8_t>(19 + total)};
          keep(start, sizeof start);
          keep(body, 17 + total);
        }
        body += 17 + total;
      }
    } else if (marker == 0xDB) {
      while (body < end) {
        const int id = body[0] & 15, wide = body[0] >> 4;
        if (id > 3 || wide > 1 || end - body < 65 + 64 * wide) return false;
        quantizers |= 1 << id;
        body += 65 + 64 * wide;
      }
      keep(data + at, 2 + length);
    } else if (marker == 0xE0 || marker == 0xEE) {
      if (marker != 0xE0 || (length >= 16 && !memcmp(body, "JFIF", 5)))
        keep(data + at, 2 + length);
    } else if (marker == 0xDD) {
      if (length != 4) return false;
      plain->interval = body[0] << 8 | body[1];
    } else if (marker == 0xDA) {
      const int count = body[0];
      if (!framed || length != 6 + 2 * count || count != plain->components) return false;
      for (int c = 0; c < count; ++c) {
        Component& part = plain->component[c];
        const int of_dc = body[2 + 2 * c] >> 4, of_ac = body[2 + 2 * c] & 15;
        if (!(quantizers >> part.quantizer & 1)) return false;
        if (body[1 + 2 * c] != part.id || of_dc > 1 || of_ac > 1 || !dc[of_dc] || !ac[of_ac])
          return false;
        part.dc = dc[of_dc];
        part.ac = ac[of_ac];
      }
      if (body[1 + 2 * count] != 0 || body[2 + 2 * count] != 63 || body[3 + 2 * count] != 0)
        return false;
      for (int id = 0; standard_dc && id < 2; ++id) {
        const uint8_t start[] = {0xFF, 0xC4, 0, 31, static_cast<uint8_t>(id)};
        keep(start, sizeof start);
        keep(kStandardDc, 28);
      }
      plain->sos.assign(data + at, data + at + 2 + length);
      plain->scan = data + at + 2 + length;
      return true;
    } else if (!(marker >= 0xE1 && marker <= 0xEF) && marker != 0xFE) {
      return false;  // another process, hierarchical, DNL, ...
    }
    at += 2 + length;
  }
}

// Copies entropy-coded bytes without their stuffing. `ends` gets the end of every restart
// interval in `clean`. Returns false where the data is not [interval RSTn]* interval EOI.
bool Unstuff(const uint8_t* scan, const uint8_t* end, std::vector<uint8_t>* clean,
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

// --- the walk --------------------------------------------------------------------------------

// The next bits of `data`, left-justified in `word`.
struct BitReader {
  const uint8_t *data, *next;
  uint64_t word = 0;
  int count = 0;  // how many of them are real

  explicit BitReader(const uint8_t* from) : data(from), next(from) {}
  uint64_t Position() const { return 8 * static_cast<uint64_t>(next - data) - count; }
  INLINE void Refill() {  // to at least 56 bits; the load does not wait for the bits before it
    uint64_t more;
    memcpy(&more, next, 8);
    word |= __builtin_bswap64(more) >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  INLINE void Drop(int bits) {
    word <<= bits;
    count -= bits;
  }
  void Seek(uint64_t byte) {
    next = data + byte;
    word = count = 0;
  }
};

// Reads a DC difference; needs 27 bits at hand. False where no code fits.
INLINE bool ReadDc(BitReader& in, const Table& table, int* difference) {
  if (const int32_t step = table.dc[in.word >> (64 - kLook)]) {
    *difference = step >> 8;
    in.Drop(step & 255);
    return true;
  }
  int symbol, length;
  if (!Find(table, in.word, &symbol, &length)) return false;
  in.Drop(length);
  *difference = symbol ? Extend(static_cast<int>(in.word >> (64 - symbol)), symbol) : 0;
  in.Drop(symbol);
  return true;
}

// Passes over the AC codes and values of one block. False where they are damaged.
INLINE bool SkipAc(BitReader& in, const Table& table) {
  constexpr uint64_t kEnd = 64 << kAdvance;
  uint64_t sum = 1 << kAdvance;  // steps taken: the next coefficient, and the bits since a refill
  const auto too_far = [](Step step, uint64_t after) {
    return step & kEndOfBlock ? after >= 2 * kEnd : after >= kEnd + (1 << kAdvance);
  };
  while (true) {
    in.Refill();
    for (int probe = 0; probe < kProbes; ++probe) {
      Step step = table.many[in.word >> (64 - kLook)];
      uint64_t after = sum + step;
      if (after >= kEnd) {  // the block ends here, or before these symbols do, or the code is long
        if (too_far(step, after)) {
          in.count -= sum & 63;
          sum &= ~uint64_t{63};
          in.Refill();
          step = table.one[in.word >> (64 - kLook)];
          if (!step) {
            int symbol, length;
            if (!Find(table, in.word, &symbol, &length)) return false;
            step = StepOf(symbol, length);
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
__attribute__((target_clones("bmi2", "default"))) bool Walk(
    const Plain& plain, int64_t across, int64_t down, const uint8_t* clean,
    const std::vector<uint64_t>& ends, const Table* standard, uint8_t* joined,
    std::vector<uint64_t>* rows) {
  BitWriter writer(joined);
  BitReader in(clean);
  uint64_t copied = 0, limit = ends[0] * 8;
  size_t interval = 0;
  int64_t left = plain.interval ? plain.interval : across * down;
  int in_dc[4] = {0}, out_dc[4] = {0};
  for (int64_t row = 0; row < down; ++row) {
    memset(out_dc, 0, sizeof out_dc);
    for (int64_t column = 0; column < across; ++column) {
      if (left == 0) {
        if (limit - in.Position() >= 8) return false;
        writer.Copy(clean, copied, in.Position());
        in.Seek(ends[interval]);
        copied = in.Position();
        limit = ends[++interval] * 8;
        left = plain.interval;
        memset(in_dc, 0, sizeof in_dc);
      }
      --left;
      for (int c = 0; c < plain.components; ++c) {
        const Component& part = plain.component[c];
        for (int block = part.h * part.v; block > 0; --block) {
          in.Refill();
          const uint64_t start = in.Position();
          int difference;
          if (!ReadDc(in, *part.dc, &difference)) return false;
          const int value = in_dc[c] + difference;
          if (value < -32768 || value > 32767) return false;
          if (in_dc[c] != out_dc[c] || standard) {
            const int patched = value - out_dc[c];
            const int category = Category(patched);
            const Table& code = standard ? *standard : *part.dc;
            if (category > 11 || !code.lengths[category]) return false;
            writer.Copy(clean, copied, start);
            writer.Put(code.codes[category], code.lengths[category]);
            writer.Put(patched < 0 ? patched - 1 : patched, category);
            copied = in.Position();
          }
          in_dc[c] = out_dc[c] = value;
          if (!SkipAc(in, *part.ac)) return false;
          if (in.Position() > limit) return false;  // ran into the next marker
        }
      }
    }
    writer.Copy(clean, copied, in.Position());
    copied = in.Position();
    rows->push_back(writer.Align() - joined);
  }
  if (limit - in.Position() >= 8) return false;
  return true;
}

}  // namespace

// Writes the same image with one restart marker a row of MCUs, and without metadata that no decoder
// of pixels reads; coefficients and tables stay as they are. `*result` is malloc'ed; free it with
// dp_free. Returns the size, or kNotPlain where the file needs libjpeg's judgement.
//
// A code optimised for its image may lack the category of a difference that a restart makes;
// `standard_dc` = 1 gives every DC difference a code that has all.
API int64_t dp_add_restarts(const uint8_t* data, int64_t size, int standard_dc,
                            uint8_t** result) try {
  struct Scratch {
    TableCache tables;
    std::vector<uint8_t> clean, joined;
  };
  static thread_local Scratch scratch;
  auto& [tables, clean, joined] = scratch;  // one look-up of the thread's own
  Plain plain;
  if (!Parse(data, size, standard_dc, &tables, &plain)) return kNotPlain;
  const Table* standard = standard_dc ? tables.Get(kStandardDc, 12, true) : nullptr;
  std::vector<uint64_t> ends;
  if (!Unstuff(plain.scan, data + size, &clean, &ends)) return kNotPlain;

  int h_max = 1, v_max = 1;
  for (int c = 0; c < plain.components; ++c) {
    if (plain.component[c].h > h_max) h_max = plain.component[c].h;
    if (plain.component[c].v > v_max) v_max = plain.component[c].v;
  }
  const int64_t across = (plain.width + 8 * h_max - 1) / (8 * h_max);
  const int64_t down = (plain.height + 8 * v_max - 1) / (8 * v_max);
  const int64_t intervals =
      plain.interval ? (across * down + plain.interval - 1) / plain.interval : 1;
  if (static_cast<int64_t>(ends.size()) != intervals || across > 65535) return kNotPlain;
  // A block takes two bits at least, so a file much smaller than its blocks is not worth a walk.
  if (across * down > static_cast<int64_t>(ends.back()) * 4) return kNotPlain;

  // A patched DC code takes at most 27 bits, and ranges are written four bytes at a time.
  int64_t patches = 3 * (down + intervals);
  for (int c = 0; standard_dc && c < plain.components; ++c)
    patches += across * down * plain.component[c].h * plain.component[c].v;
  joined.resize(clean.size() + 4 * patches + down + intervals + 64);
  std::vector<uint64_t> rows;
  if (!Walk(plain, across, down, clean.data(), ends, standard, joined.data(), &rows))
    return kNotPlain;

  auto* out = static_cast<uint8_t*>(
      malloc(plain.head.size() + plain.sos.size() + 2 * rows.back() + 2 * rows.size() + 16));
  if (!out) return kNotPlain;
  uint8_t* to = out;
  auto put = [&](const uint8_t* from, size_t count) {
    memcpy(to, from, count);
    to += count;
  };
  put(plain.head.data(), plain.head.size());
  if (down > 1) {
    const uint8_t dri[] = {0xFF, 0xDD, 0, 4, static_cast<uint8_t>(across >> 8),
                           static_cast<uint8_t>(across)};
    put(dri, sizeof dri);
  }
  put(plain.sos.data(), plain.sos.size());
  uint64_t from = 0;
  for (size_t row = 0; row < rows.size(); ++row) {
    const uint8_t* next = joined.data() + from;
    const uint8_t* stop = joined.data() + rows[row];
    while (next < stop) {
      const auto* mark = static_cast<const uint8_t*>(memchr(next, 0xFF, stop - next));
      const uint8_t* until = mark ? mark + 1 : stop;
      put(next, until - next);
      if (mark) *to++ = 0;
      next = until;
    }
    from = rows[row];
    if (row + 1 < rows.size()) {
      *to++ = 0xFF;
      *to++ = 0xD0 + (row & 7);
    }
  }
  *to++ = 0xFF;
  *to++ = 0xD9;
  *result = out;
  return to - out;
} catch (const std::bad_alloc&) {
  return kNotPlain;
}
