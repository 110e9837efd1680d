// The CUDA kernels as functions of the host, on raw pointers into the device's memory. Nothing here waits for
// the device.
#pragma once

#include <functional>

#include "mixture.h"

namespace ensemw2s::cuda {

constexpr int kMaxExperts = 64;
constexpr int64_t kMaxVocabulary = 1 << 21;  // so many masses of at most 2^42 units fit into 64 bits

// T experts' logits [rows, vocabulary]; travels to the kernels by value.
struct DeviceMixture {
  const void* logits[kMaxExperts];
  int64_t row_stride[kMaxExperts];  // in elements
  int num_experts;
  int64_t rows;
  int vocabulary;
  const float* weights;   // [T] or [rows, T], as the user gave them
  int64_t weight_stride;  // from row to row; 0 if all rows share them
  Combine combine;
  Dtype dtype;
  Offer offer;
};

// Gives scratch memory of so many bytes, aligned to 16, that stays until the launched kernels are done.
using Allocate = std::function<void*(int64_t)>;

// Both return what went wrong, or null. `stream` is a cudaStream_t.
const char* mixture_log_probs(const DeviceMixture& mixture, float* log_probs, const Allocate& allocate,
                              void* stream);
const char* mixture_sample(const DeviceMixture& mixture, const SampleSettings& settings,
                           const SampleOutputs& outputs, const Allocate& allocate, void* stream);

}  // namespace ensemw2s::cuda
