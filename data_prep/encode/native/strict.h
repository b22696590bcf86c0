// libjpeg with errors as values, and warnings that mean invented pixels as errors.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <jpeglib.h>

#include <jerror.h>

#if JPEG_LIB_VERSION >= 70  // the names of libjpeg's newer interfaces
#define DCT_SIZE DCT_h_scaled_size
#define MIN_DCT_SIZE min_DCT_h_scaled_size
#else
#define DCT_SIZE DCT_scaled_size
#define MIN_DCT_SIZE min_DCT_scaled_size
#endif

#define API extern "C" __attribute__((visibility("default")))

constexpr int kFailed = -1;      // the message says why
constexpr int kNotPlain = -2;    // valid perhaps, but not for the fast way
constexpr int kMaxScans = 1000;  // of a progressive file; real ones have about 10

struct Errors {
  jpeg_error_mgr base;
  jmp_buf escape;
  char* message;
  int message_size;
};

inline void Escape(j_common_ptr common) {
  Errors* errors = reinterpret_cast<Errors*>(common->err);
  char text[JMSG_LENGTH_MAX];
  common->err->format_message(common, text);
  snprintf(errors->message, errors->message_size, "%s", text);
  longjmp(errors->escape, 1);
}

// Warnings that mean pixels were made up are errors; the others leave every pixel as encoded.
inline void Judge(j_common_ptr common, int level) {
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

inline void Silent(j_common_ptr) {}

inline jpeg_error_mgr* Arm(Errors* errors, char* message, int message_size) {
  jpeg_std_error(&errors->base);
  errors->base.error_exit = Escape;
  errors->base.emit_message = Judge;
  errors->base.output_message = Silent;
  errors->message = message;
  errors->message_size = message_size;
  return &errors->base;
}

inline void CountScans(j_common_ptr common) {
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
inline void RequireAllScans(j_decompress_ptr in) {
  if (!in->progressive_mode || !in->coef_bits) return;
  for (int c = 0; c < in->num_components; ++c)
    for (int k = 0; k < 64; ++k)
      if (in->coef_bits[c][k] > 0 || (k < 10 && in->coef_bits[c][k] < 0)) {
        Errors* errors = reinterpret_cast<Errors*>(in->err);
        snprintf(errors->message, errors->message_size, "its progressive scans are incomplete");
        longjmp(errors->escape, 1);
      }
}

// Has the DCT itself do part of the shrinking to to_w x to_h: it halves an image as well as averaging
// does. The last factor of two to four is left to the averaging.
inline void SetReduction(j_decompress_ptr in, int to_w, int to_h) {
  in->scale_num = 8;
  in->scale_denom = 8;
  while (in->scale_num > 1 && int(in->image_width * in->scale_num / 16) >= 2 * to_w &&
         int(in->image_height * in->scale_num / 16) >= 2 * to_h)
    in->scale_num /= 2;
}
