// Plain JPEGs, which restarts.cpp rewrites bit by bit: their headers and Huffman tables.
#pragma once
#include <vector>

#include "codes.h"

constexpr int kLook = 12;
constexpr int kProbes = 3;  // after a refill of 56 bits
constexpr int kMost = 56 / kProbes;  // bits that one of them may pass over

// What some bits of AC codes and values do: bits 0-5 how many they are, from bit 6 by how many
// coefficients they advance, and 64 more where the block ends with them. So sums of steps are steps,
// and one comparison tells that something ends or is wrong.
using Step = uint16_t;
constexpr int kAdvance = 6;
constexpr Step kEndOfBlock = 64 << kAdvance, kUnknown = 512 << kAdvance;

struct Table : Code {
  int32_t dc[1 << kLook];  // DC: difference << 8 | bits, where they fit in kLook; else 0
  Step one[1 << kLook];    // AC: the first symbol in the next kLook bits, with its value; else 0
  // AC: all symbols that lie in them whole, up to the end of the block, or the first alone where its
  // value goes on for some bits, since a second look at those is a branch that nothing foretells.
  Step many[1 << kLook];
  uint8_t lengths[256];    // of the symbol's code, 0: no code
  uint16_t codes[256];

  bool build();
};

INLINE Step step_of(int symbol, int length) {
  if (symbol == 0) return static_cast<Step>(length | kEndOfBlock);
  return static_cast<Step>((length + (symbol & 15)) | ((symbol >> 4) + 1) << kAdvance);
}

using Tables = TableCache<Table, 12>;

// Lengths and symbols of a DC code with all twelve categories (T.81, table K.3).
constexpr uint8_t kStandardDc[28] = {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0,
                                     0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

struct Component {
  int id, h, v, quantizer;
  const Table *dc = nullptr, *ac = nullptr;
};

struct Plain {  // what the fast way needs of a file
  int width = 0, height = 0, components = 0, interval = 0, h_max = 1, v_max = 1;
  Component component[4];
  const uint8_t* scan = nullptr;  // entropy-coded data
  std::vector<uint8_t> head;      // SOI .. before SOS, without what is dropped
  std::vector<uint8_t> sos;
};

// Reads a file's headers. False where anything is unusual. `standard_dc`: tables of kStandardDc go
// into `head` in place of the file's own.
bool parse_plain(const uint8_t* data, int64_t size, bool standard_dc, Tables* cache, Plain* plain);
