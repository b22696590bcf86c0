// The inner loops of the resize, for any processor and for AVX2, with equal results.
#include <algorithm>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

namespace {

// One lane of pmulhrsw: a * b / 32768, rounded.
inline int16_t mulhrs(int16_t a, int16_t b) {
  return static_cast<int16_t>((static_cast<int32_t>(a) * b + 0x4000) >> 15);
}

inline int16_t saturate(int value) {
  return static_cast<int16_t>(std::clamp(value, -32768, 32767));
}

// JFIF's inverse: R = Y + 1.402 Cr, G = Y - 0.344136 Cb - 0.714136 Cr, B = Y + 1.772 Cb, where Cb
// and Cr are taken from 128. Source: ITU-T T.871, section 7.
constexpr int16_t kRed = 13173, kGreenCb = 11277, kGreenCr = 23401, kBlue = 25297;  // Q15, less 1
constexpr int16_t kMiddle = 128 << 7, kHalf = 1 << 6;

uint8_t level(int16_t value, int16_t shift) {
  const int16_t whole = std::clamp<int16_t>(value, 0, 255 << 7);
  return static_cast<uint8_t>(std::clamp(saturate(saturate(whole + shift) + kHalf) >> 7, 0, 255));
}

// Columns [from, out_w) of `Kernels::interleave`.
void interleave_from(int from, const int16_t* const rgb[3], const int16_t shift[3], int out_w,
                     int rows, uint8_t* out) {
  for (int r = 0; r < rows; ++r)
    for (int x = from; x < out_w; ++x)
      for (int c = 0; c < 3; ++c)
        out[(static_cast<ptrdiff_t>(r) * out_w + x) * 3 + c] =
            level(rgb[c][x * kLanes + r], shift[c]);
}

namespace portable {

inline int16_t value(uint8_t sample) { return static_cast<int16_t>(sample << 7); }
inline int16_t value(int16_t sample) { return sample; }

template <class Sample>
int16_t weigh(const Sample* from, ptrdiff_t stride, const int16_t* weight, int taps) {
  int sum = 0;
  for (int t = 0; t < taps; ++t) sum += mulhrs(value(from[t * stride]), weight[t]);
  return static_cast<int16_t>(sum);
}

void vertical(const uint8_t* rows, ptrdiff_t stride, const int16_t* weight, int taps, int cols,
              int16_t* out) {
  for (int x = 0; x < cols; ++x) out[x] = weigh(rows + x, stride, weight, taps);
}

void transpose(const int16_t* in, ptrdiff_t stride, int cols, int16_t* out) {
  for (int x = 0; x < cols; ++x)
    for (int r = 0; r < kLanes; ++r) out[x * kLanes + r] = in[r * stride + x];
}

void horizontal(const int16_t* in, const Taps& taps, int out_w, int16_t* out) {
  for (int o = 0; o < out_w; ++o)
    for (int l = 0; l < kLanes; ++l)
      out[o * kLanes + l] = weigh(in + taps.first[o] * kLanes + l, kLanes,
                                  &taps.weight[o * taps.width], taps.width);
}

void ycc_to_rgb(int16_t* y, int16_t* cb, int16_t* cr, int count) {
  for (int i = 0; i < count; ++i) {
    const int16_t l = y[i], u = static_cast<int16_t>(cb[i] - kMiddle);
    const int16_t v = static_cast<int16_t>(cr[i] - kMiddle);
    y[i] = saturate(l + (v + mulhrs(v, kRed)));
    cb[i] = saturate(l - (mulhrs(u, kGreenCb) + mulhrs(v, kGreenCr)));
    cr[i] = saturate(l + (u + mulhrs(u, kBlue)));
  }
}

void interleave(const int16_t* const rgb[3], const int16_t shift[3], int out_w, int rows,
                uint8_t* out) {
  interleave_from(0, rgb, shift, out_w, rows, out);
}

constexpr Kernels all{vertical, transpose, horizontal, ycc_to_rgb, interleave};

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

inline AVX2 __m256i load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
inline AVX2 void store(void* at, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(at), value);
}
inline AVX2 __m256i values(const int16_t* at) { return load(at); }
inline AVX2 __m256i values(const uint8_t* at) {
  return _mm256_slli_epi16(
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), 7);
}

// 32 outputs side by side; a tap of the next lies `stride` samples on.
template <class Sample>
inline AVX2 void weigh(const Sample* from, ptrdiff_t stride, const int16_t* weight, int taps,
                       int16_t* out) {
  __m256i w = _mm256_set1_epi16(weight[0]);
  __m256i a = _mm256_mulhrs_epi16(values(from), w);
  __m256i b = _mm256_mulhrs_epi16(values(from + 16), w);
  for (int t = 1; t < taps; ++t) {
    from += stride;
    w = _mm256_set1_epi16(weight[t]);
    a = _mm256_add_epi16(a, _mm256_mulhrs_epi16(values(from), w));
    b = _mm256_add_epi16(b, _mm256_mulhrs_epi16(values(from + 16), w));
  }
  store(out, a);
  store(out + 16, b);
}

AVX2 void vertical(const uint8_t* rows, ptrdiff_t stride, const int16_t* weight, int taps, int cols,
                   int16_t* out) {
  for (int x = 0; x < cols; x += 32) weigh(rows + x, stride, weight, taps, out + x);
}

AVX2 void transpose(const int16_t* in, ptrdiff_t stride, int cols, int16_t* out) {
  for (int x = 0; x < cols; x += 8)
    for (int r = 0; r < kLanes; r += 16) {
      __m256i a[8], b[8];
      for (int i = 0; i < 8; ++i) {  // rows r + i and r + i + 8
        const int16_t* at = in + (r + i) * stride + x;
        a[i] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8 * stride)), 1);
      }
      for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 4]);
      }
      for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_epi16(b[i], b[i + 4]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(b[i], b[i + 4]);
      }
      for (int i = 0; i < 4; ++i) {
        store(out + (x + 2 * i) * kLanes + r, _mm256_unpacklo_epi16(a[i], a[i + 4]));
        store(out + (x + 2 * i + 1) * kLanes + r, _mm256_unpackhi_epi16(a[i], a[i + 4]));
      }
    }
}

AVX2 void horizontal(const int16_t* in, const Taps& taps, int out_w, int16_t* out) {
  const int16_t* weight = taps.weight.data();
  for (int o = 0; o < out_w; ++o, weight += taps.width)
    weigh(in + taps.first[o] * kLanes, kLanes, weight, taps.width, out + o * kLanes);
}

AVX2 void ycc_to_rgb(int16_t* y, int16_t* cb, int16_t* cr, int count) {
  const __m256i middle = _mm256_set1_epi16(kMiddle);
  const __m256i red = _mm256_set1_epi16(kRed), blue = _mm256_set1_epi16(kBlue);
  const __m256i green_cb = _mm256_set1_epi16(kGreenCb), green_cr = _mm256_set1_epi16(kGreenCr);
  for (int i = 0; i < count; i += 16) {
    const __m256i l = load(y + i);
    const __m256i u = _mm256_sub_epi16(load(cb + i), middle);
    const __m256i v = _mm256_sub_epi16(load(cr + i), middle);
    const __m256i r = _mm256_add_epi16(v, _mm256_mulhrs_epi16(v, red));
    const __m256i g = _mm256_add_epi16(_mm256_mulhrs_epi16(u, green_cb),
                                       _mm256_mulhrs_epi16(v, green_cr));
    const __m256i b = _mm256_add_epi16(u, _mm256_mulhrs_epi16(u, blue));
    store(y + i, _mm256_adds_epi16(l, r));
    store(cb + i, _mm256_subs_epi16(l, g));
    store(cr + i, _mm256_adds_epi16(l, b));
  }
}

// 32 values of one column -> 32 bytes, in order.
inline AVX2 __m256i bytes(const int16_t* at, __m256i shift) {
  const __m256i zero = _mm256_setzero_si256(), white = _mm256_set1_epi16(255 << 7);
  const __m256i half = _mm256_set1_epi16(kHalf);
  __m256i a = _mm256_min_epi16(_mm256_max_epi16(load(at), zero), white);
  __m256i b = _mm256_min_epi16(_mm256_max_epi16(load(at + 16), zero), white);
  a = _mm256_srai_epi16(_mm256_adds_epi16(_mm256_adds_epi16(a, shift), half), 7);
  b = _mm256_srai_epi16(_mm256_adds_epi16(_mm256_adds_epi16(b, shift), half), 7);
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
}

AVX2 void interleave(const int16_t* const rgb[3], const int16_t shift[3], int out_w, int rows,
                     uint8_t* out) {
  const ptrdiff_t pitch = static_cast<ptrdiff_t>(out_w) * 3;
  const __m256i zero = _mm256_setzero_si256();
  const __m256i squeeze = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
                                           0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  __m256i s[3];
  for (int c = 0; c < 3; ++c) s[c] = _mm256_set1_epi16(shift[c]);
  for (int x = 0; x + 8 <= out_w; x += 8) {
    // column[k][i]: pixels of rows 4k..4k+3 and 16+4k.. of column x + i, four bytes each
    __m256i column[4][8];
    for (int i = 0; i < 8; ++i) {
      const __m256i r = bytes(rgb[0] + (x + i) * kLanes, s[0]);
      const __m256i g = bytes(rgb[1] + (x + i) * kLanes, s[1]);
      const __m256i b = bytes(rgb[2] + (x + i) * kLanes, s[2]);
      const __m256i rg_low = _mm256_unpacklo_epi8(r, g), rg_high = _mm256_unpackhi_epi8(r, g);
      const __m256i b_low = _mm256_unpacklo_epi8(b, zero), b_high = _mm256_unpackhi_epi8(b, zero);
      column[0][i] = _mm256_unpacklo_epi16(rg_low, b_low);
      column[1][i] = _mm256_unpackhi_epi16(rg_low, b_low);
      column[2][i] = _mm256_unpacklo_epi16(rg_high, b_high);
      column[3][i] = _mm256_unpackhi_epi16(rg_high, b_high);
    }
    const bool last = x + 16 > out_w;  // wide stores would run into the next row
    for (int k = 0; k < 4; ++k) {
      __m256i* c = column[k];
      __m256i pairs[8], quads[2][4];
      for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm256_unpacklo_epi32(c[2 * i], c[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(c[2 * i], c[2 * i + 1]);
      }
      for (int h = 0; h < 2; ++h) {
        quads[h][0] = _mm256_unpacklo_epi64(pairs[4 * h], pairs[4 * h + 2]);
        quads[h][1] = _mm256_unpackhi_epi64(pairs[4 * h], pairs[4 * h + 2]);
        quads[h][2] = _mm256_unpacklo_epi64(pairs[4 * h + 1], pairs[4 * h + 3]);
        quads[h][3] = _mm256_unpackhi_epi64(pairs[4 * h + 1], pairs[4 * h + 3]);
      }
      for (int i = 0; i < 4; ++i) {  // columns x..x+3 and x+4..x+7 of rows 4k+i and 16+4k+i
        const __m256i left = _mm256_shuffle_epi8(quads[0][i], squeeze);
        const __m256i right = _mm256_shuffle_epi8(quads[1][i], squeeze);
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * h + 4 * k + i;
          if (row >= rows) break;
          uint8_t* to = out + row * pitch + 3 * x;
          const __m128i a = h ? _mm256_extracti128_si256(left, 1) : _mm256_castsi256_si128(left);
          const __m128i b = h ? _mm256_extracti128_si256(right, 1) : _mm256_castsi256_si128(right);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), a);
          if (!last) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 12), b);
          } else {
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 12), b);
            const int tail = _mm_extract_epi32(b, 2);
            __builtin_memcpy(to + 20, &tail, 4);
          }
        }
      }
    }
  }
  interleave_from(out_w / 8 * 8, rgb, shift, out_w, rows, out);
}

constexpr Kernels all{vertical, transpose, horizontal, ycc_to_rgb, interleave};

}  // namespace avx2
#endif

}  // namespace

bool only_portable = false;

const Kernels& kernels() {
#if defined(__x86_64__)
  static const bool fast = __builtin_cpu_supports("avx2");
  if (fast && !only_portable) return avx2::all;
#endif
  return portable::all;
}
