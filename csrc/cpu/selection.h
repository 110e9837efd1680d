// Selection of a cut-off by weight, without sorting: the largest key such that the keys from it upwards weigh at least
// a target. A most-significant-digit-first histogram over the keys' bits, refined inside one bin at a time.
#pragma once

#include <cstdint>
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
  void start(const float* keys, const float* weights, int64_t count) {
    ordered_.resize(count);
    weight_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      ordered_[i] = ascending_bits(keys[i]);
      weight_[i] = weights ? weights[i] : 1.0f;
    }
  }

  // Uses up what start() was given.
  Found find(double target) {
    double above = 0;
    uint32_t prefix = 0;
    bool all = false;
    for (int shift : {21, 10, 0}) {
      const int width = shift == 0 ? 10 : 11;
      const uint32_t digit = find_digit(shift, width, target, above, all);
      prefix |= digit << shift;
      keep_digit(shift, width, digit);
    }
    return {from_ascending_bits(prefix), above, all};
  }

 private:
  static uint32_t ascending_bits(float key) {
    const uint32_t bits = bits_from_float(key == 0 ? 0.0f : key);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static float from_ascending_bits(uint32_t bits) {
    return float_from_bits(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
  }

  uint32_t find_digit(int shift, int width, double target, double& above, bool& all) {
    // Neighbours often share a bin: two histograms halve the wait for the last addition to it.
    const uint32_t bins = 1u << width, mask = bins - 1;
    histogram_.assign(2 * bins, 0.0);
    for (size_t i = 0; i < ordered_.size(); ++i)
      histogram_[(ordered_[i] >> shift & mask) + (i & 1) * bins] += weight_[i];
    for (uint32_t digit = 0; digit < bins; ++digit) histogram_[digit] += histogram_[digit + bins];
    uint32_t lowest = 0;
    double weight_before_lowest = above;
    for (uint32_t digit = bins; digit-- > 0;) {
      if (histogram_[digit] == 0) continue;
      lowest = digit;
      weight_before_lowest = above;
      if (above + histogram_[digit] >= target) return digit;
      above += histogram_[digit];
    }
    all = all || shift == 21;
    above = weight_before_lowest;
    return lowest;
  }

  void keep_digit(int shift, int width, uint32_t digit) {
    const uint32_t mask = (1u << width) - 1;
    size_t n = 0;
    for (size_t i = 0; i < ordered_.size(); ++i) {
      if ((ordered_[i] >> shift & mask) != digit) continue;
      ordered_[n] = ordered_[i];
      weight_[n] = weight_[i];
      ++n;
    }
    ordered_.resize(n);
    weight_.resize(n);
  }

  std::vector<uint32_t> ordered_;
  std::vector<float> weight_;
  std::vector<double> histogram_;
};

}  // namespace ensemw2s
