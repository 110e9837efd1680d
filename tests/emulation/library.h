// The emulated kernels with C linkage: for ctypes and run_cases.cpp.
// `order` is the seed of the order in which the threads of a block take turns.
#pragma once

#include <cstdint>

extern "C" const char* emulated_log_probs(uint64_t order, const void* const* logits,
                                          const int64_t* row_strides, int num_experts, int64_t rows,
                                          int vocabulary, const float* weights, int64_t weight_stride,
                                          int combine, int dtype, float* log_probs);

// Of the four settings, temperature, top_k, top_p and min_p: a number for all rows where `rows` has null,
// else one for each row, in 64 bits where `wide` says so.
struct EmulatedSettings {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  const void* rows[4];
  bool wide[4];
  const int64_t *seeds, *positions;
  // A mask and adjustments, as in Offer; null where there are none.
  const uint32_t* mask;
  const int32_t* tokens;
  const float* values;
  const uint32_t* listed;
  int64_t count;
};

extern "C" const char* emulated_sample(uint64_t order, const void* const* logits, const int64_t* row_strides,
                                       int num_experts, int64_t rows, int vocabulary, const float* weights,
                                       int64_t weight_stride, int combine, int dtype,
                                       const EmulatedSettings* settings, int64_t top_count, int64_t* tokens,
                                       float* log_probs, float* expert_log_probs, bool* valid,
                                       int64_t* top_tokens, float* top_log_probs);
