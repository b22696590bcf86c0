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

// Vectors of W channels; by name, since GCC 12 converts none whose size a template gives.
template <int W> struct Vectors;
#define VECTORS(W)                                                                                 \
    template <> struct Vectors<W> {                                                                \
        typedef float Floats __attribute__((vector_size(W * 4)));                                  \
        typedef uint32_t Words __attribute__((vector_size(W * 4)));                                \
        typedef uint16_t Halves __attribute__((vector_size(W * 2)));                               \
    };
VECTORS(16)
VECTORS(8)
VECTORS(4)
#undef VECTORS

template <int W> struct Lanes {
    typedef typename Vectors<W>::Floats Floats;
    typedef typename Vectors<W>::Words Words;
    typedef typename Vectors<W>::Halves Halves;

    INLINE Floats load(const float* from) {
        Floats value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    INLINE Floats load(const Bf16* from) {
        Halves half;
        std::memcpy(&half, from, sizeof half);
        return (Floats)(__builtin_convertvector(half, Words) << 16);
    }
    INLINE void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }
    INLINE void store(Bf16* to, const Floats& value) {
        Words word;
        std::memcpy(&word, &value, sizeof word);
        word += 0x7fff + ((word >> 16) & 1);  // to nearest, ties to even
        const Words is_no_number = (Words)(value != value);
        word = (word & ~is_no_number) | (is_no_number & 0x7fc00000u);
        const Halves half = __builtin_convertvector(word >> 16, Halves);
        std::memcpy(to, &half, sizeof half);
    }
    // What of `value` ReLU lets through: where `out` is no number, it does.
    INLINE Floats rectified(const Floats& value, const Floats& out) {
        return out <= 0 ? Floats{} : value;
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

// What the loops read and write; what one does not need is null.
template <typename T> struct Group {
    const T *x, *added, *grad;  // `added`: the residual; backward, what came of it (y)
    T *out, *masked;
    const float *mean, *scale, *shift, *constant, *slope;

    // Of the first group to those of group `g`; all share `shift`.
    Group at(int64_t g, int64_t size, int64_t channels) const {
        const auto to = [](auto* first, int64_t by) { return first ? first + by : nullptr; };
        const int64_t by = g * size, c = g * channels;
        return {to(x, by), to(added, by), to(grad, by), to(out, by), to(masked, by), to(mean, c),
                to(scale, c), shift, to(constant, c), to(slope, c)};
    }
};

// (x - mean) * scale + shift, for channels [c, c + W).
template <int W> struct Norm {
    typedef typename Lanes<W>::Floats Floats;
    Floats mean, scale, shift;

    template <typename T>
    ALWAYS Norm(const Group<T>& g, int64_t c)
        : mean(Lanes<W>::load(g.mean + c)), scale(Lanes<W>::load(g.scale + c)),
          shift(Lanes<W>::load(g.shift + c)) {}
    ALWAYS Floats operator()(const Floats& x) const { return (x - mean) * scale + shift; }
};

// The loops over rows [first, last) of a group. Structures, so that one template below compiles
// each for all levels; by value, since what they store could else be the very pointers.

// sums[0][c], sums[1][c]: of x - origin and its square; sums[2][c]: the origin, the mean of the
// first rows. That near the mean, squares lose no digits to it.
struct Moments {
    template <int W, typename T>
    INLINE void run(Group<T> g, Shape shape, int64_t first, int64_t last, float* sums) {
        typedef Lanes<W> L;
        typedef typename L::Floats Floats;
        const int64_t channels = shape.channels;
        std::fill(sums, sums + 3 * channels, 0.0f);
        const int64_t few = std::min<int64_t>(last - first, 8);
        tiles<W>(shape, first, first + few, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
            Floats origin = L::load(sums + 2 * channels + c);
            for (; row < end; ++row)
                origin += L::load(g.x + row * channels + c) * (1.0f / float(few));
            L::store(sums + 2 * channels + c, origin);
        });
        tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
            const Floats origin = L::load(sums + 2 * channels + c);
            Floats plain = L::load(sums + c), squares = L::load(sums + channels + c);
            for (; row < end; ++row) {
                const Floats value = L::load(g.x + row * channels + c) - origin;
                plain += value;
                squares += value * value;
            }
            L::store(sums + c, plain);
            L::store(sums + channels + c, squares);
        });
    }
};

// out = relu?(norm(x) + added?)
template <bool kResidual, bool kRelu> struct Apply {
    template <int W, typename T>
    INLINE void run(Group<T> g, Shape shape, int64_t first, int64_t last, float*) {
        typedef Lanes<W> L;
        const int64_t channels = shape.channels;
        tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
            const Norm<W> norm(g, c);
            for (; row < end; ++row) {
                const int64_t at = row * channels + c;
                typename L::Floats value = norm(L::load(g.x + at));
                if (kResidual) value += L::load(g.added + at);
                // Not `rectified`: -0 stays so.
                if (kRelu) value = value < 0 ? typename L::Floats{} : value;
                L::store(g.out + at, value);
            }
        });
    }
};

enum Mask { NONE, AGAIN, GIVEN };  // the ReLU's: there is none; computed again from x; from y

// sums[0][c], sums[1][c]: of g and g * (x - mean). g is `grad` where the ReLU let through. GIVEN (a
// residual was added): g is also written to `masked`.
template <Mask kMask> struct GradientSums {
    template <int W, typename T>
    INLINE void run(Group<T> g, Shape shape, int64_t first, int64_t last, float* sums) {
        typedef Lanes<W> L;
        typedef typename L::Floats Floats;
        const int64_t channels = shape.channels;
        std::fill(sums, sums + 2 * channels, 0.0f);
        tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
            const Norm<W> norm(g, c);
            Floats plain = L::load(sums + c), along = L::load(sums + channels + c);
            for (; row < end; ++row) {
                const int64_t at = row * channels + c;
                const Floats value = L::load(g.x + at);
                Floats grad = L::load(g.grad + at);
                if (kMask == GIVEN) {
                    grad = L::rectified(grad, L::load(g.added + at));
                    L::store(g.masked + at, grad);
                } else if (kMask == AGAIN) {
                    grad = L::rectified(grad, norm(value));
                }
                plain += grad;
                along += grad * (value - norm.mean);
            }
            L::store(sums + c, plain);
            L::store(sums + channels + c, along);
        });
    }
};

// out = (g - constant - (x - mean) * slope) * scale; AGAIN: `grad` is not masked yet.
template <Mask kMask> struct Gradient {
    template <int W, typename T>
    INLINE void run(Group<T> g, Shape shape, int64_t first, int64_t last, float*) {
        typedef Lanes<W> L;
        typedef typename L::Floats Floats;
        const int64_t channels = shape.channels;
        tiles<W>(shape, first, last, [&](int64_t c, int64_t row, int64_t end) ALWAYS {
            const Norm<W> norm(g, c);
            const Floats constant = L::load(g.constant + c), slope = L::load(g.slope + c);
            for (; row < end; ++row) {
                const int64_t at = row * channels + c;
                const Floats value = L::load(g.x + at);
                Floats grad = L::load(g.grad + at);
                if (kMask == AGAIN) grad = L::rectified(grad, norm(value));
                L::store(g.out + at, (grad - constant - (value - norm.mean) * slope) * norm.scale);
            }
        });
    }
};

int supported() {
    return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
}

std::atomic<int> level{supported()};

template <class Loop, typename... A> V4 void run_v4(A... a) { Loop::template run<16>(a...); }
template <class Loop, typename... A> V3 void run_v3(A... a) { Loop::template run<8>(a...); }
template <class Loop, typename... A> void run_v1(A... a) { Loop::template run<4>(a...); }

// The loop over chunk `k` of group `g`.
template <class Loop, typename T>
void run(const Group<T>& groups, const Shape& shape, int64_t g, int64_t k, float* sums) {
    const Group<T> group = groups.at(g, shape.rows * shape.channels, shape.channels);
    const int64_t first = shape.first(k), last = shape.last(k);
    if (level == 4) run_v4<Loop>(group, shape, first, last, sums);
    else if (level == 3) run_v3<Loop>(group, shape, first, last, sums);
    else run_v1<Loop>(group, shape, first, last, sums);
}

// In parallel: first(group, chunk) for all, combine(group) for all, last(group, chunk) for all.
template <class First, class Combine, class Last>
void passes(int64_t groups, int64_t chunks, First first, Combine combine, Last last) {
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < chunks; ++k) first(g, k);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; ++g) combine(g);
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < chunks; ++k) last(g, k);
    }
}

template <typename T>
void forward(const T* x, const T* residual, T* y, const float* weight, const float* bias,
             float* mean, float* var, float* invstd, int64_t groups, int64_t rows,
             int64_t channels, float eps, bool relu) {
    const Shape shape(rows, channels);
    std::vector<float> sums(groups * shape.chunks * 3 * channels), scales(groups * channels);
    std::vector<double> wide(groups * 2 * channels);
    const auto sums_of = [&](int64_t g, int64_t k) {
        return &sums[(g * shape.chunks + k) * 3 * channels];
    };
    const Group<T> all{x, residual, nullptr, y, nullptr, mean, scales.data(), bias, nullptr,
                       nullptr};
    const auto apply = residual && relu ? run<Apply<true, true>, T>
                       : residual       ? run<Apply<true, false>, T>
                       : relu           ? run<Apply<false, true>, T>
                                        : run<Apply<false, false>, T>;
    passes(groups, shape.chunks, [&](int64_t g, int64_t k) {
        run<Moments>(all, shape, g, k, sums_of(g, k));
    }, [&](int64_t g) {
        // Chan, Golub, LeVeque 1979, chunk by chunk, in double: there are few.
        double count = 0, *means = &wide[g * 2 * channels], *squares = means + channels;
        for (int64_t k = 0; k < shape.chunks; ++k) {
            const float* s = sums_of(g, k);
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
    }, [&](int64_t g, int64_t k) { apply(all, shape, g, k, nullptr); });
}

template <typename T>
void backward(const T* grad, const T* x, const T* y, T* masked, T* grad_x, const float* weight,
              const float* bias, const float* mean, const float* invstd, float* grad_weight,
              float* grad_bias, int64_t groups, int64_t rows, int64_t channels, bool relu) {
    const Shape shape(rows, channels);
    std::vector<float> sums(groups * shape.chunks * 2 * channels), scales(groups * channels),
        constants(groups * channels), slopes(groups * channels);
    std::vector<double> wide(groups * 2 * channels);
    for (int64_t at = 0; at < groups * channels; ++at)
        scales[at] = weight[at % channels] * invstd[at];
    const auto sums_of = [&](int64_t g, int64_t k) {
        return &sums[(g * shape.chunks + k) * 2 * channels];
    };
    const Group<T> all{x, y, grad, grad_x, masked, mean, scales.data(), bias, constants.data(),
                       slopes.data()};
    const auto sum = y ? run<GradientSums<GIVEN>, T> : relu ? run<GradientSums<AGAIN>, T>
                                                            : run<GradientSums<NONE>, T>;
    Group<T> then = all;
    if (y) then.grad = masked;
    const auto apply = relu && !y ? run<Gradient<AGAIN>, T> : run<Gradient<NONE>, T>;
    passes(groups, shape.chunks, [&](int64_t g, int64_t k) {
        sum(all, shape, g, k, sums_of(g, k));
    }, [&](int64_t g) {
        double *plain = &wide[g * 2 * channels], *along = plain + channels;
        for (int64_t k = 0; k < shape.chunks; ++k)
            for (int64_t c = 0; c < 2 * channels; ++c) plain[c] += sums_of(g, k)[c];
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t at = g * channels + c;
            const double inv = invstd[at];
            grad_bias[at] = float(plain[c]);
            grad_weight[at] = float(along[c] * inv);
            constants[at] = float(plain[c] / double(rows));
            slopes[at] = float(along[c] * inv * inv / double(rows));
        }
    }, [&](int64_t g, int64_t k) { apply(then, shape, g, k, nullptr); });
}

}  // namespace

// The level of x86-64 whose code runs from now on: the machine's, or `at_most`.
EXPORT int batch_norm_level(int at_most) { return level = std::min(supported(), at_most); }

// residual: or null. mean, unbiased var, invstd: [groups, channels].
EXPORT void batch_norm_forward(int bf16, const void* x, const void* residual, void* y,
                               const float* weight, const float* bias, float* mean, float* var,
                               float* invstd, int64_t groups, int64_t rows, int64_t channels,
                               float eps, int relu) {
    const auto as = [=](auto type) {
        typedef decltype(type) T;
        forward((const T*)x, (const T*)residual, (T*)y, weight, bias, mean, var, invstd, groups,
                rows, channels, eps, relu != 0);
    };
    bf16 ? as(Bf16{}) : as(float{});
}

// y and masked: both, where ReLU followed an addition, else null. grad_weight, grad_bias: [groups,
// channels].
EXPORT void batch_norm_backward(int bf16, const void* grad, const void* x, const void* y,
                                void* masked, void* grad_x, const float* weight,
                                const float* bias, const float* mean, const float* invstd,
                                float* grad_weight, float* grad_bias, int64_t groups,
                                int64_t rows, int64_t channels, int relu) {
    const auto as = [=](auto type) {
        typedef decltype(type) T;
        backward((const T*)grad, (const T*)x, (const T*)y, (T*)masked, (T*)grad_x, weight, bias,
                 mean, invstd, grad_weight, grad_bias, groups, rows, channels, relu != 0);
    };
    bf16 ? as(Bf16{}) : as(float{});
}
