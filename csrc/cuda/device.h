// All that the kernels know of the machine. nvcc compiles these to CUDA's own; with ENSEMW2S_EMULATE an
// ordinary compiler takes tests/emulation/emulation.h instead, where the threads of a block are fibers.
//
// Every thread of a block reaches every barrier, and every lane of a warp every shuffle and vote. No kernel
// waits for another block.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

namespace ensemw2s::cuda {

constexpr int kWarp = 32;

// The blocks of a launch.
struct Grid {
  int64_t x;
  int y = 1, z = 1;
};

// Whether a kernel may start while the one launched before it still runs. It then calls
// wait_for_earlier_kernels() before it touches what that one writes.
enum class Start { kInOrder, kEarly };

}  // namespace ensemw2s::cuda

#if defined(ENSEMW2S_EMULATE)
#  include "emulation.h"
#else

#  include <cuda_runtime.h>

#  define ENSEMW2S_DEVICE __device__ __forceinline__
// What is large and called from many places. What it is given lies in shared memory, so that no thread needs
// a copy of its own.
#  define ENSEMW2S_DEVICE_CALL __device__ __noinline__
// A kernel whose blocks have so many threads, and of which a multiprocessor shall hold so many blocks at
// least.
#  define ENSEMW2S_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A variable of this block, without a value at first.
#  define ENSEMW2S_SHARED(type, name) __shared__ type name

namespace ensemw2s::cuda {

using Stream = cudaStream_t;

ENSEMW2S_DEVICE int thread_index() { return int(threadIdx.x); }
ENSEMW2S_DEVICE int64_t block_index() { return blockIdx.x; }
ENSEMW2S_DEVICE int block_index_y() { return int(blockIdx.y); }
ENSEMW2S_DEVICE int block_index_z() { return int(blockIdx.z); }

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
ENSEMW2S_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
ENSEMW2S_DEVICE int atomic_add(int* counter, int amount) { return atomicAdd(counter, amount); }
ENSEMW2S_DEVICE void atomic_add(uint64_t* counter, uint64_t amount) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(amount));
}

// 2^x to about 2 units in the last place; 0 where that is below the smallest normal float.
ENSEMW2S_DEVICE float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Cards before compute capability 9.0 have neither and start every kernel in order.
ENSEMW2S_DEVICE void allow_early_kernels() {
#  if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#  endif
}
ENSEMW2S_DEVICE void wait_for_earlier_kernels() {
#  if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#  endif
}

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

// Whether the code that runs on the current device was compiled for one that knows early starts.
template <class Kernel>
bool can_start_early(Kernel* kernel) {
  static std::array<std::atomic<int>, 64> known{};  // for each device; 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= int(known.size())) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
    known[device] = attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return known[device] == 1;
}

// Returns what went wrong, or null.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, int threads, Start start, Stream stream,
                   const Arguments&... arguments) {
  if (grid.x > 0x7fffffff) return "the logits are too large for one launch";
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = start == Start::kEarly && can_start_early(kernel) ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ensemw2s::cuda

#endif

namespace ensemw2s::cuda {

ENSEMW2S_DEVICE int lane_index() { return thread_index() % kWarp; }
ENSEMW2S_DEVICE int warp_index() { return thread_index() / kWarp; }

// merge(a, b) over the lanes of a warp, or of so many neighbours in it, in a fixed order. merge(b, a) gives
// the same bits, and so every lane gets the same.
template <int kLanes = kWarp, class V, class Merge>
ENSEMW2S_DEVICE V reduce_warp(V value, const Merge& merge) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = merge(value, shuffle_xor(value, mask));
  return value;
}

// The same over all threads of a block of kThreads.
template <int kThreads, class V, class Merge>
ENSEMW2S_DEVICE V reduce_block(V value, const Merge& merge) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert((kWarps & (kWarps - 1)) == 0 && kWarps <= kWarp, "a power of two");
  struct Slots {
    V of_warp[kWarps];
  };
  ENSEMW2S_SHARED(Slots, slots);
  value = reduce_warp(value, merge);
  if (lane_index() == 0) slots.of_warp[warp_index()] = value;
  barrier();
  value = slots.of_warp[lane_index() % kWarps];
  barrier();  // the slots may be written again
  return reduce_warp<kWarps>(value, merge);
}

}  // namespace ensemw2s::cuda
