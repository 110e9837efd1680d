// What the mixture kernels take and give, on raw pointers.
#pragma once

#include "types.h"

namespace ensemw2s {

// T experts' logits [rows, vocabulary] and their weights, which sum to 1.
struct Mixture {
  const Rows* experts;
  int64_t num_experts;
  int64_t rows;
  int64_t vocabulary;
  const double* weights;
  Combine combine;
  Dtype dtype;
};

// A temperature below this is 0: float has no room for what log-probabilities become when they are divided by
// it.
constexpr double kColdest = 1e-30;

struct SampleSettings {
  double temperature;
  int64_t top_k;
  double top_p;
  double min_p;
  const int64_t* seeds;      // [rows]
  const int64_t* positions;  // [rows]
};

struct SampleOutputs {
  int64_t* tokens;          // [rows]
  float* log_probs;         // [rows]
  float* expert_log_probs;  // [T, rows]
  bool* valid;              // [rows]
};

void mixture_sample(const Mixture& mixture, const SampleSettings& settings, const SampleOutputs& outputs);

// log_probs: [rows, vocabulary], contiguous.
void mixture_log_probs(const Mixture& mixture, float* log_probs);

}  // namespace ensemw2s
