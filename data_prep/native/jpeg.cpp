// JPEG without loss and without trust: restart markers into streams that stay as they are, strict
// decoding with area-averaged shrinking, encoding, and pixel sums. A plain C interface for ctypes;
// sizes are bytes, images are RGB rows without padding, errors are negative numbers with a message.
//
// Every result is the same on every machine: integer arithmetic only, and libjpeg's accurate DCT,
// whose SIMD versions are bit-exact.

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <jpeglib.h>

#include <jerror.h>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kFailed = -1;       // the message says why
constexpr int kNotPlain = -2;     // valid perhaps, but not for the fast way
constexpr int kOverrun = 512;     // bytes that parsing one block may look past the end
constexpr int kMaxScans = 1000;   // of a progressive file; real ones have about 10

// --- libjpeg with errors as values -----------------------------------------------------------

struct Errors {
  jpeg_error_mgr base;
  jmp_buf escape;
  char* message;
  int message_size;
};

void Escape(j_common_ptr common) {
  Errors* errors = reinterpret_cast<Errors*>(common->err);
  char text[JMSG_LENGTH_MAX];
  common->err->format_message(common, text);
  snprintf(errors->message, errors->message_size, "%s", text);
  longjmp(errors->escape, 1);
}

// Warnings that mean pixels were made up are errors; the others leave every pixel as encoded.
void Judge(j_common_ptr common, int level) {
  if (level >= 0) return;
  switch (common->err->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
    case JWRN_TOO_MUCH_DATA:
      return;
    default:
      Escape(common);
  }
}

void Silent(j_common_ptr) {}

jpeg_error_mgr* Arm(Errors* errors, char* message, int message_size) {
  jpeg_std_error(&errors->base);
  errors->base.error_exit = Escape;
  errors->base.emit_message = Judge;
  errors->base.output_message = Silent;
  errors->message = message;
  errors->message_size = message_size;
  return &errors->base;
}

void CountScans(j_common_ptr common) {
  if (!common->is_decompressor) return;
  auto* jpeg = reinterpret_cast<j_decompress_ptr>(common);
  if (jpeg->input_scan_number > kMaxScans) {
    Errors* errors = reinterpret_cast<Errors*>(common->err);
    snprintf(errors->message, errors->message_size, "has more than %d scans", kMaxScans);
    longjmp(errors->escape, 1);
  }
}

// Ends with an error where a progressive file lacks scans: libjpeg would smooth blocks to hide it.
// Call when all input has been read. High frequencies that were never sent are zero by right.
void RequireAllScans(j_decompress_ptr in) {
  if (!in->progressive_mode || !in->coef_bits) return;
  for (int c = 0; c < in->num_components; ++c)
    for (int k = 0; k < 64; ++k)
      if (in->coef_bits[c][k] > 0 || (k < 10 && in->coef_bits[c][k] < 0)) {
        Errors* errors = reinterpret_cast<Errors*>(in->err);
        snprintf(errors->message, errors->message_size, "its progressive scans are incomplete");
        longjmp(errors->escape, 1);
      }
}

// --- bits ------------------------------------------------------------------------------------

inline uint64_t Peek64(const uint8_t* data, uint64_t bit) {
  uint64_t word;
  memcpy(&word, data + (bit >> 3), 8);
  return __builtin_bswap64(word) << (bit & 7);  // at least 57 valid bits
}

class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}
  void Put(uint64_t value, int count) {  // count <= 32
    if (count == 0) return;
    held_ = (held_ << count) | (value & ((uint64_t{1} << count) - 1));
    bits_ += count;
    while (bits_ >= 8) {
      bits_ -= 8;
      *out_++ = static_cast<uint8_t>(held_ >> bits_);
    }
  }
  void Copy(const uint8_t* data, uint64_t from, uint64_t to) {
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
constexpr int kEndOfBlock = 1 << 5;

// What some bits of AC codes and values do: bits 0-4 how many they are, bit 5 the block ends with
// them, from bit 6 by how many coefficients they advance, and 64 more where the block ends. So one
// comparison tells that something ends or is wrong.
using Step = uint16_t;
constexpr Step kUnknown = 512 << 6;

struct Table {
  bool defined;
  bool made_of_dc;
  std::vector<uint8_t> made_of;  // empty: not made yet
  Step one[1 << kLook];   // AC: the first symbol in the next kLook bits, with its value;
                          // DC: bits 0-4 the length of the first code, from bit 6 its symbol
  Step many[1 << kLook];  // AC: all symbols that lie in them whole, up to the end of the block
  uint8_t lengths[256];   // of the symbol's code, 0: no code
  uint16_t codes[256];
  int32_t limit[18];      // first code beyond length l, left-aligned in 16 bits
  int32_t offset[17];
  uint8_t symbols[256];
};

inline Step StepOf(int symbol, int length) {
  if (symbol == 0) return static_cast<Step>(length | kEndOfBlock | 64 << 6);
  return static_cast<Step>((length + (symbol & 15)) | ((symbol >> 4) + 1) << 6);
}

// `counts` and the symbols after them, as they stand in a DHT segment. Most files carry the same
// few tables, so one that is there already is not built again.
bool Build(const uint8_t* counts, int total, bool is_dc, Table* table) {
  if (table->made_of_dc == is_dc && table->made_of.size() == size_t(16 + total) &&
      !memcmp(table->made_of.data(), counts, 16 + total)) {
    table->defined = true;
    return true;
  }
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
      const int value_bits = is_dc ? symbol : symbol & 15;
      if (!is_dc && value_bits > 10) return false;
      if (!is_dc && !value_bits && symbol != 0 && symbol != 0xF0) return false;
      if (length <= kLook) {
        const Step step = is_dc ? static_cast<Step>(length | symbol << 6) : StepOf(symbol, length);
        Step* first = table->one + (code << (kLook - length));
        std::fill(first, first + (1 << (kLook - length)), step);
      }
    }
    table->limit[length] = code << (16 - length);
    code <<= 1;
  }
  table->limit[17] = 1 << 16;
  for (int window = 0; !is_dc && window < 1 << kLook; ++window) {
    int used = 0, advance = 0, end = 0;
    while (!end) {
      const Step step = table->one[(window << used) & ((1 << kLook) - 1)];
      if (!step || used + (step & 31) > kLook) break;
      used += step & 31;
      advance += step >> 6;
      end = step & kEndOfBlock;
    }
    table->many[window] = used ? static_cast<Step>(used | end | advance << 6) : kUnknown;
  }
  table->made_of.assign(counts, counts + 16 + total);
  table->made_of_dc = is_dc;
  table->defined = true;
  return true;
}

// Symbol and code length of the next bits; false where no code fits.
inline bool Find(const Table& table, uint64_t bits, int* symbol, int* length) {
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
  int id, h, v, quantizer, dc = -1, ac = -1;
};

inline int Category(int value) {
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

}  // namespace

// What a file's headers say. Offsets are into the file; exif_at = 0: none.
struct JpegInfo {
  int32_t width, height, components, precision, sof, transform;  // Adobe transform, -1: none
  int32_t h[4], v[4], scans_all;  // scans_all: the first scan holds every component
  int64_t exif_at, exif_size;
};

// Reads the markers up to the first scan. Returns 0 or kFailed.
API int dp_inspect(const uint8_t* data, int64_t size, JpegInfo* info, char* message,
                   int message_size) {
  memset(info, 0, sizeof *info);
  info->transform = -1;
  auto fail = [&](const char* why) {
    snprintf(message, message_size, "%s", why);
    return kFailed;
  };
  if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return fail("is not a JPEG");
  int64_t at = 2;
  while (true) {
    while (at < size && data[at] != 0xFF) ++at;  // libjpeg skips garbage here, too
    while (at < size && data[at] == 0xFF) ++at;
    if (at + 2 >= size) return fail("ends before its image data");
    const int marker = data[at++];
    if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7) || marker == 0) continue;
    if (marker == 0xD9) return fail("ends before its image data");
    const int64_t length = data[at] << 8 | data[at + 1];
    if (length < 2 || at + length > size) return fail("ends inside a header");
    const uint8_t* body = data + at + 2;
    if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
      if (info->width) return fail("has two frame headers");
      if (length < 8) return fail("has a damaged frame header");
      info->sof = marker;
      info->precision = body[0];
      info->height = body[1] << 8 | body[2];
      info->width = body[3] << 8 | body[4];
      info->components = body[5];
      if (!info->width || !info->height || info->components < 1 || info->components > 4 ||
          length < 8 + 3 * info->components)
        return fail("has a damaged frame header");
      for (int c = 0; c < info->components; ++c) {
        info->h[c] = body[7 + 3 * c] >> 4;
        info->v[c] = body[7 + 3 * c] & 15;
      }
    } else if (marker == 0xE1 && length > 8 && !memcmp(body, "Exif\0\0", 6) && !info->exif_at) {
      info->exif_at = at + 2;
      info->exif_size = length - 2;
    } else if (marker == 0xEE && length >= 14 && !memcmp(body, "Adobe", 5)) {
      info->transform = body[11];
    } else if (marker == 0xDA) {
      if (!info->width) return fail("has image data before its frame header");
      info->scans_all = length > 2 && body[0] == info->components;
      return 0;
    }
    at += length;
  }
}

namespace {

// Parses a file for the fast way. Anything unusual is left to libjpeg.
bool Parse(const uint8_t* data, int64_t size, bool standard_dc, Plain* plain, Table* dc,
           Table* ac) {
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
        part.quantizer = body[8 + 3 * c] & 31;
        if (part.h < 1 || part.h > 4 || part.v < 1 || part.v > 4) return false;
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
        if (!Build(body + 1, total, kind < 16, kind < 16 ? &dc[kind] : &ac[kind & 1]))
          return false;
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
        part.dc = body[2 + 2 * c] >> 4;
        part.ac = body[2 + 2 * c] & 15;
        if (!(quantizers >> part.quantizer & 1)) return false;
        if (body[1 + 2 * c] != part.id || part.dc > 1 || part.ac > 1 || !dc[part.dc].defined ||
            !ac[part.ac].defined)
          return false;
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
    Table dc[2], ac[2], standard;
    std::vector<uint8_t> clean, joined;
  };
  static thread_local Scratch scratch;
  auto& [dc, ac, standard, clean, joined] = scratch;  // one look-up of the thread's own
  for (int i = 0; i < 2; ++i) dc[i].defined = ac[i].defined = false;
  Plain plain;
  if (!Parse(data, size, standard_dc, &plain, dc, ac)) return kNotPlain;
  if (!standard.defined) Build(kStandardDc, 12, true, &standard);
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
  BitWriter writer(joined.data());
  const uint8_t* bits = clean.data();
  uint64_t at = 0, copied = 0;
  uint64_t limit = ends[0] * 8;
  size_t interval = 0;
  int64_t left = plain.interval ? plain.interval : across * down;
  int in_dc[4] = {0}, out_dc[4] = {0};
  const Table* const dc_tables = dc;
  const Table* const ac_tables = ac;
  for (int64_t row = 0; row < down; ++row) {
    memset(out_dc, 0, sizeof out_dc);
    for (int64_t column = 0; column < across; ++column) {
      if (left == 0) {
        if (limit - at >= 8) return kNotPlain;
        writer.Copy(bits, copied, at);
        at = copied = ends[interval] * 8;
        limit = ends[++interval] * 8;
        left = plain.interval;
        memset(in_dc, 0, sizeof in_dc);
      }
      --left;
      for (int c = 0; c < plain.components; ++c) {
        const Component part = plain.component[c];
        const Table& dc_table = dc_tables[part.dc];
        const Table& ac_table = ac_tables[part.ac];
        for (int block = part.h * part.v; block > 0; --block) {
          uint64_t word = Peek64(bits, at);
          int symbol, length;
          if (const Step step = dc_table.one[word >> (64 - kLook)]) {
            length = step & 31;
            symbol = step >> 6;
          } else if (!Find(dc_table, word, &symbol, &length)) {
            return kNotPlain;
          }
          int difference = 0;
          if (symbol) {
            difference = static_cast<int>((word << length) >> (64 - symbol));
            if (difference < 1 << (symbol - 1)) difference -= (1 << symbol) - 1;
          }
          const int value = in_dc[c] + difference;
          if (value < -32768 || value > 32767) return kNotPlain;
          if (in_dc[c] != out_dc[c] || standard_dc) {
            const int patched = value - out_dc[c];
            const int category = Category(patched);
            const Table& code = standard_dc ? standard : dc_table;
            if (category > 11 || !code.lengths[category]) return kNotPlain;
            writer.Copy(bits, copied, at);
            writer.Put(code.codes[category], code.lengths[category]);
            writer.Put(patched < 0 ? patched - 1 : patched, category);
            copied = at + length + symbol;
          }
          at += length + symbol;
          in_dc[c] = out_dc[c] = value;
          for (int k = 1; k < 64;) {
            word = Peek64(bits, at);
            // 57 bits are at hand: enough for four looks of 12, or for any one symbol of 26.
            for (int look = 0; look < 4; ++look) {
              Step step = ac_table.many[word >> (64 - kLook)];
              const int next = k + (step >> 6);
              if (next < 64) {
                word <<= step & 31;
                at += step & 31;
                k = next;
                continue;
              }
              // The block ends here, before the end of these symbols, or with a long code.
              if (step & kEndOfBlock ? next > 127 : next > 64) {
                if (look) break;  // one symbol at a time, from fresh bits
                step = ac_table.one[word >> (64 - kLook)];
                if (!step) {
                  if (!Find(ac_table, word, &symbol, &length)) return kNotPlain;
                  step = StepOf(symbol, length);
                }
                if (k + (step >> 6) > (step & kEndOfBlock ? 127 : 64)) return kNotPlain;
              }
              at += step & 31;
              k += step >> 6;
              break;
            }
          }
          if (at > limit) return kNotPlain;  // ran into the next marker
        }
      }
    }
    writer.Copy(bits, copied, at);
    copied = at;
    rows.push_back(writer.Align() - joined.data());
  }
  if (limit - at >= 8) return kNotPlain;

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

namespace {

__attribute__((target_clones("avx512f", "avx2", "default"))) void AddRow(
    uint32_t* sum, const uint8_t* row, uint32_t weight, int count) {
  for (int i = 0; i < count; ++i) sum[i] += weight * row[i];
}

// Shrinks rows that arrive one by one to `to_w` x `to_h` by averaging areas, in integers.
class AreaShrinker {
 public:
  AreaShrinker(int w, int h, int to_w, int to_h, uint8_t* out)
      : w_(w), h_(h), to_w_(to_w), to_h_(to_h), out_(out), sum_(3 * size_t(w), 0) {
    // Weight of every source pixel in every target pixel, in 1/4096 of the target; exact sums.
    first_.resize(to_w + 1);
    for (int x = 0; x < to_w; ++x) {
      const int64_t left = int64_t(x) * w, right = int64_t(x + 1) * w;  // in 1/to_w pixels
      const int from = static_cast<int>(left / to_w);
      const int to = static_cast<int>((right + to_w - 1) / to_w);
      first_[x] = static_cast<int>(weight_.size());
      start_.push_back(from);
      int64_t covered = 0;
      int given = 0;
      for (int i = from; i < to; ++i) {
        const int64_t begin = left > int64_t(i) * to_w ? left : int64_t(i) * to_w;
        const int64_t end = right < int64_t(i + 1) * to_w ? right : int64_t(i + 1) * to_w;
        covered += end - begin;
        const int upto = static_cast<int>((covered * 4096 + w / 2) / w);
        weight_.push_back(upto - given);
        given = upto;
      }
    }
    first_[to_w] = static_cast<int>(weight_.size());
  }

  void Row(const uint8_t* row) {
    // This row covers [y * to_h, (y + 1) * to_h) in 1/to_h pixels; a target row covers h of them.
    int64_t begin = int64_t(y_) * to_h_;
    const int64_t end = begin + to_h_;
    while (begin < end) {
      const int64_t stop = int64_t(target_ + 1) * h_;
      const int64_t until = end < stop ? end : stop;
      covered_ += until - begin;
      const int upto = static_cast<int>((covered_ * 2048 + h_ / 2) / h_);
      const uint32_t weight = upto - given_;
      given_ = upto;
      AddRow(sum_.data(), row, weight, 3 * w_);
      begin = until;
      if (until == stop) Emit();
    }
    ++y_;
  }

 private:
  void Emit() {
    uint8_t* out = out_ + size_t(target_) * to_w_ * 3;
    for (int x = 0; x < to_w_; ++x) {
      uint32_t red = 1 << 22, green = 1 << 22, blue = 1 << 22;
      const uint32_t* sum = sum_.data() + 3 * start_[x];
      for (int i = first_[x]; i < first_[x + 1]; ++i, sum += 3) {
        const uint32_t weight = weight_[i];
        red += weight * sum[0];
        green += weight * sum[1];
        blue += weight * sum[2];
      }
      out[3 * x] = red >> 23;
      out[3 * x + 1] = green >> 23;
      out[3 * x + 2] = blue >> 23;
    }
    std::fill(sum_.begin(), sum_.end(), 0);
    covered_ = 0;
    given_ = 0;
    ++target_;
  }

  int w_, h_, to_w_, to_h_;
  uint8_t* out_;
  std::vector<uint32_t> sum_;
  std::vector<int> first_, start_;
  std::vector<uint32_t> weight_;
  int y_ = 0, target_ = 0, given_ = 0;
  int64_t covered_ = 0;
};

}  // namespace

// Decodes a grey or three-component JPEG to RGB, shrunk to to_w x to_h (the file's own size: no
// shrinking). Returns 0, or kFailed where libjpeg would have to make up any pixel.
API int dp_decode(const uint8_t* data, int64_t size, int to_w, int to_h, uint8_t* out,
                  char* message, int message_size) {
  jpeg_decompress_struct in;
  Errors errors;
  jpeg_progress_mgr progress;
  AreaShrinker* volatile shrinker = nullptr;  // volatile: they must survive the jump
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
  // The DCT itself halves an image as well as averaging does; the last factor of two to four is
  // left to the averaging.
  in.scale_num = 8;
  in.scale_denom = 8;
  while (in.scale_num > 1 && int(in.image_width * in.scale_num / 16) >= 2 * to_w &&
         int(in.image_height * in.scale_num / 16) >= 2 * to_h)
    in.scale_num /= 2;
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
    shrinker = new AreaShrinker(w, h, to_w, to_h, out);
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
  AreaShrinker shrinker(w, h, to_w, to_h, out);
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

namespace {

__attribute__((target_clones("avx512f", "avx2", "default"))) void AddSums(
    const uint8_t* rgb, int64_t count, int64_t* totals) {
  constexpr int kLanes = 96;        // a multiple of 3, so a lane is always the same channel
  constexpr int64_t kRun = 65536;   // 65536 * 255^2 fits 32 bits
  for (int64_t at = 0; at < count;) {
    uint32_t sum[kLanes] = {0}, square[kLanes] = {0};
    int64_t runs = (count - at) / kLanes;
    if (runs > kRun) runs = kRun;
    for (int64_t run = 0; run < runs; ++run, at += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t value = rgb[at + lane];
        sum[lane] += value;
        square[lane] += value * value;
      }
    for (int lane = 0; runs < kRun && at < count; ++lane, ++at) {
      const uint32_t value = rgb[at];
      totals[lane % 3] += value;
      totals[3 + lane % 3] += value * value;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      totals[lane % 3] += sum[lane];
      totals[3 + lane % 3] += square[lane];
    }
  }
}

}  // namespace

// Adds sums and sums of squares of RGB pixels to totals[6].
API void dp_sums(const uint8_t* rgb, int64_t pixels, int64_t* totals) {
  AddSums(rgb, 3 * pixels, totals);
}

API int dp_libjpeg_version() { return LIBJPEG_TURBO_VERSION_NUMBER; }
