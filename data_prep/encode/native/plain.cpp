#include "plain.h"

#include <algorithm>
#include <numeric>

#include "segments.h"

// False where that is no code, or has symbols that no 8-bit picture needs.
bool Table::build() {
  const bool is_code = assign([this](int symbol, int code, int length) {
    const int size = is_dc ? symbol : symbol & 15, rest = kLook - length;
    if (lengths[symbol] || size > (is_dc ? 11 : 10)) return false;
    if (!is_dc && !size && symbol != 0 && symbol != 0xF0) return false;
    lengths[symbol] = length;
    codes[symbol] = code;
    for (int tail = 0; rest >= 0 && tail < 1 << rest; ++tail) {
      if (!is_dc)
        one[code << rest | tail] = step_of(symbol, length);
      else if (size <= rest)
        dc[code << rest | tail] = extend(tail >> (rest - size), size) * 256 + length + size;
    }
    return true;
  });
  for (int window = 0; is_code && !is_dc && window < 1 << kLook; ++window) {
    int sum = 0;
    while (sum < kEndOfBlock) {
      const Step step = one[(window << (sum & 63)) & ((1 << kLook) - 1)];
      if (!step || (sum & 63) + (step & 63) > kLook) break;
      if (step < kEndOfBlock && sum + step >= kEndOfBlock) break;  // would read as an end
      sum += step;
    }
    if (!sum && (one[window] & 63) <= kMost) sum = one[window];
    many[window] = sum ? static_cast<Step>(sum) : kUnknown;
  }
  return is_code;
}

bool parse_plain(const uint8_t* data, int64_t size, bool standard_dc, Tables* cache, Plain* plain) {
  const Table *dc[2] = {nullptr, nullptr}, *ac[2] = {nullptr, nullptr};
  const auto keep = [plain](const uint8_t* from, const uint8_t* end) {
    plain->head.insert(plain->head.end(), from, end);
  };
  const auto keep_table = [&](int id, const uint8_t* counts, int total) {
    const uint8_t start[] = {0xFF, 0xC4, static_cast<uint8_t>((19 + total) >> 8),
                             static_cast<uint8_t>(19 + total), static_cast<uint8_t>(id)};
    keep(start, start + sizeof start);
    keep(counts, counts + 16 + total);
  };
  int tables = 0, quantizers = 0;  // `quantizers`: bit set of those defined
  keep(data, data + 2);
  Segment segment{data + 2};
  while (true) {
    const uint8_t* start = segment.end;
    if (!segment.next(data + size)) return false;
    const uint8_t *body = segment.body, *end = segment.end;
    const int marker = segment.marker;
    if (marker == 0xC0 || marker == 0xC1) {
      if (plain->components || segment.size < 6 || body[0] != 8) return false;
      plain->height = body[1] << 8 | body[2];
      plain->width = body[3] << 8 | body[4];
      plain->components = body[5];
      if (!plain->width || !plain->height || (plain->components != 1 && plain->components != 3) ||
          segment.size != 6 + 3 * plain->components)
        return false;
      for (int c = 0; c < plain->components; ++c) {
        const uint8_t* from = body + 6 + 3 * c;
        Component& part = plain->component[c];
        part = {from[0], from[1] >> 4, from[1] & 15, from[2]};
        if (part.h < 1 || part.h > 4 || part.v < 1 || part.v > 4) return false;
        if (part.quantizer > 3) return false;
        plain->h_max = std::max(plain->h_max, part.h);
        plain->v_max = std::max(plain->v_max, part.v);
      }
      if (plain->components == 1 && (plain->h_max != 1 || plain->v_max != 1)) return false;
      keep(start, end);
    } else if (marker == 0xC4) {
      while (body < end) {
        if (end - body < 17) return false;
        const int id = body[0], total = std::accumulate(body + 1, body + 17, 0);
        if ((id & 0xEE) || total > 256 || end - body < 17 + total) return false;
        if (++tables > 8) return false;
        const Table* table = cache->get(body + 1, body + 17, total, id < 16);
        if (!table) return false;
        (id < 16 ? dc : ac)[id & 1] = table;
        if (id >= 16 || !standard_dc) keep_table(id, body + 1, total);
        body += 17 + total;
      }
    } else if (marker == 0xDB) {
      while (body < end) {
        const int id = body[0] & 15, wide = body[0] >> 4;
        if (id > 3 || wide > 1 || end - body < 65 + 64 * wide) return false;
        quantizers |= 1 << id;
        body += 65 + 64 * wide;
      }
      keep(start, end);
    } else if (marker == 0xEE ||
               (marker == 0xE0 && segment.size >= 14 && !memcmp(body, "JFIF", 5))) {
      keep(start, end);
    } else if (marker == 0xDD) {
      if (segment.size != 2) return false;
      plain->interval = body[0] << 8 | body[1];
    } else if (marker == 0xDA) {
      const int count = plain->components;
      if (!count || segment.size != 4 + 2 * count || body[0] != count) return false;
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
      for (int id = 0; standard_dc && id < 2; ++id) keep_table(id, kStandardDc, 12);
      plain->sos.assign(start, end);
      plain->scan = end;
      return true;
    } else if (!(marker >= 0xE0 && marker <= 0xEF) && marker != 0xFE) {
      return false;  // another process, hierarchical, DNL, ...
    }
  }
}
