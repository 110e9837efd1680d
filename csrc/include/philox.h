// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and Gumbel noise from
// it.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace ensemw2s {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

// One block of key `seed` and counter (counter, position, 0, 0).
ENSEMW2S_HOST_DEVICE inline PhiloxWords philox_words(uint64_t seed, uint32_t position, uint32_t counter) {
  uint32_t c0 = counter, c1 = position, c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxMultiplier0) * c0, p1 = uint64_t(kPhiloxMultiplier1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  return {{c0, c1, c2, c3}};
}

// A token's word: one block serves four neighbouring tokens.
ENSEMW2S_HOST_DEVICE inline uint32_t philox(uint64_t seed, uint32_t position, uint32_t token) {
  const PhiloxWords block = philox_words(seed, position, token / 4);
  return token & 2 ? block.word[2 + (token & 1)] : block.word[token & 1];
}

// Gumbel noise -log(-log(1 - u)) with u = (word + 1/2) / 2^32: the large values have the finest grid.
ENSEMW2S_HOST_DEVICE inline double gumbel(uint32_t word) { return -log(-log1p(-(word + 0.5) * 0x1p-32)); }

// No word gives more noise than this.
constexpr double kLargestGumbel = 22.9;

}  // namespace ensemw2s
