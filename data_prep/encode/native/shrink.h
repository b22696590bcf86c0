// Shrinking by averaging areas, in integers: the same bits on every machine.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

__attribute__((target_clones("avx512f", "avx2", "default"))) inline void add_weighted(
    uint32_t* sum, const uint8_t* row, uint32_t weight, int count) {
  for (int i = 0; i < count; ++i) sum[i] += weight * row[i];
}

// Output sample i of an axis covers [i * num, (i + 1) * num) / den of its source samples.
struct Ratio {
  int64_t num, den;
};

// Shrinks rows of `kChannels` interleaved samples, which arrive one by one, to `to_w` x `to_h`.
// What an output covers beyond the last source sample does not count.
template <int kChannels>
class AreaShrinker {
 public:
  AreaShrinker(int w, int h, Ratio across, Ratio down, int to_w, int to_h, uint8_t* out,
               ptrdiff_t pitch)
      : w_(w), h_(h), to_w_(to_w), to_h_(to_h), down_(down), out_(out), pitch_(pitch),
        sum_(kChannels * size_t(w), 0) {
    // Weight of every source sample in every output, in 1/4096 of the output; exact sums.
    first_.resize(to_w + 1);
    for (int x = 0; x < to_w; ++x) {
      const int64_t den = across.den, left = x * across.num;
      const int64_t right = std::min(left + across.num, w * den);
      const int from = static_cast<int>(left / den);
      const int to = static_cast<int>((right + den - 1) / den);
      first_[x] = static_cast<int>(weight_.size());
      start_.push_back(from);
      const int64_t whole = right - left;
      int64_t covered = 0;
      int given = 0;
      for (int i = from; i < to; ++i) {
        covered += std::min(right, (i + 1) * den) - std::max(left, i * den);
        const int upto = static_cast<int>((covered * 4096 + whole / 2) / whole);
        weight_.push_back(upto - given);
        given = upto;
      }
    }
    first_[to_w] = static_cast<int>(weight_.size());
  }

  void add_row(const uint8_t* row) {
    // This row covers [y, y + 1) * den; an output row covers `num` of that.
    int64_t begin = y_ * down_.den;
    const int64_t end = begin + down_.den;
    while (begin < end && target_ < to_h_) {
      const int64_t start = target_ * down_.num;
      const int64_t stop = std::min(start + down_.num, h_ * down_.den);
      const int64_t whole = stop - start, until = std::min(end, stop);
      covered_ += until - begin;
      const int upto = static_cast<int>((covered_ * 2048 + whole / 2) / whole);
      const uint32_t weight = upto - given_;
      given_ = upto;
      add_weighted(sum_.data(), row, weight, kChannels * w_);
      begin = until;
      if (until == stop) emit();
    }
    ++y_;
  }

 private:
  void emit() {
    uint8_t* out = out_ + target_ * pitch_;
    for (int x = 0; x < to_w_; ++x) {
      uint32_t total[kChannels];
      for (uint32_t& value : total) value = 1 << 22;
      const uint32_t* sum = sum_.data() + kChannels * size_t(start_[x]);
      for (int i = first_[x]; i < first_[x + 1]; ++i, sum += kChannels)
        for (int c = 0; c < kChannels; ++c) total[c] += weight_[i] * sum[c];
      for (int c = 0; c < kChannels; ++c) out[kChannels * x + c] = total[c] >> 23;
    }
    std::fill(sum_.begin(), sum_.end(), 0);
    covered_ = 0;
    given_ = 0;
    ++target_;
  }

  int w_, h_, to_w_, to_h_;
  Ratio down_;
  uint8_t* out_;
  ptrdiff_t pitch_;
  std::vector<uint32_t> sum_;
  std::vector<int> first_, start_;
  std::vector<uint32_t> weight_;
  int64_t y_ = 0, target_ = 0, covered_ = 0;
  int given_ = 0;
};
