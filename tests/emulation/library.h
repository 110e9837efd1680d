// The emulated kernels with C linkage: for ctypes and run_cases.cpp.
// `order` is the seed of the order in which the threads of a block take turns.
#pragma once

#include <cstdint>

extern "C" const char* emulated_log_probs(uint64_t order, const void* const* logits,
                                          const int64_t* row_strides, int num_experts, int64_t rows,
                                          int vocabulary, const float* weights, int combine, int dtype,
                                          float* log_probs);

extern "C" const char* emulated_sample(uint64_t order, const void* const* logits, const int64_t* row_strides,
                                       int num_experts, int64_t rows, int vocabulary, const float* weights,
                                       int combine, int dtype, double temperature, int64_t top_k,
                                       double top_p, double min_p, const int64_t* seeds,
                                       const int64_t* positions, int64_t* tokens, float* log_probs,
                                       float* expert_log_probs, bool* valid);
