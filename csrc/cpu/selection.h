// Selection of a cut-off by weight, without sorting: the largest key such that the keys from it upwards weigh
// at least a target. A most-significant-digit-first histogram over the keys' bits, refined inside one bin at
// a time.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "types.h"

namespace ensemw2s {

class Selection {
 public:
  struct Found {
    float key;
    double above;  // weight of the keys greater than `key`
    bool all;      // the target exceeds the weight of all keys together
  };

  // Keys may be anything but NaN; a key of weight 0 is never found. Weights of nullptr count each key once.
  Found find(const float* keys, const float* weights, int64_t count, double target) {
    double above = 0;
    bool all = false;
    const auto key = [&](int64_t i) { return ascending_bits(keys[i]); };
    const auto weight = [&](int64_t i) { return weights ? weights[i] : 1.0f; };
    uint32_t prefix = find_digit(21, 11, count, key, weight, target, above, all) << 21;
    keep_digit(21, 11, prefix >> 21, count, key, weight);
    for (const auto& [shift, width] : {std::pair{10, 11}, std::pair{0, 10}}) {
      const int64_t left = int64_t(ordered_.size());
      const auto kept_key = [&](int64_t i) { return ordered_[i]; };
      const auto kept_weight = [&](int64_t i) { return weight_[i]; };
      const uint32_t digit = find_digit(shift, width, left, kept_key, kept_weight, target, above, all);
      prefix |= digit << shift;
      keep_digit(shift, width, digit, left, kept_key, kept_weight);
    }
    return {from_ascending_bits(prefix), above, all};
  }

 private:
  static uint32_t ascending_bits(float key) {
    const uint32_t bits = bits_from_float(key == 0 ? 0.0f : key);
    return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  }
  static float from_ascending_bits(uint32_t bits) {
    return float_from_bits(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
  }

  template <class Key, class Weight>
  uint32_t find_digit(int shift, int width, int64_t count, const Key& key, const Weight& weight,
                      double target, double& above, bool& all) {
    // Neighbours often share a bin: several histograms shorten the wait for the last addition to it.
    const uint32_t bins = 1u << width, mask = bins - 1;
    histogram_.assign(kCopies * bins, 0.0);
    for (int64_t i = 0; i < count; ++i)
      histogram_[(key(i) >> shift & mask) * kCopies + i % kCopies] += weight(i);
    uint32_t lowest = 0;
    double weight_before_lowest = above;
    for (uint32_t digit = bins; digit-- > 0;) {
      double in_bin = 0;
      for (int copy = 0; copy < kCopies; ++copy) in_bin += histogram_[digit * kCopies + copy];
      if (in_bin == 0) continue;
      lowest = digit;
      weight_before_lowest = above;
      if (above + in_bin >= target) return digit;
      above += in_bin;
    }
    all = all || shift == 21;
    above = weight_before_lowest;
    return lowest;
  }

  // May read from ordered_ and weight_ what it writes there: it never writes ahead of where it reads.
  template <class Key, class Weight>
  void keep_digit(int shift, int width, uint32_t digit, int64_t count, const Key& key, const Weight& weight) {
    const uint32_t mask = (1u << width) - 1;
    if (int64_t(ordered_.size()) < count) {
      ordered_.resize(count);
      weight_.resize(count);
    }
    size_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = key(i);
      const float w = weight(i);
      ordered_[n] = bits;
      weight_[n] = w;
      n += (bits >> shift & mask) == digit;
    }
    ordered_.resize(n);
    weight_.resize(n);
  }

  static constexpr int kCopies = 4;
  std::vector<uint32_t> ordered_;
  std::vector<float> weight_;
  std::vector<double> histogram_;
};

}  // namespace ensemw2s
