// What csrc/cuda/device.h promises, without a GPU: blocks run one after the other, the threads of a block as
// fibers that switch at barriers, shuffles and votes. Which of the threads that can go on goes first is drawn
// at random from a seed, so that a missing barrier gives wrong numbers under some seed. Shared memory is a
// heap block of its own for every variable and starts as garbage; built with AddressSanitizer, every access
// outside of it is reported.
#pragma once

#include <cfloat>
#include <cmath>
#include <functional>

#define ENSEMW2S_DEVICE inline
#define ENSEMW2S_DEVICE_CALL inline
#define ENSEMW2S_KERNEL(threads, blocks) inline void
#define ENSEMW2S_SHARED(type, name) \
  static const char name##_key = 0; \
  type& name = *static_cast<type*>(emulation::shared_memory(&name##_key, sizeof(type)))

namespace ensemw2s::cuda {

namespace emulation {
int thread();
int64_t block();  // of all blocks, x first
const Grid& grid();
void wait_for_block();
// Waits until all lanes of the warp have given theirs; what lane l gave lies at l * kLargestExchange.
constexpr size_t kLargestExchange = 32;
const char* exchange(const void* mine, size_t bytes);
void* shared_memory(const void* key, size_t bytes);
void run(const Grid& grid, int threads, const std::function<void()>& body);
void set_seed(uint64_t seed);
}  // namespace emulation

using Stream = void*;

inline int thread_index() { return emulation::thread(); }
inline int64_t block_index() { return emulation::block() % emulation::grid().x; }
inline int block_index_y() { return int(emulation::block() / emulation::grid().x % emulation::grid().y); }
inline int block_index_z() { return int(emulation::block() / emulation::grid().x / emulation::grid().y); }
inline void barrier() { emulation::wait_for_block(); }

template <class V>
V shuffle_xor(const V& value, int mask) {
  static_assert(sizeof(V) % 4 == 0 && sizeof(V) <= emulation::kLargestExchange, "made of 32-bit words");
  const char* given = emulation::exchange(&value, sizeof(V));
  V other;
  std::memcpy(&other, given + (emulation::thread() % kWarp ^ mask) * emulation::kLargestExchange, sizeof(V));
  return other;
}

inline uint32_t ballot(bool mine) {
  const char* given = emulation::exchange(&mine, 1);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    votes |= uint32_t(given[lane * emulation::kLargestExchange]) << lane;
  return votes;
}

inline int lowest_bit(uint32_t bits) { return __builtin_ffs(int(bits)) - 1; }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int atomic_add(int* counter, int amount) {
  const int before = *counter;
  *counter += amount;
  return before;
}
inline void atomic_add(uint64_t* counter, uint64_t amount) { *counter += amount; }
inline float fast_exp2(float x) {
  const float power = std::exp2(x);
  return power < FLT_MIN ? 0 : power;
}
inline void allow_early_kernels() {}
inline void wait_for_earlier_kernels() {}

struct alignas(16) Words4 {
  uint32_t words[4];
};
inline Words4 load_16_bytes(const void* aligned) { return *static_cast<const Words4*>(aligned); }
inline void store_16_bytes(void* aligned, const Words4& value) { *static_cast<Words4*>(aligned) = value; }

template <class Kernel, class... Arguments>
const char* launch(Kernel* kernel, const Grid& grid, int threads, Start, Stream,
                   const Arguments&... arguments) {
  emulation::run(grid, threads, [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace ensemw2s::cuda
