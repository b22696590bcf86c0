// Ghost BatchNorm with addition and ReLU on CPUs, NHWC, bf16 or float32, sums in float32.
//
// In: addresses of dense [groups, rows, channels] tensors (rows = images x pixels of a group), with
// channels a multiple of 16. Two passes forward (moments; apply), two backward (sums; gradient).
// The sums of a group are taken over chunks of rows whose number depends on the shape alone, and
// combined in their order: the bits do not depend on threads, nor on the groups beside one's own.
//
// Parallel with the OpenMP runtime that torch has already loaded, so both share one set of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ALWAYS __attribute__((always_inline))
#define INLINE static inline ALWAYS
// One copy of a hot loop for each level of x86-64, whose vectors it fills exactly: the compiler splits
// wider ones through memory, which made them five times slower with AVX2. The bits do not depend on
// the width, only on whether the level multiplies and adds in one operation (v3 and v4 do).
#define V4 __attribute__((target("arch=x86-64-v4")))
#define V3 __attribute__((target("arch=x86-64-v3")))

namespace {

constexpr int64_t CHUNK_ROWS = 128;   // at least; a chunk is one unit of parallel work
constexpr int64_t MAX_CHUNKS = 64;    // of a group
constexpr int64_t TILE_VALUES = 64;   // at least a row: memory is walked as it lies

struct Bf16 { uint16_t bits; };

// Vectors of W channels.
template <int W> struct Vectors;
#define VECTORS(W)                                                                                 \
    template <> struct Vectors<W> {                                                                \
        typedef float Floats __attribute__((vector_size(W * 4)));                                  \
        typedef int32_t Ints __attribute__((vector_size(W * 4)));                                  \
        typedef uint32_t Words __attribute__((vector_size(W * 4)));                                \
        typedef uint16_t Halves __attribute__((vector_size(W * 2)));                               \
    };
VECTORS(16)
VECTORS(8)
VECTORS(4)
#undef VECTORS

template <int W> struct Lanes {
    typedef typename Vectors<W>::Floats Floats;
    typedef typename Vectors<W>::Ints Ints;
    typedef typename Vectors<W>::Words Words;
    typedef typename Vectors<W>::Halves Halves;

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
    INLINE Floats normalised(const Floats& x, const Floats& mean, const Floats& scale,
                             const Floats& shift) {
        return (x - mean) * scale + shift;
    }
};

struct Shape {
    int64_t rows, channels, chunks, chunk_rows;
    Shape(int64_t rows_, int64_t channels_) : rows(rows_), channels(channels_) {
        int64_t wanted = std::min(std::max<int64_t>(rows / CHUNK_ROWS, 1), MAX_CHUNKS);
        chunk_rows = (rows + wanted - 1) / wanted;
        chunks = (rows + chunk_rows - 1) / chunk_rows;
    }
    int64_t first(int64_t chunk) const { return chunk * chunk_rows; }
    int64_t last(int64_t chunk) const { return std::min(rows, (chunk + 1) * chunk_rows); }
    int64_t tile_rows() const { return std::max<int64_t>(1, TILE_VALUES / channels); }
};

// Calls body(c, first row, last row) so that rows x all channels are walked tile by tile.
template <int W, typename Body>
INLINE void tiles(const Shape& shape, int64_t first, int64_t last, Body&& body) {
    for (int64_t row = first; row < last; row += shape.tile_rows()) {
        int64_t end = std::min(last, row + shape.tile_rows());
        for (int64_t c = 0; c < shape.channels; c += W) body(c, row, end);
    }
}

// sums[0][c], sums[1][c]: of x - origin and its square, over rows [first, last); sums[2][c]: the
// origin, the mean of the first rows. That near the mean, squares lose no digits to it.
template <int W, typename T>
INLINE void moments(const T* x, const Shape& shape, int64_t first, int64_t last, float* sums) {
    typedef Lanes<W> L;
    typedef typename L::Floats Floats;
    const int64_t channels = shape.channels;
    std::fill(sums, sums + 3 * channels, 0.0f);
    const int64_t few = std::min<int64_t>(last - first, 8);
    tiles<W>(shape, first, first + few, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats origin;
        L::load(sums + 2 * channels + c, origin);
        for (; row < end; ++row) {
            Floats value;
            L::load(x + row * channels + c, value);
            origin += value * (1.0f / float(few));
        }
        L::store(sums + 2 * channels + c, origin);
    });
    tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats origin, plain, squares;
        L::load(sums + 2 * channels + c, origin);
        L::load(sums + c, plain);
        L::load(sums + channels + c, squares);
        for (; row < end; ++row) {
            Floats value;
            L::load(x + row * channels + c, value);
            value -= origin;
            plain += value;
            squares += value * value;
        }
        L::store(sums + c, plain);
        L::store(sums + channels + c, squares);
    });
}

// residual may be null.
template <int W, typename T>
INLINE void apply(const T* x, const T* residual, T* y, bool relu, const float* means,
                  const float* scales, const float* shifts, const Shape& shape, int64_t first,
                  int64_t last) {
    typedef Lanes<W> L;
    typedef typename L::Floats Floats;
    const int64_t channels = shape.channels;
    tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats mean, scale, shift;
        L::load(means + c, mean);
        L::load(scales + c, scale);
        L::load(shifts + c, shift);
        for (; row < end; ++row) {
            const int64_t at = row * channels + c;
            Floats value;
            L::load(x + at, value);
            value = L::normalised(value, mean, scale, shift);
            if (residual) {
                Floats added;
                L::load(residual + at, added);
                value += added;
            }
            // What is no number stays so.
            if (relu) L::keep_where((typename L::Ints)(value < 0) ^ -1, value);
            L::store(y + at, value);
        }
    });
}

// sums[0][c], sums[1][c]: of g and g * (x - mean). g is `grad` where the ReLU let through. With y
// given (a residual was added), y tells where, and g is also written to `masked`.
template <int W, typename T>
INLINE void gradient_sums(const T* grad, const T* x, const T* y, T* masked, bool relu,
                          const float* means, const float* scales, const float* shifts,
                          const Shape& shape, int64_t first, int64_t last, float* sums) {
    typedef Lanes<W> L;
    typedef typename L::Floats Floats;
    const int64_t channels = shape.channels;
    std::fill(sums, sums + 2 * channels, 0.0f);
    tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats mean, scale, shift, plain, along;
        L::load(means + c, mean);
        L::load(scales + c, scale);
        L::load(shifts + c, shift);
        L::load(sums + c, plain);
        L::load(sums + channels + c, along);
        for (; row < end; ++row) {
            const int64_t at = row * channels + c;
            Floats value, g;
            L::load(x + at, value);
            L::load(grad + at, g);
            if (y) {
                Floats out;
                L::load(y + at, out);
                L::keep_where((typename L::Ints)(out <= 0) ^ -1, g);
                L::store(masked + at, g);
            } else if (relu) {
                Floats out = L::normalised(value, mean, scale, shift);
                L::keep_where((typename L::Ints)(out <= 0) ^ -1, g);
            }
            plain += g;
            along += g * (value - mean);
        }
        L::store(sums + c, plain);
        L::store(sums + channels + c, along);
    });
}

// dx = (g - constant - (x - mean) * slope) * scale; recompute: g is not masked yet.
template <int W, typename T>
INLINE void gradient(const T* grad, const T* x, T* grad_x, bool recompute, const float* means,
                     const float* scales, const float* shifts, const float* constants,
                     const float* slopes, const Shape& shape, int64_t first, int64_t last) {
    typedef Lanes<W> L;
    typedef typename L::Floats Floats;
    const int64_t channels = shape.channels;
    tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
        Floats mean, scale, shift, constant, slope;
        L::load(means + c, mean);
        L::load(scales + c, scale);
        L::load(shifts + c, shift);
        L::load(constants + c, constant);
        L::load(slopes + c, slope);
        for (; row < end; ++row) {
            const int64_t at = row * channels + c;
            Floats value, g;
            L::load(x + at, value);
            L::load(grad + at, g);
            if (recompute) {
                Floats out = L::normalised(value, mean, scale, shift);
                L::keep_where((typename L::Ints)(out <= 0) ^ -1, g);
            }
            L::store(grad_x + at, (g - constant - (value - mean) * slope) * scale);
        }
    });
}

// target() takes no templates: each hot loop by name, once for each type and level.
#define HOT(T, NAME, LEVEL, W)                                                                     \
    LEVEL void moments_##NAME(const T* x, const Shape& s, int64_t a, int64_t b, float* sums) {     \
        moments<W>(x, s, a, b, sums);                                                              \
    }                                                                                              \
    LEVEL void apply_##NAME(const T* x, const T* r, T* y, bool relu, const float* m,               \
                            const float* k, const float* h, const Shape& s, int64_t a,             \
                            int64_t b) {                                                           \
        if (r && relu) apply<W>(x, r, y, true, m, k, h, s, a, b);                                  \
        else if (r) apply<W>(x, r, y, false, m, k, h, s, a, b);                                    \
        else if (relu) apply<W>(x, (const T*)nullptr, y, true, m, k, h, s, a, b);                  \
        else apply<W>(x, (const T*)nullptr, y, false, m, k, h, s, a, b);                           \
    }                                                                                              \
    LEVEL void gradient_sums_##NAME(const T* g, const T* x, const T* y, T* w, bool relu,           \
                                    const float* m, const float* k, const float* h,                \
                                    const Shape& s, int64_t a, int64_t b, float* sums) {           \
        if (y) gradient_sums<W>(g, x, y, w, true, m, k, h, s, a, b, sums);                         \
        else if (relu) gradient_sums<W>(g, x, (const T*)nullptr, w, true, m, k, h, s, a, b, sums); \
        else gradient_sums<W>(g, x, (const T*)nullptr, w, false, m, k, h, s, a, b, sums);          \
    }                                                                                              \
    LEVEL void gradient_##NAME(const T* g, const T* x, T* d, bool recompute, const float* m,       \
                               const float* k, const float* h, const float* c, const float* p,     \
                               const Shape& s, int64_t a, int64_t b) {                             \
        if (recompute) gradient<W>(g, x, d, true, m, k, h, c, p, s, a, b);                         \
        else gradient<W>(g, x, d, false, m, k, h, c, p, s, a, b);                                  \
    }
HOT(float, float_v4, V4, 16)
HOT(Bf16, bf16_v4, V4, 16)
HOT(float, float_v3, V3, 8)
HOT(Bf16, bf16_v3, V3, 8)
HOT(float, float_v1, , 4)
HOT(Bf16, bf16_v1, , 4)
#undef HOT

int supported() {
    return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
}

std::atomic<int> level{supported()};

// The names again, chosen by type and by the machine.
#define CHOOSE_OF(NAME, T, SUFFIX)                                                                 \
    template <typename... A> void NAME##_of(const T* x, A... a) {                                  \
        if (level == 4) NAME##_##SUFFIX##_v4(x, a...);                                           \
        else if (level == 3) NAME##_##SUFFIX##_v3(x, a...);                                      \
        else NAME##_##SUFFIX##_v1(x, a...);                                                        \
    }
#define CHOOSE(NAME) CHOOSE_OF(NAME, float, float) CHOOSE_OF(NAME, Bf16, bf16)
CHOOSE(moments)
CHOOSE(apply)
CHOOSE(gradient_sums)
CHOOSE(gradient)
#undef CHOOSE
#undef CHOOSE_OF

template <typename T>
void forward(const T* x, const T* residual, T* y, const float* weight, const float* bias,
             float* mean, float* var, float* invstd, int64_t groups, int64_t rows,
             int64_t channels, float eps, bool relu) {
    const Shape shape(rows, channels);
    const int64_t size = rows * channels;
    std::vector<float> sums(groups * shape.chunks * 3 * channels), scales(groups * channels);
    std::vector<double> wide(groups * 2 * channels);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < shape.chunks; ++k)
                moments_of(x + g * size, shape, shape.first(k), shape.last(k),
                           &sums[(g * shape.chunks + k) * 3 * channels]);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; ++g) {
            // Chan, Golub, LeVeque 1979, chunk by chunk, in double: there are few.
            double count = 0, *means = &wide[g * 2 * channels], *squares = means + channels;
            for (int64_t k = 0; k < shape.chunks; ++k) {
                const float* s = &sums[(g * shape.chunks + k) * 3 * channels];
                const double n = double(shape.last(k) - shape.first(k)), each = 1 / n;
                const double share = n / (count + n), apart = count * share;
                for (int64_t c = 0; c < channels; ++c) {
                    const double off = s[c] * each, delta = s[2 * channels + c] + off - means[c];
                    squares[c] += s[channels + c] - off * s[c] + delta * delta * apart;
                    means[c] += delta * share;
                }
                count += n;
            }
            for (int64_t c = 0; c < channels; ++c) {
                const int64_t at = g * channels + c;
                mean[at] = float(means[c]);
                var[at] = float(squares[c] / double(rows - 1));
                invstd[at] = float(1.0 / std::sqrt(squares[c] / double(rows) + double(eps)));
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
    std::vector<double> wide(groups * 2 * channels);
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
            double *plain = &wide[g * 2 * channels], *along = plain + channels;
            for (int64_t k = 0; k < shape.chunks; ++k) {
                const float* s = &sums[(g * shape.chunks + k) * 2 * channels];
                for (int64_t c = 0; c < 2 * channels; ++c) plain[c] += s[c];
            }
            for (int64_t c = 0; c < channels; ++c) {
                const int64_t at = g * channels + c;
                const double inv = invstd[at];
                grad_bias[at] = float(plain[c]);
                grad_weight[at] = float(along[c] * inv);
                constants[at] = float(plain[c] / double(rows));
                slopes[at] = float(along[c] * inv * inv / double(rows));
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

// The level of x86-64 whose code runs from now on: the machine's, or `at_most`.
EXPORT int batch_norm_level(int at_most) { return level = std::min(supported(), at_most); }

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
