// The CPU kernels behind the functions of tests/emulation/library.h, without torch and on one thread: for
// processors that are not there, where a program can be emulated and Python is slow.

#include <vector>

#include "library.h"
#include "mixture.h"
#include "parallel.h"
#include "settings.h"

namespace ensemw2s {

int64_t num_threads() { return 1; }

void parallel_ranges(int64_t end, void (*body)(int64_t, int64_t, void*), void* context) {
  if (end > 0) body(0, end, context);
}

namespace {

// Experts and normalised weights, and the mixture that points to them.
struct Given {
  Given(const void* const* logits, const int64_t* row_strides, int num_experts, int64_t rows, int vocabulary,
        const float* weights, int64_t weight_stride, int combine, int dtype)
      : experts(num_experts), shares(rows * num_experts) {
    for (int t = 0; t < num_experts; ++t) {
      experts[t].data = logits[t];
      experts[t].dims = 1;
      experts[t].sizes[0] = rows;
      experts[t].strides[0] = row_strides[t];
    }
    for (int64_t row = 0; row < rows; ++row) {
      double total = 0;
      for (int t = 0; t < num_experts; ++t) total += weights[row * weight_stride + t];
      for (int t = 0; t < num_experts; ++t)
        shares[row * num_experts + t] = weights[row * weight_stride + t] / total;
    }
    mixture = {experts.data(), num_experts,      rows,         vocabulary, shares.data(),
               num_experts,    Combine(combine), Dtype(dtype), {}};
  }

  std::vector<Rows> experts;
  std::vector<double> shares;
  Mixture mixture;
};

}  // namespace
}  // namespace ensemw2s

using namespace ensemw2s;

extern "C" const char* emulated_log_probs(uint64_t, const void* const* logits, const int64_t* row_strides,
                                          int num_experts, int64_t rows, int vocabulary, const float* weights,
                                          int64_t weight_stride, int combine, int dtype, float* log_probs) {
  const Given given(logits, row_strides, num_experts, rows, vocabulary, weights, weight_stride, combine,
                    dtype);
  mixture_log_probs(given.mixture, log_probs);
  return nullptr;
}

extern "C" const char* emulated_sample(uint64_t, const void* const* logits, const int64_t* row_strides,
                                       int num_experts, int64_t rows, int vocabulary, const float* weights,
                                       int64_t weight_stride, int combine, int dtype,
                                       const EmulatedSettings* settings, int64_t top_count, int64_t* tokens,
                                       float* log_probs, float* expert_log_probs, bool* valid,
                                       int64_t* top_tokens, float* top_log_probs) {
  Given given(logits, row_strides, num_experts, rows, vocabulary, weights, weight_stride, combine, dtype);
  given.mixture.offer = offer_of(*settings, vocabulary);
  mixture_sample(given.mixture, settings_of(*settings),
                 {tokens, log_probs, expert_log_probs, valid, top_tokens, top_log_probs, top_count});
  return nullptr;
}
