// What a JPEG's headers say, none of it decoded.
#include "codec.h"

// What a file's headers say. Offsets are into the file; exif_at = 0: none.
struct JpegInfo {
  int32_t width, height, components, precision, sof, h[4], v[4];
  int64_t exif_at, exif_size;
  int32_t several;  // CIPA DC-007: this is the first picture of several
};

// Reads the markers up to the first scan. Returns 0 or kFailed.
EXPORT int dp_inspect(const uint8_t* data, int64_t size, JpegInfo* info) {
  *info = JpegInfo{};
  if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return fail(kFailed, "is not a JPEG");
  int64_t at = 2;
  while (true) {
    while (at < size && data[at] != 0xFF) ++at;  // libjpeg skips garbage here, too
    while (at < size && data[at] == 0xFF) ++at;
    if (at + 2 >= size) return fail(kFailed, "ends before its image data");
    const int marker = data[at++];
    if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7) || marker == 0) continue;
    if (marker == 0xD9) return fail(kFailed, "ends before its image data");
    const int64_t length = data[at] << 8 | data[at + 1];
    if (length < 2 || at + length > size) return fail(kFailed, "ends inside a header");
    const uint8_t* body = data + at + 2;
    if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
      if (info->width) return fail(kFailed, "has two frame headers");
      if (length < 8) return fail(kFailed, "has a damaged frame header");
      info->sof = marker;
      info->precision = body[0];
      info->height = body[1] << 8 | body[2];
      info->width = body[3] << 8 | body[4];
      info->components = body[5];
      if (!info->width || !info->height || info->components < 1 || info->components > 4 ||
          length < 8 + 3 * info->components)
        return fail(kFailed, "has a damaged frame header");
      for (int c = 0; c < info->components; ++c) {
        info->h[c] = body[7 + 3 * c] >> 4;
        info->v[c] = body[7 + 3 * c] & 15;
      }
    } else if (marker == 0xE1 && length > 8 && !memcmp(body, "Exif\0\0", 6) && !info->exif_at) {
      info->exif_at = at + 2;
      info->exif_size = length - 2;
    } else if (marker == 0xE2 && length > 5 && !memcmp(body, "MPF\0", 4)) {
      info->several = 1;
    } else if (marker == 0xDA) {
      return info->width ? 0 : fail(kFailed, "has image data before its frame header");
    }
    at += length;
  }
}
