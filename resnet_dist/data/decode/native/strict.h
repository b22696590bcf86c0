// libjpeg made strict: errors are values, and a warning that means invented pixels is an error.
//
// Shared by the loader and by the conversion (data_prep): what one writes, the other judges alike.
#pragma once
#include <csetjmp>
#include <cstdarg>
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

#define EXPORT extern "C" __attribute__((visibility("default")))

inline thread_local char last_error[JMSG_LENGTH_MAX + 64];  // why this thread's last call failed

// Notes why; returns `status`.
__attribute__((format(printf, 2, 3))) inline int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return status;
}

struct Errors : jpeg_error_mgr {
  jmp_buf escape;  // where a call into libjpeg continues that fails
  char text[JMSG_LENGTH_MAX];
};

[[noreturn]] inline void give_up(j_common_ptr common, const char* why) {
  auto* errors = static_cast<Errors*>(common->err);
  snprintf(errors->text, sizeof errors->text, "%s", why);
  longjmp(errors->escape, 1);
}

[[noreturn]] inline void on_error(j_common_ptr common) {
  char text[JMSG_LENGTH_MAX];
  common->err->format_message(common, text);
  give_up(common, text);
}

// libjpeg calls this for warnings (level < 0) and traces. Damage is an error; oddities are not.
inline void on_message(j_common_ptr common, int level) {
  if (level >= 0) return;
  switch (common->err->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
      return;
    default:
      on_error(common);
  }
}

inline jpeg_error_mgr* arm(Errors& errors) {
  jpeg_std_error(&errors);
  errors.error_exit = on_error;
  errors.emit_message = on_message;
  return &errors;
}

// YCbCr whose chroma is stored at full or half resolution.
inline bool plain_colours(const jpeg_decompress_struct& info) {
  if (info.jpeg_color_space != JCS_YCbCr || info.num_components != 3) return false;
  const int h = info.max_h_samp_factor, v = info.max_v_samp_factor;
  for (int i = 0; i < 3; ++i) {
    const jpeg_component_info& c = info.comp_info[i];
    if (c.h_samp_factor != h && (i == 0 || 2 * c.h_samp_factor != h)) return false;
    if (c.v_samp_factor != v && (i == 0 || 2 * c.v_samp_factor != v)) return false;
  }
  return true;
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
