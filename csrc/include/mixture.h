// What the mixture kernels take and give, on raw pointers.
#pragma once

#include <cfloat>
#include <cmath>

#include "types.h"

namespace ensemw2s {

// What an adjusted token's log-probability becomes (ensemw2s/ops/token_adjustments.py says it in words).
struct Adjustment {
  float bias, repetition, penalty;

  template <class V>
  ENSEMW2S_HOST_DEVICE V of(V log_prob) const {
    const V shifted = log_prob + bias;
    const V changed = (shifted < 0 ? shifted * repetition : shifted / repetition) - penalty;
    return changed < V(FLT_MAX) ? changed : V(FLT_MAX);
  }
  // False for NaN, too.
  ENSEMW2S_HOST_DEVICE bool is_usable() const {
    return bias <= FLT_MAX && repetition > 0 && repetition <= FLT_MAX && penalty >= -FLT_MAX;
  }
};

// Which tokens of a row may be drawn, and which of them at another log-probability than the mixture's.
struct Offer {
  const uint32_t* mask = nullptr;  // [rows, words], a bit for each token that may be drawn; null: all may
  const int32_t* tokens =
      nullptr;                    // [rows, count], adjusted tokens, ascending, -1 behind the last; null: none
  const float* values = nullptr;  // [3, rows, count], the members of their Adjustments
  const uint32_t* listed = nullptr;  // [rows, words], a bit for each of them
  int64_t count = 0, words = 0;

  ENSEMW2S_HOST_DEVICE bool is_everything() const { return !mask && !tokens; }
  // The bits of 32 tokens that may be drawn as they are.
  ENSEMW2S_HOST_DEVICE uint32_t plain_word(int64_t row, int64_t word) const {
    return (mask ? mask[row * words + word] : ~0u) & (listed ? ~listed[row * words + word] : ~0u);
  }
  ENSEMW2S_HOST_DEVICE bool is_allowed(int64_t row, int64_t token) const {
    return !mask || (mask[row * words + token / 32] >> (token % 32) & 1);
  }
  ENSEMW2S_HOST_DEVICE int32_t token(int64_t row, int64_t i) const { return tokens[row * count + i]; }
  ENSEMW2S_HOST_DEVICE Adjustment adjustment(int64_t rows, int64_t row, int64_t i) const {
    const float* first = values + row * count + i;
    return {first[0], first[rows * count], first[2 * rows * count]};
  }
};

// T experts' logits [rows, vocabulary] and their weights, which sum to 1 (or to 0, in a row that has none).
struct Mixture {
  const Rows* experts;
  int64_t num_experts;
  int64_t rows;
  int64_t vocabulary;
  const double* weights;  // [T], or [rows, T]
  int64_t weight_stride;  // from row to row; 0 if all rows share them
  Combine combine;
  Dtype dtype;
  Offer offer;

  const double* weights_of(int64_t row) const { return weights + row * weight_stride; }
};

// A temperature below this is 0: float has no room for what log-probabilities become when they are divided by
// it.
constexpr double kColdest = 1e-30;

// One setting: a number for all rows, or one for each in a Narrow or a Wide.
template <class Narrow, class Wide>
struct Setting {
  Wide number;
  const void* rows = nullptr;  // [rows]; null if the number holds for all
  bool is_wide = false;

  ENSEMW2S_HOST_DEVICE Wide of(int64_t row) const {
    if (!rows) return number;
    return is_wide ? static_cast<const Wide*>(rows)[row] : Wide(static_cast<const Narrow*>(rows)[row]);
  }
};

// What one row is asked for.
struct RowSettings {
  double temperature;  // 0 is greedy
  int64_t top_k;       // 0 is off
  double top_p;        // 1 is off
  double min_p;        // 0 is off
  uint64_t seed;
  uint32_t position;

  ENSEMW2S_HOST_DEVICE bool is_greedy() const { return temperature == 0; }
  // Whether top-k or top-p has to look for an edge; min-p needs the likeliest token alone.
  ENSEMW2S_HOST_DEVICE bool is_filtered() const { return top_k > 0 || top_p < 1; }
  // False for NaN, too.
  ENSEMW2S_HOST_DEVICE bool are_usable() const {
    return temperature >= 0 && temperature <= 1.7976931348623157e308 && top_k >= 0 && top_p > 0 &&
           top_p <= 1 && min_p >= 0 && min_p <= 1;
  }
};

struct SampleSettings {
  Setting<float, double> temperature;
  Setting<int32_t, int64_t> top_k;
  Setting<float, double> top_p;
  Setting<float, double> min_p;
  const int64_t* seeds;      // [rows]
  const int64_t* positions;  // [rows]

  ENSEMW2S_HOST_DEVICE bool same_for_all() const {
    return !temperature.rows && !top_k.rows && !top_p.rows && !min_p.rows;
  }
  // The settings alone; a top-k that leaves every token is off.
  ENSEMW2S_HOST_DEVICE RowSettings settings_of(int64_t row, int64_t vocabulary) const {
    RowSettings found{temperature.of(row), top_k.of(row), top_p.of(row), min_p.of(row), 0, 0};
    if (found.temperature >= 0 && found.temperature < kColdest) found.temperature = 0;
    if (found.top_k >= vocabulary) found.top_k = 0;
    return found;
  }
  // With the row's seed and position.
  ENSEMW2S_HOST_DEVICE RowSettings of(int64_t row, int64_t vocabulary) const {
    RowSettings found = settings_of(row, vocabulary);
    found.seed = uint64_t(seeds[row]);
    found.position = uint32_t(positions[row]);
    return found;
  }
};

struct SampleOutputs {
  int64_t* tokens;          // [rows]
  float* log_probs;         // [rows]
  float* expert_log_probs;  // [T, rows]
  bool* valid;              // [rows]
  int64_t* top_tokens;      // [rows, top_count], the likeliest first; -1 where fewer are possible
  float* top_log_probs;     // [rows, top_count]
  int64_t top_count;
};

// The order of the likeliest tokens.
template <class V>
ENSEMW2S_HOST_DEVICE bool is_likelier(V log_prob, int64_t token, V other_log_prob, int64_t other_token) {
  return log_prob > other_log_prob || (log_prob == other_log_prob && token < other_token);
}

void mixture_sample(const Mixture& mixture, const SampleSettings& settings, const SampleOutputs& outputs);

// log_probs: [rows, vocabulary], contiguous.
void mixture_log_probs(const Mixture& mixture, float* log_probs);

}  // namespace ensemw2s
