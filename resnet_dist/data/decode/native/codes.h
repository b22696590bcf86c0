// Huffman codes of JPEGs (ITU-T T.81, annexes C and F): their bits, their tables, and tables that
// are kept from file to file. Shared by the loader's decoder and by the conversion (data_prep).
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>

// Compiled for its caller's target.
#define INLINE __attribute__((always_inline)) inline

// The value that `size` bits after a code stand for; F.2.2.1.
INLINE int extend(int bits, int size) {
  return size && bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

struct BitReader {
  const uint8_t* next = nullptr;
  uint64_t word = 0;  // the next bits, left-justified
  int count = 0;      // how many of them are real

  INLINE void refill() {  // to at least 56 bits; the load does not wait for the bits before it
    uint64_t more;
    std::memcpy(&more, next, 8);
    word |= __builtin_bswap64(more) >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  INLINE void drop(int bits) {
    word <<= bits;
    count -= bits;
  }
};

struct Code {
  bool is_dc;
  uint8_t counts[16], symbols[256];  // codes of every length from 1, and what they mean, in order
  int32_t limit[17];                 // first code beyond length l, left-aligned in 16 bits
  int32_t offset[17];                // from a code of length l to its place among the symbols

  // Gives the symbols their codes and tells visit(symbol, code, length) each. False where a length
  // has too many, or where `visit` refuses.
  template <class Visit>
  bool assign(Visit visit) {
    int code = 0, index = 0;
    for (int length = 1; length <= 16; ++length) {
      offset[length] = index - code;
      for (int i = 0; i < counts[length - 1]; ++i, ++index, ++code)
        if (code >= 1 << length || !visit(symbols[index], code, length)) return false;
      limit[length] = code << (16 - length);
      code <<= 1;
    }
    return true;
  }

  // Symbol and length of a code of `shortest` or more bits; false where none fits.
  INLINE bool find(uint64_t bits, int shortest, int* symbol, int* length) const {
    const int next = static_cast<int>(bits >> 48);
    for (int l = shortest; l <= 16; ++l)
      if (next < limit[l]) {
        *symbol = symbols[((next >> (16 - l)) + offset[l]) & 255];
        *length = l;
        return true;
      }
    return false;
  }
};

// The `kKept` tables used last, by content: most files carry the same few, and building one costs
// microseconds. A `Table` is a Code that build() completes. What a file uses at a time (at most 8)
// is never lost to its own next one.
template <class Table, int kKept>
class TableCache {
 public:
  // counts[16] and their `total` symbols, as in the file. Null where Table::build refuses them.
  const Table* get(const uint8_t* counts, const uint8_t* symbols, int total, bool is_dc) {
    Kept* oldest = kept_;
    ++clock_;
    for (Kept& entry : kept_) {
      if (entry.used && entry.table->is_dc == is_dc &&
          !std::memcmp(entry.table->counts, counts, 16) &&
          !std::memcmp(entry.table->symbols, symbols, total)) {
        entry.used = clock_;
        return entry.table.get();
      }
      if (entry.used < oldest->used) oldest = &entry;
    }
    oldest->table = std::make_unique<Table>();
    oldest->table->is_dc = is_dc;
    std::memcpy(oldest->table->counts, counts, 16);
    std::memcpy(oldest->table->symbols, symbols, total);
    oldest->used = oldest->table->build() ? clock_ : 0;
    return oldest->used ? oldest->table.get() : nullptr;
  }

 private:
  struct Kept {
    std::unique_ptr<Table> table;
    uint64_t used = 0;  // when; 0: nothing in it
  };
  Kept kept_[kKept];
  uint64_t clock_ = 0;
};
