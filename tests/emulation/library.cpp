#include "library.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "device.h"
#include "launch.h"
#include "settings.h"

namespace ensemw2s::cuda {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Every request is a heap block of its own, full of garbage.
class ScratchMemory {
 public:
  void* allocate(int64_t bytes) {
    blocks_.emplace_back(std::malloc(bytes));
    std::memset(blocks_.back().get(), 0xAB, bytes);
    return blocks_.back().get();
  }

 private:
  std::vector<std::unique_ptr<void, Free>> blocks_;
};

DeviceMixture mixture_of(const void* const* logits, const int64_t* row_strides, int num_experts, int64_t rows,
                         int vocabulary, const float* weights, int64_t weight_stride, int combine,
                         int dtype) {
  DeviceMixture mixture{};
  for (int t = 0; t < num_experts; ++t) {
    mixture.logits[t] = logits[t];
    mixture.row_stride[t] = row_strides[t];
  }
  mixture.num_experts = num_experts;
  mixture.rows = rows;
  mixture.vocabulary = vocabulary;
  mixture.weights = weights;
  mixture.weight_stride = weight_stride;
  mixture.combine = Combine(combine);
  mixture.dtype = Dtype(dtype);
  return mixture;
}

}  // namespace
}  // namespace ensemw2s::cuda

using namespace ensemw2s;
using namespace ensemw2s::cuda;

extern "C" const char* emulated_log_probs(uint64_t order, const void* const* logits,
                                          const int64_t* row_strides, int num_experts, int64_t rows,
                                          int vocabulary, const float* weights, int64_t weight_stride,
                                          int combine, int dtype, float* log_probs) {
  emulation::set_seed(order);
  ScratchMemory scratch;
  return mixture_log_probs(
      mixture_of(logits, row_strides, num_experts, rows, vocabulary, weights, weight_stride, combine, dtype),
      log_probs, [&](int64_t bytes) { return scratch.allocate(bytes); }, nullptr);
}

extern "C" const char* emulated_sample(uint64_t order, const void* const* logits, const int64_t* row_strides,
                                       int num_experts, int64_t rows, int vocabulary, const float* weights,
                                       int64_t weight_stride, int combine, int dtype,
                                       const EmulatedSettings* settings, int64_t top_count, int64_t* tokens,
                                       float* log_probs, float* expert_log_probs, bool* valid,
                                       int64_t* top_tokens, float* top_log_probs) {
  emulation::set_seed(order);
  ScratchMemory scratch;
  DeviceMixture mixture =
      mixture_of(logits, row_strides, num_experts, rows, vocabulary, weights, weight_stride, combine, dtype);
  mixture.offer = offer_of(*settings, vocabulary);
  return mixture_sample(
      mixture, settings_of(*settings),
      {tokens, log_probs, expert_log_probs, valid, top_tokens, top_log_probs, top_count},
      [&](int64_t bytes) { return scratch.allocate(bytes); }, nullptr);
}
