// All that the kernels know of the machine. nvcc compiles these to CUDA's own; with ENSEMW2S_EMULATE an
// ordinary compiler takes tests/emulation/emulation.h instead, where the threads of a block are fibers.
//
// Every thread of a block reaches every barrier, and every lane of a warp every shuffle and vote. No kernel
// waits for another block.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

namespace ensemw2s::cuda {
constexpr int kWarp = 32;
}

#if defined(ENSEMW2S_EMULATE)
#  include "emulation.h"
#else

#  include <cuda_runtime.h>

#  define ENSEMW2S_DEVICE __device__ __forceinline__
// A kernel whose blocks have so many threads, and of which a multiprocessor shall hold so many blocks at
// least.
#  define ENSEMW2S_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A variable of this block, without a value at first.
#  define ENSEMW2S_SHARED(type, name) __shared__ type name

namespace ensemw2s::cuda {

using Stream = cudaStream_t;

ENSEMW2S_DEVICE int thread_index() { return int(threadIdx.x); }
ENSEMW2S_DEVICE int64_t block_index() { return blockIdx.x; }

ENSEMW2S_DEVICE void barrier() { __syncthreads(); }

// The value of lane `own lane ^ mask`, of any type made of whole words.
template <class V>
ENSEMW2S_DEVICE V shuffle_xor(const V& value, int mask) {
  static_assert(sizeof(V) % 4 == 0 && std::is_trivially_copyable<V>::value, "made of 32-bit words");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  for (uint32_t& word : words) word = __shfl_xor_sync(~0u, word, mask);
  V other;
  memcpy(&other, words, sizeof(V));
  return other;
}

ENSEMW2S_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(~0u, vote); }
ENSEMW2S_DEVICE int lowest_bit(uint32_t bits) { return __ffs(int(bits)) - 1; }
ENSEMW2S_DEVICE int atomic_add(int* counter, int amount) { return atomicAdd(counter, amount); }

// exp to about 2 units in the last place near 0, where it matters to a sum of exp(z - max).
ENSEMW2S_DEVICE float fast_exp(float x) { return __expf(x); }

struct alignas(16) Words4 {
  uint32_t words[4];
};
ENSEMW2S_DEVICE Words4 load_16_bytes(const void* aligned) {
  const uint4 loaded = __ldg(static_cast<const uint4*>(aligned));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}
ENSEMW2S_DEVICE void store_16_bytes(void* aligned, const Words4& value) {
  *static_cast<uint4*>(aligned) = make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
}

// Returns what went wrong, or null.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
                   const Arguments&... arguments) {
  if (blocks > 0x7fffffff) return "the logits are too large for one launch";
  // clang-format off
  kernel<<<unsigned(blocks), unsigned(threads), 0, stream>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ensemw2s::cuda

#endif

namespace ensemw2s::cuda {

ENSEMW2S_DEVICE int lane_index() { return thread_index() % kWarp; }
ENSEMW2S_DEVICE int warp_index() { return thread_index() / kWarp; }

// merge(a, b) over the lanes of a warp in a fixed order; every lane gets the result if merge is symmetric in
// its bits, else lane 0 has the one to use.
template <class V, class Merge>
ENSEMW2S_DEVICE V reduce_warp(V value, const Merge& merge) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = merge(value, shuffle_xor(value, mask));
  return value;
}

// The same over all threads of a block of kThreads; every thread gets the same bits.
template <int kThreads, class V, class Merge>
ENSEMW2S_DEVICE V reduce_block(V value, const Merge& merge) {
  constexpr int kWarps = kThreads / kWarp;
  struct Slots {
    V of_warp[kWarps];
  };
  ENSEMW2S_SHARED(Slots, slots);
  value = reduce_warp(value, merge);
  if (lane_index() == 0) slots.of_warp[warp_index()] = value;
  barrier();
  V total = slots.of_warp[0];
  for (int w = 1; w < kWarps; ++w) total = merge(total, slots.of_warp[w]);
  barrier();  // the slots may be written again
  return total;
}

}  // namespace ensemw2s::cuda
