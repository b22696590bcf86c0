// Marker segments of a JPEG's header, one after the other.
#pragma once
#include <cstdint>

struct Segment {
  const uint8_t* end;   // of it; before the first next(): where the first one starts
  const uint8_t* body = nullptr;
  int marker = 0, size = 0;  // `size`: of the body

  // Goes on to the next one. False where none lies whole before `limit`.
  bool next(const uint8_t* limit) {
    const uint8_t* at = end;
    if (limit - at < 4 || at[0] != 0xFF) return false;
    marker = at[1];
    size = (at[2] << 8 | at[3]) - 2;
    body = at + 4;
    if (size < 0 || limit - body < size) return false;
    end = body + size;
    return true;
  }
};
