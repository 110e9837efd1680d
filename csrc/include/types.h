// Element types and small vocabulary shared by all kernels. No torch header is included here or in any
// kernel.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace ensemw2s {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class Dtype { kFloat, kBFloat16, kHalf };

// The order of ensemw2s.ops.checks.COMBINES.
enum class Combine : int64_t { kProb, kLogProb, kVote };

ENSEMW2S_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ENSEMW2S_HOST_DEVICE inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ENSEMW2S_HOST_DEVICE inline float to_float(float value) { return value; }

ENSEMW2S_HOST_DEVICE inline float to_float(BFloat16 value) {
  return float_from_bits(uint32_t(value.bits) << 16);
}

ENSEMW2S_HOST_DEVICE inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(value.bits));
  return converted;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) {  // zero and subnormals: exact in float
    const float tiny = float(magnitude) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

// The rows of a tensor [..., V] whose last stride is 1 and whose leading strides are free.
struct Rows {
  static constexpr int kMaxDims = 24;
  const void* data = nullptr;
  int dims = 0;  // leading dimensions only
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  template <class T>
  const T* row(int64_t index) const {
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      offset += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    return static_cast<const T*>(data) + offset;
  }
};

}  // namespace ensemw2s
