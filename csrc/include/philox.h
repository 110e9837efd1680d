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

// The token's word of key `seed`: one block, of counter (token / 4, position, 0, 0), serves four neighbouring
// tokens.
ENSEMW2S_HOST_DEVICE inline uint32_t philox(uint64_t seed, uint32_t position, uint32_t token) {
  uint32_t c0 = token >> 2, c1 = position, c2 = 0, c3 = 0;
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
  return token & 2 ? (token & 1 ? c3 : c2) : (token & 1 ? c1 : c0);
}

// Gumbel noise -log(-log(1 - u)) with u = (word + 1/2) / 2^32: the large values have the finest grid.
ENSEMW2S_HOST_DEVICE inline double gumbel(uint32_t word) { return -log(-log1p(-(word + 0.5) * 0x1p-32)); }

// No word gives more noise than this.
constexpr double kLargestGumbel = 22.9;

}  // namespace ensemw2s
