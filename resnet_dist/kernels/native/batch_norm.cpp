// Ghost BatchNorm with addition and ReLU on CPUs, NHWC, bf16 or float32, sums in float32.
//
// In: addresses of dense [groups, rows, channels] tensors (rows = images x pixels of a group), with
// channels a multiple of 16. Two passes forward (moments; apply), two backward (sums; gradient).
// The sums of a group are taken over chunks of rows whose number depends on the shape alone, and
// combined in their order: the bits do not depend on threads, nor on the groups beside one's own.
//
// Parallel with the OpenMP runtime that torch has already loaded, so both share one set of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ALWAYS __attribute__((always_inline))
#define INLINE static inline ALWAYS
// One copy of a hot loop for each level of x86-64, whose vectors it fills exactly: the compiler
// splits wider ones through memory, which cost half of the speed. The bits do not depend on the
// width, only on whether the level multiplies and adds in one operation (v3 and v4 do).
#define V4 __attribute__((target("arch=x86-64-v4")))
#define V3 __attribute__((target("arch=x86-64-v3")))

namespace {

constexpr int64_t CHUNK_ROWS = 128;   // at least; a chunk is one unit of parallel work
constexpr int64_t MAX_CHUNKS = 64;    // of a group
constexpr int64_t TILE_VALUES = 2048; // rows x channels: four tensors of them stay in the first cache

struct Bf16 { uint16_t bits; };

// W channels side by side.
template <int W> struct Vectors {
    typedef float Floats __attribute__((vector_size(W * 4)));
    typedef int32_t Ints __attribute__((vector_size(W * 4)));
    typedef uint32_t Words __attribute__((vector_size(W * 4)));
    typedef uint16_t Halves __attribute__((vector_size(W * 2)));
};
template <int W> using Floats = typename Vectors<W>::Floats;
template <int W> using Ints = typename Vectors<W>::Ints;
template <int W> using Words = typename Vectors<W>::Words;
template <int W> using Halves = typename Vectors<W>::Halves;

INLINE void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }
INLINE void load(const Bf16* from, Floats& to) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    Words word = __builtin_convertvector(half, Words) << 16;
    std::memcpy(&to, &word, sizeof to);
}
INLINE void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }
INLINE void store(Bf16* to, const Floats& value) {
    Words word;
    std::memcpy(&word, &value, sizeof word);
    word += 0x7fff + ((word >> 16) & 1);  // to nearest, ties to even
    Words is_no_number = (Words)(value != value);
    word = (word & ~is_no_number) | (is_no_number & 0x7fc00000u);
    Halves half = __builtin_convertvector(word >> 16, Halves);
    std::memcpy(to, &half, sizeof half);
}
INLINE void keep_where(const Ints& mask, Floats& value) {
    Ints bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= mask;
    std::memcpy(&value, &bits, sizeof bits);
}

struct Shape {
    int64_t rows, channels, chunks, chunk_rows;
    Shape(int64_t rows_, int64_t channels_) : rows(rows_), channels(channels_) {
        int64_t wanted = std::min(std::max<int64_t>(rows / CHUNK_ROWS, 1), MAX_CHUNKS);
        chunk_rows = (rows + wanted - 1) / wanted;
        chunks = (rows + chunk_rows - 1) / chunk_rows;
    }
    int64_t first(int64_t chunk) const { return chunk * chunk_rows; }
    int64_t last(int64_t chunk) const { return std::min(rows, (chunk + 1) * chunk_rows); }
    int64_t tile_rows() const { return std::max<int64_t>(4, TILE_VALUES / channels); }
};

// Calls body(c, first row, last row) so that rows x all channels are walked tile by tile.
template <typename Body>
INLINE void tiles(const Shape& shape, int64_t first, int64_t last, Body&& body) {
    for (int64_t row = first; row < last; row += shape.tile_rows()) {
        int64_t end = std::min(last, row + shape.tile_rows());
        for (int64_t c = 0; c < shape.channels; c += WIDTH) body(c, row, end);
    }
}

// sums[0][c], sums[1][c]: of x - origin and its square, over rows [first, last); sums[2][c]: the
// origin, the mean of the first rows. That near the mean, squares lose no digits to it.
template <typename T>
INLINE void moments(const T* x, const Shape& shape, int64_t first, int64_t last, float* sums) {
    const int64_t channels = shape.channels;
    std::fill(sums, sums + 3 * channels, 0.0f);
    const int64_t few = std::min<int64_t>(last - first, 8);
    tiles(shape, first, first + few, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats origin;
        load(sums + 2 * channels + c, origin);
        for (; row < end; ++row) {
            Floats value;
            load(x + row * channels + c, value);
            origin += value * (1.0f / float(few));
        }
        store(sums + 2 * channels + c, origin);
    });
    tiles(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats origin, plain, squares;
        load(sums + 2 * channels + c, origin);
        load(sums + c, plain);
        load(sums + channels + c, squares);
        for (; row < end; ++row) {
            Floats value;
            load(x + row * channels + c, value);
            value -= origin;
            plain += value;
            squares += value * value;
        }
        store(sums + c, plain);
        store(sums + channels + c, squares);
    });
}

INLINE Floats normalised(const Floats& x, const Floats& mean, const Floats& scale,
                         const Floats& shift) {
    return (x - mean) * scale + shift;
}

// residual may be null.
template <typename T>
INLINE void apply(const T* x, const T* residual, T* y, bool relu, const float* means,
                  const float* scales, const float* shifts, const Shape& shape, int64_t first,
                  int64_t last) {
    const int64_t channels = shape.channels;
    tiles(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats mean, scale, shift;
        load(means + c, mean);
        load(scales + c, scale);
        load(shifts + c, shift);
        for (; row < end; ++row) {
            const int64_t at = row * channels + c;
            Floats value;
            load(x + at, value);
            value = normalised(value, mean, scale, shift);
            if (residual) {
                Floats added;
                load(residual + at, added);
                value += added;
            }
            if (relu) keep_where((Ints)(value < 0) ^ -1, value);  // what is no number stays so
            store(y + at, value);
        }
    });
}

// sums[0][c], sums[1][c]: of g and g * (x - mean). g is `grad` where the ReLU let through. With y
// given (a residual was added), y tells where, and g is also written to `masked`.
template <typename T>
INLINE void gradient_sums(const T* grad, const T* x, const T* y, T* masked, bool relu,
                          const float* means, const float* scales, const float* shifts,
                          const Shape& shape, int64_t first, int64_t last, float* sums) {
    const int64_t channels = shape.channels;
    std::fill(sums, sums + 2 * channels, 0.0f);
    tiles(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats mean, scale, shift, plain, along;
        load(means + c, mean);
        load(scales + c, scale);
        load(shifts + c, shift);
        load(sums + c, plain);
        load(sums + channels + c, along);
        for (; row < end; ++row) {
            const int64_t at = row * channels + c;
            Floats value, g;
            load(x + at, value);
            load(grad + at, g);
            if (y) {
                Floats out;
                load(y + at, out);
                keep_where((Ints)(out <= 0) ^ -1, g);
                store(masked + at, g);
            } else if (relu) {
                Floats out = normalised(value, mean, scale, shift);
                keep_where((Ints)(out <= 0) ^ -1, g);
            }
            plain += g;
            along += g * (value - mean);
        }
        store(sums + c, plain);
        store(sums + channels + c, along);
    });
}

// dx = (g - constant - (x - mean) * slope) * scale; recompute: g is not masked yet.
template <typename T>
INLINE void gradient(const T* grad, const T* x, T* grad_x, bool recompute, const float* means,
                     const float* scales, const float* shifts, const float* constants,
                     const float* slopes, const Shape& shape, int64_t first, int64_t last) {
    const int64_t channels = shape.channels;
    tiles(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats mean, scale, shift, constant, slope;
        load(means + c, mean);
        load(scales + c, scale);
        load(shifts + c, shift);
        load(constants + c, constant);
        load(slopes + c, slope);
        for (; row < end; ++row) {
            const int64_t at = row * channels + c;
            Floats value, g;
            load(x + at, value);
            load(grad + at, g);
            if (recompute) {
                Floats out = normalised(value, mean, scale, shift);
                keep_where((Ints)(out <= 0) ^ -1, g);
            }
            store(grad_x + at, (g - constant - (value - mean) * slope) * scale);
        }
    });
}

// target_clones take no templates: each hot loop by name, once for each type.
#define HOT(T, SUFFIX)                                                                            \
    LEVELS void moments_##SUFFIX(const T* x, const Shape& s, int64_t a, int64_t b, float* sums) {  \
        moments(x, s, a, b, sums);                                                                 \
    }                                                                                              \
    LEVELS void apply_##SUFFIX(const T* x, const T* r, T* y, bool relu, const float* m,            \
                               const float* k, const float* h, const Shape& s, int64_t a,          \
                               int64_t b) {                                                        \
        if (r && relu) apply(x, r, y, true, m, k, h, s, a, b);                                     \
        else if (r) apply(x, r, y, false, m, k, h, s, a, b);                                       \
        else if (relu) apply(x, (const T*)nullptr, y, true, m, k, h, s, a, b);                     \
        else apply(x, (const T*)nullptr, y, false, m, k, h, s, a, b);                              \
    }                                                                                              \
    LEVELS void gradient_sums_##SUFFIX(const T* g, const T* x, const T* y, T* w, bool relu,        \
                                       const float* m, const float* k, const float* h,             \
                                       const Shape& s, int64_t a, int64_t b, float* sums) {        \
        if (y) gradient_sums(g, x, y, w, true, m, k, h, s, a, b, sums);                            \
        else if (relu) gradient_sums(g, x, (const T*)nullptr, w, true, m, k, h, s, a, b, sums);    \
        else gradient_sums(g, x, (const T*)nullptr, w, false, m, k, h, s, a, b, sums);             \
    }                                                                                              \
    LEVELS void gradient_##SUFFIX(const T* g, const T* x, T* d, bool recompute, const float* m,    \
                                  const float* k, const float* h, const float* c, const float* p,  \
                                  const Shape& s, int64_t a, int64_t b) {                          \
        if (recompute) gradient(g, x, d, true, m, k, h, c, p, s, a, b);                            \
        else gradient(g, x, d, false, m, k, h, c, p, s, a, b);                                     \
    }
HOT(float, float)
HOT(Bf16, bf16)
#undef HOT

// The names again, chosen by type.
#define CHOOSE(NAME)                                                                               \
    template <typename... A> void NAME##_of(const float* x, A... a) { NAME##_float(x, a...); }     \
    template <typename... A> void NAME##_of(const Bf16* x, A... a) { NAME##_bf16(x, a...); }
CHOOSE(moments)
CHOOSE(apply)
CHOOSE(gradient_sums)
CHOOSE(gradient)
#undef CHOOSE

template <typename T>
void forward(const T* x, const T* residual, T* y, const float* weight, const float* bias,
             float* mean, float* var, float* invstd, int64_t groups, int64_t rows,
             int64_t channels, float eps, bool relu) {
    const Shape shape(rows, channels);
    const int64_t size = rows * channels;
    std::vector<float> sums(groups * shape.chunks * 3 * channels), scales(groups * channels);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < shape.chunks; ++k)
                moments_of(x + g * size, shape, shape.first(k), shape.last(k),
                           &sums[(g * shape.chunks + k) * 3 * channels]);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t c = 0; c < channels; ++c) {
                // Chan, Golub, LeVeque 1979, chunk by chunk, in double: there are few.
                double mean_c = 0, squared = 0, count = 0;
                for (int64_t k = 0; k < shape.chunks; ++k) {
                    const float* s = &sums[(g * shape.chunks + k) * 3 * channels + c];
                    const double n = double(shape.last(k) - shape.first(k));
                    const double off = s[0] / n, here = s[2 * channels] + off;
                    const double delta = here - mean_c;
                    squared += s[channels] - off * s[0] + delta * delta * count * n / (count + n);
                    count += n;
                    mean_c += delta * n / count;
                }
                const int64_t at = g * channels + c;
                mean[at] = float(mean_c);
                var[at] = float(squared / double(rows - 1));
                invstd[at] = float(1.0 / std::sqrt(squared / double(rows) + double(eps)));
                scales[at] = weight[c] * invstd[at];
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < shape.chunks; ++k)
                apply_of(x + g * size, residual ? residual + g * size : nullptr, y + g * size, relu,
                         (const float*)mean + g * channels, (const float*)&scales[g * channels],
                         bias, shape, shape.first(k), shape.last(k));
    }
}

template <typename T>
void backward(const T* grad, const T* x, const T* y, T* masked, T* grad_x, const float* weight,
              const float* bias, const float* mean, const float* invstd, float* grad_weight,
              float* grad_bias, int64_t groups, int64_t rows, int64_t channels, bool relu) {
    const Shape shape(rows, channels);
    const int64_t size = rows * channels;
    std::vector<float> sums(groups * shape.chunks * 2 * channels), scales(groups * channels),
        constants(groups * channels), slopes(groups * channels);
    for (int64_t at = 0; at < groups * channels; ++at)
        scales[at] = weight[at % channels] * invstd[at];
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < shape.chunks; ++k)
                gradient_sums_of(grad + g * size, x + g * size, y ? y + g * size : nullptr,
                                 y ? masked + g * size : nullptr, relu, mean + g * channels,
                                 (const float*)&scales[g * channels], bias, shape, shape.first(k),
                                 shape.last(k), &sums[(g * shape.chunks + k) * 2 * channels]);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t c = 0; c < channels; ++c) {
                double plain = 0, along = 0;
                for (int64_t k = 0; k < shape.chunks; ++k) {
                    const float* s = &sums[(g * shape.chunks + k) * 2 * channels + c];
                    plain += s[0];
                    along += s[channels];
                }
                const int64_t at = g * channels + c;
                const double inv = invstd[at];
                grad_bias[at] = float(plain);
                grad_weight[at] = float(along * inv);
                constants[at] = float(plain / double(rows));
                slopes[at] = float(along * inv * inv / double(rows));
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < shape.chunks; ++k)
                gradient_of((y ? (const T*)masked : grad) + g * size, x + g * size,
                            grad_x + g * size, relu && !y, mean + g * channels,
                            (const float*)&scales[g * channels], bias,
                            (const float*)&constants[g * channels],
                            (const float*)&slopes[g * channels], shape, shape.first(k),
                            shape.last(k));
    }
}

}  // namespace

// residual: or null. mean, unbiased var, invstd: [groups, channels].
EXPORT void batch_norm_forward(int bf16, const void* x, const void* residual, void* y,
                               const float* weight, const float* bias, float* mean, float* var,
                               float* invstd, int64_t groups, int64_t rows, int64_t channels,
                               float eps, int relu) {
    if (bf16)
        forward((const Bf16*)x, (const Bf16*)residual, (Bf16*)y, weight, bias, mean, var, invstd,
                groups, rows, channels, eps, relu != 0);
    else
        forward((const float*)x, (const float*)residual, (float*)y, weight, bias, mean, var,
                invstd, groups, rows, channels, eps, relu != 0);
}

// y and masked: both, where ReLU followed an addition, else null. grad_weight, grad_bias: [groups,
// channels].
EXPORT void batch_norm_backward(int bf16, const void* grad, const void* x, const void* y,
                                void* masked, void* grad_x, const float* weight,
                                const float* bias, const float* mean, const float* invstd,
                                float* grad_weight, float* grad_bias, int64_t groups,
                                int64_t rows, int64_t channels, int relu) {
    if (bf16)
        backward((const Bf16*)grad, (const Bf16*)x, (const Bf16*)y, (Bf16*)masked, (Bf16*)grad_x,
                 weight, bias, mean, invstd, grad_weight, grad_bias, groups, rows, channels,
                 relu != 0);
    else
        backward((const float*)grad, (const float*)x, (const float*)y, (float*)masked,
                 (float*)grad_x, weight, bias, mean, invstd, grad_weight, grad_bias, groups, rows,
                 channels, relu != 0);
}
